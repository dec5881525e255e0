"""Documents of any format, in chunks that threads read, and token files."""

import codecs
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from corpus.inputs import Fetcher
from corpus.rows import json_rows
from corpus.tokenizer import last_cut

if TYPE_CHECKING:
    import pyarrow

DOCUMENTS_PER_CHUNK = 64  # enough to hide the cost of passing a chunk to a thread
ROWS_PER_CHUNK = 1000  # of parquet files, whose row groups typically have as many
# Of a .txt file that are read at a time. Sets that are interrupted continue at one of its parts, so a set
# begun with one size cannot be continued with another.
BLOCK_BYTES = 4_000_000
MOST_UNCUT = 16_000_000  # characters; to tokenize them takes 6 s and some hundred MB
MARKER = re.compile(r"<\|endoftext\|>|<\|end_of_text\|>|</s>")  # other tools write one between documents
TOKEN_FILE_HEADER, TOKEN_FILE_MAGIC, TOKEN_FILE_VERSION = 256, 20240520, 1  # int32 numbers


Position = tuple[int, int, int]  # input, first row of a chunk, and tokens to skip from there


@dataclass(frozen=True)
class Format:
    """How documents are stored: the column or key of their text, and what is between them in .txt files.

    A byte tokenizer allows to cut a text anywhere, see `parts_of`.
    """

    text_column: str = "text"
    separator: str | None = None
    is_bytes: bool = False


class Chunk(NamedTuple):
    """Consecutive documents of one input, which `read` returns; a thread calls it, to read them itself."""

    input: int  # index of the input
    row: int  # of its first document
    share: float  # fraction of the input read by the chunk's end
    read: "Callable[[], pyarrow.LargeStringArray]"
    continues: bool = False  # its first text is the next part of the document before


def read_chunks(fetcher: Fetcher, form: Format, start: tuple[int, int]) -> Iterator[Chunk | None]:
    """Yield the documents of all inputs in order, starting at row start[1] of input start[0].

    Yields None before it waits for a download, which the caller may not need. That row has to be the first
    one of a chunk. A .py file is one document, and so is a .txt file without separators; the other formats
    have one per row. Raises ValueError for input that cannot be read, naming the file and, if possible, the
    line.
    """
    first, first_row = start
    for index in range(first, len(fetcher.inputs)):
        if fetcher.inputs[index].repo:
            yield None
        path, row = fetcher.path(index), first_row if index == first else 0
        if path.suffix == ".parquet":
            for first_of_chunk, share, read in _parquet_chunks(path, form.text_column, row):
                yield Chunk(index, first_of_chunk, share, read)
            continue
        if path.suffix in (".txt", ".py"):
            texts = _plain_texts(path, form)
        else:
            texts = _jsonl_texts(path, form.text_column)
        for batch in batches_of(islice(texts, row, None)):
            read = partial(as_text, [text for text, _, _ in batch])
            yield Chunk(index, row, batch[-1][1], read, continues=batch[0][2])
            row += len(batch)


Row = tuple[str | None, float, bool]  # text, share of the file read so far, and whether it continues another


