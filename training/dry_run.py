"""What --dry_run does: prove that this machine trains correctly, and forecast the run from a few steps.

It writes nothing. What it measures are the functions that the loop of train.py calls. `run` is its Run, and
every rank has to call what takes one.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from diagnosis.published import name_of
from runtime import hardware
from runtime.cli import watched, watching
from runtime.distributed import Distributed, together
from runtime.machine import process_age
from training.checkpoints import to_host, training_state
from training.describe import NAMES
from training.prepare import common_tokens
from training.records import speed_of

# What rounding may do to the gradient of a tensor, relative to its norm. On CPUs it was at most 0.8 % (bf16)
# and 0.1 % (fp16) for new models, and 6 and 1 % for one that had converged (LOG.md). fp32 includes TF32.
ALLOWED = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.12}
FP16_SCALE = 1024.0  # keeps small gradients from vanishing, and large ones finite
MICRO_STEP_S, STEPS_S, EVALUATION_S = 8.0, 15.0, 2.0  # about how long a measurement may take
MOST_STEPS = 500
UNSTEADY = 2.0  # the slowest tenth of the steps takes this many times as long as the fastest
SLOW_DATA = 0.03  # from this share of a step on, waiting for data is worth a word

Batch = tuple[torch.Tensor, torch.Tensor]


def gradients(
    run, model: torch.nn.Module, batches: list[Batch], reduced: bool = False
) -> dict[str, torch.Tensor]:
    """Return the mean gradient of batches with equally many targets: copies on the host, by tensor.

    Each batch is a micro-step of `model`. If that is in DDP, the last one averages over the ranks if the
    result is to be `reduced`.
    """
    scale = FP16_SCALE if run.dtype == torch.float16 else 1.0
    for i, (x, y) in enumerate(batches):
        alone = hasattr(model, "no_sync") and not (reduced and i == len(batches) - 1)
        reducing = model.no_sync() if alone else contextlib.nullcontext()
        with run.attention(), reducing:
            with run.autocast:
                loss = model(x, y)[1]
            (scale / len(batches) * loss).backward()
    found = {name: p.grad.div(scale).cpu() for name, p in run.raw_model.named_parameters()}
    run.raw_model.zero_grad()
    return found


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the largest difference of a tensor, relative to the norm of `theirs`, and the tensor's name.

    It is infinite where one of the two is not finite.
    """
    differences = {}
    for name, gradient in theirs.items():
        norm, difference = gradient.norm().item(), (ours[name] - gradient).norm().item()
        ratio = difference / norm if norm else math.inf if difference else 0.0
        differences[name] = ratio if math.isfinite(ratio) else math.inf
    worst = max(differences, key=differences.get)
    return differences[worst], worst


def keep_targets(batch: Batch, first: int, end: int) -> Batch:
    """Return a batch of which only some of the (flattened) targets count."""
    x, y = batch
    kept = torch.full_like(y, -100)
    kept.view(-1)[first:end] = y.view(-1)[first:end]
    return x, kept


