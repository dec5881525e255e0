"""Train GPT-2 from scratch on the token shards that fineweb.py writes.

    python train.py --preset demo                        # a laptop: no GPU, no network, one minute
    python train.py                                      # GPT-2 (124M) on edu_fineweb10B/, one GPU
    torchrun --standalone --nproc_per_node=8 train.py    # the same run, step for step, on eight

Writes to --out_dir: log.jsonl (one record a step and an evaluation), model_XXXXX.pt and model_best.pt
(checkpoints), loss.png, where asked for tensorboard/ and wandb/. Expect a first loss near ln(vocab_size):
10.8 for GPT-2. Published for the default run: validation loss about 3.05 and 30.4 % on HellaSwag after 19,073
steps (build-nanogpt's log); OpenAI's GPT-2 scores 29.55 %.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fineweb
import hellaswag
import plot
import sample
from model import GPT, GPTConfig, choose_device, load_checkpoint, step_of
from muon import Muon
from tokenizer import NAMES, get_tokenizer

DEMO_DATA_DIR = "demo_data"
DEMO_ITEMS = Path(__file__).parent / "tests" / "hellaswag_items.jsonl"
# Learning rates and batch sizes of the larger models: Brown et al. 2020 (GPT-3), table 2.1.
XL_BATCH = dict(batch_size=8, total_batch_size=1048576, max_steps=9537)  # the same 10 billion tokens
PRESETS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, batch_size=32, learning_rate=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, batch_size=16, learning_rate=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4, **XL_BATCH),
    # Tried as a whole at small sizes (LOG.md). Not measured at this one: that half the tokens are enough, and
    # AdamW's rate, which modded-nanogpt gave the embeddings of a similar network in October 2024.
    "speedrun": {
        **dict(n_layer=12, n_head=12, n_embd=768, optimizer="muon", schedule="wsd", decay_share=0.5),
        **dict(learning_rate=3.6e-3, min_lr=0.0, warmup_steps=250, max_steps=9537),
    },
    "demo": {
        **dict(n_layer=2, n_head=4, n_embd=128, block_size=64, batch_size=16, total_batch_size=1024),
        **dict(optimizer="muon", schedule="wsd", decay_share=0.5, shuffle=True),
        **dict(learning_rate=1e-2, min_lr=0.0, warmup_steps=50, max_steps=1600),
        **dict(val_every=200, val_tokens=65536, hellaswag_every=800, hellaswag_data=str(DEMO_ITEMS)),
        **dict(sample_every=800, sample_prompt="import ", sample_tokens=300),
        **dict(checkpoint_every=800, log_every=50),
    },
}
ARCHITECTURE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
PICTURE_EVERY_S = 30.0  # drawing takes half a second, small models write checkpoints more often than that
SAME_SIGNAL_S = 1.0  # torchrun passes on what a terminal or Slurm has already sent to every process
OVERFIT_LOSS = 0.05  # nats per token; what "near zero" means to --overfit_batch
# Dense bf16/fp16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets, by the name that the driver gives.
PEAK_FLOPS = {
    r"NVIDIA B200": 2250e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"Tesla T4": 65e12,
}


@dataclass(frozen=True)
class Distributed:
    """This process's place among the ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add numbers up over the ranks, in float64. A collective: every rank calls it."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def union(self, lines: list[str]) -> list[str]:
        """The lines of all ranks, each once, in the same order on every rank. A collective."""
        gathered = [lines]
        if self.world_size > 1:
            gathered = [[] for _ in range(self.world_size)]
            torch.distributed.all_gather_object(gathered, lines)
        return list(dict.fromkeys(line for lines in gathered for line in lines))

    def leave(self) -> None:
        """Leave the process group. A collective."""
        if self.world_size > 1:
            # A thread of gloo may need the interpreter to free a tensor. To leave the group is to wait for it
            # with the interpreter locked, for ever (seen in tests); here the thread gets its turn.
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def error(self, message: str) -> BaseException:
        """What each rank is to raise when all have found the same: one says it, the others just end."""
        self.leave()
        return ValueError(message) if self.is_main else SystemExit(1)


def setup_distributed(device: str) -> Distributed:
    """Join torchrun's process group where there is one: nccl on GPUs, gloo on CPUs.

    Raises ValueError when this machine lacks the device, or has fewer GPUs than ranks.
    """
    device = choose_device(device)
    if "RANK" not in os.environ:
        return Distributed(rank=0, world_size=1, device=device)
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, single_node = None, os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if single_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # One store serves all of torchrun's restarts, and a new rank may find the address of a dead one there
        # (pytorch/pytorch#135712). The count tells them apart, but on one node only: each node has its own.
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = torch.distributed.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return Distributed(rank, world_size, device)


def read_manifest(data_dir: Path) -> dict:
    """What fineweb.py says of its shards, all tasks together; {} for other tools'.

    Raises ValueError for a set that is not finished, or whose tasks do not agree.
    """
    manifests = [json.loads(path.read_text()) for path in sorted(data_dir.glob("manifest*.json"))]
    if not manifests:
        return {}
    if not all(each["complete"] for each in manifests) or len(manifests) < manifests[0].get("task_count", 1):
        raise ValueError(f"the shards in {data_dir} are not complete: repeat the fineweb.py command")
    for name in ("tokenizer", "vocab_size", "task_count"):
        if len(found := {each.get(name) for each in manifests}) > 1:
            raise ValueError(f"the manifests in {data_dir} have {name} {found}: give each set its own")
    return {**manifests[0], "shards": [shard for each in manifests for shard in each["shards"]]}


def find_shards(data_dir: Path, split: str) -> list[Path]:
    """The shards of a split, in the order of their names. Raises FileNotFoundError where there are none."""
    paths = sorted(path for path in data_dir.glob("*.npy") if split in path.name)
    if not paths:
        raise FileNotFoundError(
            f"no {split} shards in {data_dir}/: `python fineweb.py --out_dir {data_dir}` makes them from "
            "FineWeb-Edu, `python train.py --preset demo` trains without"
        )
    return paths


