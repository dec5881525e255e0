"""What a run leaves behind besides checkpoints: log.jsonl, TensorBoard, Weights & Biases, console, picture.

log = Log(out_dir, args, start_step=0, last_step=False)
log(step, "val", loss=3.05)             # a record in log.jsonl, and a line on the console
"""

import argparse
import contextlib
import html
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.cli import shell_word
from runtime.files import FolderLock, check_folder, is_same_file, write_atomically
from runtime.hardware import describe_machine
from runtime.log import read_records

PLOT = Path(__file__).parent.parent / "plot.py"
PICTURE_EVERY_S = 30.0  # drawing takes a second, and small models write checkpoints more often than this
FEW_EPOCHS, MANY_EPOCHS = 0.1, 10.0
LONG_RUN_S = 2 * 86400.0
PICTURE_TIMEOUT_S = 120.0  # the next checkpoint waits for a picture that hangs


def check_packages(args: argparse.Namespace) -> None:
    """Raise ValueError, with a line for each, if packages that the options need are not installed."""
    wanted = [package for package in ("tensorboard", "wandb") if getattr(args, package)]
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        lines = [f"--{name} needs a package that is not installed: pip install {name}" for name in missing]
        raise ValueError("\n".join(lines))


class RunFolder(contextlib.ExitStack):
    """The folder of a run, which is locked while the run writes to it. `name` and `path` are what it is now.

    A run whose folder is deleted, moved or replaced continues in a new one, see `ensure`. Whatever writes to
    the folder registers its end with `callback`, so that it ends before the lock is released.
    """

    def __init__(self, out_dir: str | Path):
        super().__init__()
        self.name, self.path = str(out_dir), Path(out_dir).absolute()
        self.lock, self.status, self.mutex = FolderLock(self.path), None, threading.Lock()
        self.callback(lambda: self.lock.release())

    def _acquire(self) -> None:
        """Create the folder if it does not exist, and lock it. Raises ValueError if it is in use."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.folder = self.path
        self.lock.acquire()
        self.status = os.stat(self.path)

    def check(self, data_dir: str, lock: bool) -> None:
        """Check that the folder can be that of a run, and `lock` it if it exists.

        It has to be writable, and must not contain what a new run, which renames it, would take away. Raises
        OSError if it cannot be written, and ValueError if another run uses it.
        """
        path = self.path.resolve()
        if Path.cwd().is_relative_to(path):
            raise ValueError(f"--out_dir {self.name} contains the working directory: use another folder")
        if Path(data_dir).resolve().is_relative_to(path):
            raise ValueError(f"--out_dir {self.name} contains --data_dir: use another folder")
        check_folder(path)
        if lock and path.exists():
            self._acquire()

    def free_name(self) -> Path:
        """Return the folder's name with .1, .2, … appended, whichever is free first."""
        names = (self.path.with_name(f"{self.path.name}.{number}") for number in itertools.count(1))
        return next(path for path in names if not path.exists())

    def begin(self, is_new: bool) -> None:
        """Create and lock the folder of a run. If a new one finds another run in it, that is renamed."""
        self._acquire()
        if is_new and ((self.path / "log.jsonl").exists() or any(self.path.glob("model_*.pt"))):
            if os.name == "nt":  # Windows does not rename folders with open files
                self.lock.release()
            self.lock.folder = old = self.path.rename(self.free_name())
            print(f"renamed the run in {self.path} to {old} (--resume would have continued it)")
            self.lock.release()
            self._acquire()

    def nothing_to_resume(self) -> str:
        """Return the line that says so, and names the folder beside this one that has a checkpoint."""
        line = f"nothing to resume in {self.name}: starting a new run"
        if (self.path / "log.jsonl").exists():
            line += ", with the options of the one there, which has no checkpoint"
        with contextlib.suppress(OSError):  # another run may be deleting its checkpoints
            newest = max(self.path.parent.glob("*/model_*.pt"), key=os.path.getmtime, default=None)
            line += f" (there is one in {Path(self.name).with_name(newest.parent.name)})" if newest else ""
        return line

    def ensure(self) -> bool:
        """If the folder is gone, make it again; if there is another one in its place, use a free name.

        Return whether that has happened.
        """
        with self.mutex:
            if self.lock.is_held():
                return False
            if self.path.exists() and os.path.samestat(self.status, os.stat(self.path)):
                self._acquire()  # only the file of the lock was removed
                return False
            was = self.path
            if was.exists():
                self.path = self.free_name()
                self.name = str(self.path)
            tqdm.write(f"warning: {was} was deleted, moved or replaced: the run continues in {self.path}")
            self._acquire()
            return True


