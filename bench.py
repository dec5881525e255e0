"""Measure the figures that the README quotes, and those of LOG.md since 2026-11-29; git has the rest.

    python bench.py hellaswag                       # random weights, the project's own items
    python bench.py hellaswag --data hellaswag_val.jsonl --tokenizer gpt2 --limit 200
    python bench.py data --files 'edu_text/*.parquet' --tokenizer gpt2
    python bench.py generate --batch_size 8 --dtype bfloat16
    python bench.py train --n_layer 12 --n_head 12 --n_embd 768
    python bench.py memory --n_layer 6 --n_embd 1600 --n_head 25 --output memory.json
    python bench.py compile --card h100             # bytes, memory and kernels on a GPU that is not there
    python bench.py sweep --name adamw -- --preset demo --learning_rate 3e-3 6e-3    # three seeds each
    python bench.py gpu --output measured           # what to run on a GPU that is rented for ten minutes

Every subcommand prints a table and, with --output, writes it as JSON with machine, versions and commit. The
ways that are compared alternate within one run. Quote their ratios: absolute times drift with the machine.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import fineweb
import hellaswag
import train
from corpus import documents
from corpus.inputs import Fetcher, local_inputs
from corpus.tokenizer import NAMES, get_tokenizer
from model import GPT, GPT2_VOCAB_SIZE, PADDED_VOCAB_SIZE, GPTConfig
from plot import curve
from runtime import absent_gpu, hardware
from runtime.cli import Parser, Range, check_options, count, run, summary, user_path, watched, watching
from runtime.files import file_hash, write_json
from runtime.hardware import synchronize
from runtime.log import read_log
from runtime.machine import free_cores, usable_cores
from sample import generate
from training.prepare import write_random_shards

# With 524,288 tokens a step. Here a step has one micro-step, so the optimizer takes more of it.
PUBLISHED = "llm.c 468,000 tokens/s per H100 (40 % of peak) and 218,000 per A100 (60 %), discussion 481"
GRACE_S = 40.0  # torchrun takes 30 to end ranks that do not react
CUDA_SCRIPT = "runtime/cuda_env.sh"
CUDA_PYTHON = Path(__file__).parent / ".cuda-venv" / "bin" / "python"
WARM_UP_STEPS = 3  # until code is compiled and memory allocated


def config_of(args: argparse.Namespace, **changes: int) -> GPTConfig:
    """Return the model size that a command line describes; the defaults are those of GPT-2 (124M)."""
    names = {field.name for field in fields(GPTConfig)}
    return GPTConfig(**{name: value for name, value in vars(args).items() if name in names} | changes)


@torch.no_grad()
def score_padded(model: GPT, examples: list[hellaswag.Example]) -> list[int]:
    """The reference: each item is one batch of four padded rows, and all positions go through the head."""
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
    """Items per second: hellaswag.evaluate against the reference, on the same items."""
    tokenizer = get_tokenizer(args.tokenizer)
    items = itertools.islice(itertools.cycle(hellaswag.load_items(args.data)), args.limit)
    examples = hellaswag.render(list(items), tokenizer)
    torch.manual_seed(0)
    config = config_of(args, vocab_size=PADDED_VOCAB_SIZE)  # with bytes too: the head is a part of the time
    model = GPT(config).eval().to(device=device, dtype=getattr(torch, args.dtype))

    def packed() -> list[int]:
        items = hellaswag.evaluate(model, examples)["items"]
        return [item["pred_norm"] for item in items]

    ways = {"padded rows, all logits": lambda: score_padded(model, examples), "hellaswag.evaluate": packed}
    if args.alone:
        del ways["padded rows, all logits"]
    rows, chosen = alternate(ways, args.rounds, device, len(examples), "items")
    if not args.alone:
        same = sum(map(int.__eq__, *chosen))
        print(f"both choose the same ending for {same} of {len(examples)} items")
    return rows


# What the scripts of the public reproductions do: `datasets`, a pool on half of the cores, mapped over
# documents, and shards that are filled one document at a time.
USUAL_DATA_SCRIPT = """
import multiprocessing, os, sys
import numpy as np
from datasets import load_dataset
from corpus.tokenizer import get_tokenizer

name, shard_size, folder, *files = sys.argv[1:]
tokenizer, shard_size = get_tokenizer(name), int(shard_size)

def encode(document):
    tokens = np.array([tokenizer.eot_token, *tokenizer.encode_ordinary(document["text"])])
    assert tokens.max() < 2**16
    return tokens.astype(np.uint16)

