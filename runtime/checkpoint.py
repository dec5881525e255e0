"""Reading and writing checkpoints: ours, those of other GPT-2 repositories, and Hugging Face folders.

    checkpoint = load_checkpoint("log")                   # the newest complete checkpoint of a run, as a dict
    config, state, metadata = read_pretrained("gpt2")     # what `GPT.from_pretrained` builds a model from
    writer = CheckpointWriter(folder, keep=2, milestone_steps=5000, on_written=log.checkpoint)

No code from a file is ever executed.
"""

import argparse
import contextlib
import errno
import math
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import hub
from runtime.cli import NOT_RESUMED
from runtime.files import (
    check_types,
    existing_folder,
    parsing,
    read_records,
    whole_folder,
    write_atomically,
)
from runtime.hardware import synchronize
from runtime.memory import is_out_of_memory
from runtime.records import RunFolder

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_FILES = ("model.safetensors", "config.json")  # in this order both are of one revision
# OpenAI's checkpoints store these four as (in, out); `nn.Linear` expects (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Prefixes that DDP, torch.compile and wrapper modules add to tensor names.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
NUMBERED = re.compile(r"model_(\d+)\.pt")  # the names of a run's checkpoints, besides BEST
BEST = "model_best.pt"
MUCH_WORSE = 0.02  # nats, more than evaluations of a run that goes well differ by
TRAINING_STATE = {
    **{"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "args": dict},
    **{"step": int, "best_step": int, "best_val_loss": float, "val_loss": float | None},
}
NEWER_STATE = {"windows": int, "epoch_windows": int, "data": dict, "recent": dict}  # older versions lack it
PLAIN = str | int | float | None
SAVED_OPTIONS = {"optimizer": str, "total_batch_size": int, "block_size": int, "val_tokens": int}


def is_damage(error: Exception) -> bool:
    """Return whether an error says that a file was read and is not a complete checkpoint.

    Errors of the system, such as an unreadable disk or too little memory, say nothing about the file.
    """
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL  # a damaged file may point to a negative offset
    return not is_out_of_memory(error)


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


def is_milestone(step: float, every: int) -> bool:
    """Return whether the checkpoint of a step is kept forever; `every` is in steps (0: none)."""
    return step > 0 and every > 0 and step % every == 0


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


def load_training_state(out_dir: str | Path, optimizer: str, max_steps: int) -> dict | None:
    """Load the checkpoint that a resumed run continues from, or return None if the folder has none.

    Raises ValueError if there are checkpoints but none is complete, and for one that holds only weights, has
    the state of another optimizer or is past `max_steps`.
    """
    paths = checkpoints_in(Path(out_dir)) if Path(out_dir).exists() else []
    if not paths:
        return None
    if (checkpoint := load_newest(paths)) is None:
        raise ValueError(f"no checkpoint in {out_dir} is complete: omit --resume to start a new run")
    if not checkpoint.keys() >= TRAINING_STATE.keys():
        raise ValueError(f"the checkpoint in {out_dir} holds only weights: pass it to --init_from")
    with parsing(out_dir, "a run that can be resumed", "delete its newest checkpoint"):
        check_types(checkpoint, TRAINING_STATE, NEWER_STATE)
        check_types(checkpoint["args"], SAVED_OPTIONS)
        if not checkpoint["args"]["block_size"]:
            raise ValueError("its block_size is 0")
    checkpoint["args"] = {name: v for name, v in checkpoint["args"].items() if isinstance(v, PLAIN)}
    recent = checkpoint.get("recent", {})  # files that are deleted one day
    checkpoint["recent"] = {name: recent[name] is True for name in recent if NUMBERED.fullmatch(str(name))}
    if (saved := checkpoint["args"]["optimizer"]) != optimizer:
        raise ValueError(
            f"--optimizer is {optimizer}, but the checkpoint in {out_dir} has the state of {saved}: repeat "
            "that run's option, or start a new run with --init_from"
        )
    if (step := checkpoint["step"]) > max_steps:
        raise ValueError(
            f"--max_steps is {max_steps}, but the checkpoint in {out_dir} is at step {step}: "
            f"use at least {step}"
        )
    return checkpoint


@dataclass
class Progress:
    """How far a run has got: what a checkpoint holds besides weights, optimizer state, data and options.

    `windows` counts what training has consumed, over all ranks and epochs.
    """

    step: int = 0
    val_loss: float | None = None
    best_val_loss: float = math.inf
    best_step: int = 0
    windows: int = 0


def training_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    args: argparse.Namespace,
    loaders: dict,
) -> dict:
    """Return what a checkpoint holds: tensors, which are not copied yet, and plain types.

    `model` is a GPT, and `loaders` has a DataLoaderLite for `train` and one for `val`.
    """
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        **asdict(progress),
        "epoch_windows": loaders["train"].windows,
        "data": {split: loader.description for split, loader in loaders.items()},
        "config": asdict(model.config),
        "args": dict(vars(args)),
    }


