"""Train GPT-2 from scratch on the token shards that fineweb.py writes.

    python train.py --preset demo                        # a laptop: no GPU, no network, one minute
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
import hashlib
import math
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import hellaswag
import sample
from corpus.shards import Shards
from corpus.tokenizer import NAMES, get_tokenizer
from model import GPT
from muon import Muon
from runtime import hardware
from runtime.cli import Range, as_words, error_lines, run, watched
from runtime.distributed import Distributed, Interrupted, StopSignal, setup_distributed
from runtime.files import parsing
from training import dry_run, eval_only
from training.checkpoints import (
    CheckpointWriter,
    Progress,
    disk_usage,
    read_options,
    restore,
    training_state,
)
from training.prepare import SIZES, prepare
from training.records import Log, RunFolder, about_run, describe_run

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
        **dict(learning_rate=3.6e-3, embedding_lr=1.08e-2, position_lr=9e-4, beta1=0.8, beta2=0.98),
    },
    # One's own text on a laptop. Context and rates were measured on bytes (LOG.md, 2026-11-26). The prompt is
    # the beginning of the validation text.
    "text": {
        **dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, total_batch_size=2048),
        **dict(shuffle=True, dropout=0.1, learning_rate=1e-2, **MUON_WSD),
        **dict(epochs=5.0, max_steps=2000, warmup_steps=40, early_stop=5),
        **dict(val_every=100, val_tokens=65536, hellaswag_every=0, sample_every=500, sample_prompt=None),
        **dict(checkpoint_every=500, log_every=20),
    },
    "demo": {
        **dict(n_layer=2, n_head=4, n_embd=128, block_size=64, batch_size=16, total_batch_size=1024),
        **dict(shuffle=True, learning_rate=1e-2, warmup_steps=50, max_steps=1600, **MUON_WSD),
        **dict(val_every=200, val_tokens=65536, hellaswag_every=800, hellaswag_data="demo"),
        **dict(sample_every=800, sample_prompt="import ", sample_tokens=300),
        **dict(checkpoint_every=800, log_every=50),
    },
}
CLASSIC_STEPS, CLASSIC_WARMUP_STEPS = 19073, 715  # Brown et al. 2020 (GPT-3), appendix B: 375M tokens
OVERFIT_LOSS = 0.05  # nats per token; --overfit_batch passes below this


def shuffled(index: int, n: int, seed: int, epoch: int) -> int:
    """Return the index-th element of a permutation of range(n) that is drawn from (seed, epoch).

    A Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains")
    computes elements one by one, so that an epoch of any length starts at once and takes no memory.
    """
    bits = max((n - 1).bit_length() + 1, 2) // 2  # of each half
    while True:
        left, right = index >> bits, index & ((1 << bits) - 1)
        for round_number in range(4):
            key = struct.pack("<qqqq", seed, epoch, round_number, right)
            mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            left, right = right, left ^ (mixed & ((1 << bits) - 1))
        index = left << bits | right
        if index < n:
            return index


class DataLoaderLite:
    """Micro-batches of one split, in an order that depends only on the seed and the windows read so far.

    A shard holds (len - 1) // block_size windows. An epoch goes through the windows in file order or, with
    `shuffle`, in an order drawn from (seed, epoch). Each step takes the next windows, and each micro-step on
    each rank takes its slice of them. Therefore any number of ranks and any batch size train on the same
    windows, and resuming is just a `seek`. `description` tells data sets apart, and `waited_s` is how long
    `next_batch` has waited for data.

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
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.batch_size, self.block_size, self.vocab_size = batch_size, block_size, vocab_size
        self.dist, self.shuffle, self.seed, self.waited_s = dist, shuffle, seed, 0.0
        self.shards, self.epoch, self.failure = Shards(data_dir, split, dist.say), 0, None
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
                f"{self.shards.paths[shard]} holds token id {largest}, but the model's vocabulary ends "
                f"at {self.vocab_size - 1}: set --vocab_size and --tokenizer to those of the shards"
            )
        return tokens

    def _read(self, first: int) -> torch.Tensor:
        """Read `batch_size` windows of block_size + 1 tokens; `first` counts windows since training began."""
        rows = np.empty((self.batch_size, self.block_size + 1), dtype=np.int64)
        for row, window in zip(rows, range(first, first + self.batch_size), strict=True):
            epoch, window = divmod(window, self.windows)
            if epoch != self.epoch:
                self.shards.warn_of_changes()
                self.epoch = epoch
            row[:] = self.read(shuffled(window, self.windows, self.seed, epoch) if self.shuffle else window)
        rows = torch.from_numpy(rows)
        return rows.pin_memory() if self.dist.device.type == "cuda" else rows

    def seek(self, window: int) -> None:
        """Continue at this window, counted over all ranks since training began, and prefetch it."""
        self.window = window
        self.pending = self.pool.submit(self._read, window + self.dist.rank * self.batch_size)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, both (batch_size, block_size) int64 on the device."""
        started = time.perf_counter()
        try:
            rows = self.pending.result()
        except (OSError, ValueError) as error:
            # The other ranks wait for this one. Without targets, the norm is not a number, and no rank steps.
            self.failure = error
            return self.without_targets()
        self.waited_s += time.perf_counter() - started
        self.seek(self.window + self.dist.world_size * self.batch_size)
        # Only pinned rows may be copied asynchronously: MPS would read others after they have been freed
        # (pytorch/pytorch#189690).
        rows = rows.to(self.dist.device, non_blocking=self.dist.device.type == "cuda")
        # Of one form, so that validation and training are compiled for the same one.
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def without_targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch whose loss is 0 in sum and NaN in the mean."""
        x = torch.zeros(self.batch_size, self.block_size, dtype=torch.int64, device=self.dist.device)
        return x, torch.full_like(x, -100)

    def check(self) -> None:
        """End the run if any rank has a `failure`. A collective."""
        if any(self.dist.sum(self.failure is not None)):
            raise self.end_run()

    def end_run(self) -> BaseException:
        """Return the exception to raise if any rank has a `failure`. A collective."""
        lines = self.dist.union(error_lines(self.failure) if self.failure else [])
        self.failure = self.failure or OSError(lines)
        return self.dist.leave_with_error("\n".join(lines))