def is_measured_again(record: dict, args: argparse.Namespace, start_step: int, last_step: bool) -> bool:
    """Return whether a run that is resumed at `start_step` replaces this record of its log.

    It repeats every step from `start_step` on. At that step itself, it repeats only the evaluations that its
    options ask for, or all of them if it is the `last_step`, which also gets another checkpoint.
    """
    step, kind = record["step"], record["kind"]
    if kind in ("run", "end"):
        return kind == "end"
    if step != start_step or kind == "train":
        return step >= start_step
    if kind == "checkpoint":
        return last_step
    every = getattr(args, f"{kind}_every", 0)
    return every > 0 and (step % every == 0 or last_step)


class Log:
    """The records of a run: log.jsonl and the console, and TensorBoard and Weights & Biases if asked for.

    When a run is resumed, the records that it measures again and a line that was cut short are removed from
    log.jsonl and hidden in TensorBoard. At Weights & Biases the run continues under its old id, unless the
    environment sets WANDB_RUN_ID.

    What cannot be written, because the disk is full, is kept and written later, except for TensorBoard.
    Raises ValueError if Weights & Biases refuses to start.
    """

    def __init__(self, folder: RunFolder, args: argparse.Namespace, start_step: int, last_step: bool):
        self.folder, self.args, self.start_step = folder, args, start_step
        self.lock, self.unwritten, self.is_failing = threading.Lock(), b"", False
        path = folder.path / "log.jsonl"
        kept, wandb_id = [], None
        for record in read_records(path) if path.exists() else ():
            with contextlib.suppress(KeyError, TypeError):
                if not is_measured_again(record, args, start_step, last_step):
                    kept.append(record)
                    wandb_id = record.get("wandb") or wandb_id
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))
        self.file = open(path, "ab+", buffering=0)
        self.tensorboard = self.wandb = None
        if args.tensorboard:
            self._start_tensorboard(kept)
        if args.wandb:
            import wandb

            project = os.environ.get("WANDB_PROJECT", "gpt2")
            about = dict(id=os.environ.get("WANDB_RUN_ID", wandb_id), resume="allow")
            try:
                self.wandb = wandb.init(project=project, dir=folder.path, **about)
            except wandb.errors.Error as error:
                message = f"Weights & Biases: {error} (without an account: WANDB_MODE=offline)"
                raise ValueError(" ".join(message.split())) from error
            for metric in ("train/*", "checkpoint/*", "end/*", "sample/*"):
                self.wandb.define_metric(metric, step_metric="step")  # its own step counter cannot go back
            for metric in ("val/*", "hellaswag/*"):
                self.wandb.define_metric(metric, step_metric="tokens")
        # disable=None shows the bar on a terminal only.
        self.bar = tqdm(total=args.max_steps, initial=start_step, unit="step", disable=None)
        self.first_step_began: float | None = None
        self.drawn = time.monotonic()

    def __call__(self, step: int, kind: str, **values) -> None:
        """Add a record and print its line. Numbers that are not finite become null: JSON has none."""
        self._record(step, kind, values)
        if kind == "train":
            now = time.perf_counter()
            if self.first_step_began is None:
                self.first_step_began = now - values["dt_ms"] / 1000
            if step % self.args.log_every == 0:
                # The mean includes evaluations.
                mean_s = (now - self.first_step_began) / (step + 1 - self.start_step)
                left_s = mean_s * (self.args.max_steps - step - 1)
                tqdm.write(describe_step(step, values, left_s))
                rest_s = values["dt_ms"] / 1000 * (self.args.max_steps - step - 1)  # without compilation
                if rest_s > LONG_RUN_S and 0 < step - self.start_step <= self.args.log_every:
                    tqdm.write(
                        f"warning: at this speed, the rest of the run takes {rest_s / 86400:.0f} days: lower "
                        "--max_steps, or use --dry_run to see how long another machine would take"
                    )
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
            self.unwritten += json.dumps({"step": step, "kind": kind, **values}).encode() + b"\n"
            self._write()
            numbers = self._report(step, kind, **values)
            if self.wandb:
                numbers |= {"tokens": values["tokens"]} if "tokens" in values else {}
                if texts := printable(values.get("texts")):
                    import wandb

                    boxes = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
                    numbers["sample/texts"] = wandb.Html(boxes)
                self.wandb.log({"step": step, **numbers})

    def _write(self) -> None:
        """Append what has not been written yet. After an error, the next record tries again."""
        try:
            self._follow()
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.is_failing = False
        except OSError as error:
            if not self.is_failing:
                tqdm.write(f"warning: cannot write {self.file.name} ({error.strerror}); training continues")
            self.is_failing = True

    def _follow(self) -> None:
        """Continue in a new file if log.jsonl was deleted, moved or replaced; what was in it is kept."""
        path = self.folder.path / "log.jsonl"
        if is_same_file(path, self.file):
            return
        is_new = self.folder.ensure()
        path = self.folder.path / "log.jsonl"
        before = b""
        if not path.exists():
            self.file.seek(0)
            before = self.file.read()
        file = open(path, "ab+", buffering=0)
        tqdm.write(f"warning: {self.file.name} was deleted, moved or replaced: continuing in {path}")
        self.file.close()
        self.file, self.unwritten = file, before + self.unwritten
        if self.tensorboard and is_new:
            self._start_tensorboard([])

    def _start_tensorboard(self, records: list[dict]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder.path / "tensorboard"
        # Hides what was reported at this step and later ones, be they training steps or tokens.
        self.tensorboard = SummaryWriter(folder, purge_step=self.start_step, flush_secs=10)
        for record in records if self.start_step else ():
            if record["step"] == self.start_step:
                self._report(**record)
            elif isinstance(record.get("tokens"), int) and record["tokens"] >= self.start_step:
                self._report_by_tokens(**record)

    def _report(self, step: int, kind: str, **values) -> dict[str, float]:
        """Return the numbers of a record by the names of their curves, and send it to TensorBoard."""
        rates = {f"lr {name}": rate for name, rate in values.get("lrs", {}).items()}
        shown = {name: value for name, value in {**values, **rates}.items() if name != "tokens"}
        numbers = {f"{kind}/{k}": v for k, v in shown.items() if isinstance(v, int | float)}
        try:
            for name, value in numbers.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name, value, step)
            if self.tensorboard:
                self._report_by_tokens(kind, **values)
            if self.tensorboard and (texts := printable(values.get("texts"))):
                code = "\n\n---\n\n".join(textwrap.indent(text, "    ") for text in texts)  # not Markdown
                self.tensorboard.add_text("sample", code, step)
        except OSError as error:  # its writer gives up after the first one
            tqdm.write(f"warning: TensorBoard's files end at step {step} ({error}); log.jsonl goes on")
            self.tensorboard = None
        return numbers

    def _report_by_tokens(self, kind: str, **values) -> None:
        """Send what an evaluation has measured to TensorBoard again, at the tokens seen until then."""
        name = {"val": "loss", "hellaswag": "acc_norm"}.get(kind)
        if isinstance(values.get(name), int | float) and isinstance(values.get("tokens"), int):
            self.tensorboard.add_scalar(f"by tokens/{kind} {name}", values[name], values["tokens"])

    def checkpoint(self, step: int, **values) -> None:
        """Record a checkpoint and, if the picture is old, redraw it. Called in the background."""
        self(step, "checkpoint", **values)
        if time.monotonic() - self.drawn > PICTURE_EVERY_S:
            self.draw()
            self.drawn = time.monotonic()

    def draw(self) -> Path:
        """Draw the curves of the run. A failure to draw does not end the run.

        A long log takes seconds and a gigabyte to draw, which should not be those of the training process.
        """
        try:
            command = [sys.executable, PLOT, self.folder.path]
            subprocess.run(command, capture_output=True, text=True, timeout=PICTURE_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            tqdm.write(f"warning: no picture of the loss: {reason}")
        return self.folder.path / "loss.png"

    def report_end(self, step: int, overfit_loss: float | None, stopped: bool) -> None:
        """Print how the run has ended and what to do next. Draws its picture if it went to its end."""
        if stopped:
            again = f"python train.py --resume --out_dir {shell_word(self.folder.name)} continues"
            if self.args.overfit_batch:
                again = "the check has no result"
            elif not self.args.checkpoint_every:
                again = "with --checkpoint_every 0 there is nothing to resume"
            tqdm.write(f"stopped by a signal before step {step}: {again}")
        elif overfit_loss is not None:
            tqdm.write(f"overfit check passed: loss {overfit_loss:.4f} after {step} steps")
        else:
            model, prompt = shell_word(self.folder.name), shell_word(self.args.sample_prompt)
            tqdm.write(f"loss curve: {self.draw()}")
            report = shell_word(f"{self.folder.name}/report.html")
            tqdm.write(f"report:     python plot.py {model} --output {report}")
            tqdm.write(f"next:       python sample.py --model {model} --prompt {prompt}")

    def close(self) -> None:
        """Write what is still unwritten, also by TensorBoard and Weights & Biases, and remove the bar."""
        self.bar.close()
        with self.lock:
            self._write()
        self.file.close()
        if lost := self.unwritten.count(b"\n"):
            tqdm.write(f"warning: the last {lost} records could not be written to {self.file.name}")
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def printable(texts: list[str] | None) -> list[str]:
    """Return texts, with what UTF-8 cannot hold replaced."""
    return [text.encode(errors="replace").decode() for text in texts or ()]


def about_run(args: argparse.Namespace, world_size: int, groups: list[dict], device: torch.device) -> dict:
    """Return the record of what a run is about to do; `groups` are those of the optimizer."""
    groups = describe_groups(groups, args.learning_rate)
    params = sum(group["params"] for group in groups)
    about = dict(args=vars(args), world_size=world_size, params=params, groups=groups)
    return about | describe_machine(device)


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


def describe_run(
    args: argparse.Namespace,
    about: dict,
    how: str,
    epoch_tokens: int,
    val_tokens: int,
    item_tokens: int,
    disk: tuple[int, int, int],
) -> str:
    """Return what a run is about to do, one line per thing that its user may want to change, and warnings.

    `about` is the record of kind `run`. A validation reads `val_tokens`, and the HellaSwag items have
    `item_tokens`; `disk` comes from `disk_usage`.
    """
    hardware, ranks = about["hardware"], about["world_size"]
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
        what = f"{group['params']:,} {group['name']}, learning rate up to {group['lr']:.2e}"
        lines.append((group["optimizer"], f"{what}, weight decay {group['weight_decay']:g}"))
    warnings = what_disappoints(args, tokens / epoch_tokens, val_tokens, item_tokens)
    lines += [("warning", text) for text in warnings]
    if args.eval_only:
        lines = [line for line in lines if line[0] in ("device", "compute", "model")]
    return "\n".join(f"{name:12} {text}" for name, text in lines)


def what_disappoints(args: argparse.Namespace, epochs: float, val_tokens: int, item_tokens: int) -> list[str]:
    """Return a line for each thing about a run, or its rehearsal, that its user will probably regret."""
    if args.overfit_batch:
        return []
    lines = []
    if epochs < FEW_EPOCHS:
        lines.append(f"only {epochs:.1%} of the training data will be read: raise --max_steps if you can")
    if epochs > MANY_EPOCHS and not args.early_stop:
        lines.append(f"{epochs:.0f} epochs memorize the text: lower --max_steps or use --early_stop")
    pairs = ((val_tokens, args.val_every), (item_tokens, args.hellaswag_every))
    # A step of training takes three times as long as the forward pass over its tokens.
    share = sum(tokens / every for tokens, every in pairs if every) / (3 * args.total_batch_size)
    if share > 1:
        lines.append(
            f"evaluations will take about {share:.1f} times as long as the training between them: raise "
            "--val_every and --hellaswag_every, or lower --val_tokens and --hellaswag_limit"
        )
    return lines


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
