"""The machine: devices, dtypes, peak FLOP/s, kernels, what compiles, what fits into memory."""

import argparse
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.cli import watched, watching
from runtime.distributed import Distributed
from runtime.launcher import read_launcher
from runtime.machine import (
    free_cores,
    is_out_of_memory,
    keep_freed_memory,
    nvidia_gpu,
    usable_cores,
    usable_memory,
)

# Dense bf16/fp16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets, keyed by the driver's device name.
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

# The oldest driver for any minor version of a CUDA version: CUDA Toolkit release notes, table "Minimum
# Required Driver Version for CUDA Minor Version Compatibility".
OLDEST_DRIVERS = {12: 525, 13: 580}
# The builds of PyTorch 2.11 to 2.14 for newer and for older drivers; the latter knows no Blackwell GPUs
# (pytorch/pytorch#190355).
NEWER_CUDA, OLDER_CUDA = "cu130", "cu126"


def choose_device(name: str = "auto", threads: int | None = None) -> torch.device:
    """Return the device with that name, and make it the current one if it is a GPU.

    "auto" is the first of cuda, mps and cpu that this machine has. Under torchrun, each rank gets a GPU of
    its own. On CPUs, torch gets `threads`, or as many as OMP_NUM_THREADS says, or one for each core that is
    free. Raises ValueError if this machine lacks the device, and for "auto" if it has an NVIDIA GPU that
    torch cannot use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu" and (reason := unusable_gpu()):
            raise ValueError(reason)
    try:
        device = torch.device(name)
        if device.type == "cuda":
            # Asking for "cuda" would make every rank reserve memory on the first GPU.
            device = torch.device("cuda", choose_gpu(device.index or 0))
        device = torch.empty(0, device=device).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif device.type == "cpu" and (threads or "OMP_NUM_THREADS" not in os.environ):
            torch.set_num_threads(cpu_threads(threads))
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if torch.cuda.is_available() and read_launcher().world_size > 1:
            reason = f"rank {read_launcher().rank} needs a GPU of its own: lower --nproc_per_node"
            raise ValueError(reason) from error
        raise ValueError(f"device {name} is not available ({reason}): use auto or cpu") from error


def unusable_gpu() -> str | None:
    """Return why torch cannot use the NVIDIA GPU of this machine, and what helps; None if there is no GPU."""
    if (found := nvidia_gpu()) is None:
        return None
    gpu, driver = found
    version, cuda = torch.__version__.split("+")[0], torch.version.cuda
    oldest = OLDEST_DRIVERS.get(int(cuda.split(".")[0]), 0) if cuda else 0
    release = int(driver.split(".")[0]) if driver[0].isdigit() else OLDEST_DRIVERS[12]
    build = NEWER_CUDA if release >= OLDEST_DRIVERS[13] else OLDER_CUDA
    # Without the build in its version, pip would take the torch that is installed for the one that is wanted.
    advice = f"`pip install torch=={version}+{build} --index-url https://download.pytorch.org/whl/{build}`"
    if cuda is None:
        reason = "is built for CPUs"
    elif driver[0].isdigit() and release < oldest:
        reason = f"is built for CUDA {cuda}, which needs driver {oldest} or newer"
        older = f", {advice} (not for Blackwell GPUs)" if release >= OLDEST_DRIVERS[12] else ""
        advice = f"an image with a newer driver{older}"
    else:
        try:
            torch.cuda.init()
            reason = "does not find it"
        except (RuntimeError, AssertionError) as error:
            reason = f"cannot use it ({str(error).splitlines()[0]})"
        advice = "another CUDA_VISIBLE_DEVICES, restart the machine or container"
    return f"{gpu}, driver {driver}: torch {version} {reason}. Use {advice}, or --device cpu"


def choose_gpu(index: int) -> int:
    """Return the index of this rank's own GPU; a single process uses the one with the given index."""
    launcher = read_launcher()
    if launcher.world_size == 1:
        return index
    if launcher.local_rank is None and torch.cuda.device_count() > 1:
        reason = f"rank {launcher.rank} cannot tell which of the GPUs is its own without LOCAL_RANK"
        raise ValueError(f"{reason}: start the ranks with torchrun, or set it to the index of the GPU")
    return launcher.local_rank or 0


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the hardware computes in bf16 or fp16 instead of emulating it."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return dtype == torch.float16
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return any(torch.cpu.get_capabilities().get(f"{unit}_{name}") for unit in ("avx512", "amx"))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve --dtype: bf16 where the hardware computes in it, else fp16 on NVIDIA GPUs and fp32 elsewhere.

    Raises ValueError for bf16 on a GPU that only emulates it, and warns about a CPU that emulates the dtype.
    """
    if name == "auto":
        has_bf16 = computes_in(torch.bfloat16, device)
        return torch.bfloat16 if has_bf16 else torch.float16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    if dtype != torch.float32 and not computes_in(dtype, device):
        if device.type == "cuda":
            raise ValueError(f"this GPU only emulates {name}: use --dtype float16 or auto")
        if device.type == "cpu":
            warnings.warn(f"this CPU only emulates {name}: --dtype float32 is faster", stacklevel=2)
    return dtype


def cpu_threads(threads: int | None) -> int:
    """Return how many threads torch should use of the `threads` that are asked for, or of the free cores.

    A thread of OpenMP spins while it waits for one whose core another process uses. Beside two busy processes
    on two cores, a step takes three times as long with two threads as with one (LOG.md, 2026-11-29).
    """
    ranks = read_launcher().local_world_size
    most = max(usable_cores() // ranks, 1)
    if threads:
        return min(threads, most)
    if ranks > 1:  # they would see each other start
        return most
    return min(free_cores(), torch.get_num_threads())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's data-sheet FLOP/s in this dtype, or None if it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; without this, timings on GPUs are wrong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory(device: torch.device) -> tuple[int, int] | None:
    """Return the peak memory of this process in bytes and what was left then, or None on Windows."""
    if device.type == "cuda":
        peak, now = torch.cuda.max_memory_reserved(device), torch.cuda.memory_reserved(device)
        return peak, torch.cuda.mem_get_info(device)[0] + now - peak
    try:
        import resource
    except ImportError:
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    peak = kilobytes * (1 if sys.platform == "darwin" else 1024)
    return peak, usable_memory() - peak


def forget_peak_memory(device: torch.device) -> None:
    """Start measuring the peak memory of a GPU again; a process cannot forget its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def tune_for_training(
    device: torch.device, dtype: torch.dtype
) -> Callable[[], contextlib.AbstractContextManager]:
    """Allow TF32; on CPUs, also keep freed memory. Return a context for the forward pass of training steps.

    It selects the attention kernel whose forward and backward pass together are fastest.
    """
    torch.set_float32_matmul_precision("high")
    if device.type != "cpu":
        return contextlib.nullcontext
    keep_freed_memory()
    if dtype != torch.bfloat16:
        return contextlib.nullcontext
    # For bf16 on CPUs, attention written out takes at most half the time of the flash kernel (LOG.md). The
    # flag is named after CUDA but applies to CPUs too: without it, the written-out form computes in fp32.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return partial(sdpa_kernel, SDPBackend.MATH)


