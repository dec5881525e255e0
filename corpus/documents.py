"""Documents of any format, and token files: files of this machine and of the Hugging Face Hub, in chunks."""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import sys
import sysconfig
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime import hub
from runtime.files import file_hash

if TYPE_CHECKING:
    import pyarrow

DOCUMENTS_PER_CHUNK = 64  # enough to hide the cost of passing a chunk to a thread
ROWS_PER_CHUNK = 1000  # of parquet files, whose row groups typically have as many
DOWNLOAD_PATIENCE_S = 60  # of trying and waiting, on top of the retries of huggingface_hub
CONVERTED = "refs/convert/parquet"  # the branch for which the Hub converts datasets itself
SUFFIXES = (".txt", ".py", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
TOKEN_FILES = ".bin"  # of GPT-2's tokens, in llm.c's format
TOKEN_FILE_HEADER, TOKEN_FILE_MAGIC, TOKEN_FILE_VERSION = 256, 20240520, 1  # int32 numbers


@dataclass(frozen=True)
class Input:
    """One file of documents: local or, with `repo` and `revision`, from a dataset on the Hub."""

    path: str
    size: int
    sha256: str | None = None
    repo: str | None = None
    revision: str | None = None


Position = tuple[int, int, int]  # input, first row of a chunk, and tokens to skip from there


class Chunk(NamedTuple):
    """Consecutive documents of one input, which `read` returns; a thread calls it, to read them itself."""

    input: int  # index of the input
    row: int  # of its first document
    share: float  # fraction of the input read by the chunk's end
    read: "Callable[[], list[str | None] | pyarrow.Array]"


def check_format(path: str) -> None:
    """Raise ValueError for an unsupported file format."""
    if not path.endswith((*SUFFIXES, TOKEN_FILES)):
        supported = ", ".join((*SUFFIXES, f"{TOKEN_FILES} (tokens)"))
        raise ValueError(f"cannot read {path}: supported formats are {supported}")


def local_inputs(patterns: list[str]) -> list[Input]:
    """Return the files that match, sorted by name within each pattern, token files for validation first.

    Raises FileNotFoundError for a pattern without a match, and ValueError for an unsupported format.
    """
    paths = []
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            raise FileNotFoundError(f"no file matches {pattern!r}: check the path given to --files")
        paths += matches
    for path in paths:
        check_format(path)
    return [Input(path, os.path.getsize(path)) for path in validation_first(paths)]


def hub_inputs(dataset: str, name: str | None) -> list[Input]:
    """Return the files of a dataset at its current revision: those of its `train` split, or its token files.

    If the Hub has only formats that are not supported, the parquet files that it has made of them are used.
    With HF_HUB_OFFLINE, the files come from the local cache. Raises ValueError if there are none, and
    ConnectionError if the Hub cannot be reached.
    """
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE and not Path(dataset).is_dir():
        where = dict(repo_type="dataset", local_files_only=True)
        dataset = ask_hub(lambda: snapshot_download(dataset, **where), f"find {dataset} in the cache")
    if not Path(dataset).is_dir():
        info = ask_hub(lambda: HfApi().dataset_info(dataset, timeout=hub.ANSWER_S), f"list {dataset}")
        if tokens := [file.rfilename for file in info.siblings if file.rfilename.endswith(TOKEN_FILES)]:
            return describe_files(dataset, info.sha, validation_first(sorted(tokens)))
    builder = ask_hub(lambda: load_dataset_builder(dataset, name), f"list {dataset}")
    files = (builder.config.data_files or {}).get("train", [])
    if not files:
        raise ValueError(f"{dataset} ({name}) has no train split: choose another --name")
    if not files[0].startswith("hf://"):  # a folder on this machine
        return local_inputs([glob.escape(file) for file in files])
    if not all(file.endswith(SUFFIXES) for file in files):
        return converted_files(dataset, builder.config.name)
    at = f"hf://datasets/{dataset}@"
    revision = files[0].removeprefix(at).split("/")[0]
    return describe_files(dataset, revision, [file.removeprefix(f"{at}{revision}/") for file in files])


def converted_files(dataset: str, config: str) -> list[Input]:
    """Return the parquet files that the Hub has made of the `train` split of a dataset in another format."""
    from huggingface_hub import HfApi

    what = f"list the parquet files of {dataset}"
    info = ask_hub(lambda: HfApi().dataset_info(dataset, revision=CONVERTED, timeout=hub.ANSWER_S), what)
    paths = [file.rfilename for file in info.siblings]
    paths = [path for path in paths if re.match(rf"{re.escape(config)}/(partial-)?train/.*\.parquet$", path)]
    if not paths:
        raise ValueError(f"the Hub has no parquet files of {dataset} ({config}): download it and use --files")
    return describe_files(dataset, info.sha, sorted(paths))


def describe_files(dataset: str, revision: str, paths: list[str]) -> list[Input]:
    """Return files of a dataset with sizes and hashes. Raises ValueError for an unsupported format."""
    from huggingface_hub import HfApi

    for path in paths:
        check_format(path)

    def describe() -> dict:
        infos = HfApi().get_paths_info(dataset, paths, repo_type="dataset", revision=revision)
        return {info.path: info for info in infos}

    infos = ask_hub(describe, f"list {dataset}")
    return [
        Input(path, infos[path].size, infos[path].lfs and infos[path].lfs.sha256, dataset, revision)
        for path in paths
    ]


def validation_first(paths: list[str]) -> list[str]:
    """Return token files with those for validation first, so that a limited set has some."""
    return sorted(paths, key=lambda path: path.endswith(TOKEN_FILES) and "train" in Path(path).name)


def ask_hub(call: Callable, what: str, patience_s: float = hub.PATIENCE_S):
    """Return what `call` gets from the Hub; see `hub.retrying`."""
    advice = "check its name, HF_TOKEN and HF_HUB_OFFLINE, or use --files"
    command = f"python {shlex.join(sys.argv)}"
    return hub.retrying(call, what, f"{advice}; to continue: {command}", patience_s)


def download(source: Input, folder: Path) -> Path:
    """Download a file from the Hub and verify its hash; resume an interrupted download."""
    from huggingface_hub import hf_hub_download

    def fetch() -> Path:
        where = dict(repo_type="dataset", revision=source.revision, local_dir=folder)
        path = Path(hf_hub_download(source.repo, source.path, **where))
        if source.sha256 and file_hash(path) != source.sha256:
            path.unlink()
            raise OSError(f"the hash of {source.path} differs from the one on the Hub")
        return path

    return ask_hub(fetch, f"download {source.path}", DOWNLOAD_PATIENCE_S)


class Fetcher:
    """The inputs as local files; the next one can be downloaded while one is being read.

    Downloads are daemon threads, so that no command waits for the end of one that it does not need.
    """

    def __init__(self, inputs: list[Input], folder: Path, keep: bool):
        self.inputs, self.folder, self.keep = inputs, folder, keep
        self.pending: dict[int, Future] = {}

    def path(self, index: int) -> Path:
        if self.inputs[index].repo is None:
            return Path(self.inputs[index].path)
        self.prefetch(index)
        return self.pending[index].result()

    def prefetch(self, index: int) -> None:
        """Start to download an input of the Hub, unless that has been done."""
        if index < len(self.inputs) and self.inputs[index].repo and index not in self.pending:
            self.pending[index] = hub.started(partial(download, self.inputs[index], self.folder))

    def release(self, before: int) -> None:
        """Delete the downloads before this input, whose tokens have been written."""
        for index in [index for index in self.pending if index < before and not self.keep]:
            if self.pending[index].done():
                self.pending.pop(index).result().unlink(missing_ok=True)


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


def stdlib_inputs() -> list[Input]:
    """Return the sources of Python's standard library: about 10 MB of text on every machine with Python.

    Excludes its tests, installed packages and two packages of tables. Files are ordered by the hash of their
    names, so that the last tenth is a fair sample.
    """
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name.as_posix() for name in names if not excluded & set(name.parts)]
    if not names:
        raise FileNotFoundError(
            f"no Python sources in {root}: make shards with `python fineweb.py --files …`"
        )
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return local_inputs([glob.escape(str(root / name)) for name in names])


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
