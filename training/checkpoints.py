"""The checkpoints of a run: its whole state, written in the background, and resumed from.

`run` is the Run of train.py.
"""

import argparse
import contextlib
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from formats.checkpoint import (
    BEST,
    NUMBERED,
    checkpoints_in,
    is_plain,
    load_newest,
    step_of,
)
from runtime.cli import watching
from runtime.files import (
    check_types,
    existing_folder,
    parsing,
    write_atomically,
)
from runtime.hardware import synchronize
from training.folder import RunFolder

TRAINING_STATE = {
    **{"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "args": dict},
    **{"step": int, "best_step": int, "best_val_loss": float, "val_loss": float | None},
}
NEWER_STATE = {"windows": int, "epoch_windows": int, "data": dict, "recent": dict}  # older versions lack it
SAVED_OPTIONS = {"optimizer": str, "total_batch_size": int, "block_size": int, "val_tokens": int}


def numbered(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"model_{step:05d}.pt"


def is_milestone(step: float, every: int) -> bool:
    """Return whether the checkpoint of a step is kept forever; `every` is in steps (0: none)."""
    return step > 0 and every > 0 and step % every == 0


def load_training_state(args: argparse.Namespace) -> dict | None:
    """Load the checkpoint that a resumed run continues from, or return None if the folder has none.

    Raises ValueError if there are checkpoints but none is complete, and for one that holds only weights, has
    the state of another optimizer or is past --max_steps.
    """
    out_dir, optimizer = args.out_dir, args.optimizer
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
    checkpoint["args"] = {name: v for name, v in checkpoint["args"].items() if is_plain(v)}
    recent = checkpoint.get("recent", {})  # files that are deleted one day
    checkpoint["recent"] = {name: recent[name] is True for name in recent if NUMBERED.fullmatch(str(name))}
    if (saved := checkpoint["args"]["optimizer"]) != optimizer:
        raise ValueError(
            f"--optimizer is {optimizer}, but the checkpoint in {out_dir} has the state of {saved}: repeat "
            "that run's option, or start a new run with --init_from"
        )
    check_step(checkpoint["step"], args)
    return checkpoint


def check_step(step: int, args: argparse.Namespace) -> None:
    """Raise ValueError if the resumed checkpoint is past the end of the run."""
    if step > args.max_steps:
        raise ValueError(
            f"--max_steps is {args.max_steps}, but the checkpoint in {args.out_dir} is at step {step}: "
            f"use at least {step}"
        )


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

    def is_best(self, val_loss: float) -> bool:
        """Note a validation loss, and return whether it is the best one so far."""
        self.val_loss = val_loss
        if not val_loss < self.best_val_loss:
            return False
        self.best_val_loss, self.best_step = val_loss, self.step
        return True


def is_last_step(args: argparse.Namespace, progress: Progress) -> bool:
    """Return whether the run ends at its present step, as planned or early."""
    patience = args.early_stop * args.val_every
    return progress.step == args.max_steps or 0 < patience <= progress.step - progress.best_step


def is_sound(run) -> bool:
    """Return whether the run can go on from its present state.

    The last step and validation tell about the weights before the last update. What that has done to them
    shows in the loss and the gradients of a row of any tokens.
    """
    model, losses = run.raw_model, (run.loss, run.progress.val_loss)
    if run.skipped_in_row or not all(loss is None or math.isfinite(loss) for loss in losses):
        return False
    tokens = torch.arange(model.config.block_size, device=run.dist.device)[None] % model.config.vocab_size
    model.eval()  # dropout would draw random numbers
    with run.attention():
        with run.autocast:
            loss = model(tokens, tokens)[1]
        # Unlike `backward`, this leaves .grad alone, and with it DDP.
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    model.train()
    return all(each.isfinite().all() for each in (loss, *gradients))


def training_state(run) -> dict:
    """Return what a checkpoint holds: tensors, which are not copied yet, and plain types."""
    return {
        "model": run.raw_model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        **asdict(run.progress),
        "epoch_windows": run.train_data.windows,
        "data": {"train": run.train_data.description, "val": run.val_data.description},
        "config": asdict(run.raw_model.config),
        "args": dict(vars(run.args)),
    }


def plain(value: object) -> object:
    """Return six digits of a float, without those that rounding has left, and other values as they are."""
    return f"{value:g}" if isinstance(value, float) else value


def other_rates(args: argparse.Namespace, changed: set[str]) -> str:
    """Return the options of weights with learning rates of their own, without those that have changed."""
    own = [name for name in vars(args) if name.endswith("_lr") and name != "min_lr" and name not in changed]
    if args.optimizer != "muon":
        own = [name for name in own if name != "muon_lr"]
    values = {name: getattr(args, name) for name in own}
    return ", ".join(f"--{name} {value:g}" for name, value in values.items() if value is not None)


def consumed_windows(resumed: dict) -> int:
    """Return the windows that a run had consumed at this checkpoint; those of older versions lack them."""
    before = resumed["args"]
    return resumed.get("windows", resumed["step"] * before["total_batch_size"] // before["block_size"])


def restore(run, resumed: dict, ignored: set[str]) -> None:
    """Load the state of optimizer and scaler and the progress of a run, and say what differs from before.

    With the same options and data, a run continues exactly. Otherwise lines say what differs and what it
    means: training continues at the first window that has not been consumed, and the best validation loss
    counts only for the same validation tokens. Options that are `ignored` are about a single command.
    """
    args, loaders = run.args, {"train": run.train_data, "val": run.val_data}
    with parsing(args.out_dir, "the state of this run", "use an older checkpoint"):
        restore_optimizer(run.optimizer, resumed["optimizer"]["state"])
        if resumed["scaler"]:  # empty unless the run used fp16
            run.scaler.load_state_dict(resumed["scaler"])
    before = resumed["args"]
    changed = {name for name, value in vars(args).items() if before.get(name, value) != value} - ignored
    # Checkpoints of older versions lack `data`, too, and shuffled in another order.
    known = {**resumed, "windows": consumed_windows(resumed)}
    progress = run.progress = Progress(**{field.name: known[field.name] for field in fields(Progress)})
    older = "data" not in resumed
    other_data = {
        split: "data_dir" in changed if older else resumed["data"].get(split) != loader.description
        for split, loader in loaders.items()
    }
    pairs = [(name, getattr(args, name), before.get(name)) for name in sorted(changed)]
    changes = [f"--{name} {plain(now)} (was {plain(was)})" for name, now, was in pairs]
    what = f"changed options: {', '.join(changes)}" if changes else "with the same options"
    lines = [f"resuming {args.out_dir} at step {progress.step}, {what}"]
    if gone := sorted(name for name, value in before.items() if value and name not in vars(args)):
        lines.append(f"warning: this version has no {', '.join(f'--{name}' for name in gone)}")
    if "learning_rate" in changed and (others := other_rates(args, changed)):
        lines.append(f"--learning_rate does not change {others}: give these options, too, to change them")
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
    run.dist.say("\n".join(lines))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, torch.Tensor]]) -> None:
    """Load what an optimizer has remembered of each weight; the options of its groups stay as they are.

    Raises ValueError for tensors that are neither numbers nor of their weight's shape, and if the weights of
    one optimizer do not all have the same ones.
    """
    state, names = {}, {}
    weights = [(group, weight) for group in optimizer.param_groups for weight in group["params"]]
    for index, (group, weight) in enumerate(weights):
        moments = saved.get(index, {})
        if any(value.dim() and value.shape != weight.shape for value in moments.values()):
            raise ValueError("moments do not fit their weights")
        if names.setdefault(group["optimizer"], moments.keys()) != moments.keys():
            raise ValueError("some weights have no moments")
        to = dict(device=weight.device, dtype=torch.float32, copy=True)  # copied, because the file is mapped
        state[index] = {name: value.to(**to) for name, value in moments.items()}
    if saved.keys() - state.keys() or (saved and not all(names.values())):  # none before the first step
        raise ValueError("its moments are those of another model")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {i: each for i, each in state.items() if each}, "param_groups": groups}
    )