if __name__ == "__main__":
    documents = load_dataset("parquet", data_files=files, split="train", cache_dir=f"{folder}/cache")
    shard, filled, index = np.empty(shard_size, dtype=np.uint16), 0, 0
    with multiprocessing.get_context("fork").Pool(max(os.cpu_count() // 2, 1)) as pool:
        for tokens in pool.imap(encode, documents, chunksize=16):
            while filled + len(tokens) >= shard_size:
                room = shard_size - filled
                shard[filled:], tokens, filled = tokens[:room], tokens[room:], 0
                np.save(f"{folder}/{'train' if index else 'val'}_{index:06d}", shard)
                index += 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    if filled:
        np.save(f"{folder}/train_{index:06d}", shard[:filled])
"""
DATA_SHARD = 1_000_000  # tokens; fineweb.py splits a set of fewer than five shards anew


def bench_data(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """MB of text per second of whole commands: the usual script, and fineweb.py with one worker and more."""
    fetcher, shards = Fetcher(local_inputs(args.files), Path(), keep=True), {}
    chunks = documents.read_chunks(fetcher, documents.Format(), (0, 0))
    with watching("reading the files"):
        megabytes = sum(documents.not_empty(chunk.read()).nbytes for chunk in chunks) / 1e6
    files = [each.path for each in fetcher.inputs]

    def hashes(name: str, command: list[str]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "usual.py")
            script.write_text(USUAL_DATA_SCRIPT)
            path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            words = [word.format(script=script, folder=folder) for word in command]
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
            seconds = time.perf_counter() - start
            paths = sorted(Path(folder).glob("*.npy"), key=lambda path: path.stem[-6:])
            shards[name] = [file_hash(path) for path in paths]
            return seconds

    usual = ["{script}", args.tokenizer, str(DATA_SHARD), "{folder}", *files]
    options = ["--tokenizer", args.tokenizer, "--shard_size", str(DATA_SHARD), "--out_dir", "{folder}"]
    commands = {"usual script": usual}
    for workers in sorted({1, args.workers}):
        ours = [fineweb.__file__, "--files", *files, *options, "--workers", str(workers)]
        commands[f"fineweb.py, {workers} worker(s)"] = ours
    ways = {name: functools.partial(hashes, name, command) for name, command in commands.items()}
    rows, _ = alternate(ways, args.rounds, device, megabytes, "MB")
    assert all(each == shards["usual script"] for each in shards.values()), shards
    print(f"{megabytes:.1f} MB in {len(files)} files; the shards of all ways are the same, byte for byte")
    return rows


def bench_generate(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Tokens per second, greedy and drawn: sample.generate, transformers, bandwidth limit."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    config = config_of(args)
    model, dtype, n = GPT(config).eval(), getattr(torch, args.dtype), args.max_new_tokens
    with tempfile.TemporaryDirectory() as folder, watching("making the models"):
        model.save_pretrained(folder, vocab_size=config.vocab_size)
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.to(device=device, dtype=dtype)
    prompt = torch.randint(config.vocab_size, (args.batch_size, args.prompt_tokens), device=device)
    weights = torch.ones(model.num_params() * dtype.itemsize // 4, device=device)

    def transformers(**sampling) -> torch.Tensor:
        options = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, **sampling}
        return theirs.generate(prompt, min_new_tokens=n, max_new_tokens=n, pad_token_id=0, **options)

    ways = {
        "transformers": lambda: transformers(do_sample=False),
        "sample.generate": lambda: generate(model, prompt, n, temperature=0),
        "memory: weights once a token": lambda: [weights.sum() for _ in range(n)],
        "transformers, top-k 50": lambda: transformers(do_sample=True, top_k=50, temperature=0.8),
        "sample.generate, top-k 50": lambda: generate(model, prompt, n, top_k=50, temperature=0.8),
        "sample.generate, all ids": lambda: generate(model, prompt, n, temperature=0.8),
    }
    if device.type == "cuda" and hardware.can_compile(device, print):
        ways["sample.generate, compiled"] = lambda: generate(model, prompt, n, temperature=0, compiled=True)
    rows, results = alternate(ways, args.rounds, device, args.batch_size * n, "tokens")
    same = (results[0] == results[1])[:, args.prompt_tokens :].float().mean()
    print(f"transformers and sample.generate choose the same token {same:.1%} of the time")
    best = max(row["tokens/s"] for row in rows if "sample" in row["way"])
    print(f"the best way reaches {best / rows[2]['tokens/s']:.0%} of what the memory bandwidth allows:")
    print(f"torch.sum reads {4e-9 * weights.numel() * rows[2]['tokens/s'] / args.batch_size:.1f} GB/s")
    return rows


def in_process(function: Callable, *args):
    """Return what a function returns in a process of its own, with its own memory and compiled code."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def resident(name: str) -> int:
    """Return the resident memory of this process in bytes: VmRSS now, VmHWM at its peak (proc(5), Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def measure_training_bytes(
    config: GPTConfig, batch_size: int, dtype: torch.dtype, recompute: bool, device: torch.device
) -> tuple[int, int]:
    """Train for two steps of two micro-steps; return the measured and the computed peak memory in bytes."""

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

    # One-time allocations of libraries do not count.
    train(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident("VmRSS")
    model = train(config)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before
    return peak, model.training_bytes(batch_size, config.block_size, dtype)


def bench_memory(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Peak memory of a training step in eager mode, measured and by the formula of GPT.training_bytes."""
    if device.type != "cuda" and not Path("/proc/self/status").exists():
        raise ValueError("memory is measured on Linux and on CUDA devices only")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory returns to the system at once
    config = config_of(args)
    rows, ways = [], list(itertools.product((torch.float32, torch.bfloat16), (False, True)))
    for dtype, recompute in watched(ways, "training", "ways"):
        call = (config, args.batch_size, dtype, recompute, device)
        peak, formula = in_process(measure_training_bytes, *call)  # the peak is per process
        way = f"{str(dtype).removeprefix('torch.')}{', --recompute' if recompute else ''}"
        rows.append({"way": way, "MB": peak / 1e6, "formula": formula / 1e6, "ratio": peak / formula})
    return rows


def cuda_python() -> str:
    """Return a Python whose torch is a CUDA build, which compiles for GPUs that are not there.

    Torch 2.11 needs a driver for that; 2.12 was not tried. Raises FileNotFoundError, saying how to get one,
    if there is none.
    """
    if torch.version.cuda and torch.__version__ >= "2.13" and importlib.util.find_spec("triton"):
        return sys.executable
    if not CUDA_PYTHON.exists():
        raise FileNotFoundError(
            f"torch {torch.__version__} cannot compile for GPUs: `bash {CUDA_SCRIPT}` makes an environment "
            "that can, once (5 GB)"
        )
    return str(CUDA_PYTHON)


@watching("compiling for the GPU")
def count_kernels(folder: Path, args: argparse.Namespace) -> dict:
    """Return what `runtime/absent_gpu.py` counts for the model.py of a folder."""
    options = json.dumps({name: value for name, value in vars(args).items() if name != "bench"})
    command = [cuda_python(), "-P", absent_gpu.__file__, str(folder.absolute()), options]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # a GPU that is there
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    if done.returncode:
        raise ValueError(f"the model in {folder} does not compile: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_compile(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Bytes that a step moves on a GPU that is not there, its memory and kernels; nothing is run.

    Generated kernels are limited by memory bandwidth, matrix products and attention by arithmetic. The
    roofline assumes 85 % of the data sheet's bandwidth and 75 % of its FLOP/s, one after the other: compare
    versions of a model with it, not cards. `ratio` is that of its tokens per second to the first.
    """
    config, tokens = config_of(args), args.batch_size * (1 if args.what == "decoding" else args.block_size)
    with torch.device("meta"):
        model = GPT(config)
    card = absent_gpu.CARDS[args.card]
    flops = model.flops_per_token(args.block_size) * tokens / (1 if args.what == "training" else 3)
    rows, folders = [], [Path(__file__).parent, *([Path(args.against)] if args.against else [])]
    if not (folders[-1] / "model.py").is_file():
        raise FileNotFoundError(f"no model.py in {args.against}: name the folder of another version")
    for folder in folders:
        record = count_kernels(folder, args)
        generated = total = 0
        print(f"\n{folder}: {args.what} on {record['card']}, {record['dtype']}, {tokens:,} tokens")
        for graph in record["graphs"]:
            kinds = sorted(graph["kinds"].items(), key=lambda kind: -kind[1][1])
            for name, (number, size) in kinds[: args.top]:
                print(f"  {graph['kind']:9} {size / 1e9:8.2f} GB {number:4} x {name[:90]}")
            total += sum(size for _, size in graph["kinds"].values())
            generated += sum(size for name, (_, size) in kinds if not name.startswith("library"))
        first, peak = record["graphs"][0], max(graph["peak_bytes"] for graph in record["graphs"])
        fixed = 16 * model.num_params() if args.what == "training" else 0
        seconds = generated / (0.85 * card.bandwidth) + flops / (0.75 * card.flops)
        rows.append(
            {
                "way": str(folder),
                "MB/token": generated / tokens / 1e6,
                "generated": generated / 1e9,
                "all GB": total / 1e9,
                "kept GB": first["kept_bytes"] / 1e9,
                "peak GB": (peak + fixed) / 1e9,
                "tokens/s": tokens / seconds,
                "nodes": first["nodes"],
                "kernels": sum(graph["kernels"] for graph in record["graphs"]),
                "compile s": record["trace_seconds"] + sum(graph["seconds"] for graph in record["graphs"]),
                "ratio": tokens / seconds / rows[0]["tokens/s"] if rows else 1.0,
            }
        )
    print()
    return rows


def run_train(
    options: dict, device: torch.device, patch: str = "", ranks: int = 1
) -> tuple[float, float, float]:
    """Run only training steps of train.py on random shards, after a line of Python that may patch torch.

    Returns what `step_times` does, and the peak memory in bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), 1_000_000, ids=GPT2_VOCAB_SIZE)
        options = {"data_dir": folder, "out_dir": f"{folder}/log", "device": device, **options}
        options["total_batch_size"] = options["batch_size"] * options["block_size"] * ranks
        options |= {f"{name}_every": 0 for name in ("val", "hellaswag", "sample", "checkpoint")}
        options |= {"warmup_steps": 0, "tokenizer": "byte"}  # the byte tokenizer needs no download
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        script = Path(folder, "patched.py")
        run = f"runpy.run_path({train.__file__!r}, run_name='__main__')"
        script.write_text(f"import runpy, torch\n{patch}\n{run}")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(launcher if ranks > 1 else []), str(script), *words]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error:" in line.lower()]
            raise RuntimeError(errors[0] if errors else f"train.py ended with {done.returncode}")
        if "torch.compile does not work" in done.stdout:  # its figures would be those of eager mode
            raise RuntimeError(next(line for line in done.stdout.splitlines() if "does not work" in line))
        log = read_log(f"{folder}/log")
        return *step_times([step["dt_ms"] / 1000 for step in log["train"]]), log["end"][-1]["peak_bytes"]


