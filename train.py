"""Train GPT-2 from scratch on the token shards that fineweb.py writes.

    python train.py --preset demo                        # a laptop: no GPU, no network, some minutes
    python train.py                                      # GPT-2 (124M) on edu_fineweb10B/, one GPU
    torchrun --standalone --nproc_per_node=8 train.py    # the same run, step for step, on eight GPUs
    python train.py --dry_run                            # is this machine right for it, and how long?

Writes to --out_dir: log.jsonl (one record per step and evaluation), checkpoints (model_XXXXX.pt and
model_best.pt), loss.png, and tensorboard/ and wandb/ if asked for. Expect a first loss close to
ln(vocab_size): 10.8 for GPT-2. Published for the default run: a validation loss of about 3.05 and 30.4 % on
HellaSwag after 19,073 steps (build-nanogpt's log); OpenAI's GPT-2 scores 29.55 %.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import hellaswag
import sample
from corpus.shards import Shards, shuffled
from corpus.tokenizer import NAMES
from diagnosis.published import describe_scores
from model import GPT, GPTConfig
from muon import Muon
from runtime import hardware
from runtime.cli import (
    SEED,
    THIS_COMMAND,
    Parser,
    Range,
    of_this_command,
    user_path,
    visible,
    watched,
    watching,
)
from runtime.cli import run as run_script
from runtime.distributed import (
    Distributed,
    Interrupted,
    OnOtherRanks,
    StopSignal,
    no_hangs,
    setup_distributed,
    together,
)
from training import dry_run, eval_only, overfit
from training.checkpoints import (
    Progress,
    check_disk,
    is_last_step,
    numbered,
    restore,
)
from training.describe import describe_run
from training.folder import RunFolder
from training.options import parse_options
from training.prepare import (
    check_everything,
    first_words,
    fit_batch_size,
    limit_steps,
    load_pretrained,
    planned_tokens,
)
from training.records import Records, speed_of

XL_BATCH = dict(batch_size=8, total_batch_size=1048576, max_steps=9537)  # the same 10 billion tokens
MUON_WSD = dict(optimizer="muon", schedule="wsd", decay_share=0.5, min_lr=0.0)
# Learning rates and batch sizes of the larger models: Brown et al. 2020 (GPT-3), table 2.1.
PRESETS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, batch_size=32, learning_rate=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, batch_size=16, learning_rate=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4, **XL_BATCH),
    # Measured as a whole at small sizes only (LOG.md). That 45 % of the tokens suffice at this size is a
    # projection. 3.6e-3 is what modded-nanogpt used for the embeddings of a similar network in 10/2024; the
    # ratios are those of the small sizes, and beta1 is what its third track found for 124M weights.
    "speedrun": {
        **dict(n_layer=12, n_head=12, n_embd=768, warmup_steps=250, max_steps=8600, **MUON_WSD),
        **dict(milestone_every=1),  # a checkpoint before the fall of the rates can train on for longer
        **dict(learning_rate=3.6e-3, embedding_lr=1.08e-2, position_lr=9e-4, beta1=0.8, beta2=0.98),
    },
    # One's own text on a laptop; sizes and epochs follow from it. Context and rates were measured on bytes
    # (LOG.md, 2026-11-26). The prompt is the beginning of the validation text.
    "text": {
        **dict(block_size=128, batch_size=16, total_batch_size=2048),
        **dict(shuffle=True, dropout=0.1, learning_rate=1e-2, **MUON_WSD),
        **dict(max_steps=2000, warmup_steps=40, early_stop=5),
        **dict(val_every=100, val_tokens=65536, hellaswag_every=0, sample_every=500, sample_prompt=None),
        **dict(checkpoint_every=500, log_every=20),
    },
    # One's own text, from weights that can already write. The rate is that of Hugging Face's run_clm.py.
    "finetune": {
        **dict(init_from="gpt2", batch_size=4, total_batch_size=4096, learning_rate=5e-5, dropout=0.1),
        **dict(shuffle=True, epochs=3.0, max_steps=300, warmup_steps=10, early_stop=3),
        **dict(val_every=20, val_tokens=16384, hellaswag_every=0, sample_every=100, sample_prompt=None),
        **dict(checkpoint_every=100, log_every=5),
    },
    "demo": {
        **dict(n_layer=2, n_head=4, n_embd=128, block_size=64, batch_size=16, total_batch_size=1024),
        **dict(shuffle=True, learning_rate=1e-2, warmup_steps=50, max_steps=1600, **MUON_WSD),
        **dict(val_every=200, val_tokens=65536, hellaswag_every=800, hellaswag_data="demo"),
        **dict(sample_every=800, sample_prompt="import ", sample_tokens=300),
        **dict(checkpoint_every=800, log_every=50),
    },
}
# What a preset reaches on two cores (README.md). For the others, published runs may tell.
EXPECTED = {
    "demo": "on its own data, a validation loss of 1.30, in one to five minutes on two cores",
    "text": "a validation loss of 1.54 on bytes of Tiny Shakespeare, in six to nine minutes on two cores",
}
# --preset text: with fewer training tokens, the smaller model learns more in equal time (LOG.md, 2026-11-29).
FEW_TOKENS = 250_000
SMALL_GPT, LARGER_GPT = dict(n_layer=2, n_head=4, n_embd=64), dict(n_layer=4, n_head=4, n_embd=128)
CLASSIC_STEPS, CLASSIC_WARMUP_STEPS = 19073, 715  # Brown et al. 2020 (GPT-3), appendix B: 375M tokens


class DataLoaderLite:
    """Micro-batches of one split, in an order that depends only on the seed and the windows read so far.

    A shard holds (len - 1) // block_size windows. An epoch goes through the windows in file order or, with
    `shuffle_seed`, in an order drawn from it and the epoch. Each step takes the next windows, and each
    micro-step on each rank takes its slice of them. Therefore any number of ranks and any batch size train on
    the same windows, and resuming is just a `seek`. `description` tells data sets apart, `waited_s` is how
    long `next_batches` has waited for data, and `failed` says that a rank could not read it.

    Raises FileNotFoundError if there are no shards, and ValueError for a shard that is damaged, too short or
    holds ids outside a vocabulary of `vocab_size`.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        *,
        batch_size: int,
        block_size: int,
        vocab_size: int,
        dist: Distributed,
        shuffle_seed: int | None = None,
    ):
        self.batch_size, self.block_size, self.vocab_size = batch_size, block_size, vocab_size
        self.dist, self.shuffle_seed, self.waited_s = dist, shuffle_seed, 0.0
        self.shards, self.epoch, self.failed = Shards(data_dir, split, dist.say), 0, False
        windows = [max(tokens - 1, 0) // block_size for tokens in self.shards.lengths]
        self.first_windows = np.cumsum([0, *windows])  # index of each shard's first window in the epoch
        self.windows = int(self.first_windows[-1])
        if self.windows == 0:
            raise ValueError(
                f"no {split} shard in {data_dir}/ holds a window of {block_size} + 1 tokens: "
                "lower --block_size or give fineweb.py more text"
            )
        self.description = f"{self.windows:,} windows, shards {self.shards.digest[:12]}"
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{split}-loader")
        self.seek(0)
        self.pending.result()  # a wrong tokenizer usually shows in the first micro-batch

    def windows_for(self, tokens: int) -> int:
        """Return how many windows of the split are evaluated for this many tokens."""
        return min(max(tokens // self.block_size, 1), self.windows)

    def read(self, window: int) -> np.ndarray:
        """Return the block_size + 1 tokens of a window, counted in file order."""
        shard = int(np.searchsorted(self.first_windows, window, side="right")) - 1
        start = int(window - self.first_windows[shard]) * self.block_size
        tokens = self.shards.read(shard, start, start + self.block_size + 1)
        if (largest := tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.shards.paths[shard]} holds token id {largest}, but the vocabulary ends at "
                f"{self.vocab_size - 1}: set --tokenizer and --vocab_size to those of the shards"
            )
        return tokens

    def _read(self, first: int, micro_steps: int) -> torch.Tensor:
        """Return this rank's windows of a step: (micro_steps, batch_size, block_size + 1).

        `first` is the first window of the step over all ranks, counted since training began.
        """
        rows = np.empty((micro_steps, self.batch_size, self.block_size + 1), dtype=np.int64)
        for micro_step in range(micro_steps):
            start = first + (micro_step * self.dist.world_size + self.dist.rank) * self.batch_size
            for row in range(self.batch_size):
                epoch, window = divmod(start + row, self.windows)
                if epoch != self.epoch:
                    self.shards.warn_of_changes()
                    self.epoch = epoch
                if self.shuffle_seed is not None:
                    window = shuffled(window, self.windows, self.shuffle_seed, epoch)
                rows[micro_step, row] = self.read(window)
        rows = torch.from_numpy(rows)
        return rows.pin_memory() if self.dist.device.type == "cuda" else rows

    def seek(self, window: int, micro_steps: int = 1) -> None:
        """Continue at this window, counted over all ranks since training began, and prefetch from there."""
        self.window, self.prefetched = window, micro_steps
        self.pending = self.pool.submit(self._read, window, micro_steps)

    def next_batches(self, micro_steps: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return inputs and targets of some micro-steps, each (batch_size, block_size) int64 on the device.

        Raises OSError or ValueError if they cannot be read.
        """
        started = time.perf_counter()
        if self.prefetched != micro_steps:
            self.seek(self.window, micro_steps)
        rows = self.pending.result()
        self.waited_s += time.perf_counter() - started
        self.seek(self.window + micro_steps * self.dist.world_size * self.batch_size, micro_steps)
        # Only pinned rows may be copied asynchronously: MPS would read others after they have been freed
        # (pytorch/pytorch#189690).
        rows = rows.to(self.dist.device, non_blocking=self.dist.device.type == "cuda")
        # Contiguous, so that validation and training are compiled for the same layout.
        return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in rows]

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read in a block that every rank runs. If one of them cannot, the run ends on all."""
        try:
            with together(self.dist):
                yield
        except (ValueError, SystemExit):  # of the main rank, and of the others
            self.failed = True
            raise


@dataclass
class Run:
    """What the parts of a run share; data only."""

    args: argparse.Namespace
    dist: Distributed
    dtype: torch.dtype  # of autocast
    is_compiled: bool
    raw_model: GPT  # its weights are saved, and it samples and scores
    model: torch.nn.Module  # the same weights, compiled and in DDP: trains and validates, in fixed shapes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    attention: Callable[[], contextlib.AbstractContextManager]  # selects the kernel for training steps
    train_data: DataLoaderLite
    val_data: DataLoaderLite
    benchmark: hellaswag.Benchmark
    tokenizer: object  # None if nothing but validation is due
    planned_tokens: int  # of the whole run
    progress: Progress = field(default_factory=Progress)
    stop: StopSignal = field(default_factory=StopSignal)
    stopping: bool = False  # a rank has got a signal, and all know it
    loss: float | None = None  # of the last step
    skipped: int = 0
    skipped_in_row: int = 0


# The height above --min_lr, as a share of the peak's, with `left` steps to go of the `whole` after warm-up.
SCHEDULES = {
    "cosine": lambda left, whole, args: 0.5 * (1 - math.cos(math.pi * left / whole)),
    # Warm-up, stable, decay (Hu et al. 2024, MiniCPM). The decay is a share of all steps.
    "wsd": lambda left, whole, args: min(left / max(args.decay_share * args.max_steps, 1), 1),
}


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step: linear warm-up, then one of SCHEDULES down to --min_lr."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    left, whole = args.max_steps - step, max(args.max_steps - args.warmup_steps, 1)
    height = SCHEDULES[args.schedule](left, whole, args)
    return args.min_lr + height * (args.learning_rate - args.min_lr)


def tokens_at(step: int, args: argparse.Namespace) -> int:
    """Return how many tokens a step takes, over all ranks: a multiple of those in a micro-step."""
    return args.total_batch_size


OPTIMIZERS = {
    "adamw": lambda groups, options, dist: torch.optim.AdamW(groups, **options),
    "muon": lambda groups, options, dist: Muon(
        groups,
        rank=dist.rank,
        world_size=dist.world_size,
        dtype=torch.bfloat16 if hardware.computes_in(torch.bfloat16, dist.device) else torch.float32,
        **options,
    ),
}


def build_optimizer(model: GPT, args: argparse.Namespace, dist: Distributed) -> torch.optim.Optimizer:
    """Return one of OPTIMIZERS for the groups of the model. Muon is for the matrices in the blocks.

    Each group names its `optimizer`. Its learning rate is the scheduled one times its `lr_scale`.
    """
    groups = model.optimizer_groups(args.weight_decay)
    rates = {"embeddings": args.embedding_lr, "positions": args.position_lr}
    for group in groups:
        group["optimizer"] = args.optimizer
        rate = rates.get(group["name"]) or args.learning_rate
        if args.optimizer == "muon" and "parts" in group:  # one or more matrices
            group["momentum"] = args.momentum
            rate = args.muon_lr
        elif args.optimizer == "muon":
            group["optimizer"] = "adamw"
        group["lr_scale"] = rate / args.learning_rate
    options = dict(lr=args.learning_rate, betas=(args.beta1, args.beta2), eps=1e-8, fused=True)
    return OPTIMIZERS[args.optimizer](groups, options, dist)


@torch.no_grad()
def validate(run: Run, batches: int) -> dict:
    """Return the mean loss in nats per token over the first batches of all ranks, up to --val_tokens.

    Any number of ranks sums over the same tokens. Rows past the last window are masked, so that shapes stay
    fixed. Raises Interrupted on every rank once one of them has got a signal.
    """
    dist, data = run.dist, run.val_data
    B, windows = data.batch_size, data.windows_for(run.args.val_tokens)
    windows = min(windows, batches * B * dist.world_size)
    run.model.eval()
    data.seek(0)
    # Allocated up front: a tensor that outlives its batch would fragment the memory that the logits free.
    losses = torch.zeros(batches, device=dist.device)
    with data.reading():
        for i in watched(range(batches), "validation", stop=run.stop):
            ((x, y),) = data.next_batches()
            first = (i * dist.world_size + dist.rank) * B
            y = y.masked_fill(torch.arange(first, first + B, device=y.device)[:, None] >= windows, -100)
            with run.autocast:
                losses[i] = run.model(x, y, reduction="sum")[1]
    run.model.train()
    nats, stops = dist.sum(losses.cpu().double().sum().item(), bool(run.stop))
    if stops:
        raise Interrupted
    return {"loss": nats / (windows * data.block_size)}


def validation_batches(run: Run) -> int:
    windows = run.val_data.windows_for(run.args.val_tokens)
    return math.ceil(windows / (run.val_data.batch_size * run.dist.world_size))


def score_hellaswag(run: Run, n: int) -> dict:
    """Return the scores of n of the items, evenly spread, and what is known about them."""
    items = run.benchmark.examples
    examples = [items[i * len(items) // n] for i in range(n)]
    try:
        with run.autocast:
            scores = hellaswag.evaluate(run.raw_model, examples, stop=run.stop) | run.benchmark.about
    except ValueError as error:  # all ranks see the same scores
        raise run.dist.leave_with_error(str(error)) from error
    del scores["items"]
    return scores | {"compilations": hardware.compilations() if run.is_compiled else 0}


def write_samples(run: Run, tokens: int) -> dict:
    """Return two samples of up to `tokens`, the same on all ranks. Raises Interrupted if one got a signal."""
    generator, texts = torch.Generator(run.dist.device).manual_seed(run.args.seed), []

    def on_text(piece: str) -> None:
        run.stop.check()
        work.update()

    options = dict(num_samples=2, top_k=50, generator=generator, on_text=on_text)
    with contextlib.suppress(Interrupted), watching("samples", tokens, "tokens") as work:
        texts = sample.complete(run.raw_model, run.tokenizer, [run.args.sample_prompt], tokens, **options)
    if run.dist.any(run.stop):
        raise Interrupted
    return {"texts": texts}


@dataclass(frozen=True)
class Evaluation:
    """What the loop, --dry_run and --eval_only do every --<kind>_every steps, and how it is shown.

    `call(run, n)` evaluates n units, of which there are `size(run)`, and returns the record to log. Every
    rank calls it. `curve` names the number of the record that is drawn, if any; `line` is for the console.
    """

    kind: str
    call: Callable[[Run, int], dict]
    size: Callable[[Run], int]
    line: Callable[[dict], str]
    curve: str | None = None


# In this order. Validation comes first, because it may make this the last step.
EVALUATIONS = [
    Evaluation("val", validate, validation_batches, lambda r: f"val  {r['loss']:7.4f}", "loss"),
    Evaluation(
        "hellaswag",
        score_hellaswag,
        lambda run: len(run.benchmark.examples),
        describe_scores,
        "acc_norm",
    ),
    Evaluation(
        "sample",
        write_samples,
        lambda run: run.args.sample_tokens,
        lambda r: "sample\n" + visible("\n\n".join(r["texts"])) + "\n\n",
    ),
]


def train_step(run: Run, step: int, micro_steps: int | None = None) -> dict:
    """Train on the next tokens and return the record of the step, which is logged as a whole.

    If the norm of the gradient is not finite, the weights stay the same. A dry run takes fewer `micro_steps`.
    """
    args, dist, data, optimizer = run.args, run.dist, run.train_data, run.optimizer
    started, waited_s = time.perf_counter(), data.waited_s
    micro_batch = data.batch_size * data.block_size * dist.world_size
    micro_steps = micro_steps or tokens_at(step, args) // micro_batch
    if args.overfit_batch:
        data.seek(0, micro_steps)
    with data.reading():
        batches = data.next_batches(micro_steps)
    waited_ms = 1000 * (data.waited_s - waited_s)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, args) * group["lr_scale"]
    # Dropout draws the same numbers when a resumed run repeats this step.
    torch.manual_seed(int(np.random.SeedSequence((args.seed, step, dist.rank)).generate_state(1)[0]))

    loss_sum = 0.0
    for micro_step, (x, y) in enumerate(watched(batches, f"step {step}", "micro-steps")):
        # Gradients are reduced over the ranks once per step, during the last backward pass.
        accumulates = dist.world_size > 1 and micro_step < micro_steps - 1
        reducing = run.model.no_sync() if accumulates else contextlib.nullcontext()
        # The backward pass needs the same kernel, because it may recompute attention.
        with run.attention(), reducing:
            with run.autocast:
                loss = run.model(x, y)[1]
            run.scaler.scale(loss / micro_steps).backward()
        loss_sum += loss.detach() / micro_steps
    run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf).item()
    # Every rank has the same gradients, so either all of them skip the step or none does.
    if math.isfinite(norm):
        run.scaler.step(optimizer)
    run.scaler.update()
    # DDP's gradients are views of the buckets that it reduces. Freed, they would be allocated a second time.
    optimizer.zero_grad(set_to_none=dist.world_size == 1)

    run.skipped_in_row = 0 if math.isfinite(norm) else run.skipped_in_row + 1
    if run.skipped_in_row:
        run.skipped += 1
    run.progress.windows += micro_steps * data.batch_size * dist.world_size
    # One collective for the mean loss and for signals: all ranks stop after the same step.
    run.loss, signals = dist.sum(loss_sum.item() / dist.world_size, bool(run.stop))
    run.stopping = signals > 0
    hardware.synchronize(dist.device)
    speed = speed_of(run, micro_steps * micro_batch, time.perf_counter() - started)
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    return {
        "loss": run.loss,
        "lr": learning_rate_at(step, args),
        "norm": norm,
        **speed,
        "waited_ms": waited_ms,
        "skipped": run.skipped,
        "lrs": lrs,
    }


def train(run: Run, records: Records) -> None:
    """Run the loop: evaluate what is due, save what is due, stop or step, log."""
    args, dist, progress = run.args, run.dist, run.progress
    start_step = progress.step
    for step in range(start_step, args.max_steps + 1):
        progress.step = step
        last_step = step == args.max_steps
        checkpoints = []
        records.check()

        try:
            for evaluation in EVALUATIONS:
                every = getattr(args, f"{evaluation.kind}_every")
                if not every or (step % every and not last_step):
                    continue
                record = evaluation.call(run, evaluation.size(run))
                records.log(step, evaluation.kind, **record, tokens=progress.windows * args.block_size)
                if evaluation.kind != "val":
                    continue
                if progress.is_best(record["loss"]):
                    checkpoints.append("model_best.pt")
                elif is_last_step(args, progress) and not last_step:
                    since = f"no better validation loss since step {progress.best_step}"
                    dist.say(f"step {step:5d} | {since}: stopping early")
                    last_step = True
        except Interrupted:
            run.stopping = True

        on_grid = args.checkpoint_every and step % args.checkpoint_every == 0 and step > start_step
        if on_grid or last_step or run.stopping:
            checkpoints.append(numbered(step))
        records.save(checkpoints)  # not with --checkpoint_every 0, and not over good states
        if last_step or run.stopping:
            break

        record = train_step(run, step)
        if run.skipped_in_row:
            norm, times = record["norm"], run.skipped_in_row
            dist.say(f"step {step:5d} | gradient norm {norm}: step skipped, {times} in a row")
        records.log(step, "train", **record)
        if run.skipped_in_row == args.max_skipped:
            raise dist.leave_with_error(
                f"gradients were not finite for {run.skipped_in_row} steps in a row, up to step {step} with "
                f"learning rate {record['lr']:.2e}: lower it and add --resume ({records.newest()})"
            )
        progress.step = step + 1
        if run.stopping:
            records.save([numbered(step + 1)])  # this step is done
        if run.stopping or (args.overfit_batch and run.loss < overfit.ENOUGH):
            break


def fit_to_text(args: argparse.Namespace, tokens: int | None) -> None:
    """Choose what --preset text leaves open: sizes by the training tokens, epochs by what a token is.

    Without a text (`tokens` is None), a dry run forecasts the most that the preset takes.
    """
    is_small = tokens is not None and tokens < FEW_TOKENS
    chosen = {} if args.init_from else dict(SMALL_GPT if is_small else LARGER_GPT)
    if tokens is not None:
        chosen["epochs"] = 40.0 if args.tokenizer == "byte" else 5.0
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def expected_of(args: argparse.Namespace) -> str | None:
    """Return what a run of a preset reaches, or None if its options differ."""
    preset = {**PRESETS[args.preset], "sample_prompt": args.sample_prompt}  # which changes no loss
    if args.preset == "text":
        preset |= {**LARGER_GPT, "tokenizer": "byte"}
    is_changed = any(getattr(args, name) != value for name, value in preset.items())
    return None if is_changed else EXPECTED.get(args.preset)


def int_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


AT_LEAST_1, AT_LEAST_0, POSITIVE = Range(int, 1), Range(int, 0), Range(float, above=0)
FINITE = Range(float, above=0, below=math.inf)
NOT_NEGATIVE, FRACTION, BELOW_1 = Range(float, 0), Range(float, 0, 1), Range(float, 0, below=1)


def option_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = parser.add_argument_group("run").add_argument
    add("--preset", help=f"defaults that other options override: {', '.join(PRESETS)} (default: gpt2)")
    add("--data_dir", type=user_path, help="folder of shards (default: edu_fineweb10B, or demo_data)")
    add("--init_from", type=user_path, help="weights: checkpoint, run or Hugging Face folder, gpt2 … gpt2-xl")
    add("--tokenizer", choices=NAMES, help="tokenizer of the shards (default: from their manifest, or gpt2)")
    add("--seed", type=SEED, default=1337, help="seed of weights, dropout, samples and --shuffle")
    add = parser.add_argument_group(THIS_COMMAND).add_argument
    add("--out_dir", type=user_path, default="log", help="folder for log, checkpoints and picture")
    add("--resume", action="store_true", help="continue the run in --out_dir, with its options")
    add("--dry_run", action="store_true", help="check gradients, forecast the run; leaves --out_dir alone")
    add("--price", type=NOT_NEGATIVE, default=0.0, help="price of a GPU-hour, for the forecast of --dry_run")
    add("--overfit_batch", action="store_true", help="fit one batch to a loss near zero; writes nothing")
    add("--eval_only", action="store_true", help="evaluate --init_from, print the results also as JSON")
    add = parser.add_argument_group("batch").add_argument
    batch_size = Range(int_or_auto, 1)
    add("--batch_size", type=batch_size, default=64, help="sequences per rank and micro-step, or auto")
    add("--total_batch_size", type=AT_LEAST_1, default=524288, help="tokens per step, over all ranks")
    add("--shuffle", **switch, help="permute every epoch")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=AT_LEAST_1, help="on a CPU (default: OMP_NUM_THREADS, or the cores that are free)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="autocast dtype")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA only)")
    add("--recompute", **switch, help="recompute activations: less memory, more compute")
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="muon: for the blocks' matrices")
    add("--schedule", choices=SCHEDULES, default="cosine", help="wsd: constant, then linear decay")
    add("--decay_share", type=FRACTION, default=0.2, help="share of the steps in which wsd decays (0: never)")
    add("--muon_lr", type=POSITIVE, default=0.02, help="peak learning rate of muon's matrices")
    add("--momentum", type=BELOW_1, default=0.95, help="muon: decay rate of the gradient mean")
    add("--learning_rate", type=POSITIVE, default=6e-4, help="peak learning rate (muon: of everything else)")
    add("--embedding_lr", type=POSITIVE, help="that of the token embedding (default: --learning_rate)")
    add("--position_lr", type=POSITIVE, help="that of the position embedding (default: --learning_rate)")
    add("--min_lr", type=NOT_NEGATIVE, help="final learning rate (default: a tenth of the peak)")
    warmup = f"{CLASSIC_WARMUP_STEPS} or the preset's, fewer in proportion for a shorter run"
    add("--warmup_steps", type=AT_LEAST_0, help=f"steps of linear warm-up (default: {warmup}; 0: disabled)")
    add("--max_steps", type=AT_LEAST_1, default=CLASSIC_STEPS, help="steps to train for")
    add("--epochs", type=FINITE, help="train for fewer steps if they are enough for this many epochs")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.1, help="of matrices and embeddings (0: disabled)")
    add("--beta1", type=BELOW_1, default=0.9, help="decay rate of the gradient mean")
    add("--beta2", type=BELOW_1, default=0.95, help="decay rate of the mean of squared gradients")
    add("--grad_clip", type=NOT_NEGATIVE, default=1.0, help="maximum gradient norm (0: disabled)")
    add("--max_skipped", type=AT_LEAST_1, default=10, help="consecutive skipped steps that end the run")
    add = parser.add_argument_group("model (default: from the preset or --init_from)").add_argument
    add("--block_size", type=AT_LEAST_1, help="context in tokens")
    vocab_size = "token ids (default: the tokenizer's, padded to a multiple of 64)"
    add("--vocab_size", type=AT_LEAST_1, help=vocab_size)
    add("--n_layer", type=AT_LEAST_1, help="blocks")
    add("--n_head", type=AT_LEAST_1, help="attention heads per block")
    add("--n_embd", type=AT_LEAST_1, help="width; a multiple of --n_head")
    add("--dropout", type=BELOW_1, default=0.0, help="dropout probability (0: disabled)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--val_every", type=AT_LEAST_0, default=250, help="steps between validations (0: disabled)")
    add("--val_tokens", type=AT_LEAST_1, default=10485760, help="tokens per validation, always the same ones")
    add("--hellaswag_every", type=AT_LEAST_0, default=250, help="steps between evaluations (0: disabled)")
    add("--hellaswag_limit", type=AT_LEAST_1, help="score only the first N items (default: all)")
    items = f"a file as in hellaswag.py --help, or demo: 44 items (default: {hellaswag.DATA}, downloaded)"
    add("--hellaswag_data", type=user_path, help=f"items to score: {items}")
    add("--sample_every", type=AT_LEAST_0, default=250, help="steps between samples (0: disabled)")
    prompt = "Hello, I'm a language model,"
    add("--sample_prompt", default=prompt, help="of samples; text, finetune: how the validation text begins")
    add("--sample_tokens", type=AT_LEAST_1, default=64, help="tokens per sample")
    add("--early_stop", type=AT_LEAST_0, default=0, help="patience in validations (0: never stop early)")
    add = parser.add_argument_group("records").add_argument
    add("--checkpoint_every", type=AT_LEAST_0, default=1000, help="steps between checkpoints (0: none)")
    add("--keep", type=AT_LEAST_0, default=2, help="newest checkpoints to keep, plus model_best.pt (0: all)")
    add("--milestone_every", type=AT_LEAST_0, default=5, help="keep every Nth checkpoint forever (0: none)")
    add("--log_every", type=AT_LEAST_1, default=10, help="steps between lines on the console")
    add("--tensorboard", **switch, help="also write tensorboard/ in --out_dir")
    add("--wandb", **switch, help="also log to Weights & Biases; WANDB_MODE=offline works")
    return parser