def plain(value: object) -> object:
    """Return six digits of a float, without those that rounding has left, and other values as they are."""
    return f"{value:g}" if isinstance(value, float) else value


def restore(
    resumed: dict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    loaders: dict,
) -> tuple[Progress, list[str]]:
    """Load the state of optimizer and scaler; return the run's progress and what differs from before.

    With the same options and data, a run continues exactly. Otherwise lines say what differs and what it
    means: training continues at the first window that has not been consumed, and the best validation loss
    counts only for the same validation tokens.
    """
    # Only the optimizer's moments are restored; this command's options win. They are copied, because the file
    # is mapped.
    groups = optimizer.state_dict()["param_groups"]
    weights = [(weight, group) for group in optimizer.param_groups for weight in group["params"]]
    with parsing(args.out_dir, "the state of this run", "use an older checkpoint"):
        state = {}
        for index, moments in resumed["optimizer"]["state"].items():
            weight, group = weights[index]
            names = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
            wanted = {"step": (), **dict.fromkeys(names, weight.shape)}
            if {name: value.shape for name, value in moments.items()} != wanted:
                raise ValueError("moments do not fit their weights")
            to = dict(device=weight.device, dtype=torch.float32, copy=True)
            state[index] = {name: value.to(**to) for name, value in moments.items()}
        if len(state) not in (0, len(weights)):  # there are none before the first step
            raise ValueError("some weights have no moments")
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        if resumed["scaler"]:  # empty unless the run used fp16
            scaler.load_state_dict(resumed["scaler"])
    before = resumed["args"]
    changed = {name for name, value in vars(args).items() if before.get(name) != value} - {*NOT_RESUMED}
    # Checkpoints of older versions lack `windows` and `data`, and shuffled in another order.
    consumed = resumed["step"] * before["total_batch_size"] // before["block_size"]
    known = {"windows": consumed, **resumed}
    progress = Progress(**{field.name: known[field.name] for field in fields(Progress)})
    older = "data" not in resumed
    other_data = {
        split: "data_dir" in changed if older else resumed["data"].get(split) != loader.description
        for split, loader in loaders.items()
    }
    pairs = [(name, getattr(args, name), before.get(name)) for name in sorted(changed)]
    changes = [f"--{name} {plain(now)} (was {plain(was)})" for name, now, was in pairs]
    what = f"changed options: {', '.join(changes)}" if changes else "with the same options"
    lines = [f"resuming {args.out_dir} at step {progress.step}, {what}"]
    epoch, window = divmod(progress.windows, loaders["train"].windows)
    at = f"training continues at window {window:,} of epoch {epoch}"
    if "total_batch_size" in changed:
        lines.append(f"--total_batch_size has changed: {at}, the first one that it has not read")
    if other_data["train"]:
        have = "may have" if older else "have"
        lines.append(f"warning: the training data {have} changed: {at} of the new data")
    if "shuffle" in changed or (args.shuffle and ("seed" in changed or older)):
        lines.append(f"warning: the order of the data has changed: {at}, which may repeat and skip windows")
    windows = [max(n // args.block_size, 1) for n in (before["val_tokens"], args.val_tokens)]
    windows = {min(n, loaders["val"].windows) for n in windows}
    if other_data["val"] or len(windows) > 1:
        lines.append("the validation tokens have changed: earlier losses no longer count as the best")
        progress.val_loss, progress.best_val_loss, progress.best_step = None, math.inf, progress.step
    return progress, lines


def read_pretrained(source: str | Path | dict) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Return config, state dict and metadata of a checkpoint, run folder, Hugging Face folder or Hub name.

    A dict is a checkpoint that has been loaded. Raises FileNotFoundError if the source does not exist, and
    ValueError if it is not a GPT-2.
    """
    if isinstance(source, dict):
        return _read_gpt2_checkpoint("the checkpoint", source)
    if str(source) in HUB_NAMES and not Path(source).exists():
        advice = "connect to the network, or use a checkpoint or a Hugging Face folder"
        for name in HUB_FILES:
            path = hub.fetch(source, name, what=f"download {source}", advice=advice)
        return _read_hugging_face(path.parent)
    if (Path(source) / "config.json").exists():
        return _read_hugging_face(Path(source))
    return _read_gpt2_checkpoint(source, load_checkpoint(source))


def describe_pretrained(source: str | Path, metadata: dict) -> str:
    """Return a line about the checkpoint that was loaded, one about a better one; empty for other models.

    A run folder gives its newest checkpoint, and model_best.pt may be much older.
    """
    step, loss = metadata.get("step"), metadata.get("val_loss")
    if step is None:
        return ""
    lines = [f"{source}: step {step:,}" + (f", validation loss {loss:.4f}" if loss is not None else "")]
    best_step, best = metadata.get("best_step"), metadata.get("best_val_loss")
    if None not in (loss, best_step, best) and loss - best > MUCH_WORSE and Path(source).is_dir():
        at = f"at step {best_step:,} it was {best:.4f}"
        lines.append(f"{source}: {at}; {Path(source) / BEST} is that one")
    return "\n".join(lines)


def _read_hugging_face(source: Path) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Read a Hugging Face folder; the metadata is empty."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    sizes["block_size"] = "n_positions"
    try:
        with parsing(source, "a GPT-2 in Hugging Face's format", "use another model"):
            values, _ = GPT2Config.get_config_dict(source)
            if values.get("model_type") != "gpt2":
                raise ValueError(f"it is a {values.get('model_type')}")
            theirs = GPT2Config.from_dict(values)
            wanted = {
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "n_inner": (None, 4 * theirs.n_embd),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "tie_word_embeddings": (True,),
                "layer_norm_epsilon": (1e-5,),
            }
            for name, allowed in wanted.items():
                if getattr(theirs, name) not in allowed:
                    raise ValueError(f"its {name} is {getattr(theirs, name)}, but GPT-2 has {allowed[0]}")
            config = {ours: getattr(theirs, name) for ours, name in sizes.items()}
            if not all(isinstance(size, int) and size > 0 for size in config.values()):
                raise ValueError(f"its sizes are {config}")
            if files := [path for path in source.glob("*") if path.suffix in (".safetensors", ".bin")]:
                check_size(config, sum(path.stat().st_size for path in files))  # at least a byte per weight
            hf_model, report = GPT2LMHeadModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"{min(report['missing_keys'])} is missing")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"cannot load {source} ({reason}): check folder or network") from error
    return config, _transpose(hf_model.state_dict()), {}


def write_hugging_face(
    folder: str | Path, config: dict, state: dict[str, torch.Tensor], vocab_size: int
) -> None:
    """Write a GPT-2 with the fields of a GPTConfig as a Hugging Face folder.

    Only the first `vocab_size` token ids are kept; the last of them is end-of-text. Raises ValueError if the
    folder exists and is not empty.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: config[name] for name in ("n_embd", "n_layer", "n_head")}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"])
    end_of_text = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocab_size - 1)
    lengths = {"vocab_size": vocab_size, "n_positions": config["block_size"]}
    exported = GPT2LMHeadModel(GPT2Config(**sizes, **lengths, **dropout, **end_of_text))
    state = _transpose(state)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][:vocab_size]
    exported.load_state_dict(state)
    with whole_folder(folder) as partial:
        exported.save_pretrained(partial)


