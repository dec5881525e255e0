"""What --dry_run does: prove that this machine trains correctly, and forecast the run from a few steps.

It writes nothing. What it measures are the functions that the loop of train.py calls.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from runtime import hardware
from runtime.distributed import Distributed
from training.checkpoints import to_host

# What rounding may do to the gradient of a tensor, relative to its norm. On CPUs it was at most 0.8 % (bf16)
# and 0.1 % (fp16) for new models, and 6 and 1 % for one that had converged (LOG.md). fp32 includes TF32.
ALLOWED = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.12}
FP16_SCALE = 1024.0  # keeps small gradients from vanishing, and large ones finite
MICRO_STEP_S, STEPS_S, EVALUATION_S = 8.0, 15.0, 2.0  # about how long a measurement may take
MOST_STEPS = 500
UNSTEADY = 2.0  # the slowest tenth of the steps takes this many times as long as the fastest
SLOW_DATA = 0.03  # from this share of a step on, waiting for data is worth a word

Batch = tuple[torch.Tensor, torch.Tensor]
Context = Callable[[], contextlib.AbstractContextManager]


def gradients(
    raw_model: torch.nn.Module,
    model: torch.nn.Module,
    batches: list[Batch],
    autocast: torch.autocast,
    attention: Context,
    sync: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the mean gradient of batches with equally many targets: copies on the host, by tensor.

    Each batch is a micro-step of `model`. If that is in DDP, `sync` averages over the ranks in the last one.
    """
    scale = FP16_SCALE if autocast.fast_dtype == torch.float16 else 1.0
    for i, (x, y) in enumerate(batches):
        alone = hasattr(model, "no_sync") and not (sync and i == len(batches) - 1)
        with attention(), model.no_sync() if alone else contextlib.nullcontext():
            with autocast:
                loss = model(x, y)[1]
            (scale / len(batches) * loss).backward()
    found = {name: p.grad.div(scale).cpu() for name, p in raw_model.named_parameters()}
    raw_model.zero_grad()
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


