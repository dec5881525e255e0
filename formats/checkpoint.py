"""Files that hold a GPT-2, read: checkpoints of ours and of other GPT-2 repositories.

    checkpoint = load_checkpoint("log")                   # the newest complete checkpoint of a run, as a dict
    config, state, metadata = read_pretrained("gpt2")     # what `GPT.from_pretrained` builds a model from

No code from a file is ever executed.
"""

import contextlib
import errno
import math
import re
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from formats.hugging_face import HUB_NAMES, check_size, read_hugging_face, transpose
from model import GPTConfig
from runtime import hub
from runtime.cli import watching
from runtime.files import parsing
from runtime.machine import is_out_of_memory

HUB_FILES = ("model.safetensors", "config.json")  # in this order both are of one revision
# Prefixes that DDP, torch.compile and wrapper modules add to tensor names.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
NUMBERED = re.compile(r"model_(\d+)\.pt")  # the names of a run's checkpoints, besides BEST
BEST = "model_best.pt"
# Files that lie near a model, by their suffix.
OTHER_FILES = {
    ".png": "a picture",
    ".html": "a report",
    ".jsonl": "a log",
    ".json": "a description",
    ".npy": "a shard of tokens",
    ".txt": "a text",
    ".safetensors": "only the weights of a Hugging Face folder",
}
MUCH_WORSE = 0.02  # nats, more than evaluations of a run that goes well differ by
PLAIN = str | int | float | None  # bool is an int


def is_damage(error: Exception) -> bool:
    """Return whether an error says that a file was read and is not a complete checkpoint.

    Errors of the system, such as an unreadable disk or too little memory, say nothing about the file.
    """
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL  # a damaged file may point to a negative offset
    return not is_out_of_memory(error)


def is_plain(value: object) -> bool:
    """Return whether a value is that of an option: text, a number, None, or a list of these."""
    return all(isinstance(each, PLAIN) for each in (value if isinstance(value, list) else [value]))


def step_of(path: Path) -> float:
    """Return the step of model_00250.pt or model_best.pt; that of a damaged model_best.pt is infinite."""
    if number := NUMBERED.fullmatch(path.name):
        return int(number[1])
    step = read_value(path, "step")
    return step if isinstance(step, int) else math.inf  # it may be the newest, so loading reports it


def read_value(path: Path, key: str) -> object:
    """Return one value of a checkpoint without reading its tensors, or None if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_pickles(archive)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[key]
    except Exception as error:
        if not is_damage(error):
            raise system_error(path, error) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first. Files with other names are not the run's."""
    # Path.glob would hide that a folder cannot be read.
    paths = [path for path in folder.iterdir() if NUMBERED.fullmatch(path.name) or path.name == BEST]
    return sorted(filter(Path.is_file, paths), key=lambda path: (step_of(path), path.name != BEST))


def system_error(path: Path, error: Exception) -> Exception:
    """Return the one-line error for a file that the system could not read."""
    if is_out_of_memory(error):
        return MemoryError(f"too little memory to load {path}: nothing has been changed")
    return OSError(f"cannot read {path} ({error.strerror or error}): nothing has been changed, try again")


class _Inert:
    """Stands in for every class and function that a file names: accepts any arguments and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_checkpoint(source: str | Path) -> dict:
    """Load a checkpoint file, or the newest complete one of a run folder, onto the CPU.

    A file that was read and is damaged is skipped in a folder. A file that cannot be read ends the search,
    because it may be the newest one.

    Raises FileNotFoundError if there is none, and ValueError if the given file is damaged or not a
    checkpoint.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"no model at {source}: use a checkpoint file, a run folder, a Hugging Face folder, "
            f"or one of {', '.join(HUB_NAMES)}"
        )
    if source.is_dir():
        if (checkpoint := load_newest(checkpoints_in(source))) is None:
            raise FileNotFoundError(f"no complete checkpoint in {source}: train one with `python train.py`")
        return checkpoint
    mapped = False
    try:
        # Reading through Python's file keeps errors of the system apart: torch turns its own into
        # RuntimeError.
        with open(source, "rb") as file:
            with contextlib.suppress(zipfile.BadZipFile):  # formats of older versions of torch
                archive, mapped = zipfile.ZipFile(file), True
                entries = archive.infolist()
                size = sum(entry.file_size for entry in entries)
                if any(entry.compress_type for entry in entries) or size > source.stat().st_size:
                    raise ValueError("it claims to hold more than its size")
                if broken := archive.testzip():  # torch.load does not verify checksums
                    raise ValueError(f"{broken} fails its checksum")
                if any(entry.external_attr & 0x10 for entry in entries):  # and skips folders
                    raise ValueError("it has an entry that claims to be a folder")
                check_pickles(archive)
            file.seek(0)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
                # Ranks share the memory of a file that is mapped. The checks above have read all of it.
                what = source if mapped else file
                checkpoint = torch.load(what, map_location="cpu", weights_only=True, mmap=mapped)
            check_tensors(checkpoint)
    except Exception as error:
        if not is_damage(error):
            raise system_error(source, error) from error
        if what := OTHER_FILES.get(source.suffix):
            advice = "use a run folder, one of its .pt files or a Hugging Face folder"
            raise ValueError(f"{source} is {what}, not a checkpoint: {advice}") from error
        lines = str(error).splitlines() or ["unexpected end of file"]
        reason = next((line for line in lines if "Trying to" in line), lines[0].split(". ")[0])
        raise ValueError(f"{source} is damaged or not a checkpoint ({reason}): use an older one") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def check_pickles(archive: zipfile.ZipFile) -> None:
    """Raise ValueError if a pickle makes a bytearray: no checkpoint has one, and it can be of any size."""
    for entry in archive.infolist():
        if entry.filename.endswith(".pkl") and b"bytearray" in archive.read(entry):
            raise ValueError("it asks for memory that it does not fill")


