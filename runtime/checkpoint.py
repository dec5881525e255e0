"""Reading and writing checkpoints: ours, those of other GPT-2 repositories, and Hugging Face folders.

    checkpoint = load_checkpoint("log")                   # the newest complete checkpoint of a run, as a dict
    config, state, metadata = read_pretrained("gpt2")     # what `GPT.from_pretrained` builds a model from
    writer = CheckpointWriter(out_dir, keep=2, milestone_steps=5000, on_written=log.checkpoint)

No code from a file is ever executed.
"""

import argparse
import math
import pickle
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.files import whole_folder, write_atomically
from runtime.hardware import synchronize

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# OpenAI's checkpoints store these four as (in, out); `nn.Linear` expects (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Prefixes that DDP, torch.compile and wrapper modules add to tensor names.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
# What torch.load and zipfile raise for a file that is truncated, altered or something else.
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)
TRAINING_STATE = {"optimizer", "scaler", "step", "best_step", "args"}


def step_of(path: Path) -> int:
    """Return the step of model_00250.pt or model_best.pt, or -1 if it cannot be determined."""
    if path.stem != "model_best":
        number = path.stem.removeprefix("model_")
        return int(number) if number.isdecimal() else -1
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # a damaged file is reported when it is loaded
        return -1


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
        for path in sorted(source.glob("model_*.pt"), key=step_of, reverse=True):
            try:
                return load_checkpoint(path)
            except ValueError as error:
                warnings.warn(f"skipping a checkpoint: {error}", stacklevel=2)
        raise FileNotFoundError(f"no complete checkpoint in {source}: train a model with `python train.py`")
    try:
        # torch.load does not verify checksums.
        if zipfile.is_zipfile(source) and (broken := zipfile.ZipFile(source).testzip()):
            raise ValueError(f"{broken} fails its checksum")
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        lines = str(error).splitlines() or ["unexpected end of file"]
        reason = next((line for line in lines if "Trying to" in line), lines[0].split(". ")[0])
        raise ValueError(f"{source} is damaged or not a checkpoint ({reason}): use an older one") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def load_training_state(out_dir: str | Path, optimizer: str) -> dict | None:
    """Load the checkpoint that a resumed run continues from, or return None if there is no complete one.

    Raises ValueError for a checkpoint that holds only weights, or the state of another optimizer.
    """
    try:
        checkpoint = load_checkpoint(out_dir)
    except FileNotFoundError:
        return None
    if not checkpoint.keys() >= TRAINING_STATE:
        raise ValueError(f"the checkpoint in {out_dir} holds only weights: pass it to --init_from")
    if (saved := checkpoint["args"]["optimizer"]) != optimizer:
        raise ValueError(
            f"--optimizer is {optimizer}, but the checkpoint in {out_dir} has the state of {saved}: repeat "
            "that run's option, or start a new run with --init_from"
        )
    return checkpoint


