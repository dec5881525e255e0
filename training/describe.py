"""What a run is about to do, in lines for the console and as a record. `run` is the Run of train.py."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from corpus.shards import MOST_OPEN
from diagnosis.published import CHANCE, items_of, name_of, token_of
from runtime import hardware
from runtime.cli import command_line
from runtime.files import existing_folder
from runtime.launcher import read_launcher
from runtime.machine import filesystem_of, open_file_limit
from training.checkpoints import disk_usage
from training.facts import data_facts, prospects

FEW_EPOCHS, MANY_EPOCHS = 0.1, 10.0
# Of what is due every so many steps.
NAMES = {"val": "validations", "hellaswag": "HellaSwag", "sample": "samples", "checkpoint": "checkpoints"}
OTHER_FILES = 64  # besides shards: sockets, libraries, log, checkpoints


def describe_run(run, evaluations: list, tokens_at: Callable, expected: str | None) -> str:
    """Return what a run is about to do and what a good result is, in ten lines at most, and warnings.

    `evaluations` and `tokens_at` are those of train.py, and `expected` is what it says about the preset.
    Every rank has to call this. Raises OSError or ValueError if the shards cannot be read.
    """
    warnings = what_fails_later(run)  # a collective, before anything can fail
    args, ranks, machine = run.args, run.dist.world_size, hardware.describe_machine(run.dist.device)
    epoch_tokens, token = run.train_data.windows * args.block_size, token_of(args.tokenizer)
    step_tokens = args.total_batch_size
    source = f"from {args.init_from}" if args.init_from else "from scratch"
    done = f", continuing at step {run.progress.step:,}" if run.progress.step else ""
    epochs = f"{run.planned_tokens / epoch_tokens:.2f} epochs of {epoch_tokens:,} in {args.data_dir}"
    is_random = run.train_data.shards.source.get("random", False)
    with run.attention():
        how = hardware.describe_compute(args, run.dtype, run.dist.device, run.is_compiled)
    size, needed, free = (tqdm.format_sizeof(n, "B") for n in disk_usage(run))
    checkpoints = f"{size} each, at most {needed} in {args.out_dir}, where {free} are free"
    items, scores = run.benchmark.examples, []
    if items:
        what = items_of(run.benchmark.about)
        scores = [("scores", f"of {len(items):,} {what}; chance is {CHANCE:.0%}, ± is one standard error")]
    lines = [
        (
            "model",
            f"GPT {source}, {run.raw_model.num_params():,} parameters: {args.n_layer} layers, {args.n_head} "
            f"heads, width {args.n_embd}; predicts the next {token} from up to {args.block_size:,} before it",
        ),
        (
            "run",
            f"{args.max_steps:,} steps{done}, {run.planned_tokens:,} {token}s, "
            + ("here of random bytes" if is_random else epochs),
        ),
        ("plan", describe_plan(run, evaluations)),
        *prospects(run, tokens_at, expected),
        *scores,
        (
            "batch",
            f"{step_tokens:,} tokens per step: {args.batch_size} sequences x {args.block_size} "
            f"tokens x {ranks} rank(s) x {step_tokens // (args.batch_size * args.block_size * ranks)} "
            f"micro-step(s)",
        ),
        (
            "device",
            f"{ranks} x {machine['hardware']['device']}, {machine['hardware']['cpu_count']} core(s) of "
            f"{machine['hardware']['cpu']}, torch {machine['versions']['torch']}, {how}",
        ),
        ("optimizer", describe_optimizer(run)),
        ("checkpoints", checkpoints if args.checkpoint_every else "none"),
    ]
    warnings += what_disappoints(run, None if is_random else run.planned_tokens / epoch_tokens)
    lines += [("warning", text) for text in warnings]
    if args.eval_only:
        lines = [line for line in lines if line[0] in ("model", "loss", "device", "scores")]
    return "\n".join(f"{name:12} {text}" for name, text in lines)


def describe_plan(run, evaluations: list) -> str:
    """Return what is due during a run, and where its user sees how long it takes."""
    due: dict[int, list[str]] = {}
    for kind in (*(each.kind for each in evaluations), "checkpoint"):
        if every := getattr(run.args, f"{kind}_every"):
            name = name_of(kind, run.benchmark.about)
            due.setdefault(every, []).append(NAMES.get(name, name))
    parts = [f"every {every:,} steps {', '.join(names)}" for every, names in due.items()]
    return "; ".join([*parts, "the lines of steps end with the time that is left"])


def describe_optimizer(run) -> str:
    """Return the optimizers of a run with their highest rates; its log has the groups."""
    params: dict[str, int] = {}
    for group in describe_groups(run):
        what = f"{group['optimizer']} with learning rates up to {group['lr']:.2e}"
        params[what] = params.get(what, 0) + group["params"]
    return "; ".join(f"{what} for {number:,} parameters" for what, number in params.items())


def what_fails_later(run) -> list[str]:
    """Return a line for each thing about this machine that a first run on it often fails on.

    Every rank has to call this.
    """
    args, device, lines = run.args, run.dist.device, []
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        gpus = run.dist.union([f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB"])
        if len(gpus) > 1:
            lines.append(f"the GPUs differ, and all wait for the slowest: {', '.join(gpus)}")
    shards = [min(len(data.shards.paths), MOST_OPEN) for data in (run.train_data, run.val_data)]
    if (files := sum(shards) + OTHER_FILES) > (allowed := open_file_limit()):
        lines.append(f"up to {files} files will be open, but only {allowed:.0f} may: `ulimit -n 4096`")
    if filesystem_of(existing_folder(Path(args.out_dir).resolve())) == "overlay":
        lines.append(f"{args.out_dir} is on the container's own disk, and goes with the container")
    return lines


def what_disappoints(run, epochs: float | None) -> list[str]:
    """Return a line for each thing about a run, or its rehearsal, that its user will probably regret.

    `epochs` is None if the data are not those of the run.
    """
    args, ranks = run.args, run.dist.world_size
    if args.overfit_batch:
        return []
    lines = []
    gpus = torch.cuda.device_count() if run.dist.device.type == "cuda" and ":" not in args.device else 0
    if ranks < gpus and ranks == read_launcher().local_world_size:  # on a single node
        lines.append(f"{gpus} GPUs, this run uses {ranks}: {command_line(*sys.argv, ranks=gpus)}")
    if epochs is not None and epochs < FEW_EPOCHS:
        lines.append(f"only {epochs:.1%} of the training data will be read: raise --max_steps if you can")
    if epochs is not None and epochs > MANY_EPOCHS and not args.early_stop:
        lines.append(f"{epochs:.0f} epochs memorize the text: lower --max_steps or use --early_stop")
    val_tokens = run.val_data.windows_for(args.val_tokens) * args.block_size
    items = run.benchmark.examples
    item_tokens = sum(len(each.context) + sum(map(len, each.endings)) for each in items)
    pairs = ((val_tokens, args.val_every), (item_tokens, args.hellaswag_every))
    # A step of training takes three times as long as the forward pass over its tokens.
    share = sum(tokens / every for tokens, every in pairs if every) / (
        3 * run.planned_tokens / args.max_steps
    )
    if share > 1:
        lines.append(
            f"evaluations will take about {share:.1f} times as long as the training between them: raise "
            "--val_every and --hellaswag_every, or lower --val_tokens and --hellaswag_limit"
        )
    return lines


def about_run(run, evaluations: list) -> dict:
    """Return the record of what a run is about to do. It names the number of each evaluation to draw."""
    curves = {each.kind: each.curve for each in evaluations if each.curve}
    about = dict(args=vars(run.args), world_size=run.dist.world_size, params=run.raw_model.num_params())
    about |= {"groups": describe_groups(run), "curves": curves, "data": data_facts(run)}
    about["tokens"] = run.progress.windows * run.args.block_size  # seen before
    about |= {"dtype": str(run.dtype).removeprefix("torch."), "planned_tokens": run.planned_tokens}
    return about | hardware.describe_machine(run.dist.device)


def describe_groups(run) -> list[dict]:
    """Return what console and log say about each parameter group; `lr` is its peak."""
    return [
        {
            "name": group["name"],
            "optimizer": group["optimizer"],
            "params": sum(weight.numel() for weight in group["params"]),
            "lr": run.args.learning_rate * group["lr_scale"],
            "weight_decay": group["weight_decay"],
        }
        for group in run.optimizer.param_groups
    ]
