"""Rows of .jsonl, .jsonl.gz and .parquet files."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from runtime.files import damage

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNREADABLE = (ValueError, RecursionError)
DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, numbered from 1; a byte order mark at the beginning is skipped."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield number, line


def json_rows(path: Path, what: str, advice: str) -> Iterator[tuple[str, object, float]]:
    """Yield where each row of a .jsonl or .jsonl.gz file is, the row, and the share of the file read so far.

    Raises ValueError like `rows_of`.
    """
    where, size = str(path), max(path.stat().st_size, 1)
    try:
        with open(path, "rb") as file:
            for number, line in lines_of(gzip.open(file) if path.suffix == ".gz" else file):
                where = f"{path}, line {number}"
                yield where, json.loads(line), file.tell() / size
    except DAMAGED_GZIP as error:
        raise damage(path, "a gzip file", error, "copy or download it again") from error
    except UNREADABLE as error:
        raise damage(where, what, error, advice) from error


def rows_of(path: Path, what: str, advice: str) -> Iterator[tuple[str, object]]:
    """Yield where each row is, such as "items.jsonl, line 3", and the row.

    Raises ValueError, naming the row if possible, for a file that is damaged or not `what` it should be.
    """
    if path.suffix != ".parquet":
        yield from ((where, row) for where, row, _ in json_rows(path, what, advice))
        return
    try:
        rows = _read_parquet(path)
    except UNREADABLE as error:
        raise damage(path, what, error, advice) from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except OSError as error:
        if error.errno is not None:  # an error of the system; those of the parser have no number
            raise
        raise ValueError(str(error)) from error
