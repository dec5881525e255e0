"""How the options of a run come together: its preset, the run that it resumes, and the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

from formats.checkpoint import checkpoints_in, read_value
from runtime.cli import as_words
from runtime.files import parsing
from runtime.log import read_records
from training.prepare import ARCHITECTURE

Derive = Callable[[argparse.Namespace], dict[str, float]]


def parse_options(
    parser: argparse.ArgumentParser, argv: list[str] | None, presets: dict[str, dict], derive: Derive
) -> argparse.Namespace:
    """Parse a command line, whose options override those of the run that it resumes or of its preset.

    `derive` returns options that follow from others where they are not given. Raises ValueError for an
    unknown preset, and for one that is not that of the resumed run.
    """
    given = parser.parse_args(argv)
    before = read_run(parser, given.out_dir, presets, derive) if given.resume else {}
    preset = given.preset or before.get("preset") or "gpt2"
    if before.get("preset") not in (None, preset):
        raise ValueError(
            f"--preset is {preset}, but {given.out_dir} was started with {before['preset']}: leave it out to "
            "resume that run, or leave out --resume to start another one"
        )
    if preset not in presets:
        raise ValueError(f"unknown --preset {preset!r}: choose from {', '.join(presets)}")
    later = (*ARCHITECTURE, "warmup_steps")  # filled in below or by --init_from
    # What a resumed run has not recorded, or as None, must not come from its preset, which may have changed.
    defaults = before or {name: v for name, v in presets[preset].items() if name not in later}
    parser.set_defaults(**{**defaults, "preset": preset})
    args = parser.parse_args(argv)
    values = derive(args)
    if args.init_from is None:
        values |= {"block_size": 1024} | {k: v for k, v in presets[preset].items() if k in ARCHITECTURE}
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def read_run(parser: argparse.ArgumentParser, out_dir: str, presets: dict, derive: Derive) -> dict:
    """Return the options of the run in a folder, or an empty dict if it has none.

    Values that followed from others are None: they will follow again. Leaves out options that this version
    does not have.
    """
    if not (options := read_options(out_dir)):
        return {}
    with parsing(out_dir, "the folder of a run", "delete the broken lines of its log.jsonl"):
        args = parser.parse_args(as_words(parser, options))
        derived = derive(args) if args.preset in presets else {}
    return vars(args) | {name: None for name, value in derived.items() if options.get(name) == value}


def read_options(out_dir: str | Path) -> dict[str, object]:
    """Return the options with which the run in a folder was last started, or an empty dict.

    They are in its log or else, because a checkpoint may be copied alone, in its newest checkpoint.
    """
    folder = Path(out_dir)
    log = folder / "log.jsonl"
    records = read_records(log) if log.exists() else []
    found = [record["args"] for record in records if isinstance(record.get("args"), dict)]
    if found:
        return found[-1]
    for path in reversed(checkpoints_in(folder)) if folder.is_dir() else ():
        if isinstance(options := read_value(path, "args"), dict):
            return options
    return {}
