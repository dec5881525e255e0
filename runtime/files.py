"""Files and folders that are either complete or absent, JSON, hashes, and the lock of a folder.

Everything is written under a temporary name (`NAME.tmp`) and renamed when it is complete and on disk.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from runtime.machine import is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

NOTHING = {".tmp", "lost+found"}  # in an empty folder: of a command that was killed, and of a file system
BEYOND_THE_TEXT = 1 << 30  # msvcrt locks bytes, which nobody else can read then


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file, flush it to disk and rename it to `path`."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception:
        partial.unlink(missing_ok=True)  # on a full disk the space is needed
        raise


def write_json(path: str | Path, record: dict) -> None:
    """Write a dict as an indented JSON file, atomically."""
    data = json.dumps(record, indent=1).encode()
    write_atomically(Path(path), lambda file: file.write(data))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(path: str | Path) -> None:
    """Raise the error with which `write_atomically` would fail after hours of work."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(path.name + ".tmp")
    is_new = not partial.exists()
    with named(path):
        partial.open("ab").close()
        if is_new:
            partial.unlink()


def check_new_folder(folder: Path) -> None:
    """Raise the error with which `whole_folder` would fail after the work: ValueError if it is not empty."""
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - NOTHING):
        raise ValueError(f"{folder} exists and is not empty: remove it or choose another folder")
    real = Path(os.path.realpath(folder))
    check_folder(real if real.exists() else real.parent)


def existing_folder(path: Path) -> Path:
    """Return a folder or, if it does not exist, the closest one above it.

    Raises NotADirectoryError if that is a file.
    """
    path = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def check_folder(path: Path) -> None:
    """Raise OSError if files cannot be created in a folder, which may not exist yet."""
    with contextlib.suppress(FileNotFoundError):
        os.lstat(path)  # the name may be too long
    with named(existing_folder(path)) as folder, tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def named(path: Path) -> Iterator[Path]:
    """Yield a path, and name it in errors of the system about temporary files."""
    try:
        yield path
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def parsing(path: str | Path, what: str, advice: str) -> Iterator[None]:
    """Raise ValueError, with the path and `advice`, for whatever goes wrong while a file is interpreted.

    A damaged file can make a parser raise anything. Errors of the system say nothing about the file, so they
    stay as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            raise
        if is_out_of_memory(error):
            raise MemoryError(f"too little memory to read {path}: nothing has been changed") from error
        raise damage(path, what, error, advice) from error


def damage(path: str | Path, what: str, error: Exception, advice: str) -> ValueError:
    """Return the one-line error for a file, or a part of one, that cannot be interpreted."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{path} is damaged or not {what} ({reason}): {advice}")


def check_types(record: object, needed: dict[str, type], optional: dict[str, type] | None = None) -> None:
    """Raise ValueError if a dict lacks values of these types; an int is at least 0."""
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of names and values")
    for name, kind in {**needed, **(optional or {})}.items():
        value = record.get(name)
        good = isinstance(value, kind) and (kind is not int or (type(value) is int and value >= 0))
        if not good and (name in needed or name in record):
            shown = value if isinstance(value, int | float) else type(value).__name__
            raise ValueError(f"its {name} is {shown}" if name in record else f"it has no {name}")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill. If the block ends without an error, its files get to `folder`.

    A new folder appears with all of them. One that exists, and may be a mount point, has to be empty, or else
    this raises ValueError. The files get the mode that the umask gives.
    """
    check_new_folder(Path(folder))
    real = Path(os.path.realpath(folder))
    is_new = not real.exists()
    partial = real.with_name(real.name + ".tmp") if is_new else real / ".tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # as the umask has it; safetensors writes 0600
        for path in filter(Path.is_file, partial.rglob("*")):
            with contextlib.suppress(PermissionError):  # a drive without modes
                path.chmod(mode)
        if is_new:
            partial.rename(real)
        else:
            for path in partial.iterdir():
                path.rename(real / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class FolderLock:
    """The right to write to a folder, which one process has until it releases the lock or ends.

    The lock is the system's, on a file in the folder. The system drops it when the process ends, however that
    happens, so no lock is ever stale. On a shared file system, it holds for all machines. Readers ignore it.
    """

    def __init__(self, folder: Path, name: str = ".lock"):
        self.folder, self.name, self.file = folder, name, None

    def acquire(self) -> None:
        """Lock the folder, which has to exist. Raises ValueError, naming the holder, if it is in use."""
        while not self.is_held():  # the folder may be renamed between the two steps
            if self.file:
                self.file.close()
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            number = os.open(self.folder / self.name, flags, 0o666)
            with contextlib.suppress(OSError):  # it outlives a killed process, and may be another user's then
                os.chmod(self.folder / self.name, 0o666)
            self.file = open(number, "r+b", buffering=0)
            try:
                if fcntl:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    self.file.seek(BEYOND_THE_TEXT)
                    msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                    self.file.seek(0)
                    holder = self.file.read(200).decode(errors="replace").strip() or "another process"
                    self.file.close()
                    reason = f"{self.folder} is in use by {holder}"
                    raise ValueError(f"{reason}: wait until it has ended, or use another folder") from error
                advice = "make sure that no other command writes to it"
                warnings.warn(f"{self.folder} cannot be locked ({error.strerror}): {advice}", stacklevel=2)
        with contextlib.suppress(OSError):  # the name of the holder is a courtesy
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            self.file.truncate(0)
            self.file.seek(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())

    def is_held(self) -> bool:
        """Return whether this process has the lock of the folder that has this name now."""
        return self.file is not None and is_same_file(self.folder / self.name, self.file)

    def release(self) -> None:
        """Remove the lock, if this process has it."""
        with contextlib.suppress(OSError):  # Windows removes no open file, and a network drive may be gone
            if self.is_held():
                (self.folder / self.name).unlink()
        if self.file:
            self.file.close()
        self.file = None


def is_same_file(path: Path, file: IO) -> bool:
    """Return whether a path still leads to an open file, which may have been deleted, moved or replaced."""
    try:
        return not file.closed and os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def locked_folder(folder: Path, name: str) -> Iterator[FolderLock]:
    """Lock a folder during the block. One that did not exist is created, and removed if it stays empty."""
    check_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder, name)
    lock.acquire()
    try:
        yield lock
    finally:
        with contextlib.suppress(OSError):
            is_new = is_new and lock.is_held()
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