def open_shard(path: Path) -> np.ndarray:
    """Map a shard into memory. Raises ValueError when it is no whole, one-dimensional uint16 array."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is cut short or no .npy file ({error}): make it anew") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(f"{path} is {tokens.ndim}-dimensional {tokens.dtype}, not 1-dimensional uint16")
    return tokens


class DataLoaderLite:
    """Micro-batches of one split, in an order that depends on the seed and the step alone.

    A shard holds (len - 1) // block_size windows. The windows of an epoch stand in file order, or with
    `shuffle` in an order drawn from (seed, epoch); a step takes the next ones, and each micro-step its slice
    of these, rank by rank. So any number of ranks and any batch size train on the same windows, and to resume
    is to `seek`.

    Raises FileNotFoundError without shards and ValueError for a shard that is damaged, too short, or has ids
    that a vocabulary of `vocab_size` lacks.
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
        self.dist, self.shuffle = dist, shuffle
        data_dir = Path(data_dir)
        self.paths = find_shards(data_dir, split)
        listed = {shard["name"]: shard["tokens"] for shard in read_manifest(data_dir).get("shards", [])}
        windows = []
        for path in self.paths:
            tokens = len(open_shard(path))
            if tokens != listed.get(path.name, tokens):
                raise ValueError(
                    f"{path} has {tokens} tokens, its manifest says {listed[path.name]}: make it anew"
                )
            windows.append(max(tokens - 1, 0) // block_size)
        self.first_windows = np.cumsum([0, *windows])  # of each shard, in the epoch
        self.windows = int(self.first_windows[-1])
        if self.windows == 0:
            raise ValueError(
                f"no {split} shard in {data_dir}/ holds a window of {block_size} + 1 tokens: "
                "lower --block_size or give fineweb.py more text"
            )
        self.open_shard = lru_cache(maxsize=256)(open_shard)  # each one holds a file descriptor
        self.order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(self.windows)
        )
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{split}-loader")
        self.seek(0)
        self.pending.result()  # ids beyond the vocabulary show now, not in training

    def _read(self, first: int) -> torch.Tensor:
        """Read `batch_size` windows of block_size + 1 tokens; `first` counts windows since training began."""
        rows = np.empty((self.batch_size, self.block_size + 1), dtype=np.int64)
        for row, window in zip(rows, range(first, first + self.batch_size), strict=True):
            epoch, window = divmod(window, self.windows)
            if self.shuffle:
                window = self.order(epoch)[window]
            shard = int(np.searchsorted(self.first_windows, window, side="right")) - 1
            start = int(window - self.first_windows[shard]) * self.block_size
            row[:] = self.open_shard(self.paths[shard])[start : start + self.block_size + 1]
            if row.max() >= self.vocab_size:
                raise ValueError(
                    f"{self.paths[shard]} holds token id {row.max()}, but the model's vocabulary ends at "
                    f"{self.vocab_size - 1}: set --vocab_size and --tokenizer to those of the shards"
                )
        rows = torch.from_numpy(rows)
        return rows.pin_memory() if self.dist.device.type == "cuda" else rows

    def seek(self, micro_batch: int) -> None:
        """Go on with this micro-batch, counted per rank since training began; fetch it in the background."""
        self.micro_batch = micro_batch
        first = (micro_batch * self.dist.world_size + self.dist.rank) * self.batch_size
        self.pending = self.pool.submit(self._read, first)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, both (batch_size, block_size) int64 on the device."""
        rows = self.pending.result()
        self.seek(self.micro_batch + 1)
        rows = rows.to(self.dist.device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def validate(
    model: torch.nn.Module, loader: DataLoaderLite, val_tokens: int, autocast: torch.autocast
) -> float:
    """Mean loss in nats per token over the first `val_tokens` of the split (all of it when it has fewer).

    Any number of ranks sums over the same tokens. Rows past the last window are masked: shapes stay fixed.
    """
    dist, B, T = loader.dist, loader.batch_size, loader.block_size
    windows = min(max(val_tokens // T, 1), loader.windows)
    model.eval()
    loader.seek(0)
    # Reserved before, for a tensor that outlives a batch would split the memory that its logits leave behind.
    losses = torch.zeros(math.ceil(windows / (B * dist.world_size)), device=dist.device)
    for i in range(len(losses)):
        x, y = loader.next_batch()
        first = (i * dist.world_size + dist.rank) * B
        y = y.masked_fill(torch.arange(first, first + B, device=y.device)[:, None] >= windows, -100)
        with autocast:
            losses[i] = model(x, y, reduction="sum")[1]
    model.train()
    (nats,) = dist.sum(losses.cpu().double().sum().item())
    return nats / (windows * T)


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then down to --min_lr at --max_steps.

    `cosine` follows half a cosine, `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM) stays at the peak
    until the last --decay_share of the steps and falls linearly there.
    """
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    left = args.max_steps - step
    if args.schedule == "cosine":
        height = 0.5 * (1 - math.cos(math.pi * left / max(args.max_steps - args.warmup_steps, 1)))
    else:
        height = min(left / max(args.decay_share * args.max_steps, 1), 1)
    return args.min_lr + height * (args.learning_rate - args.min_lr)


