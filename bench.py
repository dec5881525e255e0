"""Measure the performance figures that the README and LOG.md quote.

    python bench.py hellaswag                       # 124M random weights, the project's own items, a minute
    python bench.py hellaswag --data hellaswag_val.jsonl --tokenizer gpt2 --limit 200
    python bench.py memory --n_layer 6 --n_embd 1600 --n_head 25 --output memory.json

Every subcommand prints a table, and with --output writes it as JSON with machine, versions and commit. Ways
that are compared run in turn in one process: quote their ratios, times by themselves drift with the machine.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import hellaswag
from fineweb import count, write_json
from model import GPT, GPTConfig, choose_device
from tokenizer import NAMES, get_tokenizer
from train import DEMO_ITEMS, describe_machine, synchronize


@torch.no_grad()
def score_padded(model: GPT, examples: list[hellaswag.Example]) -> list[int]:
    """The reference way: an item is one batch of four padded rows, all positions go through the head."""
    device, chosen = model.transformer.wte.weight.device, []
    for example in examples:
        rows = [(example.context + ending)[-model.config.block_size :] for ending in example.endings]
        idx = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(idx)
        for i, (row, ending) in enumerate(zip(rows, example.endings, strict=True)):
            idx[i, : len(row)] = torch.tensor(row)
            mask[i, len(row) - len(ending) : len(row)] = 1
        idx, mask = idx.to(device), mask[:, 1:].to(device)
        logits, _ = model(idx)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none")
        losses = (losses.view_as(mask) * mask).sum(dim=1) / mask.sum(dim=1)
        chosen.append(int(losses.argmin()))
    return chosen


def bench_hellaswag(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Items per second of hellaswag.evaluate against the reference way, on the same items."""
    tokenizer = get_tokenizer(args.tokenizer)
    examples = hellaswag.render(hellaswag.load_items(args.data)[: args.limit], tokenizer)
    torch.manual_seed(0)
    config = GPTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    model = GPT(config).eval().to(device=device, dtype=getattr(torch, args.dtype))

    def packed() -> list[int]:
        items = hellaswag.evaluate(model, examples, batch_tokens=args.batch_tokens)["items"]
        return [item["pred_norm"] for item in items]

    ways = {"padded rows, all logits": lambda: score_padded(model, examples), "hellaswag.evaluate": packed}
    rows, chosen = alternate(ways, args.rounds, device, len(examples), "items")
    same = sum(map(int.__eq__, *chosen))
    print(f"both ways choose the same ending for {same} of {len(examples)} items")
    return rows


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the most (proc(5), Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def measure_training_bytes(
    config: GPTConfig, batch_size: int, dtype: torch.dtype, recompute: bool, device: torch.device
) -> tuple[int, int]:
    """Train for two steps of two micro-steps; return the peak of memory in bytes and the formula's."""

    def train(config: GPTConfig) -> GPT:
        model = GPT(config).to(device)
        model.recompute = recompute
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.int64, device=device)
        for micro_step in range(4):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(idx, idx)[1]
            loss.backward()
            if micro_step % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return model

    train(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))  # what libraries take once
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident("VmRSS")
    model = train(config)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before
    return peak, model.training_bytes(batch_size, config.block_size, dtype)


def bench_memory(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Peak memory of a training step in eager mode against the formula of GPT.training_bytes."""
    if device.type != "cuda" and not Path("/proc/self/status").exists():
        raise ValueError("memory is measured on Linux and on CUDA devices only")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system at once
    config = GPTConfig(args.block_size, args.vocab_size, args.n_layer, args.n_head, args.n_embd)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for recompute in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process has one peak
                call = (config, args.batch_size, dtype, recompute, device)
                peak, formula = pool.apply(measure_training_bytes, call)
            way = f"{str(dtype).removeprefix('torch.')}{', --recompute' if recompute else ''}"
            rows.append({"way": way, "MB": peak / 1e6, "formula": formula / 1e6, "ratio": peak / formula})
    return rows


def alternate(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device, amount: float, unit: str
) -> tuple[list[dict], list]:
    """Time the ways in turn, after a warm-up each.

    Returns a row for each way, with its rate per second of `unit` and its ratio to the first way's round by
    round, and what each way returned.
    """
    seconds, results = {name: [] for name in ways}, {}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            synchronize(device)
            start = time.perf_counter()
            results[name] = way()
            synchronize(device)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    base = next(iter(seconds.values()))
    rows = []
    for name, each in seconds.items():
        rates = [amount / s for s in each]
        ratio = statistics.median(b / s for b, s in zip(base, each, strict=True))
        spread = {f"{unit}/s": statistics.median(rates), "min": min(rates), "max": max(rates)}
        rows.append({"way": name, **spread, "ratio": ratio})
    return rows, list(results.values())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("hellaswag", help=bench_hellaswag.__doc__, formatter_class=formatter)
    command.set_defaults(run=bench_hellaswag)
    add = command.add_argument
    add("--data", default=str(DEMO_ITEMS), help="items to score")
    add("--tokenizer", choices=NAMES, default="byte", help="gpt2 is the real thing, byte needs no download")
    add("--limit", type=count, default=20, help="items to score")
    add("--batch_tokens", type=count, help="tokens per forward pass; None is hellaswag.evaluate's own choice")
    add("--n_layer", type=int, default=12, help="blocks")
    add("--n_head", type=int, default=12, help="attention heads per block")
    add("--n_embd", type=int, default=768, help="width")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of weights and arithmetic")
    add("--rounds", type=count, default=3, help="counted repetitions of each way, after one warm-up")
    command = commands.add_parser("memory", help=bench_memory.__doc__, formatter_class=formatter)
    command.set_defaults(run=bench_memory)
    add = command.add_argument
    add("--n_layer", type=int, default=12, help="blocks")
    add("--n_head", type=int, default=12, help="attention heads per block")
    add("--n_embd", type=int, default=768, help="width")
    add("--vocab_size", type=int, default=50304, help="token ids")
    add("--block_size", type=int, default=256, help="context in tokens")
    add("--batch_size", type=int, default=2, help="sequences")
    for command in commands.choices.values():
        add = command.add_argument
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        add("--output", help="write the figures to this .json file")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    rows = args.run(args, device)
    width = max(len(row["way"]) for row in rows)
    print(" " * width, *(f"{name:>10}" for name in list(rows[0])[1:]))
    for row in rows:
        print(f"{row['way']:{width}}", *(f"{value:10.2f}" for value in list(row.values())[1:]))
    if args.output:
        options = {name: value for name, value in vars(args).items() if name != "run"}
        record = {"args": options, **describe_machine(device), "rows": rows}
        write_json(args.output, record)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"bench.py: error: {error}")