def step_times(seconds: list[float]) -> tuple[float, float]:
    """Return the median seconds of all steps but the first few, and what those took more, mostly to compile.

    Compilation may find in Inductor's cache what it has compiled for another way.
    """
    first, median = seconds[:WARM_UP_STEPS], statistics.median(seconds[WARM_UP_STEPS:])
    return median, max(sum(first) - len(first) * median, 0.0)


def train_in_turn(ways: dict[str, Callable], rounds: int, device: torch.device, tokens: int) -> list[dict]:
    """Time ways to train on `tokens` a step, alternately. Each returns `step_times` and bytes.

    The rows add the seconds to compile and the peak memory in GB. A way that fails says so, and its row has
    no figures.
    """
    compile_s: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def timed(name: str) -> float:
        if math.isnan(peaks.get(name, 0.0)):
            return math.nan
        try:
            seconds, extra_s, peaks[name] = ways[name]()
            compile_s.setdefault(name, extra_s)  # later rounds find the code in Inductor's cache
            return seconds
        except (RuntimeError, BrokenExecutor) as error:  # out of memory is one of them
            print(f"{name}: {' '.join(str(error).split())[:200]}", flush=True)
            compile_s[name] = peaks[name] = math.nan
            return math.nan

    calls = {name: functools.partial(timed, name) for name in ways}
    rows, _ = alternate(calls, rounds, device, tokens, "tokens", warm_up=False)
    return [{**row, "GB": peaks[row["way"]] / 1e9, "compile s": compile_s[row["way"]]} for row in rows]


