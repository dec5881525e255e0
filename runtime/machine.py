"""The cores and the memory that this process may use, for scripts with and without torch."""

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC, STAT = Path("/proc/self"), Path("/proc/stat")  # proc(5), on Linux only
MEASURED_S = 0.2  # /proc/stat counts hundredths of a second
IMPORTED = time.monotonic()
MOST_FILES = 4096  # that a run may open: up to 256 shards of each split, and the sockets of NCCL
DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    That is fewer than the machine has after `taskset`, in a job of Slurm, and in a container with a quota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        for quota, period in cgroup_limits("cpu", names, numbers=2):
            cores = min(cores, math.ceil(quota / period))
    return cores


def free_cores() -> int:
    """Return how many of the usable cores other processes leave idle, at least 1."""
    return max(min(round(idle_cores()), usable_cores()), 1)


def idle_cores() -> float:
    """Return how many of its cores other processes leave to this one, by watching for MEASURED_S.

    Where that cannot be seen, all usable cores count as idle.
    """
    try:
        before, own_s = core_ticks(), time.process_time()
        time.sleep(MEASURED_S)
        after, own_s = core_ticks(), time.process_time() - own_s
    except (OSError, ValueError):
        return usable_cores()
    idle = own_s / MEASURED_S  # by the other threads of this process
    for core, (idle_before, all_before) in before.items():
        idle_after, all_after = after.get(core, (idle_before, all_before))
        idle += (idle_after - idle_before) / max(all_after - all_before, 1)
    return idle


def core_ticks() -> dict[int, tuple[int, int]]:
    """Return the ticks that each core of this process has been idle for, and those of all its states."""
    ticks = {}
    for core, times in re.findall(r"^cpu(\d+) (.*)$", STAT.read_text(), re.MULTILINE):
        # user, nice, system, idle, iowait, irq, softirq, steal; the rest is part of user and nice
        each = [int(word) for word in times.split()[:8]]
        if int(core) in os.sched_getaffinity(0):
            ticks[int(core)] = each[3] + each[4], sum(each)
    return ticks


def usable_memory() -> int:
    """Return the bytes of memory that this process may use: all of the machine, or what its cgroup allows."""
    memory = installed_memory()
    for name in ("memory.max", "memory.limit_in_bytes"):
        for (limit,) in cgroup_limits("memory", [name], numbers=1):
            memory = min(memory, limit)
    return memory


def installed_memory() -> int:
    """Return the bytes of memory of this machine."""
    if sys.platform == "win32":
        status = (ctypes.c_ulonglong * 8)(64)  # MEMORYSTATUSEX: its size, then the physical memory
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_limits(controller: str, names: list[str], numbers: int) -> Iterator[list[int]]:
    """Yield what these files hold, so many numbers, for the cgroup of this process and each of its parents.

    Leaves out cgroups without a limit, which is "max" in version 2 and -1 in version 1, and unreadable files.
    """
    for folder in cgroup_folders(controller):
        try:
            limit = [int(word) for name in names for word in (folder / name).read_text().split()]
        except (OSError, ValueError):
            continue
        if len(limit) == numbers and min(limit) > 0:
            yield limit


def cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of its parents, of versions 1 and 2 (cgroups(7))."""
    try:
        cgroups, mounts = (PROC / "cgroup").read_text(), (PROC / "mountinfo").read_text()
    except (OSError, ValueError):
        return
    paths = {}  # by controller; version 2 has a single path, without a name
    for controllers, path in re.findall(r"^\d+:([^:]*):(.*)$", cgroups, re.MULTILINE):
        paths |= dict.fromkeys(controllers.split(","), path)
    mounted = r"^\S+ \S+ \S+ (\S+) (\S+) .*- (cgroup2?) \S+ (\S+)$"
    for root, mount, version, options in re.findall(mounted, mounts, re.MULTILINE):
        if version == "cgroup" and controller not in options.split(","):
            continue
        try:
            below = PurePosixPath(paths["" if version == "cgroup2" else controller]).relative_to(root).parts
        except (KeyError, ValueError):
            below = ()  # a container sees its own cgroup as the root, or a path of the host
        for depth in range(len(below) + 1):
            yield Path(mount, *below[:depth])


def filesystem_of(path: Path) -> str | None:
    """Return the type of the file system that a path is on, such as ext4, or None if that is not known."""
    try:
        mounts = (PROC / "mountinfo").read_text()
    except OSError:
        return None
    # Of mounts at the same place, the last one is on top.
    types = dict(re.findall(r"^\S+ \S+ \S+ \S+ (\S+) .*- (\S+) ", mounts, re.MULTILINE))
    names = [str(each).replace(" ", r"\040") for each in (path, *path.parents)]  # as proc(5) writes them
    return next((types[name] for name in names if name in types), None)


def shared_memory() -> float:
    """Return the bytes of memory that processes may share in /dev/shm, of which containers have little."""
    shared = Path("/dev/shm")
    return shutil.disk_usage(shared).total if shared.exists() else math.inf


def open_file_limit() -> float:
    """Return how many files this process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def allow_open_files() -> None:
    """Raise the limit of open files to MOST_FILES, or as far as the system allows."""
    if (soft := open_file_limit()) < MOST_FILES:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
        if most > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def process_age() -> float:
    """Return the seconds since this process started or, on other systems than Linux, since this import."""
    if not (PROC / "stat").exists():
        return time.monotonic() - IMPORTED
    ticks = int((PROC / "stat").read_text().rpartition(")")[2].split()[19])  # since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int | None:
    """Return the memory of this process, or None where the system does not say (proc(5), Linux)."""
    try:
        return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return None


def nvidia_gpu() -> tuple[str, str] | None:
    """Return the name of an NVIDIA GPU that this process should be able to use, and the driver's version.

    nvidia-smi talks to the driver, also in containers and in WSL. Where it is missing or fails, as after an
    update of the driver, the device files of GPUs decide: other files of a driver may be there without a GPU.
    A GPU that CUDA_VISIBLE_DEVICES hides does not count.
    """
    if not re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")):
        return None  # "", "-1" or Slurm's NoDevFiles
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
        if found := re.match(r"(.+), (\d[\d.]+)$", answer.stdout, re.MULTILINE):
            return found[1], found[2]
    if not any(DEVICES.glob("nvidia[0-9]*")):
        return None
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module.*?  (\d[\d.]+)  ", DRIVER.read_text()):
            return "NVIDIA GPU", found[1]
    return "NVIDIA GPU", "unknown"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the system or a device has refused to allocate memory."""
    pattern = "out of memory|(can't|cannot) allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(pattern, str(error), re.IGNORECASE))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next array instead of returning it to the system.

    The first touch of a page that comes from the system costs as much as the arithmetic on it: half the time
    of a training step of the 124M model on CPUs, and it keeps threads that fill arrays from scaling (LOG.md).
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of mallopt(3)
        ctypes.CDLL(None).mallopt(m_mmap_max, 0)
        ctypes.CDLL(None).mallopt(m_trim_threshold, -1)


def return_freed_memory() -> None:
    """Make glibc return freed memory to the system, so that `resident_bytes` no longer counts it."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
