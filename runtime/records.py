"""What a run leaves behind besides checkpoints: log.jsonl, TensorBoard, Weights & Biases, console, picture.

    log = Log(out_dir, args, start_step)
    log(step, "val", loss=3.05)             # a record in log.jsonl, and a line on the console
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import threading
import time
from pathlib import Path

from tqdm import tqdm

import plot
from runtime.checkpoint import checkpoint_bytes
from runtime.files import write_atomically

PICTURE_EVERY_S = 30.0  # drawing takes half a second, and small models write checkpoints more often than this


def check_packages(args: argparse.Namespace) -> None:
    """Raise ValueError, with a line for each, if packages that the options need are not installed."""
    wanted = [package for package in ("tensorboard", "wandb") if getattr(args, package)]
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        lines = [f"--{name} needs a package that is not installed: pip install {name}" for name in missing]
        raise ValueError("\n".join(lines))


def make_run_folder(out_dir: Path) -> None:
    """Create the folder of a new run. A folder that already holds a run is renamed to log.1, log.2, …"""
    if (out_dir / "log.jsonl").exists() or any(out_dir.glob("model_*.pt")):
        number = 1
        while out_dir.with_name(f"{out_dir.name}.{number}").exists():
            number += 1
        old = out_dir.rename(out_dir.with_name(f"{out_dir.name}.{number}"))
        print(f"{out_dir} held a run, which is now {old} (--resume continues a run)")
    out_dir.mkdir(parents=True, exist_ok=True)


class Log:
    """The records of a run: log.jsonl and the console, and TensorBoard and Weights & Biases if asked for.

    A resumed run repeats its first step with all evaluations. Records from that step on, and a line that was
    cut short, are therefore removed from log.jsonl and hidden in TensorBoard. At Weights & Biases the run
    continues under its old id.

    Raises ValueError if Weights & Biases refuses to start.
    """

    def __init__(self, out_dir: Path, args: argparse.Namespace, start_step: int):
        self.out_dir, self.args, self.start_step = out_dir, args, start_step
        self.path, self.lock = out_dir / "log.jsonl", threading.Lock()
        kept, wandb_id = [], None
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if record["step"] < start_step or record["kind"] == "run":
                    kept.append(line + "\n")
                    wandb_id = record.get("wandb") or wandb_id
        write_atomically(self.path, lambda file: file.write("".join(kept).encode()))
        self.file = open(self.path, "a", buffering=1)
        self.tensorboard = self.wandb = None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out_dir / "tensorboard", purge_step=start_step, flush_secs=10)
        if args.wandb:
            import wandb

            project = os.environ.get("WANDB_PROJECT", "gpt2")
            try:
                self.wandb = wandb.init(project=project, dir=out_dir, id=wandb_id, resume="allow")
            except wandb.errors.Error as error:
                message = f"Weights & Biases: {error} (without an account: WANDB_MODE=offline)"
                raise ValueError(" ".join(message.split())) from error
            self.wandb.define_metric("*", step_metric="step")  # its own step counter cannot go back
        # disable=None shows the bar on a terminal only.
        self.bar = tqdm(total=args.max_steps, initial=start_step, unit="step", disable=None)
        self.first_step_began: float | None = None
        self.drawn = time.monotonic()

    def start(self, world_size: int, groups: list[dict], epoch_tokens: int, how: str, machine: dict) -> None:
        """Record what the run is about to do, and print it.

        `groups` are those of the optimizer, `how` names dtype and kernels, `machine` is `describe_machine`'s.
        """
        disk = checkpoint_bytes(self.args, groups)
        groups = describe_groups(groups, self.args.learning_rate)
        params = sum(group["params"] for group in groups)
        about = dict(args=vars(self.args), world_size=world_size, params=params, groups=groups, **machine)
        self(self.start_step, "run", **about)
        tqdm.write(describe_run(about, how, epoch_tokens, disk))

    def __call__(self, step: int, kind: str, **values) -> None:
        """Add a record and print its line. Numbers that are not finite become null: JSON lacks them."""
        self._record(step, kind, values)
        if kind == "train":
            now = time.perf_counter()
            if self.first_step_began is None:
                self.first_step_began = now - values["dt_ms"] / 1000
            if step % self.args.log_every == 0:
                # The mean includes evaluations.
                mean_s = (now - self.first_step_began) / (step + 1 - self.start_step)
                tqdm.write(describe_step(step, values, mean_s * (self.args.max_steps - step - 1)))
            self.bar.update()
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        elif kind in ("val", "hellaswag", "sample"):
            tqdm.write(describe_evaluation(step, kind, values))

    def _record(self, step: int, kind: str, values: dict) -> None:
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if kind == "run" and self.wandb:
            values["wandb"] = self.wandb.id
            self.wandb.config.update(values["args"], allow_val_change=True)
        with self.lock:
            try:
                self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            except OSError as error:  # the file object keeps the line and retries with the next one
                tqdm.write(f"warning: could not write {self.path} ({error}); training continues")
            rates = {f"lr {name}": rate for name, rate in values.pop("lrs", {}).items()}
            numbers = {k: v for k, v in {**values, **rates}.items() if isinstance(v, int | float)}
            if self.tensorboard:
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
            if self.wandb:
                self.wandb.log({"step": step, **{f"{kind}/{name}": value for name, value in numbers.items()}})

    def checkpoint(self, step: int, **values) -> None:
        """Record a checkpoint and, if the picture is old, redraw it. Called in the background."""
        self(step, "checkpoint", **values)
        if time.monotonic() - self.drawn > PICTURE_EVERY_S:
            self.draw()
            self.drawn = time.monotonic()

    def draw(self) -> Path:
        """Draw the curves of the run. A picture that fails does not end the run."""
        path = self.out_dir / "loss.png"
        try:
            plot.plot([self.out_dir], path)
        except (ImportError, OSError, ValueError) as error:
            tqdm.write(f"warning: no picture of the loss: {error}")
        return path

    def close(self) -> None:
        """Write what TensorBoard and Weights & Biases have buffered, and remove the bar."""
        self.bar.close()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def describe_groups(groups: list[dict], learning_rate: float) -> list[dict]:
    """Return what console and log say about each parameter group; `lr` is its peak."""
    return [
        {
            "name": group["name"],
            "optimizer": "muon" if "momentum" in group else "adamw",
            "params": sum(weight.numel() for weight in group["params"]),
            "lr": learning_rate * group["lr_scale"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]


def describe_run(about: dict, how: str, epoch_tokens: int, disk: tuple[int, int, int]) -> str:
    """Return what a run is about to do, one line per thing that its user may want to change.

    `about` is the record of kind `run`; `disk` comes from `checkpoint_bytes`.
    """
    args, hardware, ranks = argparse.Namespace(**about["args"]), about["hardware"], about["world_size"]
    tokens, micro_batch = args.max_steps * args.total_batch_size, args.batch_size * args.block_size * ranks
    size, needed, free = (tqdm.format_sizeof(n, "B") for n in disk)
    checkpoints = f"{size} each, at most {needed} in {args.out_dir}, where {free} are free"
    lines = [
        ("device", f"{ranks} x {hardware['device']}, {hardware['cpu_count']} cores of {hardware['cpu']}"),
        ("compute", f"torch {about['versions']['torch']}, {how}"),
        (
            "model",
            f"{about['params']:,} parameters: {args.n_layer} layers, {args.n_head} heads, width "
            f"{args.n_embd}, context {args.block_size}, {args.vocab_size:,} token ids",
        ),
        (
            "batch",
            f"{args.total_batch_size:,} tokens per step: {args.batch_size} sequences x {args.block_size} "
            f"tokens x {ranks} rank(s) x {args.total_batch_size // micro_batch} micro-step(s)",
        ),
        (
            "run",
            f"{args.max_steps:,} steps, {tokens:,} tokens, {tokens / epoch_tokens:.2f} epochs of "
            f"{epoch_tokens:,} in {args.data_dir}",
        ),
        ("checkpoints", checkpoints if args.checkpoint_every else "none"),
    ]
    for group in about["groups"]:
        what = f"{group['params']:,} {group['name']}, peak learning rate {group['lr']:.2e}"
        lines.append((group["optimizer"], f"{what}, weight decay {group['weight_decay']:g}"))
    return "\n".join(f"{name:12} {text}" for name, text in lines)


def describe_step(step: int, record: dict, seconds_left: float) -> str:
    """Return the console line of a training step, in columns."""
    return (
        f"step {step:5d} | loss {record['loss']:7.4f} | lr {record['lr']:.2e} | norm {record['norm']:7.3f} | "
        f"{record['dt_ms']:8.1f} ms | {record['tokens_per_s']:9,.0f} tok/s"
        + (f" | mfu {record['mfu']:5.1%}" if record["mfu"] else "")
        + f" | left {tqdm.format_interval(seconds_left)}"
    )


def describe_evaluation(step: int, kind: str, record: dict) -> str:
    """Return the console lines of a validation, a HellaSwag evaluation or samples."""
    if kind == "val":
        return f"step {step:5d} | val  {record['loss']:7.4f}"
    if kind == "hellaswag":
        scores = f"{record['acc_norm']:.2%} (acc_norm), {record['acc']:.2%} (acc)"
        return f"step {step:5d} | hellaswag {scores}"
    return "".join(f"step {step:5d} | sample\n{text}\n\n" for text in record["texts"])
