"""Files and folders that are either complete or absent, JSON, and hashes.

Everything is written under a temporary name (`NAME.tmp`) and renamed when it is complete and on disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it is renamed to `folder` when the block ends without an error.

    Raises ValueError if `folder` exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: remove it or choose another folder")
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