def usual_steps(options: dict, device: torch.device) -> tuple[float, float, float]:
    """Run the usual loop with transformers; return `step_times` and the peak memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(options["threads"])
    sizes = {name: options[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    rates = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config = GPT2Config(n_positions=options["block_size"], **sizes, **rates)
    model = GPT2LMHeadModel(config).to(device).train()
    step_model = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    dtype, seconds = getattr(torch, options["dtype"]), []
    for _ in range(options["max_steps"]):
        synchronize(device)
        start = time.perf_counter()
        idx = torch.randint(GPT2_VOCAB_SIZE, (options["batch_size"], options["block_size"]), device=device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = step_model(idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    used = hardware.memory(device)
    return *step_times(seconds), used[0] if used else math.nan


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on this machine, the best of twenty tries."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    (row,), _ = alternate({"product": lambda: a @ b}, 20, device, 2 * n**3, "FLOP")
    return row["max"]


def add_shares(
    rows: list[dict], config: GPTConfig, device: torch.device, dtype: torch.dtype, ranks: int = 1
) -> None:
    """Add to rows of training their share of a matrix product's FLOP/s and, if it is known, of the peak's."""
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    rate, peak = matmul_rate(device, dtype), hardware.peak_flops(device, dtype)
    print(f"{str(dtype).removeprefix('torch.')} matrix product: {rate / 1e12:.2f} TFLOP/s")
    for row in rows:
        row["of matmul"] = row["tokens/s"] * flops / ranks / rate
        if peak:
            row["mfu"] = row["tokens/s"] * flops / ranks / peak


def ranks_on(device: torch.device) -> int:
    """Return how many ranks train on this machine: one on each GPU."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


