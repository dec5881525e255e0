"""What has to be right, or has to be loaded, before the first step of a run.

    model, dtype, loaders, benchmark, resumed = prepare(args, dist, folder, parser, open_loaders)

Finds everything that is wrong with a command and reports it at once, on the main rank.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

import fineweb
import hellaswag
from corpus.shards import Shards, read_set
from corpus.tokenizer import get_tokenizer
from formats.checkpoint import describe_pretrained
from model import GPT, GPTConfig
from runtime import hardware
from runtime.cli import check_options
from runtime.distributed import Distributed, Problems
from training.checkpoints import check_disk, load_training_state
from training.records import RunFolder, check_packages

DATA_DIR, DEMO_DATA_DIR = "edu_fineweb10B", "demo_data"
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


def limit_steps(args: argparse.Namespace) -> None:
    """Replace --epochs by the --max_steps that it means for the shards; the warm-up shrinks in proportion."""
    tokens = sum(Shards(args.data_dir, "train").lengths)
    steps = min(args.max_steps, max(round(args.epochs * tokens / args.total_batch_size), 1))
    args.warmup_steps = min(round(args.warmup_steps * steps / args.max_steps), steps - 1)
    args.max_steps, args.epochs = steps, None  # a resumed run may be extended


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


def load_model(args: argparse.Namespace, n_vocab: int, resumed: dict | None) -> GPT:
    """Build the model, with the weights of the resumed checkpoint or of --init_from if there are any.

    Fills in the architecture options that were left open. Raises ValueError, with a line for each, for
    options that differ from the weights.
    """
    model, known = None, {"vocab_size": math.ceil(n_vocab / 64) * 64}
    if resumed:
        source, model = args.out_dir, GPT.from_pretrained(resumed, dropout=args.dropout)
        known = {**asdict(model.config), "block_size": resumed["args"]["block_size"]}
    elif args.init_from:
        source, model = args.init_from, GPT.from_pretrained(args.init_from, dropout=args.dropout)
        known = asdict(model.config)
    problems = []
    for name in SIZES:
        asked = getattr(args, name)
        # Windows may be shorter than the model's context.
        shorter_windows = model and not resumed and name == "block_size" and asked and asked < known[name]
        if asked is None:
            setattr(args, name, known[name])
        elif model and asked != known[name] and not shorter_windows:
            problems.append(f"--{name} is {asked}, but {source} has {known[name]}: leave it out")
    trained_on = (model.metadata.get("args") or {}).get("tokenizer") if model else None
    if args.init_from and trained_on != args.tokenizer and args.vocab_size >= 2 * n_vocab:
        problems.append(
            f"{source} has {args.vocab_size} token ids, the shards' tokenizer only {n_vocab}: prepare shards "
            "with the tokenizer of the model"
        )
    if args.vocab_size < n_vocab:
        problems.append(f"--vocab_size is {args.vocab_size}, but the shards' tokenizer has {n_vocab} ids")
    if problems:
        raise ValueError("\n".join(problems))
    return model or GPT(GPTConfig(**{name: getattr(args, name) for name in (*SIZES, "dropout")}))


def first_words(tokens: np.ndarray, tokenizer) -> str:
    """Return up to five words from the beginning of a document or, within one, of a line, as a prompt."""
    text = tokenizer.decode([int(token) for token in tokens if token != tokenizer.eot_token][:200])
    if tokens[0] != tokenizer.eot_token:
        text = text.partition("\n")[2].strip() or text
    return " ".join(text.strip("\ufffd").split()[:5])


def prepare(
    args: argparse.Namespace,
    dist: Distributed,
    folder: RunFolder,
    parser: argparse.ArgumentParser,
    open_loaders: Callable[[], dict],
) -> tuple[GPT, torch.dtype, dict, hellaswag.Benchmark, dict | None]:
    """Return model, dtype, loaders, HellaSwag, and the checkpoint to resume or None.

    Fills in the options left open, and locks the folder of a run if it exists. Raises ValueError, with a line
    for each problem, on the main rank and SystemExit on the others. A collective.
    """
    model, tokenizer, items, loaders = None, None, [], {}
    problems = Problems(dist)
    is_demo = args.preset == "demo" and args.data_dir in (None, DEMO_DATA_DIR)
    args.data_dir = args.data_dir or (DEMO_DATA_DIR if is_demo else DATA_DIR)
    problems.call(check_args, args, dist.world_size, parser)
    problems.call(check_packages, args)
    dtype = problems.call(hardware.choose_dtype, args.dtype, dist.device)
    if is_demo:
        if dist.is_main:
            problems.call(fineweb.prepare_demo, DEMO_DATA_DIR)
        problems.none_on_any_rank()  # the other ranks wait for the shards
    if args.epochs and not problems.lines:
        problems.call(limit_steps, args)
    if dist.is_main:
        problems.call(folder.check, args.data_dir, not (args.dry_run or args.eval_only))
    if manifest := problems.call(read_set, args.data_dir, args.tokenizer) or {}:
        args.tokenizer = manifest["tokenizer"]
    if args.hellaswag_every and args.hellaswag_data:
        path = hellaswag.DEMO_ITEMS if args.hellaswag_data == "demo" else args.hellaswag_data
        items = problems.call(hellaswag.load_items, path) or []
    resumed = None
    if args.resume:
        resumed = problems.call(load_training_state, args.out_dir, args.optimizer, args.max_steps)
        hint = f"the ranks would resume {args.out_dir} at different steps; every node has to see this folder"
        problems.call(dist.check_same, resumed and resumed["step"], hint)
    if problems.none_on_any_rank():  # what may need the network comes after everything local
        writes_text = args.sample_every or args.sample_prompt is None
        if writes_text or args.hellaswag_every or args.eval_only or "vocab_size" not in manifest:
            tokenizer = problems.call(get_tokenizer, args.tokenizer)
        if args.hellaswag_every and not args.hellaswag_data and problems.none_on_any_rank():
            if dist.is_main:
                problems.call(hellaswag.download)
            if problems.none_on_any_rank():  # the other ranks wait for the file
                items = problems.call(hellaswag.load_items, hellaswag.DATA) or []
            elif args.dry_run:
                dist.say("\n".join([*problems.lines, "the dry run goes on without HellaSwag"]))
                problems.lines, args.hellaswag_every = [], 0
    if problems.none_on_any_rank():
        n_vocab = tokenizer.n_vocab if tokenizer else manifest["vocab_size"]
        torch.manual_seed(args.seed)
        model = problems.call(load_model, args, n_vocab, resumed)
    if problems.none_on_any_rank():
        if not resumed and (line := describe_pretrained(args.init_from, model.metadata)):
            dist.say(line)
        model = model.to(dist.device)
        model.recompute = args.recompute
        problems.call(check_args, args, dist.world_size, parser)  # again, with the sizes of --init_from
        problems.call(check_disk, args, model.optimizer_groups(args.weight_decay), resumed)
    if problems.none_on_any_rank():
        with problems.collect():
            if args.batch_size != "auto":
                if not args.eval_only:  # which needs no gradients
                    hardware.check_memory(model, args.batch_size, args.block_size, dtype, dist.device)
            else:
                sizes = (args.total_batch_size, args.block_size)
                args.batch_size = hardware.find_batch_size(model, *sizes, dtype, dist)
            loaders = open_loaders()
            if args.sample_prompt is None:
                args.sample_prompt = first_words(loaders["val"].read(0), tokenizer)
    if problems.none_on_any_rank():
        found = [loader.description for loader in loaders.values()]
        hint = f"the ranks see different shards; {args.data_dir} has to be the same on every node"
        problems.call(dist.check_same, found, hint)
    problems.raise_all()
    about = hellaswag.identify(items) if items else {}
    if "warning" in about:
        dist.say(f"HellaSwag: {about['warning']}")
    benchmark = hellaswag.Benchmark(hellaswag.render(items[: args.hellaswag_limit], tokenizer), about)
    return model, dtype, loaders, benchmark, resumed