class CheckpointWriter:
    """Writes checkpoints in the background, one after the other.

    Training waits for a copy to host memory only, and for the write before where that is not done. A write
    that fails is reported and leaves the older checkpoints as they are; `check` and `close` raise ValueError
    when two in a row have failed, `close` also when the last one has.
    """

    def __init__(self, out_dir: Path, keep: int, milestone_steps: int, log: Callable[..., None]):
        self.out_dir, self.keep, self.milestone_steps, self.log = out_dir, keep, milestone_steps, log
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending = self.pool.submit(lambda: None)
        self.host: dict[tuple, torch.Tensor] = {}
        self.failure = ""  # what became of the last write
        self.drawn = time.monotonic()
        for unfinished in out_dir.glob("*.tmp"):  # the last one of a run that was killed
            unfinished.unlink()

    def to_host(self, value):
        """Copy nested dicts and lists with their tensors; those that share memory still do.

        The memory is kept for the next time, on GPUs it is pinned: the copy runs at the full rate of the bus.
        """
        if isinstance(value, dict):
            return {name: self.to_host(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.to_host(each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.data_ptr(), value.shape, value.dtype)
        if key not in self.host:
            self.host[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.host[key].copy_(value, non_blocking=True)

    def save(self, names: list[str], checkpoint: dict, device: torch.device) -> None:
        """Start to write the checkpoint under each of the names."""
        started = time.perf_counter()
        self.pending.result()
        checkpoint = self.to_host(checkpoint)
        synchronize(device)
        held_ms = 1000 * (time.perf_counter() - started)
        self.pending = self.pool.submit(self._write, names, checkpoint, held_ms)

    def _write(self, names: list[str], checkpoint: dict, held_ms: float) -> None:
        started = time.perf_counter()
        try:
            for name in names:
                fineweb.write_atomically(self.out_dir / name, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            # torch.save turns the file's error into one of its own.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            before, self.failure = self.failure, f"could not write {self.out_dir / name} ({reason})"
            if before:
                raise ValueError(
                    f"{self.failure}, nor the one before: make room and --resume from {self.newest()}"
                ) from error
            tqdm.write(f"warning: {self.failure}; training goes on, and the next checkpoint is tried")
            return
        self.failure = ""
        write_ms = 1000 * (time.perf_counter() - started)
        self.log(checkpoint["step"], "checkpoint", names=names, held_ms=held_ms, write_ms=write_ms)
        for path in self.numbered()[: -self.keep] if self.keep else []:
            if not self.milestone_steps or step_of(path) % self.milestone_steps:
                path.unlink()
        if time.monotonic() - self.drawn > PICTURE_EVERY_S:
            draw(self.out_dir)
            self.drawn = time.monotonic()

    def numbered(self) -> list[Path]:
        """The checkpoints of this run but model_best.pt, the oldest first."""
        return sorted(self.out_dir.glob("model_[0-9]*.pt"), key=step_of)

    def newest(self) -> str:
        """The newest checkpoint, for messages."""
        best = [path for path in [self.out_dir / "model_best.pt"] if path.exists()]
        return str(max([*self.numbered(), *best], key=step_of, default="nothing: none was written yet"))

    def check(self) -> None:
        """Raise what a finished write has raised."""
        if self.pending.done():
            self.pending.result()

    def close(self) -> None:
        """Wait for the last write."""
        self.pending.result()
        if self.failure:
            raise ValueError(f"{self.failure}: make room and --resume from {self.newest()}")


class StopSignal:
    """True once SIGTERM or SIGINT has arrived; a second one ends the process at once."""

    def __init__(self):
        self.arrived = None
        self.before = {each: signal.signal(each, self._handle) for each in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame) -> None:
        if self.arrived is None:
            self.arrived = time.monotonic()
        elif time.monotonic() - self.arrived > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __bool__(self) -> bool:
        return self.arrived is not None

    def restore(self) -> None:
        """Leave signals to those who had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """A run's records: log.jsonl, and beside it those of TensorBoard and Weights & Biases where asked for.

    A resumed run repeats its first step with all evaluations: what log.jsonl holds from there on, and a line
    that was cut short, goes; TensorBoard hides it too. At Weights & Biases the run goes on under its id.

    Raises ValueError when Weights & Biases refuses to start.
    """

    def __init__(self, out_dir: Path, start_step: int, tensorboard: bool, wandb: bool):
        self.path, self.lock = out_dir / "log.jsonl", threading.Lock()
        kept, wandb_id = [], None
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if record["step"] < start_step or record["kind"] == "run":
                    kept.append(line + "\n")
                    wandb_id = record.get("wandb") or wandb_id
        fineweb.write_atomically(self.path, lambda file: file.write("".join(kept).encode()))
        self.file = open(self.path, "a", buffering=1)
        self.tensorboard = self.wandb = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out_dir / "tensorboard", purge_step=start_step, flush_secs=10)
        if wandb:
            import wandb

            project = os.environ.get("WANDB_PROJECT", "gpt2")
            try:
                self.wandb = wandb.init(project=project, dir=out_dir, id=wandb_id, resume="allow")
            except wandb.errors.Error as error:
                message = f"Weights & Biases: {error} (without an account: WANDB_MODE=offline)"
                raise ValueError(" ".join(message.split())) from error
            self.wandb.define_metric("*", step_metric="step")  # its own steps cannot go back

    def __call__(self, step: int, kind: str, **values) -> None:
        """Add a record. Numbers that are not finite become null: they are no JSON."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if kind == "run" and self.wandb:
            values["wandb"] = self.wandb.id
            self.wandb.config.update(values["args"], allow_val_change=True)
        with self.lock:
            try:
                self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            except OSError as error:  # the file object keeps the line and tries again with the next one
                tqdm.write(f"warning: could not write {self.path} ({error}); training goes on")
            rates = {f"lr {name}": rate for name, rate in values.pop("lrs", {}).items()}
            numbers = {k: v for k, v in {**values, **rates}.items() if isinstance(v, int | float)}
            if self.tensorboard:
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
            if self.wandb:
                self.wandb.log({"step": step, **{f"{kind}/{name}": value for name, value in numbers.items()}})

    def close(self) -> None:
        """Write what TensorBoard and Weights & Biases still hold back."""
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def describe_machine(device: torch.device) -> dict:
    """What a figure needs beside it: versions, hardware, git commit and time."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
            "cpu_count": os.cpu_count(),
        },
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve --dtype: bf16 where the hardware computes in it, else fp16 on NVIDIA GPUs and fp32 elsewhere.

    Raises ValueError for bf16 on a GPU that only emulates it; on such a CPU it is slow, with a warning.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        has_bf16 = any(capabilities.get(feature) for feature in ("avx512_bf16", "amx_bf16"))
    if name == "auto":
        name = "bfloat16" if has_bf16 else "float16" if device.type == "cuda" else "float32"
    elif name == "bfloat16" and not has_bf16 and device.type == "cuda":
        raise ValueError("this GPU only emulates bfloat16: give --dtype float16 or auto")
    elif name == "bfloat16" and not has_bf16 and device.type == "cpu":
        warnings.warn("this CPU only emulates bfloat16: --dtype float32 is faster", stacklevel=2)
    return getattr(torch, name)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's data-sheet FLOP/s in this dtype, None where we do not know it."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def synchronize(device: torch.device) -> None:
    """Wait for what the device still computes: a GPU's clock is only honest then."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, where it would give it back to the system.

    On CPUs a step allocates the same large tensors again and again, and the first touch of a page that comes
    from the system costs as much as the arithmetic on it: half the time of a step of the 124M model (LOG.md).
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of mallopt(3)
        ctypes.CDLL(None).mallopt(m_mmap_max, 0)
        ctypes.CDLL(None).mallopt(m_trim_threshold, -1)


def can_compile(device: torch.device, say: Callable[[str], None]) -> bool:
    """Try torch.compile on next to nothing: CPUs need a C++ compiler, GPUs Triton and a C compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        say(f"warning: torch.compile does not work here, training goes on without ({reason})")
        return False
    torch._dynamo.utils.counters.clear()  # the log counts the model's compilations
    return True


def fits(model: GPT, batch_size: int, block_size: int, dtype: torch.dtype, dist: Distributed) -> bool:
    """Whether a training step has the memory for `batch_size` sequences per micro-step.

    A GPU is tried, in eager mode, which needs more than compiled code. Elsewhere nothing can be tried, a
    system out of memory swaps or kills: there half of what the machine has, shared by the ranks, must do.
    """
    if dist.device.type != "cuda":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        return model.training_bytes(batch_size, block_size, dtype) <= memory / dist.world_size
    try:
        # AdamW's moments, and a twentieth of the device for what comes and goes.
        reserve = [torch.empty_like(weight) for weight in [*model.parameters()] * 2]
        reserve += [torch.empty(torch.cuda.mem_get_info()[1] // 20, dtype=torch.uint8, device=dist.device)]
        idx = torch.zeros(batch_size, block_size, dtype=torch.int64, device=dist.device)
        for _ in range(2):  # the second micro-step adds to the gradients of the first
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(idx, idx)[1]
            loss.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def find_batch_size(model: GPT, args: argparse.Namespace, dtype: torch.dtype, dist: Distributed) -> int:
    """The largest --batch_size that fits on every rank and divides the tokens of a step.

    Raises ValueError when not even 1 fits. A collective.
    """
    most = args.total_batch_size // (args.block_size * dist.world_size)
    for batch_size in (n for n in range(most, 0, -1) if most % n == 0):
        (misfits,) = dist.sum(not fits(model, batch_size, args.block_size, dtype, dist))
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
        if not misfits:
            return batch_size
    raise ValueError("not even --batch_size 1 fits into memory: give --recompute or a smaller --block_size")


def prepare_demo_data(dist: Distributed) -> None:
    """Make the demo's shards, where they are missing, from the sources of the standard library."""
    found = fineweb.read_manifest(Path(DEMO_DATA_DIR))
    if dist.is_main and not (found and found["complete"]):
        print(f"making shards from Python's standard library in {DEMO_DATA_DIR}/")
        source = {"standard library of Python": platform.python_version(), "text_column": None}
        fineweb.prepare(fineweb.stdlib_inputs(), DEMO_DATA_DIR, source=source, tokenizer="byte")
    dist.sum(0)  # the others wait for the shards


def draw(out_dir: Path) -> Path:
    """Draw the run's curves. A picture that fails is not worth a run."""
    path = out_dir / "loss.png"
    try:
        plot.plot([out_dir], path)
    except (ImportError, OSError, ValueError) as error:
        tqdm.write(f"warning: no picture of the loss: {error}")
    return path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add = parser.add_argument_group("run").add_argument
    add("--preset", default="gpt2", help=f"defaults that other options override: {', '.join(PRESETS)}")
    add("--data_dir", help="folder of shards; None is edu_fineweb10B, for the demo shards that it makes")
    add("--out_dir", default="log", help="folder for log, checkpoints and picture")
    add("--init_from", help="weights to start with: checkpoint, run, Hugging Face folder, gpt2 … gpt2-xl")
    add("--resume", action="store_true", help="continue the run in --out_dir where there is one")
    add("--tokenizer", choices=NAMES, help="of the shards; None is what their manifest names, or gpt2")
    add("--seed", type=int, default=1337, help="of weights, dropout, samples and --shuffle")
    add = parser.add_argument_group("model (None is the preset's, or that of --init_from)").add_argument
    add("--block_size", type=int, help="context in tokens")
    add("--vocab_size", type=int, help="token ids; None is the tokenizer's, padded to a multiple of 64")
    add("--n_layer", type=int, help="blocks")
    add("--n_head", type=int, help="attention heads per block")
    add("--n_embd", type=int, help="width; a multiple of --n_head")
    add("--dropout", type=float, default=0.0, help="probability; 0 is off")
    add = parser.add_argument_group("batch").add_argument
    add(
        "--batch_size",
        type=lambda text: text if text == "auto" else int(text),
        default=64,
        help="sequences per rank and micro-step; auto is the most that memory allows",
    )
    add("--total_batch_size", type=int, default=524288, help="tokens per step, all ranks and micro-steps")
    add("--shuffle", action=argparse.BooleanOptionalAction, default=False, help="permute every epoch")
    add("--overfit_batch", action="store_true", help="sanity check: fit one batch to a loss near zero")
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon is for the blocks' matrices")
    add("--schedule", choices=("cosine", "wsd"), default="cosine", help="wsd stays at the peak, then falls")
    add("--decay_share", type=float, default=0.2, help="share of the steps in which wsd falls; 0 is never")
    add("--muon_lr", type=float, default=0.02, help="peak learning rate of muon")
    add("--momentum", type=float, default=0.95, help="of muon: decay of the mean of gradients")
    add("--learning_rate", type=float, default=6e-4, help="peak learning rate")
    add("--min_lr", type=float, help="final learning rate; None is a tenth of the peak")
    add("--warmup_steps", type=int, default=715, help="steps of linear warm-up; 0 is off")
    add("--max_steps", type=int, default=19073, help="steps to train for")
    add("--weight_decay", type=float, default=0.1, help="of tensors with two or more dimensions; 0 is off")
    add("--beta1", type=float, default=0.9, help="decay of the mean of gradients")
    add("--beta2", type=float, default=0.95, help="decay of the mean of squared gradients")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0 is off")
    add("--max_skipped", type=int, default=10, help="skipped steps in a row that end the run")
    add = parser.add_argument_group("evaluation").add_argument
    add("--val_every", type=int, default=250, help="steps between validations; 0 is off")
    add("--val_tokens", type=int, default=10485760, help="tokens per validation, always the same ones")
    add("--hellaswag_every", type=int, default=250, help="steps between HellaSwag evaluations; 0 is off")
    add("--hellaswag_data", help=f"items to score; None is {hellaswag.DATA}, downloaded where it is missing")
    add("--sample_every", type=int, default=250, help="steps between samples; 0 is off")
    add("--sample_prompt", default="Hello, I'm a language model,", help="what samples begin with")
    add("--sample_tokens", type=int, default=64, help="tokens per sample")
    add("--early_stop", type=int, default=0, help="validations without improvement to stop after; 0 is off")
    add = parser.add_argument_group("records").add_argument
    add("--checkpoint_every", type=int, default=1000, help="steps between checkpoints; 0 writes none at all")
    add("--keep", type=int, default=2, help="newest checkpoints to keep beside model_best.pt; 0 keeps all")
    add("--milestone_every", type=int, default=5, help="checkpoints per one that is kept for good; 0 is none")
    add("--log_every", type=int, default=10, help="steps between lines on the console")
    add("--tensorboard", action="store_true", help="write tensorboard/ in --out_dir too")
    add("--wandb", action="store_true", help="report to Weights & Biases too; WANDB_MODE=offline for later")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of autocast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; None is on CUDA only")
    add("--recompute", action="store_true", help="activations in the backward pass: less memory, slower")
    preset = parser.parse_known_args(argv)[0].preset
    if preset not in PRESETS:
        raise ValueError(f"unknown --preset {preset!r}: choose from {', '.join(PRESETS)}")
    parser.set_defaults(**{k: v for k, v in PRESETS[preset].items() if k not in ARCHITECTURE})
    args = parser.parse_args(argv)
    if args.init_from is None:
        architecture = {"block_size": 1024, **PRESETS[preset]}
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(args, name) is None:
                setattr(args, name, architecture[name])
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.overfit_batch:
        args.val_every = args.hellaswag_every = args.sample_every = args.checkpoint_every = 0
    return args


def check_args(args: argparse.Namespace, world_size: int) -> list[str]:
    """Return what is wrong with the command line by itself, a line for each problem."""
    at_least_1 = (
        "block_size vocab_size n_layer n_head n_embd batch_size total_batch_size max_steps val_tokens "
        "sample_tokens log_every max_skipped"
    )
    at_least_0 = (
        "dropout warmup_steps decay_share min_lr weight_decay beta1 beta2 momentum grad_clip val_every "
        "hellaswag_every sample_every early_stop checkpoint_every keep milestone_every seed"
    )
    problems = [
        f"--{name} is {getattr(args, name)}: give at least {least}"
        for least, names in ((1, at_least_1), (0, at_least_0))
        for name in names.split()
        if getattr(args, name) not in (None, "auto") and getattr(args, name) < least
    ]
    for name in ("dropout", "beta1", "beta2", "momentum"):
        if getattr(args, name) >= 1:
            problems.append(f"--{name} is {getattr(args, name)}: give less than 1")
    for name in ("learning_rate", "muon_lr"):
        if getattr(args, name) <= 0:
            problems.append(f"--{name} is {getattr(args, name)}: give more than 0")
    if args.decay_share > 1:
        problems.append(f"--decay_share is {args.decay_share}: give at most 1, which is all steps")
    if args.early_stop and not args.val_every:
        problems.append("--early_stop counts validations, but --val_every is 0: set both or neither")
    if Path(args.out_dir).absolute() in (Path.cwd(), *Path.cwd().parents):
        problems.append(f"--out_dir {args.out_dir} holds your working folder: name one inside it")
    if problems or args.n_embd is None or args.block_size is None:
        return problems
    if args.n_embd % args.n_head:
        problems.append(f"--n_embd {args.n_embd} does not divide by --n_head {args.n_head}: change one")
    batch_size = 1 if args.batch_size == "auto" else args.batch_size
    micro_step = batch_size * args.block_size * world_size
    if args.total_batch_size % micro_step:
        nearest = max(round(args.total_batch_size / micro_step), 1) * micro_step
        problems.append(
            f"--total_batch_size {args.total_batch_size} does not divide by --batch_size {batch_size} x "
            f"--block_size {args.block_size} x {world_size} rank(s) = {micro_step}: "
            f"give --total_batch_size {nearest} or another --batch_size"
        )
    return problems


def checkpoint_bytes(args: argparse.Namespace, model: GPT) -> tuple[int, int, int]:
    """Bytes of one checkpoint, of all that there will be with the one that is being written, and free ones.

    A checkpoint holds weights and moments in fp32: two moments of AdamW's, one of Muon's.
    """
    size, written = 0, 0
    for group in model.optimizer_groups(args.weight_decay):
        moments = 1 if args.optimizer == "muon" and "parts" in group else 2
        size += sum(4 * (1 + moments) * weight.numel() for weight in group["params"])
    if args.checkpoint_every:
        written = math.ceil(args.max_steps / args.checkpoint_every)
        milestones = args.milestone_every and args.max_steps // (args.checkpoint_every * args.milestone_every)
        written = min(written, args.keep + milestones) if args.keep else written
        written += 2  # model_best.pt, and the one that is being written
    out_dir = Path(args.out_dir).absolute()
    free = shutil.disk_usage(next(folder for folder in (out_dir, *out_dir.parents) if folder.exists())).free
    return size, written * size, free


def check_disk(args: argparse.Namespace, model: GPT) -> list[str]:
    """Return the problem of checkpoints that will not fit."""
    _, needed, free = checkpoint_bytes(args, model)
    if free >= needed:
        return []
    size = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return [f"checkpoints in {args.out_dir} need {size}: lower --keep or choose another --out_dir"]


def load_model(args: argparse.Namespace, n_vocab: int, resumed: dict | None) -> GPT:
    """Build the model, with the weights of the resumed checkpoint or of --init_from where there is one.

    Fills in the architecture options that were left open. Raises ValueError, a line for each, for those that
    differ from what the weights have.
    """
    model, known = None, {"vocab_size": math.ceil(n_vocab / 64) * 64}
    if resumed:
        source, known = args.out_dir, {**resumed["config"], "block_size": resumed["args"]["block_size"]}
    elif args.init_from:
        source, model = args.init_from, GPT.from_pretrained(args.init_from, dropout=args.dropout)
        known = asdict(model.config)
    problems = []
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        asked = getattr(args, name)
        shorter_windows = model and name == "block_size" and asked and asked < known[name]
        if asked is None:
            setattr(args, name, known[name])
        elif (resumed or model) and asked != known[name] and not shorter_windows:
            problems.append(f"--{name} is {asked}, but {source} has {known[name]}: repeat that run's options")
    if args.vocab_size < n_vocab:
        problems.append(f"--vocab_size is {args.vocab_size}, but the shards' tokenizer has {n_vocab} ids")
    if problems:
        raise ValueError("\n".join(problems))
    if model is None:
        config = resumed["config"] if resumed else {name: getattr(args, name) for name in ARCHITECTURE}
        model = GPT(GPTConfig(**{**config, "dropout": args.dropout}))
    if resumed:
        model.load_state_dict(resumed["model"])
    return model


@contextlib.contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Note what a user can mend and go on, so that everything wrong with a command is said at once."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))


def prepare(
    args: argparse.Namespace, dist: Distributed
) -> tuple[GPT, torch.dtype, dict[str, DataLoaderLite], list[hellaswag.Example], dict | None]:
    """Load what a run needs: model, dtype, loaders, HellaSwag examples, and the checkpoint that it resumes.

    Whatever can be wrong or missing is found here, before the first step, and ends every rank. Fills in the
    options left open. Raises ValueError with a line for each problem. A collective.
    """
    problems = check_args(args, dist.world_size)
    if args.data_dir is None:
        args.data_dir = DEMO_DATA_DIR if args.preset == "demo" else "edu_fineweb10B"
        if args.preset == "demo":
            prepare_demo_data(dist)
    manifest, dtype, model, resumed, loaders, examples, tokenizer = {}, None, None, None, {}, [], None
    with collecting(problems):
        dtype = choose_dtype(args.dtype, dist.device)
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and importlib.util.find_spec(package) is None:
            problems.append(f"--{package} needs a package that is not installed: pip install {package}")
    with collecting(problems):
        for split in ("val", "train"):
            find_shards(Path(args.data_dir), split)
        manifest = read_manifest(Path(args.data_dir))
    made_with = manifest.get("tokenizer", args.tokenizer or "gpt2")
    if args.tokenizer not in (None, made_with):
        problems.append(
            f"--tokenizer is {args.tokenizer}, but the shards in {args.data_dir} were made with {made_with}: "
            "leave --tokenizer out or make other shards"
        )
    args.tokenizer = made_with
    n_vocab = manifest.get("vocab_size")
    # What may have to be downloaded comes after what is wrong at home.
    if not problems and (args.sample_every or args.hellaswag_every or n_vocab is None):
        with collecting(problems):
            tokenizer = get_tokenizer(args.tokenizer)
            n_vocab = tokenizer.n_vocab
    if args.hellaswag_every and args.hellaswag_data is None and dist.is_main and not problems:
        with collecting(problems):
            hellaswag.download()
    problems = dist.union(problems)  # the others wait for the file
    if args.hellaswag_every and (args.hellaswag_data or not problems):
        with collecting(problems):
            items = hellaswag.load_items(args.hellaswag_data or hellaswag.DATA)
            examples = hellaswag.render(items, tokenizer) if tokenizer else []
    if args.resume and Path(args.out_dir).exists():
        with contextlib.suppress(FileNotFoundError):
            resumed = load_checkpoint(args.out_dir)
        if resumed and not {"optimizer", "scaler", "step", "best_step", "args"} <= resumed.keys():
            problems.append(f"the checkpoint in {args.out_dir} holds weights only: give it to --init_from")
        elif resumed and resumed["args"]["optimizer"] != args.optimizer:
            problems.append(
                f"--optimizer is {args.optimizer}, but the checkpoint in {args.out_dir} has the state of "
                f"{resumed['args']['optimizer']}: repeat that run's option, or start anew with --init_from"
            )
    if len(steps := dist.union([str(resumed and resumed.get("step"))])) > 1:
        problems.append(
            f"the ranks would resume {args.out_dir} at different steps ({', '.join(steps)}): "
            "--out_dir must be a folder that every node sees"
        )
    torch.manual_seed(args.seed)
    if not problems:
        with collecting(problems):
            model = load_model(args, n_vocab, resumed).to(dist.device)
            model.recompute = args.recompute
            problems += check_args(args, dist.world_size)  # now with the architecture of --init_from
            problems += check_disk(args, model)
    problems = dist.union(problems)
    if not problems:
        with collecting(problems):
            if args.batch_size == "auto":
                args.batch_size = find_batch_size(model, args, dtype, dist)
            for split in ("val", "train"):
                loaders[split] = DataLoaderLite(
                    args.data_dir,
                    split,
                    batch_size=args.batch_size,
                    block_size=args.block_size,
                    vocab_size=args.vocab_size,
                    dist=dist,
                    shuffle=args.shuffle and split == "train",
                    seed=args.seed,
                )
    problems = dist.union(problems)
    if problems:
        raise dist.error("\n".join(problems))
    return model, dtype, loaders, examples, resumed


def build_optimizer(model: GPT, args: argparse.Namespace, dist: Distributed) -> torch.optim.AdamW:
    """AdamW; with --optimizer muon one that is Muon for the matrices in the blocks.

    The learning rate of a group is that of the schedule times its `lr_scale`.
    """
    groups = model.optimizer_groups(args.weight_decay)
    for group in groups:
        group["lr_scale"] = 1.0
        if args.optimizer == "muon" and "parts" in group:
            group |= {"lr_scale": args.muon_lr / args.learning_rate, "momentum": args.momentum}
    options = dict(lr=args.learning_rate, betas=(args.beta1, args.beta2), eps=1e-8, fused=True)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    has_bf16 = choose_dtype("auto", dist.device) == torch.bfloat16
    options["dtype"] = torch.bfloat16 if has_bf16 else torch.float32
    return Muon(groups, rank=dist.rank, world_size=dist.world_size, **options)


def describe_groups(optimizer: torch.optim.AdamW, learning_rate: float) -> list[dict]:
    """What console and log say of each parameter group; `lr` is its peak."""
    return [
        {
            "name": group["name"],
            "optimizer": "muon" if "momentum" in group else "adamw",
            "params": sum(weight.numel() for weight in group["params"]),
            "lr": learning_rate * group["lr_scale"],
            "weight_decay": group["weight_decay"],
        }
        for group in optimizer.param_groups
    ]


def attention_backend(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that PyTorch picks for this model's attention in the current context."""
    if device.type not in ("cpu", "cuda"):
        return "PyTorch's choice"
    shape = (1, args.n_head, args.block_size, args.n_embd // args.n_head)  # the batch decides nothing
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    choice = torch._fused_sdp_choice(q, q, q, dropout_p=args.dropout, is_causal=True)
    return SDPBackend(choice).name.lower().replace("_attention", "")


def describe_run(
    args: argparse.Namespace,
    model: GPT,
    loader: DataLoaderLite,
    hardware: dict[str, str | int],
    accum: int,
    compute: str,
    groups: list[dict],
) -> str:
    """What a run is about to do, a line for each thing that its user may want to be otherwise."""
    ranks, epoch = loader.dist.world_size, loader.windows * args.block_size
    tokens = args.max_steps * args.total_batch_size
    size, needed, free = (tqdm.format_sizeof(n, "B") for n in checkpoint_bytes(args, model))
    checkpoints = f"{size} each, at most {needed} in {args.out_dir}, where {free} are free"
    lines = [
        ("device", f"{ranks} x {hardware['device']}, {hardware['cpu_count']} cores of {hardware['cpu']}"),
        ("compute", f"torch {torch.__version__}, {compute}"),
        (
            "model",
            f"{model.num_params():,} parameters: {args.n_layer} layers, {args.n_head} heads, width "
            f"{args.n_embd}, context {args.block_size}, {args.vocab_size:,} token ids",
        ),
        (
            "batch",
            f"{args.total_batch_size:,} tokens a step: {args.batch_size} sequences x {args.block_size} "
            f"tokens x {ranks} rank(s) x {accum} micro-step(s)",
        ),
        (
            "run",
            f"{args.max_steps:,} steps, {tokens:,} tokens, {tokens / epoch:.2f} epochs of {epoch:,} in "
            f"{args.data_dir}",
        ),
        ("checkpoints", checkpoints if args.checkpoint_every else "none"),
    ]
    for group in groups:
        what = f"{group['params']:,} {group['name']}, peak learning rate {group['lr']:.2e}"
        lines.append((group["optimizer"], f"{what}, weight decay {group['weight_decay']:g}"))
    return "\n".join(f"{name:12} {text}" for name, text in lines)


def describe_step(step: int, record: dict, seconds_left: float) -> str:
    """A training step's line on the console, in columns."""
    return (
        f"step {step:5d} | loss {record['loss']:7.4f} | lr {record['lr']:.2e} | norm {record['norm']:7.3f} | "
        f"{record['dt_ms']:8.1f} ms | {record['tokens_per_s']:9,.0f} tok/s"
        + (f" | mfu {record['mfu']:5.1%}" if record["mfu"] else "")
        + f" | left {tqdm.format_interval(seconds_left)}"
    )


def prepare_out_dir(out_dir: Path) -> None:
    """Make the folder of a new run. One that holds a run is renamed to log.1, log.2, …: nothing is lost."""
    if (out_dir / "log.jsonl").exists() or any(out_dir.glob("model_*.pt")):
        number = 1
        while out_dir.with_name(f"{out_dir.name}.{number}").exists():
            number += 1
        old = out_dir.rename(out_dir.with_name(f"{out_dir.name}.{number}"))
        print(f"{out_dir} held a run, which is now {old} (--resume continues a run)")
    out_dir.mkdir(parents=True, exist_ok=True)


def describe_out_of_memory(args: argparse.Namespace) -> str:
    """What to try next; a divisor of the batch size keeps the tokens per step."""
    batch_size = 1 if args.batch_size == "auto" else args.batch_size
    smaller = max((n for n in range(1, batch_size) if batch_size % n == 0), default=None)
    mend = f"--batch_size {smaller}" if smaller else "a smaller --block_size"
    mend += "" if args.recompute else " or --recompute"
    return f"out of memory with --batch_size {batch_size}: try {mend}; the tokens per step stay the same"


def main(args: argparse.Namespace) -> None:
    dist = setup_distributed(args.device)
    device, out_dir = dist.device, Path(args.out_dir).absolute()
    say = tqdm.write if dist.is_main else lambda line: None
    raw_model, dtype, loaders, examples, resumed = prepare(args, dist)

    torch.set_float32_matmul_precision("high")
    optimizer = build_optimizer(raw_model, args, dist)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    attention = contextlib.nullcontext
    if device.type == "cpu":
        keep_freed_memory()
        if dtype == torch.bfloat16:
            # The flash kernel is slow there: attention written out takes half its time and less (LOG.md). The
            # flag is named for CUDA, but CPUs heed it: without, the written form computes in fp32.
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            attention = partial(sdpa_kernel, SDPBackend.MATH)
    # raw_model: weights, sampling, HellaSwag. model: training and validation, so it sees fixed shapes only.
    model = raw_model
    if dist.world_size > 1:
        model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    compiled = compiled and can_compile(device, say)
    model = torch.compile(model) if compiled else model
    accum = args.total_batch_size // (args.batch_size * args.block_size * dist.world_size)
    peak = peak_flops(device, dtype)

    start_step, best_step, val_loss, best_val_loss, stopping = 0, 0, None, math.inf, False
    skipped, skipped_in_row = 0, 0
    if resumed:
        # The options of this command hold: of the optimizer only the moments come from the checkpoint.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": resumed["optimizer"]["state"], "param_groups": groups})
        if resumed["scaler"]:  # empty in a run that was not fp16
            scaler.load_state_dict(resumed["scaler"])
        start_step, best_step = resumed["step"], resumed["best_step"]
        val_loss, best_val_loss = resumed["val_loss"], resumed["best_val_loss"]
        changed = [k for k, v in vars(args).items() if resumed["args"].get(k) != v and k != "resume"]
        say(f"resuming {out_dir} at step {start_step}; changed options: {', '.join(changed) or 'none'}")
    elif dist.is_main:
        prepare_out_dir(out_dir)
    del resumed  # its memory is needed
    machine = describe_machine(device)
    params, flops_per_token = raw_model.num_params(), raw_model.flops_per_token(args.block_size)
    log, writer = lambda step, kind, **values: None, None
    if dist.is_main:
        log = Log(out_dir, start_step, args.tensorboard, args.wandb)
        writer = CheckpointWriter(out_dir, args.keep, args.milestone_every * args.checkpoint_every, log)
    groups = describe_groups(optimizer, args.learning_rate)
    about = dict(world_size=dist.world_size, params=params, groups=groups)
    log(start_step, "run", args=vars(args), **about, **machine)
    with attention():
        compute = f"{str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'eager'}, "
        compute += f"attention {attention_backend(args, dtype, device)}"
    say(describe_run(args, raw_model, loaders["train"], machine["hardware"], accum, compute, groups))

    def save(step: int, names: list[str]) -> None:
        if not names or not dist.is_main:
            return
        checkpoint = {
            "model": raw_model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "step": step,
            "val_loss": val_loss,
            "best_val_loss": best_val_loss,
            "best_step": best_step,
            "config": asdict(raw_model.config),
            "args": dict(vars(args)),
        }
        writer.save(names, checkpoint, device)

    raw_model.train()
    loaders["train"].seek(start_step * accum)
    stop = StopSignal()
    # disable=None shows the bar on a terminal only.
    bar = tqdm(total=args.max_steps, initial=start_step, unit="step", disable=None if dist.is_main else True)
    for step in range(start_step, args.max_steps + 1):
        last_step, due = step == args.max_steps, []
        if dist.is_main:
            writer.check()

        if args.val_every and (step % args.val_every == 0 or last_step):
            val_loss = validate(model, loaders["val"], args.val_tokens, autocast)
            log(step, "val", loss=val_loss)
            say(f"step {step:5d} | val  {val_loss:7.4f}")
            if val_loss < best_val_loss:
                best_val_loss, best_step = val_loss, step
                due.append("model_best.pt")
            elif args.early_stop and step - best_step >= args.early_stop * args.val_every:
                say(f"step {step:5d} | no better validation loss since step {best_step}: stopping early")
                last_step = True

        if args.hellaswag_every and (step % args.hellaswag_every == 0 or last_step):
            with autocast:
                scores = hellaswag.evaluate(raw_model, examples)
            del scores["items"]
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiled else 0
            log(step, "hellaswag", **scores, compilations=graphs)
            say(f"step {step:5d} | hellaswag {scores['acc_norm']:.2%} (acc_norm), {scores['acc']:.2%} (acc)")

        if args.sample_every and (step % args.sample_every == 0 or last_step):
            random = torch.Generator(device).manual_seed(args.seed)
            what = (get_tokenizer(args.tokenizer), [args.sample_prompt], args.sample_tokens)
            texts = sample.complete(raw_model, *what, num_samples=2, top_k=50, generator=random)
            log(step, "sample", texts=texts)
            say("".join(f"step {step:5d} | sample\n{text}\n\n" for text in texts))

        if args.checkpoint_every:
            if step % args.checkpoint_every == 0 and step > start_step or last_step:
                due.append(f"model_{step:05d}.pt")
            save(step, due)

        if last_step:
            break

        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args) * group["lr_scale"]
        # Dropout draws the same numbers again when a resumed run repeats this step.
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, dist.rank)).generate_state(1)[0]))
        if args.overfit_batch:
            loaders["train"].seek(0)
        loss_sum = 0.0
        for micro_step in range(accum):
            x, y = loaders["train"].next_batch()
            # Gradients are summed over the ranks once a step, during the last backward pass.
            sync_now = dist.world_size == 1 or micro_step == accum - 1
            with contextlib.nullcontext() if sync_now else model.no_sync():
                with autocast, attention():
                    loss = model(x, y)[1]  # the logits' memory is needed
                scaler.scale(loss / accum).backward()
            loss_sum += loss.detach() / accum
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip or math.inf).item()
        # Every rank holds the same gradients, so all of them skip a step or none does.
        if math.isfinite(norm):
            scaler.step(optimizer)
            skipped_in_row = 0
        else:
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
            say(f"step {step:5d} | gradient norm {norm}: step skipped, {skipped_in_row} in a row")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # One rank's signal stops them all, after the same step.
        train_loss, stopping = dist.sum(loss_sum.item() / dist.world_size, bool(stop))
        synchronize(device)
        seconds = time.perf_counter() - started

        speed = args.total_batch_size / seconds
        mfu = speed * flops_per_token / (peak * dist.world_size) if peak else None
        lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
        lr = lrs["embeddings"]  # AdamW's in any case
        record = dict(loss=train_loss, lr=lr, norm=norm, dt_ms=1000 * seconds, tokens_per_s=speed, mfu=mfu)
        log(step, "train", **record, skipped=skipped, lrs=lrs)
        if step == start_step:
            first_began = started
        if step % args.log_every == 0:
            each = (time.perf_counter() - first_began) / (step + 1 - start_step)  # with its evaluations
            say(describe_step(step, record, each * (args.max_steps - step - 1)))
        bar.update()
        bar.set_postfix_str(f"loss {train_loss:.3f}", refresh=False)
        if skipped_in_row == args.max_skipped:
            raise dist.error(
                f"gradients were not finite for {skipped_in_row} steps in a row, up to step {step} with "
                f"learning rate {lr:.2e}: lower it and --resume from {writer and writer.newest()}"
            )
        if stopping:
            save(step + 1, [f"model_{step + 1:05d}.pt"] if args.checkpoint_every else [])
        if stopping or args.overfit_batch and train_loss < OVERFIT_LOSS:
            break
    bar.close()
    stop.restore()
    if dist.is_main:
        writer.close()
        log.close()

    if stopping:
        say(f"stopped by a signal after step {step}: the same command with --resume goes on from there")
    elif args.overfit_batch and train_loss >= OVERFIT_LOSS:
        raise dist.error(
            f"one batch still has loss {train_loss:.3f} after {args.max_steps} steps, not {OVERFIT_LOSS}: "
            "the model is broken, or needs more --max_steps, another --learning_rate or no --dropout"
        )
    elif args.overfit_batch:
        say(f"one batch was learnt to loss {train_loss:.4f} in {step + 1} steps: the model can fit")
    elif dist.is_main:
        say(f"loss curve: {draw(out_dir)}")
        say(f"next:       python sample.py --model {args.out_dir} --prompt {json.dumps(args.sample_prompt)}")
    dist.leave()


if __name__ == "__main__":
    try:
        args = parse_args()
        main(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit("\n".join(f"train.py: error: {line}" for line in str(error).splitlines()))
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        sys.exit(f"train.py: error: {describe_out_of_memory(args)}")