def check_tensors(value: object) -> None:
    """Raise ValueError if the tensors in nested dicts and lists are larger than what was stored for them.

    A damaged or malicious file can repeat a few bytes to any size, which is allocated when they are copied.
    """
    todo, seen, stored, claimed = [value], set(), {}, 0
    while todo:
        value = todo.pop()
        if id(value) in seen:  # a list may hold itself
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or value.layout != torch.strided:
                raise ValueError("it holds a tensor without data")
            stored[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            claimed += value.numel() * value.element_size()
    if claimed > 2 * sum(stored.values()):  # embedding and head are the same, and are listed twice
        raise ValueError("its tensors are larger than what it stores")


def load_newest(paths: list[Path]) -> dict | None:
    """Load the last checkpoint that is complete, or return None if there is none."""
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"skipping a checkpoint: {error}", stacklevel=2)
    return None


@watching("reading the weights")
def read_pretrained(
    source: str | Path | dict, n_head: int | None = None
) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Return config, state dict and metadata of a checkpoint, run folder, Hugging Face folder or Hub name.

    A dict is a checkpoint that has been loaded; `n_head` is for those that do not say it. Raises
    FileNotFoundError if the source does not exist, and ValueError if it is not a GPT-2 with `n_head` heads.
    """
    config, state, metadata = _read(source, n_head)
    name = "the checkpoint" if isinstance(source, dict) else source
    if n_head not in (None, config["n_head"]):
        raise ValueError(f"--n_head is {n_head}, but {name} has {config['n_head']}: leave it out")
    if n_head and config["n_embd"] % n_head:
        raise ValueError(
            f"--n_head {n_head} does not divide the width {config['n_embd']} of {name}: change it"
        )
    return config, state, metadata


def _read(source: str | Path | dict, n_head: int | None) -> tuple[dict, dict[str, torch.Tensor], dict]:
    if isinstance(source, dict):
        return _read_gpt2_checkpoint("the checkpoint", source, n_head)
    if str(source) in HUB_NAMES and not Path(source).exists():
        files = " and ".join(HUB_FILES)
        advice = f"connect to the network once, or copy {files} into a folder and name that, not {source}"
        for name in HUB_FILES:
            path = hub.fetch(source, name, what=f"download {source}", advice=advice)
        return read_hugging_face(path.parent)
    if (Path(source) / "config.json").exists():
        return read_hugging_face(Path(source))
    return _read_gpt2_checkpoint(source, load_checkpoint(source), n_head)


def is_ours(checkpoint: dict) -> bool:
    """Return whether train.py wrote a checkpoint. In those of others, `config` is something else."""
    config = checkpoint.get("config")
    return isinstance(config, dict) and "best_step" in checkpoint and "vocab_size" in config


def own_config(saved: dict, found: dict) -> dict:
    """Return the fields of GPTConfig that a checkpoint of ours was trained with; `found` is in its tensors.

    A field that is newer than the checkpoint has its default, which is said. Raises ValueError for a field
    that this version does not know, and if the tensors have other sizes.
    """
    known = {each.name: each.default for each in fields(GPTConfig)}
    if unknown := saved.keys() - known.keys():
        raise ValueError(f"its {min(unknown)} is unknown here: use the model.py that it was trained with")
    for name, size in found.items():
        if name != "n_head" and saved.get(name) != size:
            raise ValueError(f"its {name} is {saved.get(name)}, but its tensors have {size}")
    newer = {name: default for name, default in known.items() if name not in saved}
    for name, default in newer.items():
        warnings.warn(f"the checkpoint is older than {name}, which is {default} now", stacklevel=2)
    return {**newer, **saved}


def describe_pretrained(source: str | Path, metadata: dict) -> str:
    """Return lines about a model that was loaded: its `notes`, its checkpoint, and one that is better.

    A run folder gives its newest checkpoint, and model_best.pt may be much older.
    """
    step, loss = metadata.get("step"), metadata.get("val_loss")
    lines = [f"{source} {note}" for note in metadata.get("notes", ())]
    if step is None:
        return "\n".join(lines)
    tokens = (metadata.get("args") or {}).get("val_tokens")
    on = f" on up to {tokens:,} tokens" if isinstance(tokens, int) else ""
    lines += [f"{source}: step {step:,}" + (f", validation loss {loss:.4f}{on}" if loss is not None else "")]
    best_step, best = metadata.get("best_step"), metadata.get("best_val_loss")
    if None not in (loss, best_step, best) and loss - best > MUCH_WORSE and Path(source).is_dir():
        at = f"at step {best_step:,} it was {best:.4f}"
        lines.append(f"{source}: {at}; {Path(source) / BEST} is that one")
    return "\n".join(lines)


def is_nanogpt(checkpoint: dict, beside: list[dict]) -> bool:
    """Return whether nanoGPT's train.py, or a fork of it, wrote a checkpoint; `beside` holds its dicts."""
    return bool({"model_args", "iter_num"} & checkpoint.keys()) or any(
        {"bias", "block_size"} <= each.keys() for each in beside
    )