def read_pretrained(source: str | Path) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Return config, state dict and metadata of a checkpoint, run folder, Hugging Face folder or Hub name.

    Raises FileNotFoundError if the source does not exist, and ValueError if it is not a GPT-2.
    """
    if str(source) in HUB_NAMES and not Path(source).exists() or (Path(source) / "config.json").exists():
        return _read_hugging_face(str(source))
    return _read_gpt2_checkpoint(source)


def _read_hugging_face(source: str) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Read a Hugging Face folder or Hub name; the metadata is empty."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, GPT2LMHeadModel

    try:
        theirs = AutoConfig.from_pretrained(source)
        if theirs.model_type != "gpt2":
            raise ValueError(f"{source} holds a {theirs.model_type} model: only GPT-2 is supported")
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
                raise ValueError(f"{source}: {name} is {getattr(theirs, name)}, but GPT-2 has {allowed[0]}")
        hf_model, report = GPT2LMHeadModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"{source} is not a complete GPT-2: {min(report['missing_keys'])} is missing")
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"cannot load {source} ({reason}): check folder or network") from error
    config = {name: getattr(theirs, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return {**config, "block_size": theirs.n_positions}, _transpose(hf_model.state_dict()), {}


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


def _read_gpt2_checkpoint(source: str | Path) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Read a checkpoint of ours or of another GPT-2 repository.

    Tensor names may have prefixes of DDP, torch.compile or a wrapper module. Sizes are read off the tensors;
    `n_head` comes from a dict or object beside them, and defaults to heads that are 64 wide, as in all of
    OpenAI's models. Weights may have OpenAI's layout. Missing biases become zeros. A model trained with exact
    GELU, like nanoGPT's, runs with GPT-2's tanh GELU. Raises ValueError for anything else.
    """
    checkpoint = load_checkpoint(source)
    values = [checkpoint, *checkpoint.values()]
    for state in (value for value in values if isinstance(value, dict)):
        state = {PREFIXES.sub("", str(name)): w for name, w in state.items() if isinstance(w, torch.Tensor)}
        if {"transformer.wte.weight", "transformer.wpe.weight"} <= state.keys():
            break
    else:
        raise ValueError(
            f"{source} is not a GPT-2: it has no transformer.wte.weight and transformer.wpe.weight"
        )
    # Older models store their causal masks.
    state = {name: w for name, w in state.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    wte, wpe = state["transformer.wte.weight"], state["transformer.wpe.weight"]
    if not torch.equal(state.setdefault("lm_head.weight", wte), wte):
        raise ValueError(f"{source} is not a GPT-2: its lm_head is not tied to its embedding")
    config = {"vocab_size": len(wte), "n_embd": wte[0].numel(), "block_size": len(wpe)}
    config["n_layer"] = sum(name.endswith(".ln_1.weight") for name in state)
    beside = [value if isinstance(value, dict) else getattr(value, "__dict__", {}) for value in values]
    n_heads = [each["n_head"] for each in beside if isinstance(each.get("n_head"), int)]
    config["n_head"] = n_heads[0] if n_heads else max(config["n_embd"] // 64, 1)
    if state.get("transformer.h.0.attn.c_attn.weight", wte).size(-1) == 3 * config["n_embd"]:
        state = _transpose(state)
    if not any(name.endswith(".bias") for name in state):
        layers = [name for name in state if re.search(r"\.(c|ln)_\w+\.weight$", name)]
        state |= {name.removesuffix("weight") + "bias": torch.zeros(len(state[name])) for name in layers}
    metadata = {name: checkpoint.get(name) for name in ("step", "val_loss", "args")}
    if not isinstance(metadata["args"], dict):
        metadata["args"] = None
    return config, state, metadata


def checkpoint_bytes(args: argparse.Namespace, groups: list[dict]) -> tuple[int, int, int]:
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
    out_dir = Path(args.out_dir).absolute()
    existing = next(folder for folder in (out_dir, *out_dir.parents) if folder.exists())
    return size, number * size, shutil.disk_usage(existing).free


def check_disk(args: argparse.Namespace, groups: list[dict]) -> None:
    """Raise ValueError if the checkpoints of the run will not fit on the disk."""
    _, needed, free = checkpoint_bytes(args, groups)
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
        raise ValueError(f"checkpoints in {args.out_dir} need {sizes}: lower --keep or use another --out_dir")


class CheckpointWriter:
    """Writes checkpoints in the background, one after the other.

    Training waits only for the copy to host memory, and for the previous write if that has not finished.
    After each write, `on_written(step, names=..., held_ms=..., write_ms=...)` is called in the background. A
    write that fails is reported and leaves older checkpoints alone. `check` and `close` raise ValueError
    after two failures in a row, and `close` also if the last write failed.
    """

    def __init__(self, out_dir: Path, keep: int, milestone_steps: int, on_written: Callable[..., None]):
        self.out_dir, self.keep, self.milestone_steps = out_dir, keep, milestone_steps
        self.on_written = on_written
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending = self.pool.submit(lambda: None)
        self.host: dict[tuple, torch.Tensor] = {}
        self.failure = ""  # of the last write
        for unfinished in out_dir.glob("*.tmp"):  # left behind by a run that was killed
            unfinished.unlink()

    def to_host(self, value):
        """Copy nested dicts and lists with their tensors to host memory; shared memory stays shared.

        The host memory is reused by the next call. For GPUs it is pinned, so that the copy runs at the full
        speed of the bus.
        """
        if isinstance(value, dict):
            return {name: self.to_host(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.to_host(each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.data_ptr(), value.shape, value.dtype)
        if key not in self.host:
            self.host[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.host[key].copy_(value, non_blocking=True)

    def save(self, names: list[str], checkpoint: dict, device: torch.device) -> None:
        """Start writing the checkpoint under each of the names."""
        started = time.perf_counter()
        self.pending.result()
        checkpoint = self.to_host(checkpoint)
        synchronize(device)
        held_ms = 1000 * (time.perf_counter() - started)
        self.pending = self.pool.submit(self._write, names, checkpoint, held_ms)

    def _write(self, names: list[str], checkpoint: dict, held_ms: float) -> None:
        started = time.perf_counter()
        try:
            for name in names:
                write_atomically(self.out_dir / name, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            # torch.save replaces the error of the file by one of its own.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            before, self.failure = self.failure, f"could not write {self.out_dir / name} ({reason})"
            if before:
                raise ValueError(
                    f"{self.failure}, and the previous write failed too: free disk space and --resume from "
                    f"{self.newest()}"
                ) from error
            tqdm.write(f"warning: {self.failure}; training continues and retries at the next checkpoint")
            return
        self.failure = ""
        write_ms = 1000 * (time.perf_counter() - started)
        for path in self.numbered()[: -self.keep] if self.keep else []:
            if not self.milestone_steps or step_of(path) % self.milestone_steps:
                path.unlink()
        self.on_written(checkpoint["step"], names=names, held_ms=held_ms, write_ms=write_ms)

    def numbered(self) -> list[Path]:
        """Return the checkpoints of this run except model_best.pt, oldest first."""
        return sorted(self.out_dir.glob("model_[0-9]*.pt"), key=step_of)

    def newest(self) -> str:
        """Return the newest checkpoint, for messages."""
        best = [path for path in [self.out_dir / "model_best.pt"] if path.exists()]
        return str(max([*self.numbered(), *best], key=step_of, default="nothing: none has been written yet"))

    def check(self) -> None:
        """Raise the error of a finished write."""
        if self.pending.done():
            self.pending.result()

    def close(self) -> None:
        """Wait for the last write."""
        self.pending.result()
        if self.failure:
            raise ValueError(f"{self.failure}: free disk space and --resume from {self.newest()}")