def disk_usage(run) -> tuple[int, int, int]:
    """Return the bytes of one checkpoint, of all that exist at the same time, and the free bytes.

    A checkpoint holds the weights and the optimizer's moments in fp32: two of each weight, or one for Muon.
    While one is being written, its predecessors are still there.
    """
    args, size, number = run.args, 0, 0
    for group in run.optimizer.param_groups:
        moments = 1 if group["optimizer"] == "muon" else 2
        size += sum(4 * (1 + moments) * weight.numel() for weight in group["params"])
    if args.checkpoint_every:
        number = math.ceil(args.max_steps / args.checkpoint_every)
        milestones = args.milestone_every and args.max_steps // (args.checkpoint_every * args.milestone_every)
        number = min(number, args.keep + milestones) if args.keep else number
        number += 2  # model_best.pt, and the one being written
    return size, number * size, shutil.disk_usage(existing_folder(Path(args.out_dir))).free


def check_disk(run, is_new: bool, recent: dict[str, bool]) -> None:
    """Raise ValueError if the checkpoints that the run has yet to write will not fit on the disk.

    Those that a resumed run has written, and counts among the `recent` ones it keeps, take no more space.
    """
    args = run.args
    size, needed, free = disk_usage(run)
    if not is_new:
        grid = args.milestone_every * args.checkpoint_every
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
        with watching("finishing the previous checkpoint"):
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