@watching("comparing gradients")
def check_gradients(run) -> None:
    """Compute the gradient of a micro-batch in ways that have to agree, and print how much they differ.

    Compiled code is compared with eager code, which takes a part of the rows at a time and so needs no more
    memory; two micro-steps that each count half of the targets with a single one; and what DDP reduces with
    what the main rank computes alone, from the batches of all ranks. Raises ValueError for a difference above
    `ALLOWED`.
    """
    dist, raw_model, model, data, found = run.dist, run.raw_model, run.model, run.train_data, {}
    dtype_name = str(run.dtype).removeprefix("torch.")
    start = data.window
    with data.reading():
        batches = data.next_batches()

    raw_model.train(raw_model.config.dropout == 0)  # dropout would draw other numbers each time
    x, y = batch = batches[0]
    once = gradients(run, model, [batch])
    if run.is_compiled:
        rows = max(n for n in range(1, max(len(x) // 4, 1) + 1) if len(x) % n == 0)
        parts = zip(x.split(rows), y.split(rows), strict=True)
        found["compiled and eager"] = largest_difference(once, gradients(run, raw_model, list(parts)))
    even = once
    if half := y.numel() // 2:
        if y.numel() % 2:
            even = gradients(run, model, [keep_targets(batch, 0, 2 * half)])
        halves = [keep_targets(batch, first, first + half) for first in (0, half)]
        found["two micro-steps and one"] = largest_difference(gradients(run, model, halves), even)
    if dist.world_size > 1:
        del once, even  # each takes the memory of the weights
        with together(dist):
            if dist.is_main:  # first, because DDP's forward pass is a collective after its first reduction
                alone = gradients(run, model, batches_of_all_ranks(data, start))
        reduced = gradients(run, model, [batch], reduced=True)
        if dist.is_main:
            found[f"{dist.world_size} ranks and one"] = largest_difference(reduced, alone)
    raw_model.train()
    data.seek(start)

    without = ", without dropout" if raw_model.config.dropout else ""
    limit, wrong = f"{dtype_name} allows {ALLOWED[run.dtype]:.0%}", []
    advice = "--no-compile, " if run.is_compiled else ""
    for what, (difference, tensor) in found.items():
        size = f"{difference:.2%}" if math.isfinite(difference) else "what is not a finite number"
        dist.say(f"{'gradients':12} {what} differ by at most {size}, in {tensor}; {limit}{without}")
        if difference > ALLOWED[run.dtype]:
            wrong.append(
                f"wrong gradients: {what} differ by {size} in {tensor}, where {limit}. Do not train like "
                f"this: try {advice}another --dtype or other versions of torch and driver"
            )
    if wrong := dist.union(wrong):
        raise dist.leave_with_error("\n".join(wrong))


def batches_of_all_ranks(data, start: int) -> list[Batch]:
    """Return the micro-batch that each rank reads from a window on."""
    batches = []
    for rank in range(data.dist.world_size):
        data.seek(start + (rank - data.dist.rank) * data.batch_size)
        batches += data.next_batches()
    return batches


class Stopwatch:
    """Measures calls. All ranks get the same times, so that they can decide by them."""

    def __init__(self, dist: Distributed):
        self.dist = dist

    def __call__(self, call: Callable, *args) -> float:
        """Return the mean over the ranks of the seconds that a call takes."""
        hardware.synchronize(self.dist.device)
        started = time.perf_counter()
        call(*args)
        hardware.synchronize(self.dist.device)
        (seconds,) = self.dist.sum(time.perf_counter() - started)
        return seconds / self.dist.world_size

    @watching("measuring an evaluation")
    def extrapolate(self, call: Callable[[int], object], whole: int) -> float:
        """Return the seconds of call(whole), measured with a smaller number if that would take long.

        call(1) warms up, and compiles what has to be compiled.
        """
        self(call, n := 1)
        while (seconds := self(call, n)) < EVALUATION_S and n < whole:
            n = min(4 * n, whole)
        return seconds * whole / n


@watching("measuring steps")
def time_steps(run, train_step: Callable, stopwatch: Stopwatch) -> tuple[list[float], list[dict]]:
    """Return the seconds of a few steps, after two to warm up, and the records of all.

    Of a step that takes long, only some micro-steps are taken, and the result is extrapolated: what a step
    costs beyond them, for the optimizer, is small then.
    """
    args, data, records = run.args, run.train_data, []
    micro_batch = data.batch_size * data.block_size * run.dist.world_size
    micro_steps = run.planned_tokens / args.max_steps / micro_batch

    def timed(n: int) -> float:
        return stopwatch(lambda: records.append(train_step(run, run.progress.step, micro_steps=n)))

    for _ in range(2):
        short = timed(1)
    n = max(min(int(micro_steps), int(STEPS_S / short)), 1)
    seconds = [timed(n)]
    while sum(seconds) < STEPS_S and len(seconds) < MOST_STEPS:
        seconds.append(timed(n))
    return [each * micro_steps / n for each in seconds], records


@watching("measuring a micro-step")
def cut_batch_size(run, stopwatch: Stopwatch) -> int:
    """Lower the batch size of the loaders if a micro-step would take long, and return it.

    On GPUs no micro-step takes long.
    """
    data, start = run.train_data, run.train_data.window
    if run.dist.device.type == "cuda":
        return data.batch_size
    with data.reading():
        row = [each[:1] for each in data.next_batches()[0]]

    def forward_and_backward() -> None:
        with run.attention():
            with run.autocast:
                loss = run.raw_model(*row)[1]
            loss.backward()

    stopwatch(forward_and_backward)  # warms up
    seconds = min(stopwatch(forward_and_backward) for _ in range(3))
    run.raw_model.zero_grad()
    for each in (data, run.val_data):
        each.batch_size = max(min(each.batch_size, int(MICRO_STEP_S / seconds)), 1)
    data.seek(start)
    return data.batch_size


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def suggest(run, waiting: float, step_tokens: int) -> list[str]:
    """Return what would obviously help.

    `waiting` is the share of a step that waits for data, and every step takes a multiple of `step_tokens`.
    """
    micro_batch = run.args.batch_size * run.args.block_size * run.dist.world_size
    args, found, device = run.args, [], run.dist.device
    if device.type == "cuda" and not run.is_compiled:
        found.append("eager code is slow on GPUs: use --compile")
    if device.type == "cpu" and run.dtype != torch.float32 and not hardware.computes_in(run.dtype, device):
        found.append(f"this CPU only emulates {args.dtype}: use --dtype float32")
    if waiting > SLOW_DATA:
        found.append(f"steps wait for data: copy {args.data_dir} to a local disk")
    if device.type == "cuda" and step_tokens % (2 * micro_batch) == 0:
        peak, left = hardware.memory(device)
        if left > peak:  # even if everything grew with the batch, the weights included
            found.append(f"--batch_size {2 * args.batch_size} fits, and may be faster")
    return found


def rehearse(run, train_step: Callable, evaluations: list, tokens_at: Callable) -> None:
    """Check gradients, measure each part of the run and print what the whole will take.

    `train_step`, `evaluations` and `tokens_at` are those of train.py.
    """
    args, dist, stopwatch, step = run.args, run.dist, Stopwatch(run.dist), run.progress.step
    if step == args.max_steps:
        return dist.say(f"the run in {args.out_dir} is at its last step: use a larger --max_steps")
    start_s = process_age() - hardware.compilation_seconds()
    batch_size, cut = cut_batch_size(run, stopwatch), ""
    if batch_size < args.batch_size:
        cut = f", measured with --batch_size {batch_size}: {args.batch_size} would take long here"
    check_gradients(run)

    hardware.forget_peak_memory(dist.device)
    waited_s, started = run.train_data.waited_s, time.perf_counter()
    tokens_left = sum(tokens_at(later, args) for later in range(step, args.max_steps))
    step_seconds, records = time_steps(run, train_step, stopwatch)
    waiting = (run.train_data.waited_s - waited_s) / (time.perf_counter() - started)
    step_s = statistics.mean(step_seconds)
    speed = speed_of(run, run.planned_tokens / args.max_steps, step_s)
    parts = [f"{speed['tokens_per_s']:,.0f} tokens/s", f"{duration(step_s)} a step"]
    parts.append(f"{waiting:.1%} of it waiting for data")
    if speed["mfu"]:
        parts.append(f"mfu {speed['mfu']:.1%}")
    dist.say(f"{'speed':12} {', '.join(parts)}{cut}")
    report_losses(dist, records, args.vocab_size)

    costs = [("steps", args.max_steps - step, tokens_left / speed["tokens_per_s"] / (args.max_steps - step))]
    for evaluation in evaluations:
        if every := getattr(args, f"{evaluation.kind}_every"):
            call = partial(evaluation.call, run)
            seconds = stopwatch.extrapolate(call, evaluation.size(run))
            name = name_of(evaluation.kind, run.benchmark.about)
            costs.append((NAMES.get(name, name), times_due(step, args.max_steps, every), seconds))
    if args.checkpoint_every:
        host: dict = {}
        # Any validation may be the best one so far; without validation, none is written at the start.
        times = times_due(step, args.max_steps, args.checkpoint_every, args.val_every)
        times -= not args.val_every and step % args.checkpoint_every == 0
        for _ in watched(range(2), "copying a checkpoint", "times"):  # the first one reserves the memory
            held_s = stopwatch(lambda: to_host(training_state(run), host) if dist.is_main else None)
        costs.append(("checkpoints", times, held_s * dist.world_size))
    if memory := hardware.memory(dist.device):
        used, left = (tqdm.format_sizeof(n, "B") for n in memory)
        each = f" on rank {dist.rank} of {dist.world_size}" if dist.world_size > 1 else ""
        dist.say(f"{'memory':12} {used} at the peak{each}, {left} left{cut}")
    costs.append(("start", 1, start_s))
    if run.is_compiled:
        costs.append(("compilation", 1, hardware.compilation_seconds()))
    forecast(run, costs)
    slowest = sorted(step_seconds)[int(0.9 * len(step_seconds))]
    if slowest > UNSTEADY * min(step_seconds):
        seconds = f"{duration(min(step_seconds))} to {duration(slowest)}"
        dist.say(f"{'suggestion':12} steps took {seconds}: measure again when nothing else is running")
    for suggestion in suggest(run, waiting, common_tokens(args, tokens_at)):
        dist.say(f"{'suggestion':12} {suggestion}")


def forecast(run, costs: list[tuple[str, int, float]]) -> None:
    """Print the parts of a run, each with its name, how often it is due and what it takes, and their sum.

    The first part is the training.
    """
    total = sum(times * seconds for _, times, seconds in costs)
    share = costs[0][1] * costs[0][2] / total
    for i, (name, times, seconds) in enumerate(costs):
        of = f"{times:,} x {duration(seconds)}"
        run.dist.say(f"{'' if i else 'forecast':12} {name:12} {of:>22} = {duration(times * seconds)}")
    end, cost = time.time() + total, ""
    end = time.strftime(", until %Y-%m-%d %H:%M if started now", time.localtime(end)) if end < 1e11 else ""
    if run.args.price:
        price = total / 3600 * run.dist.world_size * run.args.price
        cost = f", {price:,.2f} for {run.dist.world_size} rank(s) at {run.args.price:g} per GPU-hour"
    run.dist.say(f"{'':12} {duration(total)} in all, {share:.0%} of it training{end}{cost}")
    run.dist.say(f"{'':12} not counted: checkpoints are written in the background")


def report_losses(dist: Distributed, records: list[dict], vocab_size: int) -> None:
    """Print the losses of the steps that were taken. Raises ValueError if the last one is not finite."""
    losses = [record["loss"] for record in records]
    skipped = sum(not math.isfinite(record["norm"]) for record in records)
    skipped = f", {skipped} skipped because their gradients were not finite" if skipped else ""
    new = f"a new model starts near {math.log(vocab_size):.2f}"
    dist.say(f"{'loss':12} {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps{skipped}; {new}")
    if not math.isfinite(losses[-1]):
        raise dist.leave_with_error("the loss is not finite: lower --learning_rate")


def times_due(start: int, end: int, *intervals: int) -> int:
    """Return how many of the steps from `start` to `end` are multiples of an interval, or `end` itself."""

    def multiples(every: int) -> int:
        return end // every - -(-start // every) + 1

    every = [each for each in intervals if each]
    both = multiples(math.lcm(*every)) if len(every) == 2 else 0
    return sum(map(multiples, every)) - both + all(end % each for each in every)
