"""What a run leaves behind: log.jsonl, TensorBoard, Weights & Biases, console, picture, and checkpoints.

    with Records(run, folder, evaluations, is_new=True, recent={}) as records:
        records.log(step, "val", loss=3.05)     # a record in log.jsonl, and a line on the console
        records.save(["model_00250.pt"])

`run` is the Run of train.py.
"""

import contextlib
import html
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

from tqdm import tqdm

from diagnosis.published import name_of
from diagnosis.watch import Watch
from runtime import hardware
from runtime.cli import LINE_EVERY_S, command_line, watching, with_these_ranks
from runtime.files import is_same_file, write_atomically
from runtime.launcher import environment_of_helpers
from runtime.log import read_records
from runtime.machine import idle_cores
from training.checkpoints import CheckpointWriter, is_last_step, is_sound, numbered, training_state
from training.describe import about_run
from training.folder import RunFolder

PLOT = Path(__file__).parent.parent / "plot.py"
PICTURE_EVERY_S = 30.0  # drawing takes a second, and small models write checkpoints more often than this
LONG_RUN_S = 2 * 86400.0
PICTURE_TIMEOUT_S = 120.0  # the next checkpoint waits for a picture that hangs


class Log:
    """The records of a run: log.jsonl and the console, and TensorBoard and Weights & Biases if asked for.

    When a run is resumed, the records that it measures again and a line that was cut short are removed from
    log.jsonl and hidden in TensorBoard. At Weights & Biases the run continues under its old id, unless the
    environment sets WANDB_RUN_ID.

    What cannot be written, because the disk is full, is kept and written later, except for TensorBoard.
    Raises ValueError if Weights & Biases refuses to start.
    """

    def __init__(self, run, folder: RunFolder, evaluations: list):
        args, start_step = run.args, run.progress.step
        self.folder, self.args, self.start_step = folder, args, start_step
        self.evaluations = {evaluation.kind: evaluation for evaluation in evaluations}
        self.lock, self.unwritten, self.is_failing = threading.Lock(), b"", False
        path = folder.path / "log.jsonl"
        kept, wandb_id, self.watch = [], None, Watch()
        for record in read_records(path) if path.exists() else ():
            with contextlib.suppress(KeyError, TypeError):
                if not self._is_measured_again(record, is_last_step(args, run.progress)):
                    kept.append(record)
                    wandb_id = record.get("wandb") or wandb_id
                    self.watch.feed(record)  # what it has said before is not said again
        self.watch.idle_cores = idle_cores
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
            for kind in ("train", "checkpoint", "end", *self.evaluations):
                axis = "tokens" if self._curve(kind) else "step"  # its own step counter cannot go back
                name = name_of(kind, run.benchmark.about)
                self.wandb.define_metric(f"{name}/*", step_metric=axis)
        # disable=None shows the bar on a terminal only.
        self.bar = tqdm(total=args.max_steps, initial=start_step, unit="step", disable=None)
        self.progress, self.planned_windows = run.progress, run.planned_tokens / args.block_size
        self.timed_from: tuple[float, int] | None = None  # end of the first step, and the windows until then
        self.shown_s, self.drawn = -math.inf, time.monotonic()  # when a step was shown, and the picture drawn
        self.is_forecast = False  # a line has said how long the rest will take

    def _curve(self, kind: str) -> str | None:
        """Return the number of an evaluation that is drawn."""
        return self.evaluations[kind].curve if kind in self.evaluations else None

    def _is_measured_again(self, record: dict, last_step: bool) -> bool:
        """Return whether a resumed run replaces this record of its log.

        It repeats every step from `start_step` on. At that step itself, it repeats only the evaluations that
        its options ask for, or all of them if it is the `last_step`, which also gets another checkpoint.
        """
        step, kind = record["step"], record["kind"]
        if kind in ("run", "end"):
            return kind == "end"
        if step != self.start_step or kind == "train":
            return step >= self.start_step
        if kind == "checkpoint":
            return last_step
        every = getattr(self.args, f"{kind}_every") if kind in self.evaluations else 0
        return every > 0 and (step % every == 0 or last_step)

    def __call__(self, step: int, kind: str, **values) -> None:
        """Add a record and print its line, and warnings that follow from it.

        Numbers that are not finite become null: JSON has none.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        warnings = self.watch.feed({"step": step, "kind": kind, **finite})
        if kind == "val" and (distance := self.watch.distance()) is not None:
            finite["above_published"] = values["above_published"] = distance
        self._record(step, kind, finite)
        self._show(step, kind, values)
        for sign, text in warnings:
            tqdm.write(f"warning: {text}")
            self._record(step, "warning", {"sign": sign, "text": text})

    def _show(self, step: int, kind: str, values: dict) -> None:
        """Print the line of a record."""
        if kind == "train":
            # Also the first one, and as often as `watching` shows itself.
            if step % self.args.log_every == 0 or time.monotonic() - self.shown_s > LINE_EVERY_S:
                self.shown_s, left_s = time.monotonic(), self._seconds_left()
                tqdm.write(describe_step(step, values, left_s))
                is_first, self.is_forecast = not self.is_forecast, left_s is not None
                if is_first and self.is_forecast and left_s > LONG_RUN_S:
                    tqdm.write(
                        f"warning: at this speed, the rest of the run takes {left_s / 86400:.0f} days: lower "
                        "--max_steps, or use --dry_run to see how long another machine would take"
                    )
            self.timed_from = self.timed_from or (time.perf_counter(), self.progress.windows)
            self.bar.update()
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        elif kind in self.evaluations:
            beside = f", {self.watch.beside()}" if "above_published" in values else ""
            tqdm.write(f"step {step:5d} | {self.evaluations[kind].line(values)}{beside}")

    def _seconds_left(self) -> float | None:
        """Return the time until the end, evaluations included, or None at the first step, which compiles."""
        if self.timed_from is None:
            return None
        started, windows = self.timed_from
        each_s = (time.perf_counter() - started) / max(self.progress.windows - windows, 1)
        return each_s * max(self.planned_windows - self.progress.windows, 0)

    def _record(self, step: int, kind: str, values: dict) -> None:
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
        rates = {f"lr {name}": rate for name, rate in values.get("lrs", {}).items()}  # as in older runs
        left_out = ("tokens", "args", "lrs")
        shown = {name: value for name, value in {**values, **rates}.items() if name not in left_out}
        numbers = flat(name_of(kind, values), shown)
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
        name = self._curve(kind)
        if isinstance(values.get(name), int | float) and isinstance(values.get("tokens"), int):
            tag = f"by tokens/{name_of(kind, values)} {name}"
            self.tensorboard.add_scalar(tag, values[name], values["tokens"])

    def checkpoint(self, step: int, **values) -> None:
        """Record a checkpoint and, if the picture is old, redraw it. Called in the background."""
        self(step, "checkpoint", **values)
        if self.timed_from and time.monotonic() - self.drawn > PICTURE_EVERY_S:
            self.draw()
            self.drawn = time.monotonic()

    def draw(self) -> Path:
        """Draw the curves of the run. A failure to draw does not end the run.

        A long log takes seconds and a gigabyte to draw, which should not be those of the training process.
        """
        try:
            command = [sys.executable, PLOT, self.folder.path]
            options = dict(capture_output=True, text=True, timeout=PICTURE_TIMEOUT_S, check=True)
            subprocess.run(command, env=environment_of_helpers(), **options)
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            tqdm.write(f"warning: no picture of the loss: {reason}")
        return self.folder.path / "loss.png"

    def report_end(self, step: int, overfit_loss: float | None, stopped: bool) -> None:
        """Print how the run has ended and what to do next. Draws its picture if it went to its end."""
        if stopped:
            again = f"{with_these_ranks('train.py', '--resume', '--out_dir', self.folder.name)} continues"
            if self.args.overfit_batch:
                again = "the check has no result"
            elif not self.args.checkpoint_every:
                again = "with --checkpoint_every 0 there is nothing to resume"
            tqdm.write(f"stopped by a signal before step {step}: {again}")
        elif overfit_loss is not None:
            tqdm.write(f"overfit check passed: loss {overfit_loss:.4f} after {step} steps")
        else:
            for line in self.watch.lines():
                tqdm.write(f"verdict:    {line}")
            model, prompt = self.folder.name, self.args.sample_prompt
            with watching("drawing the loss curve"):
                picture = self.draw()
            tqdm.write(f"loss curve: {picture}")
            report = command_line("plot.py", model, "--output", f"{model}/report.html")
            sample = command_line("sample.py", "--model", model, "--prompt", prompt)
            tqdm.write(f"report:     {report}")
            tqdm.write(f"next:       {sample}")

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


def flat(name: str, value: object) -> dict[str, float]:
    """Return the numbers in nested dicts by their paths, such as train/norms/3."""
    if isinstance(value, dict):
        return {path: v for key, each in value.items() for path, v in flat(f"{name}/{key}", each).items()}
    return {name: value} if isinstance(value, int | float) else {}


def printable(texts: list[str] | None) -> list[str]:
    """Return texts, with what UTF-8 cannot hold replaced."""
    return [text.encode(errors="replace").decode() for text in texts or ()]


def describe_step(step: int, record: dict, seconds_left: float | None) -> str:
    """Return the console line of a training step, in columns."""
    return (
        f"step {step:5d} | loss {record['loss']:7.4f} | lr {record['lr']:.2e} | norm {record['norm']:7.3f} | "
        f"{record['dt_ms']:8.1f} ms | {record['tokens_per_s']:9,.0f} tok/s"
        + (f" | mfu {record['mfu']:5.1%}" if record["mfu"] else "")
        + (f" | left {tqdm.format_interval(seconds_left)}" if seconds_left is not None else "")
    )


class Records:
    """The log and the checkpoints of a run, which the main rank writes.

    `evaluations` are those of train.py, and `recent` is the list in the checkpoint that is resumed. At the
    end of a `with` block, everything is on disk. If shards could not be read, that includes a checkpoint: the
    weights are still those of the last step.
    """

    def __init__(self, run, folder: RunFolder, evaluations: list, is_new: bool, recent: dict[str, bool]):
        self.run, args = run, run.args
        folder.begin(is_new)
        milestone_steps = args.milestone_every * args.checkpoint_every
        self.log = Log(run, folder, evaluations)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.log.close)
            written = self.log.checkpoint  # which does not keep the run alive
            self.writer = CheckpointWriter(folder, args.keep, milestone_steps, written, recent)
            on_error.pop_all()
        self.check, self.newest, self.is_overdue = self.writer.check, self.writer.newest, False
        self.log(run.progress.step, "run", **about_run(run, evaluations))

    def save(self, names: list[str]) -> None:
        """Start writing a checkpoint of the present state under each of the names, if it is sound.

        One that is due while the state is not is written after the first step from which the run can go on.
        """
        run = self.run
        if not run.args.checkpoint_every or not (names or self.is_overdue):
            return
        if not is_sound(run):
            if not self.is_overdue:
                reason = "loss or gradients are not finite"
                tqdm.write(f"step {run.progress.step:5d} | {reason}: no checkpoint; --resume {self.newest()}")
            self.is_overdue = True
            return
        if self.is_overdue:
            names = sorted({*names, numbered(run.progress.step)}, reverse=True)
        self.is_overdue = False
        self.writer.save(names, training_state(run), run.dist.device)

    def finish(self) -> None:
        """Wait for the last checkpoint, and log the end of a run that no signal has stopped."""
        with watching("writing the last checkpoint"):
            self.writer.close()
        self.run.stop.restore()
        if not self.run.stopping:
            used = hardware.memory(self.run.dist.device)
            self.log(self.run.progress.step, "end", peak_bytes=used[0] if used else None)

    def report_end(self) -> None:
        """Print how the run has ended and what to do next."""
        run = self.run
        self.log.report_end(run.progress.step, run.loss if run.args.overfit_batch else None, run.stopping)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.ExitStack() as last:  # each of these also if one before it fails
            last.callback(self.log.close)
            last.callback(self.writer.pool.shutdown)
            if self.run.train_data.failed or self.run.val_data.failed:
                self.save([numbered(self.run.progress.step)])


def speed_of(run, tokens: int, seconds: float) -> dict[str, float | None]:
    """Return what a record says about the time that a step took; `mfu` is None for an unknown device."""
    speed, peak = tokens / seconds, hardware.peak_flops(run.dist.device, run.dtype)
    flops = speed * run.raw_model.flops_per_token(run.args.block_size)
    mfu = flops / (peak * run.dist.world_size) if peak else None
    return {"dt_ms": 1000 * seconds, "tokens_per_s": speed, "mfu": mfu}