def _read_gpt2_checkpoint(
    source: str | Path, checkpoint: dict, n_head: int | None
) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Find the GPT-2 in a checkpoint of ours or of another GPT-2 repository.

    One of ours is rebuilt from its own `config`, field by field. For others, sizes are read off the tensors,
    whose names may have prefixes of DDP, torch.compile or a wrapper module; `n_head` comes from a dict or
    object beside them, or else from the caller, and defaults to heads that are 64 wide, as in all of OpenAI's
    models. Weights may have OpenAI's layout. Missing biases become zeros. A model trained with exact GELU,
    like nanoGPT's, runs with GPT-2's tanh GELU. `notes` in the metadata say what was assumed. Raises
    ValueError for anything else.
    """
    with parsing(source, "a GPT-2", "use another model"):
        values = [checkpoint, *checkpoint.values()]
        for state in (value for value in values if isinstance(value, dict)):
            tensors = {name: w for name, w in state.items() if isinstance(w, torch.Tensor)}
            state = {PREFIXES.sub("", str(name)): w for name, w in tensors.items()}
            if {"transformer.wte.weight", "transformer.wpe.weight"} <= state.keys():
                break
        else:
            raise ValueError("it has no transformer.wte.weight and transformer.wpe.weight")
        # Older models store their causal masks.
        masks = (".attn.bias", ".attn.masked_bias")
        state = {name: w for name, w in state.items() if not name.endswith(masks)}
        wte, wpe = state["transformer.wte.weight"], state["transformer.wpe.weight"]
        head = state.setdefault("lm_head.weight", wte)
        if not torch.allclose(head, wte, rtol=0, atol=0, equal_nan=True):
            raise ValueError("its lm_head is not tied to its embedding")
        config = {"vocab_size": len(wte), "n_embd": wte[0].numel(), "block_size": len(wpe)}
        config["n_layer"] = sum(name.endswith(".ln_1.weight") for name in state)
        beside = [value if isinstance(value, dict) else getattr(value, "__dict__", {}) for value in values]
        n_heads = [each["n_head"] for each in beside if isinstance(each.get("n_head"), int)]
        notes, width = [], config["n_embd"]
        if not n_heads and not n_head:
            n_head = 1 if width % 64 else width // 64
            heads = f"{n_head} head{'s' * (n_head > 1)} of {width // n_head}"
            notes.append(f"has no n_head: assuming {heads}; --n_head sets it")
        config["n_head"] = n_heads[0] if n_heads else n_head
        if is_ours(checkpoint):
            config = own_config(checkpoint["config"], config)
        elif is_nanogpt(checkpoint, beside):
            notes.append("looks like nanoGPT's, with exact GELU: it runs with GPT-2's tanh GELU")
        check_size(config, sum(w.numel() for w in state.values()))
        if state.get("transformer.h.0.attn.c_attn.weight", wte).size(-1) == 3 * config["n_embd"]:
            state = transpose(state)
        if not any(name.endswith(".bias") for name in state):
            layers = [name for name in state if re.search(r"\.(c|ln)_\w+\.weight$", name)]
            state |= {name.removesuffix("weight") + "bias": torch.zeros(len(state[name])) for name in layers}
        kinds = {"step": int, "windows": int, "args": dict}
        kinds |= {"val_loss": float, "best_step": int, "best_val_loss": float}
        known = {name: checkpoint.get(name) for name in kinds}
        metadata = {name: v if isinstance(v, kinds[name]) else None for name, v in known.items()}
        if args := metadata["args"]:
            metadata["args"] = {name: value for name, value in args.items() if is_plain(value)}
        return config, state, metadata | {"notes": notes}