def bench_train(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Tokens per second and memory of train.py's step, with its variants, and of the usual loop."""
    names = ("n_layer", "n_head", "n_embd", "batch_size", "block_size", "dtype")
    options = {name: getattr(args, name) for name in names}
    options |= {"vocab_size": PADDED_VOCAB_SIZE, "max_steps": args.steps + WARM_UP_STEPS}
    options["threads"] = torch.get_num_threads()  # on CPUs, for all ways what is free now
    ranks = ranks_on(device)
    ours = functools.partial(run_train, device=device, ranks=ranks)
    muon = options | {"optimizer": "muon"}
    ways = {
        "train.py": lambda: ours(options),
        "train.py, muon": lambda: ours(muon),
    }
    if ranks == 1:
        ways = {"transformers": lambda: in_process(usual_steps, options, device), **ways}
    if device.type == "cuda":
        for kernel in ("flash", "cudnn"):
            patch = f"torch.backends.cuda.enable_{kernel}_sdp(False)"
            ways[f"train.py, no {kernel}"] = functools.partial(ours, options, patch=patch)
        for rows in (4096, 8192, 16384):
            patch = f"import model; model.head_rows = lambda *sizes: {rows}"
            ways[f"train.py, head {rows:,} rows"] = functools.partial(ours, options, patch=patch)
    if ranks > 1:
        patch = "torch._dynamo.config.optimize_ddp = False"
        ways["train.py, no optimize_ddp"] = lambda: ours(options, patch=patch)
    tokens = args.batch_size * args.block_size * ranks
    rows = train_in_turn(ways, args.rounds, device, tokens)
    add_shares(rows, config_of(args, vocab_size=PADDED_VOCAB_SIZE), device, getattr(torch, args.dtype), ranks)
    return rows


def steps_to(target: float, run: dict[str, list[dict]]) -> float:
    """Return the steps until the validation loss reaches `target`, or infinity if it does not.

    Interpolates linearly between validations.
    """
    steps, losses = curve(run["val"], "loss")
    reached = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if not reached:  # step 0 does not count: nothing has been learned there
        return math.inf
    before, after = losses[reached - 1], losses[reached]
    return steps[reached - 1] + (before - target) / (before - after) * (steps[reached] - steps[reached - 1])


def welch_p(ours: list[float], theirs: list[float]) -> float:
    """Return the two-sided p of Welch's t-test, or NaN if a side has less than two values or none differ."""
    if min(len(ours), len(theirs)) < 2:
        return math.nan
    a, b = (statistics.variance(each) / len(each) for each in (ours, theirs))
    if a + b == 0:
        return math.nan
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))
    difference = abs(statistics.mean(ours) - statistics.mean(theirs))

    # With t = sqrt(freedom) * tan(angle), the density of Student's t is a power of the cosine.
    def tail(start: float) -> float:
        angles = torch.linspace(start, math.pi / 2, 10_001, dtype=torch.float64)
        return torch.trapezoid(angles.cos() ** (freedom - 1), angles).item()

    return tail(math.atan(difference / math.sqrt(freedom * (a + b)))) / tail(0)


def read_finished(out_dir: Path) -> dict[str, list[dict]] | None:
    """Return the log of a run that has reached its last step, or None for any other."""
    try:
        log = read_log(out_dir)
        return log if log["val"][-1]["step"] == log["run"][-1]["args"]["max_steps"] else None
    except (FileNotFoundError, KeyError):
        return None


