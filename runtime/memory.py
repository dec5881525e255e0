"""The memory of this machine and process, for scripts with and without torch."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path


def installed_memory() -> int:
    """Return the bytes of memory of this machine."""
    if sys.platform == "win32":
        status = (ctypes.c_ulonglong * 8)(64)  # MEMORYSTATUSEX: its size, then the physical memory
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int | None:
    """Return the memory of this process, or None where the system does not say (proc(5), Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return None


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
