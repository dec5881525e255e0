"""Rows of .jsonl, .jsonl.gz and .parquet files."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from runtime.files import damage

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNREADABLE = (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile)


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, numbered from 1; a byte order mark at the beginning is skipped."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield number, line


def rows_of(path: Path, what: str, advice: str) -> Iterator[tuple[str, object]]:
    """Yield where each row is, such as "items.jsonl, line 3", and the row.

    Raises ValueError, naming the row if possible, for a file that is damaged or not `what` it should be.
    """
    where = str(path)
    try:
        if path.suffix == ".parquet":
            for number, row in enumerate(_parquet_rows(path), start=1):
                yield f"{path}, row {number}", row
            return
        with open(path, "rb") as file:
            for number, line in lines_of(gzip.open(file) if path.suffix == ".gz" else file):
                where = f"{path}, line {number}"
                yield where, json.loads(line)
    except UNREADABLE as error:
        raise damage(where, what, error, advice) from error


def _parquet_rows(path: Path) -> list[dict]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except OSError as error:
        if error.errno is not None:  # an error of the system; those of the parser have no number
            raise
        raise ValueError(str(error)) from error