def bench_sweep(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Train with every combination of options and seeds, and compare all runs in the folder.

    Options of train.py follow `--`; those with several values span the grid. Each run has a folder
    `NAME,option=value,seed=1`. A finished run is not repeated, so several commands can fill one folder.
    Raises ValueError if a finished run of the same name had other options.
    """
    grid = [[(name, value) for value in values or [""]] for name, values in args.options.items()]
    varied = {name for name, values in args.options.items() if len(values) > 1}
    folder = Path(args.out_dir)
    threads = {**os.environ, "OMP_NUM_THREADS": str(max(free_cores() // args.jobs, 1))}

    def train_once(settings: tuple[tuple[str, str], ...], seed: str) -> None:
        name = ",".join([args.name, *(f"{key}={value}" for key, value in settings if key in varied)])
        out_dir = folder / f"{name},seed={seed}"
        words = [word for key, value in settings for word in (f"--{key}", value) if word]
        words += ["--seed", seed, "--device", str(device), "--out_dir", str(out_dir)]
        if log := read_finished(out_dir):
            wanted, had = vars(train.parse_args(words)), log["run"][-1]["args"]
            for key in (key.removeprefix("no-") for key, _ in settings):
                if had[key] != wanted[key]:
                    raise ValueError(f"{out_dir} was run with --{key} {had[key]}: use another --name")
            return
        shutil.rmtree(out_dir, ignore_errors=True)
        command = [sys.executable, train.__file__, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=threads)
        outcome = done.stderr.strip().splitlines()[-1:] if done.returncode else ["done"]
        tqdm.write(f"{out_dir.name}: {' '.join(outcome)}")

    # Seeds are the outer loop, so that a change in the speed of the machine affects all settings.
    runs = [(each, seed) for seed in args.seeds for each in itertools.product(*grid)]
    with ThreadPoolExecutor(args.jobs) as pool, watching("sweep", len(runs), "runs") as work:
        for _ in pool.map(lambda each: train_once(*each), runs):
            work.update()
    return compare_runs(folder, args.baseline)


def compare_runs(folder: Path, baseline: str | None) -> list[dict]:
    """Return a row per setting of a sweep: its loss, and the steps to the baseline's loss.

    `baseline` defaults to the best setting. Raises ValueError if it is missing or no run has finished.
    """
    settings: dict[str, list[dict]] = {}
    for out_dir in sorted(folder.glob("*")):
        if log := read_finished(out_dir):
            settings.setdefault(out_dir.name.rpartition(",seed=")[0], []).append(log)
    if not settings:
        raise ValueError(f"no run in {folder} has finished: check the errors of train.py, or add --seeds")
    losses = {name: [log["val"][-1]["loss"] for log in logs] for name, logs in settings.items()}
    base = baseline or min(settings, key=lambda name: statistics.mean(losses[name]))
    if base not in settings:
        raise ValueError(f"no setting {base} in {folder}: choose from {', '.join(settings)}")
    target, rows = statistics.mean(losses[base]), []
    for name, logs in settings.items():
        # The target is a mean, which some of the baseline's own runs do not reach.
        goals = losses[name] if name == base else [target] * len(logs)
        reached = [steps_to(goal, log) for goal, log in zip(goals, logs, strict=True)]
        rows.append(
            {
                "way": name,
                "seeds": len(logs),
                "val loss": statistics.mean(losses[name]),
                "spread": statistics.stdev(losses[name]) if len(logs) > 1 else math.nan,
                "p": welch_p(losses[name], losses[base]),
                "steps": logs[0]["val"][-1]["step"],
                "to target": statistics.mean(reached),
            }
        )
    print(f"target: the validation loss of {base}, {target:.4f}; spread: the standard deviation;")
    print("p: that of Welch's test against the target's runs, two-sided")
    return rows


def gpu_parts(on_gpu: bool, card: str | None = None) -> dict[str, int]:
    """Return the commands of `bench.py gpu` in order of worth, and the seconds that each may take.

    The roofline is counted for a known `card`.
    """
    size = "--n_layer 12 --n_head 12 --n_embd 768" if on_gpu else "--n_layer 1 --n_head 2 --n_embd 16"
    steps = f"--block_size {1024 if on_gpu else 32} --steps {20 if on_gpu else 1} --batch_size"
    batch_size = 64 if on_gpu else 4
    items, tokens, dtype = (10042, 256, "bfloat16") if on_gpu else (4, 4, "float32")
    text = f"generate {size} --rounds 1 --dtype {dtype} --max_new_tokens {tokens}"
    roofline = {f"compile {size} --batch_size {batch_size} --card {card}": 200} if card else {}
    return {
        f"train {size} {steps} {batch_size} --rounds 1": 1200,
        **roofline,
        f"hellaswag {size} --dtype {dtype} --limit {items} --rounds 1 --alone": 120,
        text: 300,
        f"{text} --batch_size 8": 300,
        f"memory {size} --batch_size {16 if on_gpu else 1} --block_size {1024 if on_gpu else 32}": 240,
    }


def bench_gpu(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure what is worth most on a rented GPU, each part in a process of its own with a time limit.

    Each part is written to the folder --output as soon as it ends. A table for the README comes last.
    """
    folder = Path(args.output or "measured")
    folder.mkdir(parents=True, exist_ok=True)
    args.output, outcomes = f"{folder}/gpu.json", []
    card = absent_gpu.card_in(hardware.describe_machine(device)["hardware"]["device"])
    for number, (words, limit_s) in enumerate(gpu_parts(device.type == "cuda", card).items()):
        print(f"\nbench.py {words}", flush=True)
        path = part_path(folder, number, words)
        path.unlink(missing_ok=True)  # what an earlier command has measured
        command = [sys.executable, __file__, *words.split(), "--device", str(device), "--output", str(path)]
        start = time.perf_counter()
        process = subprocess.Popen(command, start_new_session=True)
        try:
            failed = process.wait(limit_s) != 0
        except subprocess.TimeoutExpired:
            failed = True
            print(f"stopped after {limit_s} s", flush=True)
        finally:
            if process.poll() is None:
                # torchrun's ranks have sessions of their own, and end only if torchrun can tell them to.
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(GRACE_S)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        outcomes.append({"way": words, "s": time.perf_counter() - start, "failed": float(failed)})
    print(f"\nPublished for GPT-2 (124M), 1,024 tokens of context: {PUBLISHED}\n")
    return outcomes


def part_path(folder: Path, number: int, words: str) -> Path:
    """Return where a part of `bench.py gpu` writes its figures."""
    return folder / f"{number}_{words.split()[0]}.json"


def table_of_training(folder: Path, parts: list[str], device: torch.device) -> str:
    """Return what the `train` parts of `bench.py gpu` have measured, as a table in Markdown.

    What was not measured leaves its cells empty: all of a part or way that failed, MFU and roofline of an
    unknown card. The roofline is that of `bench.py compile`.
    """
    ranks, measured = ranks_on(device), []
    card = f"{ranks} x {hardware.describe_machine(device)['hardware']['device']}"
    columns = {"tokens/s": ",.0f", "roofline": ",.0f", "mfu": ".1%", "GB": ".1f", "compile s": ".0f"}
    roofline = None
    for number, words in enumerate(parts):
        path, rows = part_path(folder, number, words), [{"way": "train.py"}]
        if path.exists():
            rows = json.loads(path.read_text())["rows"]
        if words.startswith("train "):
            measured += rows
        elif words.startswith("compile ") and path.exists():
            roofline = ranks * rows[0]["tokens/s"]
    lines = [
        "| card | way | tokens/s | roofline | MFU | GB | seconds to compile |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        row["roofline"] = roofline if row["way"] == "train.py" else None
        cells = ["" if row.get(name) is None else format(row[name], how) for name, how in columns.items()]
        lines.append(f"| {' | '.join([card, row['way'], *cells])} |")
    return "\n".join(lines)


def alternate(
    ways: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    amount: float,
    unit: str,
    warm_up: bool = True,
) -> tuple[list[dict], list]:
    """Time the variants alternately, after one warm-up each. One that returns a float has timed itself.

    Returns a row for each way, with its rate in `unit` per second and the median over the rounds of its ratio
    to the first way, and the results of all ways.
    """
    seconds, results = {name: [] for name in ways}, {}
    runs = list(itertools.product(range(rounds + warm_up), ways.items()))
    with watching("", len(runs), "runs") as work:
        for round_number, (name, way) in runs:
            work.what = f"round {round_number + 1} of {rounds + warm_up}, {name}"
            if round_number == 0:
                work.show()
            synchronize(device)
            start = time.perf_counter()
            results[name] = way()
            synchronize(device)
            taken = time.perf_counter() - start
            if round_number >= warm_up:
                seconds[name].append(results[name] if isinstance(results[name], float) else taken)
            work.update()
    base = next(iter(seconds.values()))
    rows = []
    for name, each in seconds.items():
        rates = [amount / s for s in each]
        ratio = statistics.median(b / s for b, s in zip(base, each, strict=True))
        spread = {f"{unit}/s": statistics.median(rates), "min": min(rates), "max": max(rates)}
        rows.append({"way": name, **spread, "ratio": ratio})
    return rows, list(results.values())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    at_least_1 = Range(count, 1)
    # Options that several subcommands share.
    parents = [argparse.ArgumentParser(add_help=False) for _ in range(7)]
    shared, timed, tokenized, sized, small, stepped, typed = parents
    add = shared.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--output", type=user_path, help="write the figures to this .json file")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    typed.add_argument("--dtype", choices=dtypes, default="auto", help="dtype, auto as in train.py")
    add = timed.add_argument
    add("--rounds", type=at_least_1, default=2, help="timed runs of each variant")
    add = tokenized.add_argument
    add("--tokenizer", choices=NAMES, default="byte", help="gpt2 for real figures; byte needs no download")
    for parent, n_layer, n_head, n_embd in ((sized, 12, 12, 768), (small, 2, 4, 256)):
        add = parent.add_argument
        add("--n_layer", type=int, default=n_layer, help="blocks")
        add("--n_head", type=int, default=n_head, help="attention heads per block")
        add("--n_embd", type=int, default=n_embd, help="width")
    add = stepped.add_argument
    add("--batch_size", type=at_least_1, default=4, help="sequences per step")
    add("--block_size", type=at_least_1, default=512, help="context in tokens")
    add("--steps", type=at_least_1, default=2, help="steps per round")

    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, bench: Callable, *parents: argparse.ArgumentParser) -> Callable:
        parents = [shared, *parents]
        what = summary(bench.__doc__)
        command = commands.add_parser(name, help=what, doc=what, parents=parents)
        command.set_defaults(bench=bench)
        return command.add_argument

    add = command("hellaswag", bench_hellaswag, timed, tokenized, sized, typed)
    add("--data", type=user_path, default=str(hellaswag.DEMO_ITEMS), help="items to score")
    add("--limit", type=at_least_1, default=20, help="items to score; if there are fewer, they repeat")
    add("--alone", action="store_true", help="leave out the reference")
    add = command("data", bench_data, timed, tokenized)
    add("--files", type=user_path, nargs="+", required=True, help="parquet files of documents")
    add("--workers", type=at_least_1, default=usable_cores(), help="threads that tokenize")
    add = command("generate", bench_generate, timed, sized, typed)
    add("--batch_size", type=at_least_1, default=1, help="sequences")
    add("--prompt_tokens", type=at_least_1, default=8, help="tokens in the prompt")
    add("--max_new_tokens", type=at_least_1, default=256, help="tokens to generate")
    command("train", bench_train, timed, small, stepped, typed)
    add = command("sweep", bench_sweep)
    add("--out_dir", type=user_path, default="sweep", help="folder of the runs")
    add("--name", default="run", help="prefix of the run folders")
    add("--seeds", nargs="*", default=["1", "2", "3"], help="one run for each (none: only compare)")
    add("--jobs", type=at_least_1, default=1, help="parallel runs")
    add("--baseline", help="setting whose validation loss is the target (default: the best one)")
    command("gpu", bench_gpu)
    add = command("compile", bench_compile, sized)
    add("--card", choices=absent_gpu.CARDS, default="h100", help="GPU to compile for")
    what = "forward and backward, forward, or one new token"
    add("--what", choices=absent_gpu.PASSES, default="training", help=what)
    add("--batch_size", type=at_least_1, default=64, help="sequences")
    add("--block_size", type=at_least_1, default=1024, help="context in tokens")
    add("--dropout", type=float, default=0.0, help="dropout probability (0: disabled)")
    add("--recompute", action="store_true", help="recompute activations")
    add("--against", type=user_path, help="folder with another model.py, such as an older commit's")
    add("--top", type=int, default=12, help="kinds of kernels to list per graph")
    add = command("memory", bench_memory, sized)
    add("--vocab_size", type=int, default=PADDED_VOCAB_SIZE, help="token ids")
    add("--block_size", type=int, default=256, help="context in tokens")
    add("--batch_size", type=int, default=2, help="sequences")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    check_options(commands.choices[args.command], args)
    args.options = {}  # of train.py, each with its values
    for word in argv[end + 1 :]:
        if word.startswith("--"):
            values = args.options[word[2:]] = []
        elif not args.options:
            parser.error(f"-- must be followed by an option of train.py, not {word}")
        else:
            values.append(word)
    if args.options and args.command != "sweep":
        parser.error(f"{args.command} takes no options of train.py after --")
    return args


def main(args: argparse.Namespace) -> None:
    device = hardware.choose_device(args.device)
    if hasattr(args, "dtype"):
        args.dtype = str(hardware.choose_dtype(args.dtype, device)).removeprefix("torch.")
        print(f"dtype: {args.dtype}", flush=True)
    rows = args.bench(args, device)
    width = max(len(row["way"]) for row in rows)
    print(" " * width, *(f"{name:>10}" for name in list(rows[0])[1:]))
    for row in rows:
        print(f"{row['way']:{width}}", *(f"{value:10.5g}" for value in list(row.values())[1:]))
    if args.output:
        options = {name: value for name, value in vars(args).items() if name != "bench"}
        # JSON has no NaN.
        rows = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        record = {"args": options, **hardware.describe_machine(device), "rows": rows}
        write_json(args.output, record)
    if args.command == "gpu":
        parts = [row["way"] for row in rows]
        print(f"\n{table_of_training(Path(args.output).parent, parts, device)}")


if __name__ == "__main__":
    run(main, parse_args, needs_output=False)
