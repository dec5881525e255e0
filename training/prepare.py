"""What has to be right before the first step of a run.

Finds everything that is wrong with a command and reports it at once, on the main rank. What may need the
network comes after everything local.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

import fineweb
import hellaswag
from corpus.shards import read_set
from corpus.tokenizer import get_tokenizer, is_padded, name_for
from formats.checkpoint import describe_pretrained
from model import GPT, GPTConfig
from runtime import hardware
from runtime.cli import check_options, watching
from runtime.distributed import Distributed, Problems
from runtime.files import write_json
from runtime.machine import allow_open_files
from training.checkpoints import check_step, consumed_windows, load_training_state
from training.folder import RunFolder

DATA_DIR, DEMO_DATA_DIR = "edu_fineweb10B", "demo_data"
# The options that say what a model is; without a value, they come from the preset or the weights.
ARCHITECTURE = tuple(each.name for each in fields(GPTConfig) if each.name != "dropout")
TokensAt = Callable[[int, argparse.Namespace], int]  # tokens of a step, as in train.py


@dataclass
class Found:
    """What `check_everything` has loaded on its way."""

    dtype: torch.dtype
    tokenizer: object  # None if nothing needs one
    n_vocab: int  # of the tokenizer
    benchmark: hellaswag.Benchmark
    resumed: dict | None  # the checkpoint to continue from
    train_tokens: int | None  # in the shards, unless they are random
    used_ids: int = 0  # of --vocab_size, those that shards may hold


def check_packages(args: argparse.Namespace) -> None:
    """Raise ValueError, with a line for each, if packages that the options need are not installed."""
    wanted = [package for package in ("tensorboard", "wandb") if getattr(args, package)]
    # A folder of that name, such as the one that wandb writes to, can be imported too.
    specs = {package: importlib.util.find_spec(package) for package in wanted}
    missing = [package for package, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        lines = [f"--{name} needs a package that is not installed: pip install {name}" for name in missing]
        raise ValueError("\n".join(lines))


def check_args(args: argparse.Namespace, world_size: int, parser: argparse.ArgumentParser) -> None:
    """Raise ValueError, with a line for each problem, if the options alone are wrong."""
    problems = []
    if args.warmup_steps >= args.max_steps > 0:
        problems.append(
            f"--warmup_steps is {args.warmup_steps}, but --max_steps is {args.max_steps}: the run would end "
            "during warm-up; lower --warmup_steps or leave it out"
        )
    checks = [name for name in ("dry_run", "overfit_batch", "eval_only") if getattr(args, name)]
    if len(checks) > 1:
        names = " and ".join(f"--{name}" for name in checks)
        problems.append(f"{names} are different checks: use one of them")
    if args.resume and (args.overfit_batch or args.eval_only):
        problems.append(f"--{checks[0]} does not continue a run: leave out --resume")
    if args.eval_only and not args.init_from:
        problems.append("--eval_only needs a model: add --init_from with a checkpoint, run folder or gpt2")
    if args.price and not args.dry_run:
        problems.append("--price is for the forecast of --dry_run: add it, or leave out --price")
    if args.early_stop and not args.val_every:
        problems.append("--early_stop counts validations, but --val_every is 0: set both or neither")
    # Sizes may still have to come from --init_from, and out of range they are reported below.
    if (args.n_embd or 0) > 0 and (args.n_head or 0) > 0 and args.n_embd % args.n_head:
        problems.append(
            f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}: change one of them"
        )
    batch_size = 1 if args.batch_size == "auto" else args.batch_size
    micro_step = batch_size * (args.block_size or 0) * world_size
    if micro_step > 0 and args.total_batch_size % micro_step and not args.eval_only:
        nearest = max(round(args.total_batch_size / micro_step), 1) * micro_step
        problems.append(
            f"--total_batch_size {args.total_batch_size} is not divisible by --batch_size {batch_size} x "
            f"--block_size {args.block_size} x {world_size} rank(s) = {micro_step}: "
            f"use --total_batch_size {nearest} or another --batch_size"
        )
    check_options(parser, args, problems)


def load_pretrained(
    args: argparse.Namespace, dist: Distributed, found: Found, parser: argparse.ArgumentParser
) -> GPT | None:
    """Load the model of the resumed checkpoint or of --init_from, or return None for a new model.

    Fills in the architecture options that were left open. Raises ValueError, with a line for each, for
    options that differ from the weights, or do not fit the data.
    """
    model, n_vocab, problems = None, found.n_vocab, []
    known = {each.name: each.default for each in fields(GPTConfig)}
    known["vocab_size"] = math.ceil(n_vocab / 64) * 64
    source = args.out_dir if found.resumed else args.init_from
    if source:
        n_head = None if found.resumed else args.n_head
        model = GPT.from_pretrained(found.resumed or source, args.dropout, n_head)
        known = vars(model.config)
        if found.resumed:
            known = {**known, "block_size": found.resumed["args"]["block_size"]}
    for name in ARCHITECTURE:
        asked = getattr(args, name)
        # Windows may be shorter than the model's context.
        is_shorter = name == "block_size" and asked is not None and asked < known[name]
        if asked is None:
            setattr(args, name, known[name])
        elif model and asked != known[name] and not (is_shorter and not found.resumed):
            problems.append(f"--{name} is {asked}, but {source} has {known[name]}: leave it out")
    if model and (trained_on := name_for(model)) != args.tokenizer:
        problems.append(
            f"{source} has the token ids of {trained_on}, the shards those of {args.tokenizer}: prepare "
            f"shards with --tokenizer {trained_on}"
        )
    elif args.vocab_size < n_vocab:
        problems.append(f"--vocab_size is {args.vocab_size}, but the shards' tokenizer has {n_vocab} ids")
    if problems:
        raise ValueError("\n".join(problems))
    if model and not found.resumed and (line := describe_pretrained(args.init_from, model.metadata)):
        dist.say(line)
    check_args(args, dist.world_size, parser)  # again, with the sizes of the weights
    found.used_ids = n_vocab if is_padded(args.vocab_size, n_vocab) else args.vocab_size
    return model


def fit_batch_size(
    args: argparse.Namespace, dist: Distributed, model: GPT, dtype: torch.dtype, tokens_at: TokensAt
) -> int:
    """Return --batch_size, or for auto the largest one that fits. Every rank has to call this.

    Raises ValueError if it needs more memory than this machine has.
    """
    if args.batch_size == "auto":
        return hardware.find_batch_size(model, common_tokens(args, tokens_at), args.block_size, dtype, dist)
    if not args.eval_only:  # which needs no gradients
        hardware.check_memory(model, args.batch_size, args.block_size, dtype, dist.device)
    return args.batch_size


def limit_steps(
    args: argparse.Namespace, epoch_tokens: int, tokens_at: TokensAt, resumed: dict | None = None
) -> None:
    """Lower --max_steps to the steps that --epochs takes, if it is given; the warm-up shrinks in proportion.

    Raises ValueError if the resumed checkpoint is past them.
    """
    if not args.epochs:
        return
    tokens, steps, before = args.epochs * epoch_tokens, 0, args.max_steps
    while steps < before and tokens >= tokens_at(steps, args) / 2:
        tokens -= tokens_at(steps, args)
        steps += 1
    args.max_steps, args.epochs = max(steps, 1), None  # a resumed run may be extended
    args.warmup_steps = min(round(args.warmup_steps * args.max_steps / before), args.max_steps - 1)
    if resumed and resumed["step"] == args.max_steps == before:
        raise ValueError(
            f"--epochs only shortens a run, and this one has done its {before} steps: use --max_steps"
        )
    if resumed:
        check_step(resumed["step"], args)


def planned_tokens(
    args: argparse.Namespace, world_size: int, tokens_at: TokensAt, resumed: dict | None = None
) -> int:
    """Return the tokens of a whole run: those that were taken before it was resumed, and those to come.

    Raises ValueError for a step that is no number of micro-steps.
    """
    micro_batch, tokens = args.batch_size * args.block_size * world_size, 0
    for step in range(args.max_steps):
        step_tokens = tokens_at(step, args)
        tokens += step_tokens
        if (step_tokens < micro_batch or step_tokens % micro_batch) and not args.eval_only:
            largest, rest = divmod(common_tokens(args, tokens_at), args.block_size * world_size)
            fix = f"--batch_size {largest}" if largest and not rest else "more tokens, or fewer ranks"
            raise ValueError(
                f"step {step} takes {step_tokens} tokens, which is not a multiple of the {micro_batch} in a "
                f"micro-step: use {fix}"
            )
    if resumed:  # with other options, the steps until here would have taken other numbers of tokens
        tokens += consumed_windows(resumed) * args.block_size
        tokens -= sum(tokens_at(step, args) for step in range(resumed["step"]))
    return tokens


def common_tokens(args: argparse.Namespace, tokens_at: TokensAt) -> int:
    """Return the largest number of tokens of which every step takes a multiple."""
    return math.gcd(*{tokens_at(step, args) for step in range(args.max_steps)})


def use_random_shards(args: argparse.Namespace, folder: RunFolder) -> None:
    """Let a dry run read random data. Raises ValueError if the length of the run depends on the data."""
    if args.epochs:
        raise ValueError(
            f"--epochs needs the data in {args.data_dir}: use --max_steps to forecast without it"
        )
    args.data_dir = folder.scratch()
    write_random_shards(Path(args.data_dir), max(args.val_tokens, 1_000_000) + 1)


def write_random_shards(folder: Path, tokens: int, ids: int = 256) -> None:
    """Write a shard of so many random tokens for each split. Bytes are ids of any tokenizer."""
    shards = [{"name": f"{split}.npy", "tokens": tokens} for split in ("val", "train")]
    for number, shard in enumerate(shards):
        rng = np.random.default_rng(number)
        np.save(folder / shard["name"], rng.integers(ids, size=tokens, dtype=np.uint16))
    write_json(folder / "manifest.json", {"complete": True, "source": {"random": True}, "shards": shards})


def first_words(tokens: np.ndarray, tokenizer) -> str:
    """Return up to five words from the beginning of a document or, within one, of a line, as a prompt."""
    text = tokenizer.decode([int(token) for token in tokens if token != tokenizer.eot_token][:200])
    if tokens[0] != tokenizer.eot_token:
        text = text.partition("\n")[2].strip() or text
    return " ".join(text.strip("\ufffd").split()[:5])


@watching("checking options and data")
def check_everything(
    args: argparse.Namespace,
    dist: Distributed,
    folder: RunFolder,
    parser: argparse.ArgumentParser,
    evaluations: list,
) -> Found:
    """Check options, packages, folder, data, items and checkpoint, and return what was loaded for that.

    Fills in the options that the data decide, and locks the folder of a run if it exists. Raises ValueError,
    with a line for each problem, on the main rank and SystemExit on the others. Every rank has to call this.
    """
    problems = Problems(dist)
    allow_open_files()  # before the shards are opened
    is_demo = args.preset == "demo" and args.data_dir in (None, DEMO_DATA_DIR)
    args.data_dir = args.data_dir or (DEMO_DATA_DIR if is_demo else DATA_DIR)
    problems.call(check_args, args, dist.world_size, parser)
    problems.call(check_packages, args)
    dtype = problems.call(hardware.choose_dtype, args.dtype, dist.device)
    if is_demo:
        if dist.is_main:
            problems.call(fineweb.prepare_demo, DEMO_DATA_DIR)
        problems.none_on_any_rank()  # the other ranks wait for the shards
    if dist.is_main:
        problems.call(folder.check, args.data_dir, not (args.dry_run or args.eval_only))
    if args.dry_run and not args.resume and not dist.any(Path(args.data_dir).exists()):
        dist.say(f"there is no {args.data_dir}: the dry run reads random bytes instead")
        problems.call(use_random_shards, args, folder)
    manifest = problems.call(read_set, args.data_dir, args.tokenizer) or {}
    args.tokenizer = manifest.get("tokenizer", args.tokenizer)
    items, resumed = [], None
    if args.hellaswag_every and args.hellaswag_data:
        items = problems.call(hellaswag.load_items, args.hellaswag_data) or []
    if args.resume:
        found_before = len(problems.lines)
        resumed = problems.call(load_training_state, args)
        if resumed is None and len(problems.lines) == found_before:
            dist.say(folder.nothing_to_resume())
        hint = f"the ranks would resume {args.out_dir} at different steps; every node has to see this folder"
        problems.call(dist.check_same, resumed and resumed["step"], hint)
    problems.raise_all()

    tokenizer, needs_text = None, args.eval_only or args.sample_prompt is None
    for evaluation in evaluations:  # all but validation are about text
        needs_text |= evaluation.kind != "val" and getattr(args, f"{evaluation.kind}_every") > 0
    if needs_text or "vocab_size" not in manifest:
        tokenizer = problems.call(get_tokenizer, args.tokenizer)
    if args.hellaswag_every and not args.hellaswag_data and problems.none_on_any_rank():
        items = download_items(args, dist, problems)
    problems.raise_all()
    about = hellaswag.identify(items) if items else {}
    if "warning" in about:
        dist.say(f"HellaSwag: {about['warning']}")
    benchmark = hellaswag.Benchmark(hellaswag.render(items[: args.hellaswag_limit], tokenizer), about)
    n_vocab = tokenizer.n_vocab if tokenizer else manifest["vocab_size"]
    train_tokens = None if manifest.get("source", {}).get("random") else manifest["train_tokens"]
    return Found(dtype, tokenizer, n_vocab, benchmark, resumed, train_tokens)


def download_items(args: argparse.Namespace, dist: Distributed, problems: Problems) -> list[dict]:
    """Return HellaSwag's items, which the main rank downloads; a dry run goes on without them."""
    if dist.is_main:
        problems.call(hellaswag.download)
    if problems.none_on_any_rank():  # the other ranks wait for the file
        return problems.call(hellaswag.load_items, hellaswag.DATA, hellaswag.DOWNLOAD_AGAIN) or []
    if args.dry_run:
        dist.say("\n".join([*problems.lines, "the dry run goes on without HellaSwag"]))
        problems.lines, args.hellaswag_every = [], 0
    return []
