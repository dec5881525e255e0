"""Measure the performance figures that the README and LOG.md quote.

    python bench.py hellaswag                       # 124M random weights, the project's own items, a minute
    python bench.py hellaswag --data hellaswag_val.jsonl --tokenizer gpt2 --limit 200
    python bench.py data --files 'edu_text/*.parquet' --tokenizer gpt2
    python bench.py generate --batch_size 8 --dtype bfloat16
    python bench.py memory --n_layer 6 --n_embd 1600 --n_head 25 --output memory.json

Every subcommand prints a table, and with --output writes it as JSON with machine, versions and commit. Ways
that are compared run in turn in one process: quote their ratios, times by themselves drift with the machine.
"""

import argparse
import functools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import fineweb
import hellaswag
from fineweb import count, write_json
from model import GPT, GPTConfig, choose_device
from sample import generate
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


def encode_document(text: str, tokenizer_name: str) -> np.ndarray:
    """What the usual script does in a worker: one document at a time."""
    tokenizer = get_tokenizer(tokenizer_name)
    tokens = np.array([tokenizer.eot_token, *tokenizer.encode_ordinary(text)])
    assert tokens.max() < 2**16
    return tokens.astype(np.uint16)


def bench_data(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """MB of text per second: one core of tiktoken, a pool that maps document by document, fineweb.py."""
    inputs = fineweb.local_inputs(args.files) if args.files else fineweb.stdlib_inputs()
    chunks = fineweb.read_chunks(fineweb.Fetcher(inputs, Path(), keep=True), "text", (0, 0))
    texts = [text for chunk in chunks for text in fineweb.texts_of(chunk) if text]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = get_tokenizer(args.tokenizer)

    def serial() -> int:
        return sum(1 + len(tokenizer.encode_to_numpy(text, disallowed_special=())) for text in texts)

    def by_document() -> int:
        # Forked, so it starts at once; reading and writing, which the usual script does too, are left out.
        with multiprocessing.get_context("fork").Pool(args.workers) as pool:
            encode = functools.partial(encode_document, tokenizer_name=args.tokenizer)
            return sum(map(len, pool.imap(encode, texts, chunksize=16)))

    def command() -> int:
        with tempfile.TemporaryDirectory() as out_dir:
            options = ["--tokenizer", args.tokenizer, "--workers", str(args.workers), "--out_dir", out_dir]
            words = [sys.executable, fineweb.__file__, "--files", *(each.path for each in inputs), *options]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            return sum(shard["tokens"] for shard in fineweb.read_manifest(Path(out_dir))["shards"])

    ways = {"tiktoken, one core": serial, "pool, by document": by_document, "fineweb.py": command}
    rows, (tokens, *others) = alternate(ways, args.rounds, device, megabytes, "MB")
    assert others == [tokens, tokens], (tokens, others)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as out_dir:
        source = {"text_column": "text"}
        fineweb.prepare(inputs, out_dir, source=source, tokenizer=args.tokenizer, workers=args.workers)
    parent, core = (time.process_time() - start) / tokens, rows[0]["MB/s"] / megabytes * tokens
    print(f"{megabytes:.1f} MB, {tokens:,} tokens, {args.workers} workers")
    print(f"fineweb.py reaches {rows[2]['ratio'] / args.workers:.0%} of workers x one core of tiktoken and")
    print(f"{rows[2]['ratio'] / rows[1]['ratio']:.2f} times the pool that maps document by document; its")
    print(f"parent needs {1e9 * parent:.1f} ns of CPU per token: busy with {1 / parent / core:.0f} workers")
    return rows


def bench_generate(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Greedy tokens per second of sample.generate, transformers, a loop without a cache, and memory alone."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    model, dtype, n = GPT(config).eval(), getattr(torch, args.dtype), args.max_new_tokens
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, vocab_size=config.vocab_size)
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.to(device=device, dtype=dtype)
    prompt = torch.randint(config.vocab_size, (args.batch_size, args.prompt_tokens), device=device)
    weights = torch.ones(model.num_params() * dtype.itemsize // 4, device=device)

    def transformers() -> torch.Tensor:
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
        return theirs.generate(prompt, min_new_tokens=n, max_new_tokens=n, pad_token_id=0, **options)

    ways = {
        "transformers": transformers,
        "sample.generate": lambda: generate(model, prompt, n, temperature=0),
        "memory: weights once a token": lambda: [weights.sum() for _ in range(n)],
    }
    if device.type == "cuda":
        ways["sample.generate, compiled"] = lambda: generate(model, prompt, n, temperature=0, compiled=True)
    rows, results = alternate(ways, args.rounds, device, args.batch_size * n, "tokens")
    same = (results[0] == results[1])[:, args.prompt_tokens :].float().mean()
    print(f"transformers and sample.generate draw the same token {same:.1%} of the time")
    best = max(row["tokens/s"] for row in rows if "sample" in row["way"])
    print(f"the best way reaches {best / rows[2]['tokens/s']:.0%} of what memory allows, with")
    print(f"{4e-9 * weights.numel() * rows[2]['tokens/s'] / args.batch_size:.1f} GB/s read by torch.sum")

    # The loop without a cache would take minutes. Its time grows steadily, so five of its steps tell.
    lengths = np.linspace(args.prompt_tokens, args.prompt_tokens + n - 1, 5).astype(int)
    steps = {str(T): functools.partial(model, results[1][:, :T]) for T in lengths}
    with torch.no_grad():
        steps, _ = alternate(steps, args.rounds, device, 1, "steps")
    for name in ("tokens/s", "min", "max"):
        seconds = n * np.trapezoid([1 / step[name.replace("tokens", "steps")] for step in steps]) / 4
        steps[0][name] = args.batch_size * n / seconds
    loop = {name: steps[0][name] for name in ("tokens/s", "min", "max")}
    return [*rows, {"way": "no cache, from 5 steps", **loop, "ratio": loop["tokens/s"] / rows[0]["tokens/s"]}]


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
    # What several subcommands take.
    shared, timed, tokenized, sized = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    add = shared.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--output", help="write the figures to this .json file")
    add = timed.add_argument
    add("--rounds", type=count, default=3, help="counted repetitions of each way, after one warm-up")
    add = tokenized.add_argument
    add("--tokenizer", choices=NAMES, default="byte", help="gpt2 is the real thing, byte needs no download")
    add = sized.add_argument
    add("--n_layer", type=int, default=12, help="blocks")
    add("--n_head", type=int, default=12, help="attention heads per block")
    add("--n_embd", type=int, default=768, help="width")

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable, *parents: argparse.ArgumentParser) -> Callable:
        parents = [shared, *parents]
        command = commands.add_parser(name, help=run.__doc__, formatter_class=formatter, parents=parents)
        command.set_defaults(run=run)
        return command.add_argument

    add = command("hellaswag", bench_hellaswag, timed, tokenized, sized)
    add("--data", default=str(DEMO_ITEMS), help="items to score")
    add("--limit", type=count, default=20, help="items to score")
    add("--batch_tokens", type=count, help="tokens per forward pass; None is hellaswag.evaluate's own choice")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of weights and arithmetic")
    add = command("data", bench_data, timed, tokenized)
    add("--files", nargs="+", default=[], help="text to tokenise; none is Python's standard library")
    add("--workers", type=count, default=os.cpu_count(), help="processes that tokenise")
    add = command("generate", bench_generate, timed, sized)
    add("--batch_size", type=count, default=1, help="sequences")
    add("--prompt_tokens", type=count, default=8, help="tokens in the prompt")
    add("--max_new_tokens", type=count, default=256, help="tokens to generate")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and arithmetic")
    add = command("memory", bench_memory, sized)
    add("--vocab_size", type=int, default=50304, help="token ids")
    add("--block_size", type=int, default=256, help="context in tokens")
    add("--batch_size", type=int, default=2, help="sequences")
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