def batches_of(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Group rows into lists for chunks, of which only the first row may continue another one."""
    batch: list[Row] = []
    for row in rows:
        if batch and (row[2] or len(batch) == DOCUMENTS_PER_CHUNK):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _plain_texts(path: Path, form: Format) -> Iterator[Row]:
    """Yield the documents of a .txt or .py file; what is not UTF-8 in a .py file is replaced."""
    size, is_txt = max(path.stat().st_size, 1), path.suffix == ".txt"
    separator = form.separator if is_txt else None
    said = separator is not None or not is_txt
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if is_txt else "replace")
    with open(path, "rb") as file:

        def blocks() -> Iterator[str]:
            nonlocal said
            # Python allocates all that it is asked to read, which takes longer than to read a small file.
            while data := file.read(min(BLOCK_BYTES, size)):
                start = file.tell() - len(data) - len(decoder.getstate()[0])
                try:
                    block = decoder.decode(data, final=file.tell() >= size)
                except UnicodeDecodeError as error:
                    what = f"byte {start + error.start:,}: {error.reason}"
                    raise ValueError(f"{path} is not UTF-8 ({what}): convert it with iconv") from error
                if not said and (found := MARKER.search(block)):
                    marker = found[0]
                    tqdm.write(f"{path} holds {marker} as text: --separator {marker!r} ends documents there")
                    said = True
                yield block if start else block.removeprefix("\ufeff")  # a byte order mark

        try:
            for text, continues in parts_of(blocks(), separator, form.is_bytes):
                yield text, file.tell() / size, continues
        except UncutError as error:
            raise ValueError(f"{path}, byte {file.tell() - BLOCK_BYTES:,}: {error}") from error


class UncutError(ValueError):
    """A text is too long to be tokenized as a whole, and has no place for a cut."""


def parts_of(blocks: Iterator[str], separator: str | None, is_bytes: bool) -> Iterator[tuple[str, bool]]:
    """Yield the documents of a text, long ones in parts, and whether a part continues the one before.

    The tokens of the parts are those of the whole. Raises UncutError if that is not possible: GPT-2 has no
    token boundary within a word, however long, while byte tokens end everywhere.
    """
    rest, continues = "", False
    for block in blocks:
        if rest:  # and more to come
            most = len(rest) - len(separator or "")  # a separator may begin there
            cut = last_cut(rest, most) or (max(most, 0) if is_bytes else 0)
            if cut:
                yield rest[:cut], continues
                rest, continues = rest[cut:], True
            elif len(rest) > MOST_UNCUT:
                raise UncutError(f"{len(rest):,} characters without a token boundary: leave out this text")
        *whole, rest = (rest + block).split(separator) if separator else (rest + block,)
        for text in whole:
            yield text, continues
            continues = False
    if not separator or continues or rest.strip():  # nothing follows a separator at the end
        yield rest, continues


def _jsonl_texts(path: Path, text_column: str) -> Iterator[Row]:
    what, advice = f"a JSON object with the key {text_column!r}", "fix it or set another --text_column"
    for where, row, share in json_rows(path, what, advice):
        if not isinstance(row, dict) or text_column not in row:
            raise ValueError(f"{where} is not {what}: {advice}")
        text = row[text_column]
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: {text_column!r} is of type {type(text).__name__}, not text: {advice}")
        yield text, share, False


class RowGroup:
    """A column of a row group in a parquet file, decoded by the first thread that needs a part of it."""

    def __init__(self, path: Path, metadata: "pyarrow.parquet.FileMetaData", number: int, column: str):
        self.path, self.metadata, self.number, self.column = path, metadata, number, column
        self.lock, self.values = threading.Lock(), None

    def read(self, first: int, rows: int) -> "pyarrow.LargeStringArray":
        """Return some of the rows. Raises ValueError if the file is damaged or a row is not UTF-8."""
        import pyarrow
        import pyarrow.parquet

        with self.lock:
            if self.values is None:
                try:
                    with pyarrow.parquet.ParquetFile(self.path, metadata=self.metadata) as file:
                        group = file.read_row_group(self.number, [self.column], use_threads=False)
                except (ValueError, OSError) as error:
                    raise ValueError(f"{self.path}: {error}") from error
                self.values = group[0]
        values = self.values.slice(first, rows)
        try:
            texts = values.cast(pyarrow.large_string()).combine_chunks()
            texts.validate(full=True)  # UTF-8
            return texts
        except pyarrow.ArrowInvalid as error:
            before = sum(self.metadata.row_group(i).num_rows for i in range(self.number))
            row = before + first + 1 + first_not_utf8(values.cast(pyarrow.large_binary()).to_pylist())
            raise ValueError(f"{self.path}, row {row}: the text is not UTF-8: fix or remove it") from error


def first_not_utf8(values: list[bytes | None]) -> int:
    """Return the index of the first value that is not UTF-8."""
    for index, value in enumerate(values):
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return index
    raise AssertionError("all values are UTF-8")


def is_text(kind: "pyarrow.DataType") -> bool:
    """Return whether a column of this type can hold text: strings, bytes, dictionaries of them, or nulls."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(
        is_kind(kind)
        for is_kind in (
            *(types.is_string, types.is_large_string, types.is_string_view, types.is_null),
            *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
        )
    )


def _parquet_chunks(path: Path, text_column: str, skip: int) -> Iterator[tuple[int, float, Callable]]:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    schema = metadata.schema.to_arrow_schema()
    advice = f"set --text_column to one of {[field.name for field in schema if is_text(field.type)]}"
    if text_column not in schema.names:
        raise ValueError(f"{path} has no column {text_column!r}: {advice}")
    if not is_text(kind := schema.field(text_column).type):
        raise ValueError(f"{path}: column {text_column!r} holds {kind}, not text: {advice}")
    row = 0
    for number in range(metadata.num_row_groups):
        rows, group = metadata.row_group(number).num_rows, RowGroup(path, metadata, number, text_column)
        # Sets of older versions may continue in the middle of what is a chunk now.
        for first in range(max(skip - row, 0), rows, ROWS_PER_CHUNK):
            count = min(ROWS_PER_CHUNK, rows - first)
            share = (row + first + count) / metadata.num_rows
            yield row + first, share, partial(group.read, first, count)
        row += rows


def as_text(texts: list[str | None]) -> "pyarrow.LargeStringArray":
    """Return texts as an Arrow array. Lone surrogates, possible in JSON, are replaced as tiktoken does it."""
    import pyarrow

    try:
        return pyarrow.array(texts, pyarrow.large_string())
    except UnicodeEncodeError:
        pairs = [text and text.encode("utf-16", "surrogatepass") for text in texts]
        whole = [pair and pair.decode("utf-16", "replace") for pair in pairs]
        return pyarrow.array(whole, pyarrow.large_string())


def not_empty(texts: "pyarrow.LargeStringArray") -> "pyarrow.LargeStringArray":
    """Return the texts that are neither null nor empty."""
    import pyarrow.compute as compute

    is_kept = compute.greater(compute.binary_length(texts), 0)
    return texts if is_kept.true_count == len(texts) else texts.filter(is_kept)  # without a copy


def read_token_file(path: Path) -> np.ndarray:
    """Memory-map the tokens of a file in llm.c's format. Raises ValueError if it is not a complete one."""
    header = np.fromfile(path, dtype="<i4", count=TOKEN_FILE_HEADER)
    if len(header) < TOKEN_FILE_HEADER or header[0] != TOKEN_FILE_MAGIC or header[1] != TOKEN_FILE_VERSION:
        raise ValueError(f"{path} is not a token file of llm.c, version {TOKEN_FILE_VERSION}: leave it out")
    tokens, size = int(header[2]), path.stat().st_size
    if size != header.nbytes + 2 * tokens:
        raise ValueError(f"{path} has {size} bytes, which do not fit its {tokens} tokens: copy it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header.nbytes, shape=(tokens,))