def derived_options(args: argparse.Namespace) -> dict[str, float]:
    """Return the options that follow from others where they are not given."""
    full = {"warmup_steps": CLASSIC_WARMUP_STEPS, "max_steps": CLASSIC_STEPS, **PRESETS[args.preset]}
    warmup_steps = round(full["warmup_steps"] * min(args.max_steps / full["max_steps"], 1))
    return {"warmup_steps": warmup_steps, "min_lr": args.learning_rate / 10}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = parse_options(option_parser(), argv, PRESETS, derived_options)
    for evaluation in EVALUATIONS if args.overfit_batch else ():
        setattr(args, f"{evaluation.kind}_every", 0)
    if args.overfit_batch or args.eval_only:
        args.checkpoint_every = 0
    return args


def main(args: argparse.Namespace) -> None:
    # Ranks and device
    dist = setup_distributed(hardware.choose_device(args.device, args.threads))
    parser, device = option_parser(), dist.device
    args.threads = torch.get_num_threads() if device.type == "cpu" else None  # losses depend on it
    with RunFolder(args.out_dir, is_temporary=args.overfit_batch) as folder:
        # Checks: all problems at once; fills in the options that were left open
        found = check_everything(args, dist, folder, parser, EVALUATIONS)
        if args.preset == "text" and found.resumed is None:
            fit_to_text(args, found.train_tokens)

        # Model: --resume, --init_from, or a new one
        torch.manual_seed(args.seed)
        with together(dist), watching("loading or initializing the model"):
            raw_model = load_pretrained(args, dist, found, parser)
            if raw_model is None:
                config = {each.name: getattr(args, each.name) for each in fields(GPTConfig)}
                raw_model = GPT(GPTConfig(**config))
            raw_model.to(device).train()
            raw_model.recompute = args.recompute
        with together(dist):
            args.batch_size = fit_batch_size(args, dist, raw_model, found.dtype, tokens_at)

        # Data
        sizes = dict(batch_size=args.batch_size, block_size=args.block_size, vocab_size=found.used_ids)
        with together(dist), watching("opening the shards"):
            val_data = DataLoaderLite(args.data_dir, "val", dist=dist, **sizes)
            order = args.seed if args.shuffle else None
            train_data = DataLoaderLite(args.data_dir, "train", dist=dist, shuffle_seed=order, **sizes)
            if args.sample_prompt is None:
                args.sample_prompt = first_words(val_data.read(0), found.tokenizer)
        with together(dist):
            hint = f"the ranks see different shards; {args.data_dir} has to be the same on every node"
            dist.check_same([val_data.description, train_data.description], hint)  # or one alone may fail
            limit_steps(args, train_data.windows * args.block_size, tokens_at, found.resumed)
            planned = planned_tokens(args, dist.world_size, tokens_at, found.resumed)

        # Optimizer, scaler, autocast
        optimizer = build_optimizer(raw_model, args, dist)
        scaler = torch.amp.GradScaler(device.type, enabled=found.dtype == torch.float16)
        autocast = torch.autocast(device.type, dtype=found.dtype, enabled=found.dtype != torch.float32)

        # Compile and DDP
        attention = hardware.tune_for_training(device, found.dtype)
        model = raw_model
        if dist.world_size > 1:
            model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
        asked = device.type == "cuda" if args.compile is None else args.compile
        with together(dist):
            is_compiled = asked and hardware.can_compile(device, dist.say)
        if is_compiled:
            model = torch.compile(model)

        run = Run(
            args, dist, dtype=found.dtype, is_compiled=is_compiled, raw_model=raw_model, model=model,
            optimizer=optimizer, scaler=scaler, autocast=autocast, attention=attention, train_data=train_data,
            val_data=val_data, benchmark=found.benchmark, tokenizer=found.tokenizer, planned_tokens=planned,
        )  # fmt: skip

        # Resume
        is_new, recent = found.resumed is None, {}
        if not is_new:
            recent = found.resumed.get("recent", {})
            restore(run, found.resumed, of_this_command(parser))  # of the optimizer, its moments only
            found.resumed = None  # frees its memory
        train_data.seek(run.progress.windows)

        # What is about to happen
        with together(dist):
            check_disk(run, is_new, recent)
        with together(dist):
            dist.say(describe_run(run, EVALUATIONS, tokens_at, expected_of(args)))
        if args.dry_run:
            dry_run.rehearse(run, train_step, EVALUATIONS, tokens_at)
            return dist.leave()
        if args.eval_only:
            eval_only.report(run, EVALUATIONS)
            return dist.leave()

        # Loop
        records = Records(run, folder, EVALUATIONS, is_new, recent) if dist.is_main else OnOtherRanks()
        with run.stop, records:
            with no_hangs(dist, run.progress):
                train(run, records)

            # End
            records.finish()
            overfit.check(run)
            records.report_end()
            dist.leave()  # signals are handled until the last checkpoint is written


if __name__ == "__main__":
    run_script(main, parse_args, hardware.explain_out_of_memory, needs_output=False)
