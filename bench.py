"""Measure the performance figures that the README and LOG.md quote.

    python bench.py hellaswag                       # 124M random weights, the project's own items, a minute
    python bench.py hellaswag --data hellaswag_val.jsonl --tokenizer gpt2 --limit 200
    python bench.py hellaswag --n_layer 2 --n_embd 128 --n_head 2 --output hellaswag.json

Every subcommand prints a table, and with --output writes it as JSON with machine, versions and commit. Ways
that are compared run in turn in one process: quote their ratios, times by themselves drift with the machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

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
    rows, chosen = alternate(ways, args.rounds, device, len(examples), "items/s")
    same = sum(map(int.__eq__, *chosen))
    print(f"both ways choose the same ending for {same} of {len(examples)} items")
    return rows


def alternate(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device, amount: float, unit: str
) -> tuple[list[dict], list]:
    """Time the ways in turn, after a warm-up each.

    Returns a row for each way, with its ratio to the first one round by round, and what each way returned.
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
        spread = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
        rows.append({"way": name, "unit": unit, **spread, "ratio": ratio})
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
    for command in commands.choices.values():
        add = command.add_argument
        add("--rounds", type=count, default=3, help="counted repetitions of each way, after one warm-up")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        add("--output", help="write the figures to this .json file")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    rows = args.run(args, device)
    width = max(len(row["way"]) for row in rows)
    print(f"{'':{width}}  {rows[0]['unit']:>10}  {'min':>10}  {'max':>10}  {'ratio':>6}")
    for row in rows:
        figures = "  ".join(f"{row[name]:10.2f}" for name in ("median", "min", "max"))
        print(f"{row['way']:{width}}  {figures}  {row['ratio']:6.2f}")
    if args.output:
        options = {name: value for name, value in vars(args).items() if name != "run"}
        record = {"args": options, **describe_machine(device), "rows": rows}
        write_json(args.output, record)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"bench.py: error: {error}")