def check_gradients(
    dist: Distributed,
    dtype: torch.dtype,
    raw_model: torch.nn.Module,
    model: torch.nn.Module,
    loader,
    autocast: torch.autocast,
    attention: Context,
    is_compiled: bool,
) -> None:
    """Compute the gradient of a micro-batch in ways that have to agree, and print how much they differ.

    Compiled code is compared with eager code, which takes a part of the rows at a time and so needs no more
    memory; two micro-steps that each count half of the targets with a single one; and what DDP reduces with
    what the main rank computes alone, from the batches of all ranks. Raises ValueError for a difference above
    `ALLOWED`. A collective.
    """
    start, dtype_name, found = loader.window, str(dtype).removeprefix("torch."), {}

    def of(model: torch.nn.Module, *batches: Batch, sync: bool = False) -> dict[str, torch.Tensor]:
        return gradients(raw_model, model, batches, autocast, attention, sync)

    raw_model.train(raw_model.config.dropout == 0)  # dropout would draw other numbers each time
    x, y = batch = loader.next_batch()
    once = of(model, batch)
    if is_compiled:
        rows = max(n for n in range(1, max(len(x) // 4, 1) + 1) if len(x) % n == 0)
        parts = zip(x.split(rows), y.split(rows), strict=True)
        found["compiled and eager"] = largest_difference(once, of(raw_model, *parts))
    even = once
    if half := y.numel() // 2:
        even = of(model, keep_targets(batch, 0, 2 * half)) if y.numel() % 2 else once
        halves = [keep_targets(batch, first, first + half) for first in (0, half)]
        found["two micro-steps and one"] = largest_difference(of(model, *halves), even)
    if dist.world_size > 1:
        del once, even  # each takes the memory of the weights
        batches = []
        for rank in range(dist.world_size) if dist.is_main else ():
            loader.seek(start + rank * loader.batch_size)
            batches.append(loader.next_batch())
        if dist.is_main:  # first, because DDP's forward pass is a collective after its first reduction
            alone = of(model, *batches)
        reduced = of(model, batch, sync=True)
        if dist.is_main:
            found[f"{dist.world_size} ranks and one"] = largest_difference(reduced, alone)
    raw_model.train()
    loader.check()  # a batch that could not be read has wrong gradients
    loader.seek(start)

    without = ", without dropout" if raw_model.config.dropout else ""
    limit, wrong = f"{dtype_name} allows {ALLOWED[dtype]:.0%}", []
    advice = "--no-compile, " if is_compiled else ""
    for what, (difference, tensor) in found.items():
        size = f"{difference:.2%}" if math.isfinite(difference) else "what is not a finite number"
        dist.say(f"{'gradients':12} {what} differ by at most {size}, in {tensor}; {limit}{without}")
        if difference > ALLOWED[dtype]:
            wrong.append(
                f"wrong gradients: {what} differ by {size} in {tensor}, where {limit}. Do not train like "
                f"this: try {advice}another --dtype or other versions of torch and driver"
            )
    if wrong := dist.union(wrong):
        raise dist.leave_with_error("\n".join(wrong))


class Stopwatch:
    """Measures calls. All ranks get the same times, so that they can decide by them."""

    def __init__(self, dist: Distributed):
        self.dist = dist

    def __call__(self, call: Callable, *args) -> float:
        """Return the mean over the ranks of the seconds that a call takes. A collective."""
        hardware.synchronize(self.dist.device)
        started = time.perf_counter()
        call(*args)
        hardware.synchronize(self.dist.device)
        (seconds,) = self.dist.sum(time.perf_counter() - started)
        return seconds / self.dist.world_size

    def extrapolate(self, call: Callable[[int], object], whole: int, first: int = 1) -> float:
        """Return the seconds of call(whole), measured with a smaller number if that would take long.

        call(first) warms up, and compiles what has to be compiled.
        """
        self(call, n := min(first, whole))
        while (seconds := self(call, n)) < EVALUATION_S and n < whole:
            n = min(4 * n, whole)
        return seconds * whole / n


def time_steps(
    stopwatch: Stopwatch, take_step: Callable, step: int, accum: float
) -> tuple[list[float], list[tuple[float, float]]]:
    """Return the seconds of a few steps of `accum` micro-steps, after two to warm up, and what they returned.

    Of a step that takes long, only some micro-steps are taken, and the result is extrapolated: what a step
    costs beyond them, for the optimizer, is small then.
    """
    results: list[tuple[float, float]] = []

    def timed(micro_steps: int) -> float:
        return stopwatch(lambda: results.append(take_step(step, micro_steps)))

    for _ in range(2):
        short = timed(1)
    n = max(min(int(accum), int(STEPS_S / short)), 1)
    seconds = [timed(n)]
    while sum(seconds) < STEPS_S and len(seconds) < MOST_STEPS:
        seconds.append(timed(n))
    return [each * accum / n for each in seconds], results


def cut_batch_size(
    stopwatch: Stopwatch,
    raw_model: torch.nn.Module,
    loaders: dict,
    autocast: torch.autocast,
    attention: Context,
) -> int:
    """Lower the batch size of the loaders if a micro-step would take long, and return it. A collective.

    On GPUs no micro-step takes long.
    """
    loader, start = loaders["train"], loaders["train"].window
    if loader.dist.device.type == "cuda":
        return loader.batch_size

    def forward_and_backward() -> None:
        with attention():
            with autocast:
                loss = raw_model(*row)[1]
            loss.backward()

    row = [each[:1] for each in loader.next_batch()]
    stopwatch(forward_and_backward)  # warms up
    seconds = min(stopwatch(forward_and_backward) for _ in range(3))
    raw_model.zero_grad()
    for each in loaders.values():
        each.batch_size = max(min(each.batch_size, int(MICRO_STEP_S / seconds)), 1)
    loader.seek(start)
    return loader.batch_size


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def suggest(
    args: argparse.Namespace, dist: Distributed, dtype: torch.dtype, is_compiled: bool, waiting: float
) -> list[str]:
    """Return what would obviously help. `waiting` is the share of a step that waits for data."""
    found, device = [], dist.device
    if device.type == "cuda" and not is_compiled:
        found.append("eager code is slow on GPUs: leave out --no-compile")
    if device.type == "cpu" and dtype != torch.float32 and not hardware.computes_in(dtype, device):
        found.append(f"this CPU only emulates {args.dtype}: use --dtype float32")
    if waiting > SLOW_DATA:
        found.append(f"steps wait for data: copy {args.data_dir} to a local disk")
    micro_steps = args.total_batch_size // (args.batch_size * args.block_size * dist.world_size)
    if device.type == "cuda" and micro_steps % 2 == 0:
        peak, left = hardware.memory(device)
        if left > peak:  # even if everything grew with the batch, the weights included
            found.append(f"--batch_size {2 * args.batch_size} fits, and may be faster")
    return found


def rehearse(
    args: argparse.Namespace,
    dist: Distributed,
    dtype: torch.dtype,
    raw_model: torch.nn.Module,
    model: torch.nn.Module,
    autocast: torch.autocast,
    attention: Context,
    loaders: dict,
    examples: list,
    start_step: int,
    is_compiled: bool,
    *,
    take_step: Callable[[int, int], object],
    evaluate: Callable[[int], object],
    score: Callable[[list], object],
    write_samples: Callable[[int], object],
    state: Callable[[], dict],
) -> None:
    """Check gradients, measure each part of the run and print what the whole will take.

    The functions are those of the loop: `take_step(step, micro_steps)`, `evaluate(val_tokens)`,
    `score(examples)`, `write_samples(tokens)`, and `state()` for checkpoints. A collective.
    """
    loader, stopwatch, device = loaders["train"], Stopwatch(dist), dist.device
    if start_step == args.max_steps:
        return dist.say(f"the run in {args.out_dir} is at its last step: use a larger --max_steps")
    batch_size = cut_batch_size(stopwatch, raw_model, loaders, autocast, attention)
    cut = f", measured with --batch_size {batch_size}: {args.batch_size} would take long here"
    cut = cut if batch_size < args.batch_size else ""
    check_gradients(dist, dtype, raw_model, model, loader, autocast, attention, is_compiled)

    hardware.forget_peak_memory(device)
    windows = batch_size * dist.world_size  # of a micro-step
    waited_s, started = loader.waited_s, time.perf_counter()
    accum = args.total_batch_size / (windows * args.block_size)
    step_seconds, results = time_steps(stopwatch, take_step, start_step, accum)
    loader.check()
    waiting = (loader.waited_s - waited_s) / (time.perf_counter() - started)
    step_s = statistics.mean(step_seconds)
    speed, peak = args.total_batch_size / step_s, hardware.peak_flops(device, dtype)
    mfu = speed * raw_model.flops_per_token(args.block_size) / (peak * dist.world_size) if peak else None
    parts = [f"{speed:,.0f} tokens/s", f"{duration(step_s)} a step", f"{waiting:.1%} of it waiting for data"]
    dist.say(f"{'speed':12} {', '.join(parts + [f'mfu {mfu:.1%}'] if mfu else parts)}{cut}")
    report_losses(dist, results, args.vocab_size)

    def spread(n: int) -> list:
        return examples[:: len(examples) // n][:n]

    batches = math.ceil(loaders["val"].windows_for(args.val_tokens) / windows)
    evaluations = [
        ("validations", args.val_every, lambda n: evaluate(n * windows * args.block_size), batches, 1),
        ("HellaSwag", args.hellaswag_every, lambda n: score(spread(n)), len(examples), 8 * dist.world_size),
        ("samples", args.sample_every, write_samples, args.sample_tokens, 1),
    ]
    span = (start_step, args.max_steps)
    costs = [("steps", args.max_steps - start_step, step_s)]
    for name, every, call, whole, first in evaluations:
        if every:
            costs.append((name, times_due(*span, every), stopwatch.extrapolate(call, whole, first)))
    if args.checkpoint_every:
        host: dict = {}
        # Any validation may be the best one so far; without validation, none is written at the start.
        times = times_due(*span, args.checkpoint_every, args.val_every)
        times -= not args.val_every and start_step % args.checkpoint_every == 0
        for _ in range(2):  # the first one reserves the memory
            held_s = stopwatch(lambda: to_host(state(), host) if dist.is_main else None) * dist.world_size
        costs.append(("checkpoints", times, held_s))
    if memory := hardware.memory(device):
        used, left = (tqdm.format_sizeof(n, "B") for n in memory)
        each = f" on rank {dist.rank} of {dist.world_size}" if dist.world_size > 1 else ""
        dist.say(f"{'memory':12} {used} at the peak{each}, {left} left{cut}")
    total = sum(times * seconds for _, times, seconds in costs)
    for i, (name, times, seconds) in enumerate(costs):
        of = f"{times:,} x {duration(seconds)}"
        dist.say(f"{'' if i else 'forecast':12} {name:12} {of:>22} = {duration(times * seconds)}")
    end = time.time() + total
    end = time.strftime(", until %Y-%m-%d %H:%M if started now", time.localtime(end)) if end < 1e11 else ""
    price = total / 3600 * dist.world_size * args.price
    cost = f", {price:,.2f} at {args.price:g} per GPU-hour" if args.price else ""
    dist.say(f"{'':12} {duration(total)} in all{end}{cost}")
    dist.say(f"{'':12} not counted: start and compilation; checkpoints are written in the background")
    slowest = sorted(step_seconds)[int(0.9 * len(step_seconds))]
    if slowest > UNSTEADY * min(step_seconds):
        seconds = f"{duration(min(step_seconds))} to {duration(slowest)}"
        dist.say(f"{'suggestion':12} steps took {seconds}: measure again when nothing else is running")
    for suggestion in suggest(args, dist, dtype, is_compiled, waiting):
        dist.say(f"{'suggestion':12} {suggestion}")


def report_losses(dist: Distributed, results: list[tuple[float, float]], vocab_size: int) -> None:
    """Print the losses of the steps that were taken. Raises ValueError if the last one is not finite."""
    losses = dist.sum(*(loss / dist.world_size for loss, _ in results))
    skipped = sum(not math.isfinite(norm) for _, norm in results)
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