def open_loaders(args: argparse.Namespace, dist: Distributed) -> dict[str, DataLoaderLite]:
    """Return the loaders of both splits."""
    sizes = {name: getattr(args, name) for name in ("batch_size", "block_size", "vocab_size")}
    order = {"shuffle": args.shuffle, "seed": args.seed}
    val = DataLoaderLite(args.data_dir, "val", dist=dist, **sizes)
    return {"val": val, "train": DataLoaderLite(args.data_dir, "train", dist=dist, **sizes, **order)}


@torch.no_grad()
def validate(
    model: torch.nn.Module,
    loader: DataLoaderLite,
    autocast: torch.autocast,
    val_tokens: int,
    stop: object = False,
) -> float:
    """Return the mean loss in nats per token over the first `val_tokens` of the split.

    Any number of ranks sums over the same tokens. Rows past the last window are masked, so that shapes stay
    fixed. Raises Interrupted on every rank once `stop` is true on one of them.
    """
    dist, B, T = loader.dist, loader.batch_size, loader.block_size
    windows = loader.windows_for(val_tokens)
    model.eval()
    loader.seek(0)
    # Allocated up front: a tensor that outlives its batch would fragment the memory that the logits free.
    losses = torch.zeros(math.ceil(windows / (B * dist.world_size)), device=dist.device)
    for i in watched(range(len(losses)), "validation", shown=dist.is_main, stop=stop):
        x, y = loader.next_batch()
        first = (i * dist.world_size + dist.rank) * B
        y = y.masked_fill(torch.arange(first, first + B, device=y.device)[:, None] >= windows, -100)
        with autocast:
            losses[i] = model(x, y, reduction="sum")[1]
    model.train()
    nats, *flags = dist.sum(losses.cpu().double().sum().item(), loader.failure is not None, bool(stop))
    failures, stops = flags
    if failures:
        raise loader.end_run()
    if stops:
        raise Interrupted
    return nats / (windows * T)


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step: linear warm-up, then a decay to --min_lr at --max_steps.

    `cosine` follows half a cosine. `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM) stays at the peak
    until the last --decay_share of the steps and then falls linearly.
    """
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    left = args.max_steps - step
    if args.schedule == "cosine":
        height = 0.5 * (1 - math.cos(math.pi * left / max(args.max_steps - args.warmup_steps, 1)))
    else:
        height = min(left / max(args.decay_share * args.max_steps, 1), 1)
    return args.min_lr + height * (args.learning_rate - args.min_lr)


def int_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


AT_LEAST_1, AT_LEAST_0, POSITIVE = Range(int, 1), Range(int, 0), Range(float, above=0)
FINITE = Range(float, above=0, below=math.inf)
NOT_NEGATIVE, FRACTION, BELOW_1 = Range(float, 0), Range(float, 0, 1), Range(float, 0, below=1)


def option_parser(**settings) -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    description = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, **settings)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = parser.add_argument_group("run").add_argument
    add("--preset", help=f"defaults that other options override: {', '.join(PRESETS)} (None: gpt2)")
    add("--data_dir", help="folder of shards (None: edu_fineweb10B, or demo_data, which the demo makes)")
    add("--out_dir", default="log", help="folder for log, checkpoints and picture")
    add("--init_from", help="initial weights: checkpoint, run folder, Hugging Face folder, gpt2 … gpt2-xl")
    add("--resume", action="store_true", help="continue the run in --out_dir, with its options")
    add("--tokenizer", choices=NAMES, help="tokenizer of the shards (None: from their manifest, or gpt2)")
    add("--seed", type=AT_LEAST_0, default=1337, help="seed of weights, dropout, samples and --shuffle")
    add = parser.add_argument_group("checks").add_argument
    add("--dry_run", action="store_true", help="check gradients, forecast the run; leaves --out_dir alone")
    add("--price", type=NOT_NEGATIVE, default=0.0, help="price of a GPU-hour, for the forecast of --dry_run")
    add("--overfit_batch", action="store_true", help="fit one batch to a loss near zero; writes nothing")
    add("--eval_only", action="store_true", help="evaluate --init_from, print the results also as JSON")
    add = parser.add_argument_group("model (None: from the preset or --init_from)").add_argument
    add("--block_size", type=AT_LEAST_1, help="context in tokens")
    add("--vocab_size", type=AT_LEAST_1, help="token ids (None: the tokenizer's, padded to a multiple of 64)")
    add("--n_layer", type=AT_LEAST_1, help="blocks")
    add("--n_head", type=AT_LEAST_1, help="attention heads per block")
    add("--n_embd", type=AT_LEAST_1, help="width; a multiple of --n_head")
    add("--dropout", type=BELOW_1, default=0.0, help="dropout probability (0: disabled)")
    add = parser.add_argument_group("batch").add_argument
    batch_size = Range(int_or_auto, 1)
    add("--batch_size", type=batch_size, default=64, help="sequences per rank and micro-step, or auto")
    add("--total_batch_size", type=AT_LEAST_1, default=524288, help="tokens per step, over all ranks")
    add("--shuffle", **switch, help="permute every epoch")
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for the blocks' matrices")
    add("--schedule", choices=("cosine", "wsd"), default="cosine", help="wsd: constant, then linear decay")
    add("--decay_share", type=FRACTION, default=0.2, help="share of the steps in which wsd decays (0: never)")
    add("--muon_lr", type=POSITIVE, default=0.02, help="peak learning rate of muon")
    add("--momentum", type=BELOW_1, default=0.95, help="muon: decay rate of the gradient mean")
    add("--learning_rate", type=POSITIVE, default=6e-4, help="peak learning rate of everything else")
    add("--embedding_lr", type=POSITIVE, help="that of the token embedding (None: --learning_rate)")
    add("--position_lr", type=POSITIVE, help="that of the position embedding (None: --learning_rate)")
    add("--min_lr", type=NOT_NEGATIVE, help="final learning rate (None: a tenth of the peak)")
    warmup = f"{CLASSIC_WARMUP_STEPS} or the preset's, fewer in proportion for a shorter run"
    add("--warmup_steps", type=AT_LEAST_0, help=f"steps of linear warm-up (None: {warmup}; 0: disabled)")
    add("--max_steps", type=AT_LEAST_1, default=CLASSIC_STEPS, help="steps to train for")
    add("--epochs", type=FINITE, help="train for fewer steps if they are enough for this many epochs")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.1, help="of matrices and embeddings (0: disabled)")
    add("--beta1", type=BELOW_1, default=0.9, help="decay rate of the gradient mean")
    add("--beta2", type=BELOW_1, default=0.95, help="decay rate of the mean of squared gradients")
    add("--grad_clip", type=NOT_NEGATIVE, default=1.0, help="maximum gradient norm (0: disabled)")
    add("--max_skipped", type=AT_LEAST_1, default=10, help="consecutive skipped steps that end the run")
    add = parser.add_argument_group("evaluation").add_argument
    add("--val_every", type=AT_LEAST_0, default=250, help="steps between validations (0: disabled)")
    add("--val_tokens", type=AT_LEAST_1, default=10485760, help="tokens per validation, always the same ones")
    add("--hellaswag_every", type=AT_LEAST_0, default=250, help="steps between evaluations (0: disabled)")
    add("--hellaswag_limit", type=AT_LEAST_1, help="score only the first N items (None: all)")
    items = f".jsonl, .jsonl.gz or .parquet, or demo: 44 items (None: {hellaswag.DATA}, downloaded)"
    add("--hellaswag_data", help=f"items to score: {items}")
    add("--sample_every", type=AT_LEAST_0, default=250, help="steps between samples (0: disabled)")
    prompt = "Hello, I'm a language model,"
    add("--sample_prompt", default=prompt, help="prompt of the samples (None: the start of the text)")
    add("--sample_tokens", type=AT_LEAST_1, default=64, help="tokens per sample")
    add("--early_stop", type=AT_LEAST_0, default=0, help="patience in validations (0: never stop early)")
    add = parser.add_argument_group("records").add_argument
    add("--checkpoint_every", type=AT_LEAST_0, default=1000, help="steps between checkpoints (0: none)")
    add("--keep", type=AT_LEAST_0, default=2, help="newest checkpoints to keep, plus model_best.pt (0: all)")
    add("--milestone_every", type=AT_LEAST_0, default=5, help="keep every Nth checkpoint forever (0: none)")
    add("--log_every", type=AT_LEAST_1, default=10, help="steps between lines on the console")
    add("--tensorboard", **switch, help="also write tensorboard/ in --out_dir")
    add("--wandb", **switch, help="also log to Weights & Biases; WANDB_MODE=offline works")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="autocast dtype")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (None: on CUDA only)")
    add("--recompute", **switch, help="recompute activations: less memory, more compute")
    return parser


def derived_options(args: argparse.Namespace) -> dict[str, float]:
    """Return the options that follow from others where they are not given."""
    full = {"warmup_steps": CLASSIC_WARMUP_STEPS, "max_steps": CLASSIC_STEPS, **PRESETS[args.preset]}
    warmup_steps = round(full["warmup_steps"] * min(args.max_steps / full["max_steps"], 1))
    return {"warmup_steps": warmup_steps, "min_lr": args.learning_rate / 10}


def read_run(out_dir: str, preset: str | None) -> list[str]:
    """Return the options of a run as words, except for values that follow from others, and will again."""
    options = read_options(out_dir)
    with parsing(out_dir, "the folder of a run", "delete the broken lines of its log.jsonl"):
        parser = option_parser(exit_on_error=False)
        args = parser.parse_args(as_words(parser, options))
        if args.preset in PRESETS:
            derived = derived_options(args)
            options = {name: value for name, value in options.items() if value != derived.get(name)}
    if args.preset and preset not in (None, args.preset):
        raise ValueError(
            f"--preset is {preset}, but {out_dir} was started with {args.preset}: leave it out to "
            "resume that run, or leave out --resume to start another one"
        )
    return as_words(parser, options)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, words, before = option_parser(), sys.argv[1:] if argv is None else argv, []
    given = parser.parse_known_args(words)[0]
    if given.resume:
        before = read_run(given.out_dir, given.preset)
        words = [*before, *words]  # what is given comes last, so it wins
        given = parser.parse_known_args(words)[0]
    preset = given.preset or "gpt2"
    if preset not in PRESETS:
        raise ValueError(f"unknown --preset {preset!r}: choose from {', '.join(PRESETS)}")
    later = (*SIZES, "warmup_steps")  # filled in below or by --init_from
    # What a resumed run has not recorded, or as None, must not come from its preset, which may have changed.
    defaults = {} if before else {k: v for k, v in PRESETS[preset].items() if k not in later}
    parser.set_defaults(**defaults, preset=preset)
    args = parser.parse_args(words)
    values = derived_options(args)
    if args.init_from is None:
        values |= {"block_size": 1024} | {k: v for k, v in PRESETS[preset].items() if k in SIZES}
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.overfit_batch:
        args.val_every = args.hellaswag_every = args.sample_every = 0
    if args.overfit_batch or args.eval_only:
        args.checkpoint_every = 0
    return args


def build_optimizer(model: GPT, args: argparse.Namespace, dist: Distributed) -> torch.optim.AdamW:
    """Return AdamW or, for --optimizer muon, one that applies Muon to the matrices in the blocks.

    The learning rate of a group is the scheduled one times the group's `lr_scale`.
    """
    groups = model.optimizer_groups(args.weight_decay)
    rates = {"embeddings": args.embedding_lr, "positions": args.position_lr}
    for group in groups:
        rate = rates.get(group["name"])
        if args.optimizer == "muon" and "parts" in group:
            rate, group["momentum"] = args.muon_lr, args.momentum
        group["lr_scale"] = (rate or args.learning_rate) / args.learning_rate
    options = dict(lr=args.learning_rate, betas=(args.beta1, args.beta2), eps=1e-8, fused=True)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    fast = hardware.computes_in(torch.bfloat16, dist.device)
    options["dtype"] = torch.bfloat16 if fast else torch.float32
    return Muon(groups, rank=dist.rank, world_size=dist.world_size, **options)


def is_last_step(args: argparse.Namespace, progress: Progress) -> bool:
    """Return whether the run ends at its present step, as planned or early."""
    patience = args.early_stop * args.val_every
    return progress.step == args.max_steps or 0 < patience <= progress.step - progress.best_step


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: DataLoaderLite,
    autocast: torch.autocast,
    attention: Callable[[], contextlib.AbstractContextManager],
    args: argparse.Namespace,
    step: int,
    accum: int,
) -> tuple[float, float]:
    """Train on the next `accum` micro-batches; return this rank's mean loss and the norm of the gradient.

    `attention` is the context that selects its kernel. If the norm is not finite, the weights stay the same.
    """
    dist = loader.dist
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, args) * group["lr_scale"]
    # Dropout draws the same numbers when a resumed run repeats this step.
    torch.manual_seed(int(np.random.SeedSequence((args.seed, step, dist.rank)).generate_state(1)[0]))
    if args.overfit_batch:
        loader.seek(0)
    loss_sum = 0.0
    for micro_step in range(accum):
        x, y = loader.next_batch()
        # Gradients are reduced over the ranks once per step, during the last backward pass.
        sync_now = dist.world_size == 1 or micro_step == accum - 1
        # The backward pass needs the same kernel, because it may recompute attention.
        with attention(), contextlib.nullcontext() if sync_now else model.no_sync():
            with autocast:
                loss = model(x, y)[1]
            scaler.scale(loss / accum).backward()
        loss_sum += loss.detach() / accum
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf).item()
    # Every rank has the same gradients, so either all of them skip the step or none does.
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    # DDP's gradients are views of the buckets that it reduces. Freed, they would be allocated a second time.
    optimizer.zero_grad(set_to_none=dist.world_size == 1)
    return loss_sum.item(), norm


def score(
    model: GPT,
    dist: Distributed,
    autocast: torch.autocast,
    stop: StopSignal,
    about: dict[str, str],
    examples: list[hellaswag.Example],
) -> dict:
    """Return the scores of `hellaswag.evaluate` and what is known `about` the items; an error ends all ranks.

    A collective.
    """
    try:
        with autocast:
            return hellaswag.evaluate(model, examples, stop=stop) | about
    except ValueError as error:  # all ranks see the same scores
        raise dist.leave_with_error(str(error)) from error


def write_samples(
    model: GPT, dist: Distributed, stop: StopSignal, args: argparse.Namespace, tokens: int
) -> list[str]:
    """Return two samples, the same on all ranks. Raises Interrupted if one has got a signal. A collective."""
    generator = torch.Generator(dist.device).manual_seed(args.seed)
    what = (get_tokenizer(args.tokenizer), [args.sample_prompt], tokens)
    texts = []
    with contextlib.suppress(Interrupted):
        options = dict(num_samples=2, top_k=50, generator=generator)
        texts = sample.complete(model, *what, **options, on_text=stop.check)
    if any(dist.sum(bool(stop))):
        raise Interrupted
    return texts


def train(args: argparse.Namespace, dist: Distributed, folder: RunFolder) -> None:
    opened = partial(open_loaders, args, dist)
    raw_model, dtype, loaders, benchmark, resumed = prepare(args, dist, folder, option_parser(), opened)
    device = dist.device
    optimizer = build_optimizer(raw_model, args, dist)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    attention = hardware.tune_for_training(device, dtype)
    # raw_model: weights, sampling, HellaSwag. model: training and validation, which have fixed shapes.
    parallel = raw_model
    if dist.world_size > 1:
        parallel = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
    wanted = device.type == "cuda" if args.compile is None else args.compile
    compiled = wanted and hardware.can_compile(device, dist.say)
    model = torch.compile(parallel) if compiled else parallel
    accum = args.total_batch_size // (args.batch_size * args.block_size * dist.world_size)
    flops_per_token, peak = raw_model.flops_per_token(args.block_size), hardware.peak_flops(device, dtype)
    progress, recent = Progress(), (resumed or {}).get("recent", {})
    if resumed:
        progress, differences = restore(resumed, optimizer, scaler, args, loaders)
        dist.say("\n".join(differences))
    elif args.resume:
        dist.say(folder.nothing_to_resume())
    is_new, resumed = not resumed, None  # its memory is needed
    stop, stopping = StopSignal(), False

    contexts = (autocast, attention)
    take_step = partial(train_step, model, optimizer, scaler, loaders["train"], *contexts, args)
    evaluate = partial(validate, model, loaders["val"], autocast, stop=stop)
    score_items = partial(score, raw_model, dist, autocast, stop, benchmark.about)
    write_texts = partial(write_samples, raw_model, dist, stop, args)
    state = partial(training_state, raw_model, optimizer, scaler, progress, args, loaders)
    with attention():
        how = hardware.describe_compute(args, dtype, device, compiled)
    about = about_run(args, dist.world_size, optimizer.param_groups, device)
    disk = disk_usage(args, optimizer.param_groups)
    epoch_tokens = loaders["train"].windows * args.block_size
    item_tokens = sum(len(each.context) + sum(map(len, each.endings)) for each in benchmark.examples)
    val_tokens = loaders["val"].windows_for(args.val_tokens) * args.block_size
    dist.say(describe_run(args, about, how, epoch_tokens, val_tokens, item_tokens, disk))
    raw_model.train()
    loaders["train"].seek(progress.windows)
    calls = dict(evaluate=evaluate, score=score_items, write_samples=write_texts)
    if args.dry_run:
        what = (args, dist, dtype, raw_model, model, *contexts, loaders, benchmark.examples)
        dry_run.rehearse(*what, progress.step, compiled, **calls, take_step=take_step, state=state)
        return dist.leave()
    if args.eval_only:
        eval_only.report(args, loaders["val"], benchmark.examples, get_tokenizer(args.tokenizer), **calls)
        return dist.leave()

    folder.callback(stop.restore)
    log, writer = lambda step, kind, **values: None, None
    if dist.is_main:
        folder.begin(is_new)
        log = Log(folder, args, progress.step, is_last_step(args, progress))
        milestone_steps = args.milestone_every * args.checkpoint_every
        folder.callback(log.close)
        writer = CheckpointWriter(folder, args.keep, milestone_steps, log.checkpoint, recent)
        folder.callback(writer.pool.shutdown)

        @folder.push
        def save_if_shards_failed(*_) -> None:  # the weights are still those of the step
            if args.checkpoint_every and any(loader.failure for loader in loaders.values()):
                writer.save([f"model_{progress.step:05d}.pt"], state(), device)

    log(progress.step, "run", **about)

    start_step, skipped, skipped_in_row = progress.step, 0, 0
    stop.listen()
    for step in range(start_step, args.max_steps + 1):
        progress.step, due = step, []
        last_step, seen = step == args.max_steps, progress.windows * args.block_size
        if dist.is_main:
            writer.check()

        try:
            if args.val_every and (step % args.val_every == 0 or last_step):
                progress.val_loss = evaluate(args.val_tokens)
                log(step, "val", loss=progress.val_loss, tokens=seen)
                if progress.val_loss < progress.best_val_loss:
                    progress.best_val_loss, progress.best_step = progress.val_loss, step
                    due.append("model_best.pt")
                elif is_last_step(args, progress) and not last_step:
                    since = f"no better validation loss since step {progress.best_step}"
                    dist.say(f"step {step:5d} | {since}: stopping early")
                    last_step = True

            if args.hellaswag_every and (step % args.hellaswag_every == 0 or last_step):
                scores = score_items(benchmark.examples)
                del scores["items"]
                compilations = hardware.compilations() if compiled else 0
                log(step, "hellaswag", **scores, tokens=seen, compilations=compilations)

            if args.sample_every and (step % args.sample_every == 0 or last_step):
                log(step, "sample", texts=write_texts(args.sample_tokens), tokens=seen)
        except Interrupted:
            stopping = True

        on_grid = args.checkpoint_every and step % args.checkpoint_every == 0 and step > start_step
        if args.checkpoint_every and (on_grid or last_step or stopping):
            due.append(f"model_{step:05d}.pt")
        if args.checkpoint_every and due and dist.is_main:
            writer.save(due, state(), device)

        if last_step or stopping:
            break

        started = time.perf_counter()
        loss, norm = take_step(step, accum)
        failed = loaders["train"].failure is not None
        # The mean loss, and whether any rank has got a signal: one collective stops all after the same step.
        train_loss, stopping, failures = dist.sum(loss / dist.world_size, bool(stop), failed)
        if failures:
            raise loaders["train"].end_run()
        skipped_in_row = 0 if math.isfinite(norm) else skipped_in_row + 1
        if skipped_in_row:
            skipped += 1
            dist.say(f"step {step:5d} | gradient norm {norm}: step skipped, {skipped_in_row} in a row")
        progress.windows += args.total_batch_size // args.block_size
        hardware.synchronize(device)
        seconds = time.perf_counter() - started

        speed = args.total_batch_size / seconds
        mfu = speed * flops_per_token / (peak * dist.world_size) if peak else None
        lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
        lr = lrs["gains and biases"]  # the scheduled rate, which other groups scale
        record = dict(loss=train_loss, lr=lr, norm=norm, dt_ms=1000 * seconds, tokens_per_s=speed, mfu=mfu)
        log(step, "train", **record, skipped=skipped, lrs=lrs)
        if skipped_in_row == args.max_skipped:
            raise dist.leave_with_error(
                f"gradients were not finite for {skipped_in_row} steps in a row, up to step {step} with "
                f"learning rate {lr:.2e}: lower it and add --resume ({writer and writer.newest()})"
            )
        progress.step = step + 1
        if stopping and args.checkpoint_every and dist.is_main:
            writer.save([f"model_{step + 1:05d}.pt"], state(), device)
        if stopping or (args.overfit_batch and train_loss < OVERFIT_LOSS):
            break

    if dist.is_main:
        writer.close()
        stop.restore()
        if not stopping:
            peak_bytes = (hardware.memory(device) or [None])[0]
            log(step, "end", peak_bytes=peak_bytes)
    if args.overfit_batch and not stopping and train_loss >= OVERFIT_LOSS:
        raise dist.leave_with_error(
            f"one batch still has loss {train_loss:.3f} after {args.max_steps} steps, not {OVERFIT_LOSS}: "
            "the model is broken, or needs more --max_steps, another --learning_rate or no --dropout"
        )
    if dist.is_main:
        log.report_end(progress.step, train_loss if args.overfit_batch else None, stopping)
    dist.leave()


def main(args: argparse.Namespace) -> None:
    dist = setup_distributed(hardware.choose_device(args.device))
    with contextlib.ExitStack() as stack:
        if args.overfit_batch:  # a check, which leaves --out_dir alone
            args.out_dir = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        folder = stack.enter_context(RunFolder(args.out_dir))
        train(args, dist, folder)


if __name__ == "__main__":
    run(main, parse_args, hardware.explain_out_of_memory, needs_output=False)