def _transpose(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict between our layout and OpenAI's."""
    return {name: w.t().contiguous() if name.endswith(TRANSPOSED) else w for name, w in state.items()}


def _read_gpt2_checkpoint(
    source: str | Path, checkpoint: dict
) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Find the GPT-2 in a checkpoint of ours or of another GPT-2 repository.

    Tensor names may have prefixes of DDP, torch.compile or a wrapper module. Sizes are read off the tensors;
    `n_head` comes from a dict or object beside them, and defaults to heads that are 64 wide, as in all of
    OpenAI's models. Weights may have OpenAI's layout. Missing biases become zeros. A model trained with exact
    GELU, like nanoGPT's, runs with GPT-2's tanh GELU. Raises ValueError for anything else.
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
        config["n_head"] = n_heads[0] if n_heads else max(config["n_embd"] // 64, 1)
        check_size(config, sum(w.numel() for w in state.values()))
        if state.get("transformer.h.0.attn.c_attn.weight", wte).size(-1) == 3 * config["n_embd"]:
            state = _transpose(state)
        if not any(name.endswith(".bias") for name in state):
            layers = [name for name in state if re.search(r"\.(c|ln)_\w+\.weight$", name)]
            state |= {name.removesuffix("weight") + "bias": torch.zeros(len(state[name])) for name in layers}
        kinds = {"step": int, "val_loss": float, "best_step": int, "best_val_loss": float, "args": dict}
        known = {name: checkpoint.get(name) for name in kinds}
        metadata = {name: v if isinstance(v, kinds[name]) else None for name, v in known.items()}
        if args := metadata["args"]:
            metadata["args"] = {name: value for name, value in args.items() if isinstance(value, PLAIN)}
        return config, state, metadata


def check_size(config: dict, stored: int) -> None:
    """Raise ValueError if a model with these sizes would be larger than the `stored` weights.

    It would be allocated before the difference is noticed.
    """
    V, T, L, C = (config[name] for name in ("vocab_size", "block_size", "n_layer", "n_embd"))
    if (V + T + 12 * L * C) * C > stored:
        raise ValueError("it has too few weights for its sizes")


def disk_usage(args: argparse.Namespace, groups: list[dict]) -> tuple[int, int, int]:
    """Return the bytes of one checkpoint, of all that exist at the same time, and the free bytes.

    A checkpoint holds the weights of the optimizer's `groups` and their moments in fp32: two for AdamW, one
    for Muon. While one is being written, its predecessors are still there.
    """
    size, number = 0, 0
    for group in groups:
        moments = 1 if args.optimizer == "muon" and "parts" in group else 2
        size += sum(4 * (1 + moments) * weight.numel() for weight in group["params"])
    if args.checkpoint_every:
        number = math.ceil(args.max_steps / args.checkpoint_every)
        milestones = args.milestone_every and args.max_steps // (args.checkpoint_every * args.milestone_every)
        number = min(number, args.keep + milestones) if args.keep else number
        number += 2  # model_best.pt, and the one being written
    return size, number * size, shutil.disk_usage(existing_folder(Path(args.out_dir))).free


def check_disk(args: argparse.Namespace, groups: list[dict], resumed: dict | None) -> None:
    """Raise ValueError if the checkpoints that the run has yet to write will not fit on the disk.

    Those that a resumed run has written, and counts among those it keeps, take no more space.
    """
    size, needed, free = disk_usage(args, groups)
    if resumed:
        grid, recent = args.milestone_every * args.checkpoint_every, resumed.get("recent", {})
        for path in checkpoints_in(Path(args.out_dir)):
            is_kept = path.name == BEST or args.keep == 0 or is_milestone(step_of(path), grid)
            if is_kept or path.name in recent:
                needed -= path.stat().st_size
        needed = max(needed, size)
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
        raise ValueError(f"checkpoints in {args.out_dir} need {sizes}: lower --keep or use another --out_dir")


def to_host(value, host: dict[tuple, torch.Tensor]):
    """Copy nested dicts and lists with their tensors to host memory; shared memory stays shared.

    `host` keeps that memory for the next call. For CUDA devices it is pinned, so that copies are asynchronous
    and run at the full speed of the bus: synchronize before reading them. On MPS, asynchronous copies may
    hold wrong values (pytorch/pytorch#139550).
    """
    if isinstance(value, dict):
        return {name: to_host(each, host) for name, each in value.items()}
    if isinstance(value, list):
        return [to_host(each, host) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    key = (value.data_ptr(), value.shape, value.dtype)
    if key not in host:
        host[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return host[key].copy_(value, non_blocking=value.is_cuda)


class CheckpointWriter:
    """Writes checkpoints in the background, one after the other.

    Training waits only for the copy to host memory, and for the previous write if that has not finished.
    After each write, `on_written(step, names=..., held_ms=..., write_ms=...)` is called in the background. A
    write that fails is reported and leaves older checkpoints alone. `check` and `close` raise ValueError
    after two failures in a row, and `close` also if the last write failed.

    A run deletes only numbered checkpoints that it has written itself, and of those none of the newest `keep`
    and no milestone. `recent` lists the newest ones and whether each may be deleted. Every checkpoint stores
    the list, so that a resumed run deletes exactly what the uninterrupted one would have deleted.
    """

    def __init__(
        self,
        folder: RunFolder,
        keep: int,
        milestone_steps: int,
        on_written: Callable[..., None],
        recent: dict[str, bool] | None = None,
    ):
        self.folder, self.keep, self.milestone_steps = folder, keep, milestone_steps
        self.on_written, self.recent = on_written, recent or {}
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending = self.pool.submit(lambda: None)
        self.host: dict[tuple, torch.Tensor] = {}
        self.failure = ""  # of the last write
        for unfinished in folder.path.glob("model_*.pt.tmp"):  # left behind by a run that was killed
            if NUMBERED.fullmatch(unfinished.stem) or unfinished.stem == BEST:
                unfinished.unlink()

    def save(self, names: list[str], checkpoint: dict, device: torch.device) -> None:
        """Start writing the checkpoint under each of the names."""
        started = time.perf_counter()
        self.pending.result()
        checkpoint = to_host(checkpoint, self.host)
        synchronize(device)
        held_ms = 1000 * (time.perf_counter() - started)
        self.pending = self.pool.submit(self._write, names, checkpoint, held_ms)

    def _write(self, names: list[str], checkpoint: dict, held_ms: float) -> None:
        started, recent = time.perf_counter(), dict(self.recent)
        if self.keep:
            may_go = not is_milestone(checkpoint["step"], self.milestone_steps)
            recent |= {name: may_go for name in names if NUMBERED.fullmatch(name)}
        else:
            recent = {}
        # Includes what is deleted next: a run that is killed before that deletes it when it is resumed.
        checkpoint = {**checkpoint, "recent": recent}
        path = self.folder.path
        try:
            self.folder.ensure()
            for name in sorted(names, key=lambda name: name == BEST):
                path = self.folder.path / name
                write_atomically(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            # torch.save replaces the error of the file with one of its own.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            before, self.failure = self.failure, f"could not write {path} ({reason})"
            if before:
                raise ValueError(
                    f"{self.failure}, and the previous write failed too: free some disk space, then repeat "
                    f"the command with --resume ({self.newest()})"
                ) from error
            tqdm.write(f"warning: {self.failure}; training continues and retries at the next checkpoint")
            return
        self.failure = ""
        write_ms = 1000 * (time.perf_counter() - started)
        for name in list(recent)[: -self.keep]:
            if recent.pop(name):
                self._delete(name)
        self.recent = recent
        self.on_written(checkpoint["step"], names=names, held_ms=held_ms, write_ms=write_ms)

    def _delete(self, name: str) -> None:
        try:
            (self.folder.path / name).unlink(missing_ok=True)
        except OSError as error:
            tqdm.write(f"warning: could not delete {self.folder.path / name} ({error.strerror})")

    def newest(self) -> str:
        """Return where --resume would continue, for messages."""
        paths = []
        with contextlib.suppress(OSError):
            paths = checkpoints_in(self.folder.path)
        return f"continues from {paths[-1]}" if paths else "no checkpoint has been written yet"

    def check(self) -> None:
        """Raise the error of a finished write."""
        if self.pending.done():
            self.pending.result()

    def close(self) -> None:
        """Wait for the last write."""
        self.pending.result()
        if self.failure:
            raise ValueError(
                f"{self.failure}: free some disk space, then repeat the command with --resume "
                f"({self.newest()})"
            )