def describe_compute(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device, compiled: bool
) -> str:
    """Return dtype, compiler, and the kernel that PyTorch picks for attention in the current context."""
    how = f"{str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'eager'}"
    if device.type == "cuda" and uses_tf32(device):
        how += ", fp32 products in TF32"
    if device.type == "cpu":
        how += f", {torch.get_num_threads()} thread(s)"
    if device.type not in ("cpu", "cuda"):
        return how
    shape = (1, args.n_head, args.block_size, args.n_embd // args.n_head)  # the batch size does not matter
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    choice = torch._fused_sdp_choice(q, q, q, dropout_p=args.dropout, is_causal=True)
    return f"{how}, attention {SDPBackend(choice).name.lower().replace('_attention', '')}"


def uses_tf32(device: torch.device) -> bool:
    """Return whether a GPU multiplies fp32 matrices in TF32, which it can since Ampere."""
    is_new = torch.cuda.get_device_capability(device) >= (8, 0)
    return is_new and torch.get_float32_matmul_precision() != "highest"


@watching("trying torch.compile")
def can_compile(
    device: torch.device, say: Callable[[str], None], otherwise: str = "use train.py --no-compile"
) -> bool:
    """Try torch.compile on a trivial function: CPUs need a C++ compiler, GPUs Triton and a C compiler.

    Returns False with a warning on a CPU, and raises ValueError on a GPU, where eager training would cost
    more than it takes to install a compiler. `otherwise` says how to do without.
    """
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # Set here, because torch's optimizers have already imported this module, which reads the variable.
        from torch._inductor import config

        cores = max(usable_cores() // read_launcher().local_world_size, 1)
        config.compile_threads = min(config.compile_threads, cores)
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the C compiler that Triton calls does not raise RuntimeError
        reason = " ".join(str(error).split("\n\n")[0].split())
        if device.type == "cuda":
            reason = what_compiling_lacks() or reason
            raise ValueError(f"torch.compile does not work here: {reason}, or {otherwise}") from error
        say(f"warning: torch.compile does not work here, continuing without it ({reason})")
        return False
    torch._dynamo.utils.counters.clear()  # so that `compilations` counts only those of the model
    return True


def what_compiling_lacks() -> str:
    """Return what Triton lacks to build its launchers and how to install it, or "" if nothing is missing."""
    lacks = {}
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        lacks["a C compiler"] = "build-essential"
    if not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").exists():
        lacks["Python.h"] = f"python3.{sys.version_info.minor}-dev"
    if not lacks:
        return ""
    return f"Triton needs {' and '.join(lacks)}: `apt install {' '.join(lacks.values())}`"


def compilations() -> int:
    """Return the number of graphs that torch.compile has compiled since `can_compile`."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compilation_seconds() -> float:
    """Return the seconds that torch.compile has worked in this process."""
    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


def masked_attention() -> contextlib.AbstractContextManager:
    """Return a context for attention with a mask, in shapes that change from call to call.

    It excludes cuDNN's kernel, which PyTorch prefers on Hopper and Blackwell: it makes a plan for every
    shape, which takes 23 to 37 ms (published).
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def fits(
    model: torch.nn.Module,
    batch_size: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Return whether a training step of a GPT with `batch_size` sequences per micro-step fits into memory.

    On a GPU this runs a step in eager mode, which needs more memory than compiled code. Elsewhere a trial is
    not safe, because a system that is out of memory swaps or kills processes; there the limit is half of the
    usable memory, shared by the ranks of this machine.
    """
    if device.type != "cuda":
        share = usable_memory() / 2 / read_launcher().local_world_size
        return model.training_bytes(batch_size, block_size, dtype) <= share
    try:
        # AdamW's moments, and a twentieth of the device for temporary tensors.
        reserve = [torch.empty_like(weight) for weight in [*model.parameters()] * 2]
        reserve += [torch.empty(torch.cuda.mem_get_info(device)[1] // 20, dtype=torch.uint8, device=device)]
        idx = torch.zeros(batch_size, block_size, dtype=torch.int64, device=device)
        for _ in range(2):  # the second micro-step adds to the gradients of the first
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(idx, idx)[1]
            loss.backward()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def check_memory(
    model: torch.nn.Module, batch_size: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError if training a GPT needs more memory than this process may use.

    GPUs report that themselves. Elsewhere the system would swap, or kill the process, without a word.
    """
    if device.type == "cuda":
        return
    needed = model.training_bytes(batch_size, block_size, dtype) * read_launcher().local_world_size
    if needed > (usable := usable_memory()):
        sizes = f"{needed / 1e9:.1f} GB, but {usable / 1e9:.1f} GB may be used here"
        raise ValueError(f"--batch_size {batch_size} needs at least {sizes}: use a smaller one, or auto")


def find_batch_size(
    model: torch.nn.Module, step_tokens: int, block_size: int, dtype: torch.dtype, dist: Distributed
) -> int:
    """Return the largest --batch_size that fits on every rank and divides the tokens of a step.

    Raises ValueError if not even 1 fits. A collective.
    """
    most = step_tokens // (block_size * dist.world_size)
    divisors = [n for n in range(most, 0, -1) if most % n == 0]
    for batch_size in watched(divisors, "largest batch size", "trials"):
        fits_here = fits(model, batch_size, block_size, dtype, dist.device)
        (misfits,) = dist.sum(not fits_here)
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
        if not misfits:
            return batch_size
    if most == 0:
        window = f"a window of {block_size} tokens for each of {dist.world_size} rank(s)"
        raise ValueError(f"a step of {step_tokens} tokens has less than {window}: use larger steps")
    raise ValueError("not even --batch_size 1 fits into memory: use --recompute or a smaller --block_size")


def explain_out_of_memory(error: BaseException, args: argparse.Namespace) -> str | None:
    """Return what to try after running out of memory, or None if the error is a different one."""
    if not is_out_of_memory(error):
        return None
    batch_size = 1 if args.batch_size == "auto" else args.batch_size
    # A divisor keeps the tokens per step.
    smaller = max((n for n in range(1, batch_size) if batch_size % n == 0), default=None)
    advice = f"--batch_size {smaller}" if smaller else "a smaller --block_size"
    advice += "" if args.recompute else " or --recompute"
    return f"out of memory with --batch_size {batch_size}: try {advice}; the tokens per step stay the same"


def describe_machine(device: torch.device) -> dict:
    """Return the context of a measurement: versions, hardware, git commit and time."""
    repository = Path(__file__).parent.parent
    git = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12"]
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
            "cpu_count": usable_cores(),
        },
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
