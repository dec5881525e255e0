"""Documents of any format, in chunks that threads read, and token files."""

import gzip
import io
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corpus.inputs import Fetcher

if TYPE_CHECKING:
    import pyarrow

DOCUMENTS_PER_CHUNK = 64  # enough to hide the cost of passing a chunk to a thread
ROWS_PER_CHUNK = 1000  # of parquet files, whose row groups typically have as many
TOKEN_FILE_HEADER, TOKEN_FILE_MAGIC, TOKEN_FILE_VERSION = 256, 20240520, 1  # int32 numbers


Position = tuple[int, int, int]  # input, first row of a chunk, and tokens to skip from there


class Chunk(NamedTuple):
    """Consecutive documents of one input, which `read` returns; a thread calls it, to read them itself."""

    input: int  # index of the input
    row: int  # of its first document
    share: float  # fraction of the input read by the chunk's end
    read: "Callable[[], list[str | None] | pyarrow.Array]"


def read_chunks(fetcher: Fetcher, text_column: str, start: tuple[int, int]) -> Iterator[Chunk | None]:
    """Yield the documents of all inputs in order, starting at row start[1] of input start[0].

    Yields None before it waits for a download, which the caller may not need. That row has to be the first
    one of a chunk. A .txt or .py file is one document; the other formats have one per row. Raises ValueError
    for input that cannot be read, naming the file and, if possible, the line.
    """
    first, first_row = start
    for index in range(first, len(fetcher.inputs)):
        if fetcher.inputs[index].repo:
            yield None
        path, skip = fetcher.path(index), first_row if index == first else 0
        try:
            if path.suffix == ".parquet":
                for row, share, read in _parquet_rows(path, text_column, skip):
                    yield Chunk(index, row, share, read)
                continue
            if path.suffix in (".txt", ".py"):
                errors = "strict" if path.suffix == ".txt" else "replace"
                rows = iter([(1.0, path.read_bytes().decode("utf-8", errors))])
            else:
                rows = _jsonl_rows(path, text_column)
            rows = islice(rows, skip, None)
            while batch := list(islice(rows, DOCUMENTS_PER_CHUNK)):
                texts = [text for _, text in batch]
                yield Chunk(index, skip, batch[-1][0], partial(list, texts))
                skip += len(batch)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}): convert it with iconv") from error
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: {error}") from error


def _jsonl_rows(path: Path, text_column: str) -> Iterator[tuple[float, str | None]]:
    with open(path, "rb") as file:
        lines = io.TextIOWrapper(gzip.open(file) if path.suffix == ".gz" else file, encoding="utf-8")
        size = max(path.stat().st_size, 1)
        for number, line in enumerate(lines, start=1):
            try:
                yield file.tell() / size, json.loads(line)[text_column]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} is not a JSON object with the key {text_column!r} ({error}): "
                    "fix it or set another --text_column"
                ) from error


class RowGroup:
    """A column of a row group in a parquet file, decoded by the first thread that needs a part of it."""

    def __init__(self, path: Path, metadata: "pyarrow.parquet.FileMetaData", number: int, column: str):
        self.path, self.metadata, self.number, self.column = path, metadata, number, column
        self.lock, self.values = threading.Lock(), None

    def read(self, first: int, rows: int) -> "pyarrow.Array":
        """Return some of the rows. Raises ValueError if the file is damaged."""
        import pyarrow.parquet

        with self.lock:
            if self.values is None:
                try:
                    with pyarrow.parquet.ParquetFile(self.path, metadata=self.metadata) as file:
                        group = file.read_row_group(self.number, [self.column], use_threads=False)
                except (ValueError, OSError) as error:
                    raise ValueError(f"{self.path}: {error}") from error
                self.values = group[0]
        return self.values.slice(first, rows)


def _parquet_rows(path: Path, text_column: str, skip: int) -> Iterator[tuple[int, float, Callable]]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    names = metadata.schema.to_arrow_schema().names
    if text_column not in names:
        raise ValueError(f"no column {text_column!r}: set --text_column to one of {names}")
    row = 0
    for number in range(metadata.num_row_groups):
        rows, group = metadata.row_group(number).num_rows, RowGroup(path, metadata, number, text_column)
        # Sets of older versions may continue in the middle of what is a chunk now.
        for first in range(max(skip - row, 0), rows, ROWS_PER_CHUNK):
            count = min(ROWS_PER_CHUNK, rows - first)
            share = (row + first + count) / metadata.num_rows
            yield row + first, share, partial(group.read, first, count)
        row += rows


def clean(texts: "list[str | None] | pyarrow.Array") -> "pyarrow.LargeStringArray":
    """Return the documents that are text and not empty. Lone surrogates are replaced, as tiktoken does it."""
    import pyarrow
    import pyarrow.compute as compute

    if isinstance(texts, list):
        texts = [text for text in texts if isinstance(text, str) and text]
        try:
            return pyarrow.array(texts, pyarrow.large_string())
        except UnicodeEncodeError:  # possible in JSON
            whole = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
            return pyarrow.array(whole, pyarrow.large_string())
    kind = texts.type.value_type if pyarrow.types.is_dictionary(texts.type) else texts.type
    if not any(is_text(kind) for is_text in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
        return pyarrow.array([], pyarrow.large_string())
    texts = pyarrow.chunked_array(texts).cast(pyarrow.large_string())
    texts = texts.filter(compute.greater(compute.binary_length(texts), 0)).combine_chunks()
    texts.validate(full=True)  # UTF-8
    return texts


def read_token_file(path: Path) -> np.ndarray:
    """Memory-map the tokens of a file in llm.c's format. Raises ValueError if it is not a complete one."""
    header = np.fromfile(path, dtype="<i4", count=TOKEN_FILE_HEADER)
    if len(header) < TOKEN_FILE_HEADER or header[0] != TOKEN_FILE_MAGIC or header[1] != TOKEN_FILE_VERSION:
        raise ValueError(f"{path} is not a token file of llm.c, version {TOKEN_FILE_VERSION}: leave it out")
    tokens, size = int(header[2]), path.stat().st_size
    if size != header.nbytes + 2 * tokens:
        raise ValueError(f"{path} has {size} bytes, which do not fit its {tokens} tokens: copy it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header.nbytes, shape=(tokens,))
