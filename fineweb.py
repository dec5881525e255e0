"""Turn documents into token shards that train.py reads.

    python fineweb.py                                             # FineWeb-Edu, 10 billion tokens
    python fineweb.py --files input.txt --out_dir shakespeare     # your own .txt, .jsonl, .jsonl.gz, .parquet
    python fineweb.py --dataset Salesforce/wikitext --name wikitext-103-raw-v1 --shard_size 1e7 --out_dir wiki
    python fineweb.py --verify                                    # compare the shards with their hashes

Writes `edufineweb_{val|train}_{index:06d}.npy` to --out_dir: one-dimensional uint16 arrays of --shard_size
tokens. The first shard is for validation, and every document starts with the end-of-text token.
`manifest.json` describes the set. A set that fits into one shard is split instead: its last tenth becomes
`val` and the rest `train`, as is usual for Tiny Shakespeare. FineWeb-Edu's sample of about 10 billion tokens
gives about 100 shards of 200 MB. The same command continues an interrupted set and repairs a finished one.
"""

import argparse
import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from runtime import hub
from runtime.cli import Range, check_options, count, run
from runtime.files import (
    FolderLock,
    check_types,
    existing_folder,
    file_hash,
    locked_folder,
    parsing,
    write_atomically,
    write_json,
)
from runtime.memory import keep_freed_memory
from tokenizer import NAMES, BatchTokenizer, get_tokenizer

if TYPE_CHECKING:
    import pyarrow

SMALL_TEXT = 100_000_000  # tokens; `train.py --preset text` is meant for fewer
# What all tasks of a set have in common.
SAME_IN_ALL_TASKS = ("source", "tokenizer", "vocab_size", "shard_size", "max_tokens", "task_count")
# What a manifest says, and what only sets of fineweb.py need; the same for each of its shards.
MANIFEST_TYPES = (
    {"complete": bool, "shards": list},
    {
        **{"tokenizer": str, "source": dict, "vocab_size": int, "eot_token": int, "shard_size": int},
        **{"max_tokens": int | None, "task_index": int, "task_count": int, "skipped_documents": int},
    },
)
SHARD_TYPES = ({"name": str, "tokens": int}, {"documents": int, "sha256": str, "next": list | None})
SINGLE_TASK = {"task_index": 0, "task_count": 1}
MOST_VALIDATION = 0.2  # share of a set; where the first shard is more, a tenth of the set is validation
DOCUMENTS_PER_CHUNK = 64  # enough to hide the cost of passing a chunk to a thread
ROWS_PER_CHUNK = 1000  # of parquet files, whose row groups typically have as many
RETRY_S = (1, 5, 25, 125)  # delays after which a shard that cannot be read is tried again
DOWNLOAD_PATIENCE_S = 60  # of trying and waiting, on top of the retries of huggingface_hub
CONVERTED = "refs/convert/parquet"  # the branch for which the Hub converts datasets itself
SUFFIXES = (".txt", ".py", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
GPT2_VOCABULARY = 50257  # with end-of-text, its last id
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


def encode_chunk(chunk: Chunk, tokenizer: BatchTokenizer) -> tuple[np.ndarray, int]:
    """Return the documents' ids in uint16, each after an end-of-text token, and the number of skipped ones.

    Documents that are empty or not text are skipped.
    """
    texts = chunk.read()
    documents = clean(texts)
    ids, starts = tokenizer.encode(documents)
    return np.insert(ids, starts[:-1], tokenizer.encoding.eot_token), len(texts) - len(documents)


def encode_chunks(
    chunks: Iterator[Chunk], tokenizer: BatchTokenizer, workers: int
) -> Iterator[tuple[Chunk, np.ndarray, int]]:
    """Yield the chunks in order, each with its result of `encode_chunk`, computed by threads.

    Decoding, tokenizing, hashing and writing all release the interpreter lock.
    """
    pending: deque = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenizer") as pool:
        try:
            for chunk in chain(chunks, [None]):
                if chunk:
                    pending.append((chunk, pool.submit(encode_chunk, chunk, tokenizer)))
                while len(pending) > (2 * workers if chunk else 0):  # a bounded queue keeps memory flat
                    done, future = pending.popleft()
                    yield done, *future.result()
        finally:
            for _, future in pending:
                future.cancel()


@contextlib.contextmanager
def explained(out_dir: Path, needed: int) -> Iterator[None]:
    """Add to errors of the system what a write of `needed` bytes to a folder lacks, and how to continue."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(existing_folder(out_dir)).free
        sizes = f"{needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        command = f"python {shlex.join(sys.argv)}"
        reason = f"cannot write to {out_dir} ({error.strerror or error}): it takes {sizes}"
        raise OSError(f"{reason}; complete shards stay; to continue: {command}") from error


def expected_bytes(inputs: list[Input], tokenizer: str, max_tokens: int | None) -> int:
    """Return about how many bytes the shards of these inputs will take."""
    per_byte = 0.0
    for each in inputs:
        packed = each.path.endswith((".parquet", ".gz"))
        # GPT-2's tokens are 4.3 bytes of English text, of which zstd and gzip make less than half.
        text = 1.0 if each.path.endswith(TOKEN_FILES) else (0.8 if packed else 0.47)
        per_byte += each.size * text * (4.3 if tokenizer == "byte" else 1.0)
    return min(int(per_byte), 2 * (max_tokens or sys.maxsize))


class ShardSet:
    """The shards of one task and the manifest that describes them.

    The record of each shard says where the `next` one begins: input, row, and how many tokens from there
    still belong to this shard. So a set can continue after its last complete shard, and any shard can be made
    again.
    """

    def __init__(
        self,
        out_dir: Path,
        manifest: dict,
        fetcher: Fetcher,
        tokenizer: BatchTokenizer | None = None,
        workers: int = 1,
        lock: FolderLock | None = None,
    ):
        self.out_dir, self.manifest, self.fetcher = out_dir, manifest, fetcher
        self.tokenizer, self.workers, self.lock = tokenizer, workers, lock
        task = manifest["task_index"], manifest["task_count"]
        self.path = out_dir / f"{task_name('manifest', *task)}.json"
        self.sizes = np.cumsum([0, *(each.size for each in fetcher.inputs)])

    def shards(
        self, start: Position, size: int, left: int, done: int = 0, skipped: int = 0
    ) -> Iterator[tuple[np.ndarray, Position | None, int]]:
        """For each shard, yield its tokens, where the next one begins (None after the last), and how many
        documents have been skipped so far."""
        total = self.manifest["max_tokens"] or sys.maxsize
        chunks = read_chunks(self.fetcher, self.manifest["source"]["text_column"], start[:2])
        stream = encode_chunks(chunks, self.tokenizer, self.workers)
        buffer, filled, drop = np.empty(size, dtype=np.uint16), 0, start[2]
        unlimited = left > sys.maxsize // 2
        with tqdm(
            unit="tok", unit_scale=True, desc="tokenizing", initial=done, disable=None, leave=False
        ) as bar:
            for chunk, tokens, skipped_here in stream:
                taken = min(drop, len(tokens))
                drop -= taken
                tokens = tokens[: taken + left]
                left -= len(tokens) - taken
                if left and (unlimited or chunk.share > 0.5):  # a limited set may end within this input
                    self.fetcher.prefetch(chunk.input + 1)
                bar.update(len(tokens) - taken)
                done_bytes = self.sizes[chunk.input] + chunk.share * self.fetcher.inputs[chunk.input].size
                bar.total = min(int(bar.n * self.sizes[-1] / max(done_bytes, 1)), total)
                while taken < len(tokens):
                    if filled == size:
                        yield buffer, (chunk.input, chunk.row, taken), skipped
                        filled = 0
                    piece = tokens[taken : taken + size - filled]
                    buffer[filled : filled + len(piece)] = piece
                    filled, taken = filled + len(piece), taken + len(piece)
                skipped += skipped_here
                if left == 0:
                    break
        yield buffer[:filled], None, skipped

    def extend(self) -> None:
        """Write the shards that are still missing at the end of the set."""
        records, task_count = self.manifest["shards"], self.manifest["task_count"]
        start, done = tuple(records[-1]["next"]) if records else (0, 0, 0), sum(r["tokens"] for r in records)
        left = (self.manifest["max_tokens"] or sys.maxsize) - done
        size, skipped = self.manifest["shard_size"], self.manifest["skipped_documents"]
        for tokens, following, skipped_now in self.shards(start, size, left, done, skipped):
            parts = [tokens]
            if following is None and not records and task_count == 1:
                cut = int(0.9 * len(tokens))
                if cut == 0:
                    raise ValueError(
                        f"{len(tokens)} tokens are too few for a val and a train shard: add more text"
                    )
                parts = [tokens[cut:], tokens[:cut]]
            made = [self.write(len(records) + i, part) for i, part in enumerate(parts)]
            records += [{**record, "next": following} for record in made]
            if following is None and task_count == 1:
                self.shrink_validation()
            self.manifest["skipped_documents"] = skipped_now
            self.manifest["complete"] = following is None
            self.save_manifest()
            self.fetcher.release(following[0] if following else len(self.fetcher.inputs))

    def check_folder(self) -> None:
        """Raise ValueError if the folder is no longer the one that was locked."""
        if self.lock and not self.lock.is_held():
            raise ValueError(f"{self.out_dir} was deleted, moved or replaced: repeat the command")

    def save_manifest(self) -> None:
        self.check_folder()
        with explained(self.out_dir, 0):
            write_json(self.path, self.manifest)

    def write(self, number: int, tokens: np.ndarray, sha256: str | None = None) -> dict:
        """Write a shard and return its record. If its hash is not `sha256`, raises ValueError instead."""
        name, data = shard_name(number, self.manifest), io.BytesIO()
        np.save(data, tokens)
        digest = hashlib.sha256(data.getbuffer()).hexdigest()
        if sha256 not in (None, digest):
            raise ValueError(f"the inputs of {name} have changed: --no-resume makes the whole set again")
        self.check_folder()
        with explained(self.out_dir, data.getbuffer().nbytes):
            write_atomically(self.out_dir / name, lambda file: file.write(data.getbuffer()))
        documents = int(np.count_nonzero(tokens == self.manifest["eot_token"]))
        return {"name": name, "tokens": len(tokens), "documents": documents, "sha256": digest}

    def shrink_validation(self) -> None:
        """Leave a tenth of a small set for validation: the rest of its first shard goes to training.

        That rest becomes the last shard.
        """
        records, size = self.manifest["shards"], self.manifest["shard_size"]
        total = sum(record["tokens"] for record in records)
        if records[0]["tokens"] <= MOST_VALIDATION * total or size < 2:
            return
        path = self.out_dir / records[0]["name"]
        if path.exists() and file_hash(path) == records[0]["sha256"]:
            tokens = np.load(path)
        else:  # damaged, or cut already by a command that was killed then
            tokens, _, _ = next(self.shards((0, 0, 0), size, size))
        kept = max(total // 10, 1)
        records.append({**self.write(len(records), tokens[kept:]), "next": None})
        records[0] |= self.write(0, tokens[:kept])

    def start(self, number: int) -> Position:
        """Return where the tokens of a shard begin."""
        records = self.manifest["shards"]
        if len(records) == 2 and records[0]["next"] is None:  # one shard that was split: its end is val
            return (0, 0, 0) if number else (0, 0, records[1]["tokens"])
        if number == 0:
            return (0, 0, 0)
        # Nothing follows the last regular shard but the rest of the first one.
        return tuple(records[number - 1]["next"] or (0, 0, records[0]["tokens"]))

    def repair(self, number: int) -> None:
        """Rebuild one shard. Raises ValueError if the inputs no longer give the same tokens."""
        record = self.manifest["shards"][number]
        tokens, _, _ = next(self.shards(self.start(number), record["tokens"], record["tokens"]))
        self.write(number, tokens, record["sha256"])


def read_token_file(path: Path) -> np.ndarray:
    """Memory-map the tokens of a file in llm.c's format. Raises ValueError if it is not a complete one."""
    header = np.fromfile(path, dtype="<i4", count=TOKEN_FILE_HEADER)
    if len(header) < TOKEN_FILE_HEADER or header[0] != TOKEN_FILE_MAGIC or header[1] != TOKEN_FILE_VERSION:
        raise ValueError(f"{path} is not a token file of llm.c, version {TOKEN_FILE_VERSION}: leave it out")
    tokens, size = int(header[2]), path.stat().st_size
    if size != header.nbytes + 2 * tokens:
        raise ValueError(f"{path} has {size} bytes, which do not fit its {tokens} tokens: copy it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header.nbytes, shape=(tokens,))


class TokenShardSet(ShardSet):
    """A set made of token files, each of which becomes one shard. No tokenizer is needed."""

    def tokens_of(self, number: int) -> np.ndarray:
        tokens = read_token_file(path := self.fetcher.path(number))
        if len(tokens) and (largest := int(tokens.max())) >= self.manifest["vocab_size"]:
            raise ValueError(f"{path} holds token id {largest}: it was not made with GPT-2's tokenizer")
        return tokens

    def extend(self) -> None:
        """Write the shards that are still missing, each with a whole file, until there are enough tokens."""
        records, total = self.manifest["shards"], self.manifest["max_tokens"] or sys.maxsize
        inputs = self.fetcher.inputs
        for each in inputs[len(records) :]:
            if each.repo is None:
                read_token_file(Path(each.path))  # before anything is written
        with tqdm(total=len(inputs), initial=len(records), unit="file", disable=None, leave=False) as bar:
            while not self.manifest["complete"]:
                number = len(records)
                tokens = self.tokens_of(number)
                done = sum(record["tokens"] for record in records) + len(tokens)
                is_last = number + 1 == len(inputs) or done >= total
                if not is_last:
                    self.fetcher.prefetch(number + 1)
                following = None if is_last else (number + 1, 0, 0)
                records.append({**self.write(number, tokens), "next": following})
                self.manifest["complete"] = is_last
                self.save_manifest()
                self.fetcher.release(number + 1)
                bar.update()

    def repair(self, number: int) -> None:
        """Rebuild one shard. Raises ValueError if its file no longer has the same tokens."""
        self.write(number, self.tokens_of(number), self.manifest["shards"][number]["sha256"])


def check_token_files(inputs: list[Input], names: list[str], tokenizer: str) -> None:
    """Raise ValueError if token files are mixed with documents, or cannot keep their names as shards."""
    if not names:
        return
    if len(names) < len(inputs):
        raise ValueError(f"{TOKEN_FILES} files hold tokens, the others documents: make two sets")
    if tokenizer != "gpt2":
        raise ValueError(f"{TOKEN_FILES} files hold GPT-2's tokens: leave out --tokenizer {tokenizer}")
    if len(set(names)) < len(names):
        raise ValueError(f"two token files are named {max(names, key=names.count)}: rename one")
    for name in names:
        if ("val" in name) == ("train" in name):
            raise ValueError(f"{name} needs either val or train in its name: rename it or leave it out")


def token_files(source: dict) -> list[str]:
    """Return the names of the token files that a set is made of, none for a set of documents."""
    paths = [path for path, *_ in source.get("files") or source.get("inputs") or ()]
    return [Path(path).name for path in paths if path.endswith(TOKEN_FILES)]


def bad_shards(out_dir: Path, manifest: dict) -> list[int]:
    """Return the numbers of the shards that are missing or whose hash differs."""

    def is_intact(record: dict) -> bool:
        path = out_dir / record["name"]
        return path.exists() and file_hash(path) == record["sha256"]

    bar = tqdm(manifest["shards"], desc="verifying", disable=None, leave=False)
    return [number for number, record in enumerate(bar) if not is_intact(record)]


def shard_name(number: int, manifest: dict) -> str:
    """Return the file name of a task's shard number `number`. Task i of n names its shards i, i + n, …

    Those of token files keep their names.
    """
    index = number * manifest["task_count"] + manifest["task_index"]
    if names := token_files(manifest["source"]):
        return str(Path(names[index]).with_suffix(".npy"))
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"


def shard_names(manifest: dict) -> list[str]:
    """Return the names of a task's shards, and of two that it may have written but not recorded."""
    written = len(manifest["shards"]) + (0 if manifest["complete"] else 2)
    if names := token_files(manifest["source"]):
        written = min(written, len(names[manifest["task_index"] :: manifest["task_count"]]))
    return [shard_name(number, manifest) for number in range(written)]


def task_name(name: str, task_index: int, task_count: int) -> str:
    """Return a name that differs between the tasks of a set."""
    return name if task_count == 1 else f"{name}_{task_index:04d}_of_{task_count:04d}"


def check_next(position: object) -> None:
    """Raise ValueError unless it is a Position, as JSON has it, or None."""
    if position is not None and not (len(position) == 3 and all(type(n) is int and n >= 0 for n in position)):
        raise ValueError("it says wrongly where a shard begins")


def check_source(source: dict) -> None:
    """Raise ValueError unless the files in the `source` of a manifest are described as `find_inputs` does."""
    for name, size, *_ in [*source.get("files", []), *source.get("inputs", [])]:
        check_types({"name": name, "size": size}, {"name": str, "size": int})
    for each in source.get("inputs", []):
        Input(*each)


def read_manifests(out_dir: Path) -> list[dict]:
    """Return the manifests of all tasks. Raises ValueError for a file that is damaged."""
    manifests = []
    for path in sorted(out_dir.glob("manifest*.json")):
        with parsing(path, "a manifest of shards", "make the set again in another folder"):
            manifest = json.loads(path.read_bytes())
            check_types(manifest, *MANIFEST_TYPES)
            if not 0 < manifest.get("vocab_size", 1) <= 2**16 or not 0 < manifest.get("shard_size", 1):
                raise ValueError("its sizes are out of range")
            for shard in manifest["shards"]:
                check_types(shard, *SHARD_TYPES)
                if Path(shard["name"]).name != shard["name"]:
                    raise ValueError(f"it names {shard['name']!r}, which is not in its folder")
                check_next(shard.get("next"))
            check_source(manifest.get("source", {}))
        for name, value in SINGLE_TASK.items():
            manifest.setdefault(name, value)
        manifests.append(manifest)
    return manifests


def read_task_manifest(out_dir: Path, task_index: int = 0, task_count: int = 1) -> dict | None:
    """Return the manifest of one task, or None if there is none. Raises ValueError if it lacks something."""
    for manifest in read_manifests(out_dir):
        if (manifest["task_index"], manifest["task_count"]) == (task_index, task_count):
            with parsing(out_dir, "a set of fineweb.py", "make it again in another folder"):
                check_types(manifest, MANIFEST_TYPES[0] | MANIFEST_TYPES[1])
                for shard in manifest["shards"]:
                    check_types(shard, SHARD_TYPES[0] | SHARD_TYPES[1])
            return manifest
    return None


def read_manifest(out_dir: Path) -> dict:
    """Return the manifest of a finished set, merged over all tasks; without one, `shards` is empty.

    Raises ValueError if the set is incomplete or its tasks do not belong together.
    """
    manifests = read_manifests(out_dir)
    if not manifests:
        return {"shards": []}
    incomplete = f"the shards in {out_dir} are incomplete: repeat the fineweb.py command"
    if not all(each["complete"] for each in manifests):
        raise ValueError(incomplete)
    for name in SAME_IN_ALL_TASKS:
        for each in manifests[1:]:
            if each.get(name) != manifests[0].get(name):
                found = difference(name, manifests[0].get(name), each.get(name))
                raise ValueError(f"the tasks in {out_dir} differ: {found}; use a folder for each set")
    if sorted(each["task_index"] for each in manifests) != list(range(manifests[0]["task_count"])):
        raise ValueError(incomplete)
    return {**manifests[0], "shards": [shard for each in manifests for shard in each["shards"]]}


def prepare(
    inputs: list[Input],
    out_dir: str | Path,
    *,
    source: dict,
    tokenizer: str = "gpt2",
    shard_size: int = 100_000_000,
    max_tokens: int | None = None,
    workers: int = 1,
    task_index: int = 0,
    task_count: int = 1,
    keep_downloads: bool = False,
    resume: bool = True,
    lock: FolderLock | None = None,
) -> dict:
    """Write the documents of the inputs to a folder as shards with a manifest, and return the manifest.

    `source` says in plain types where the documents come from, and `lock` is that of the folder. Resumes an
    interrupted set and rebuilds damaged shards of a finished one; without `resume`, rebuilds all. Each of
    `task_count` tasks processes every `task_count`-th input. Raises ValueError if the folder holds a set made
    with other arguments, or other shards.
    """
    out_dir, names = Path(out_dir), token_files(source)
    check_token_files(inputs, names, tokenizer)
    # Token files need no vocabulary, and so no download.
    n_vocab = GPT2_VOCABULARY if names else get_tokenizer(tokenizer).n_vocab
    manifest = {
        "tokenizer": tokenizer,
        "vocab_size": n_vocab,
        "eot_token": n_vocab - 1,
        "source": source,
        "shard_size": shard_size,
        "max_tokens": max_tokens,
        "task_index": task_index,
        "task_count": task_count,
        "skipped_documents": 0,
        "shards": [],
        "complete": False,
    }
    found = read_task_manifest(out_dir, task_index, task_count)
    is_continued = resume and found and found["shards"]
    check_same_set(out_dir, manifest, replaced=None if is_continued else found)
    if is_continued:
        manifest = found
    elif found and not resume:
        for name in shard_names(found):
            (out_dir / name).unlink(missing_ok=True)
    inputs = inputs[task_index::task_count]
    if not inputs:
        raise ValueError(f"there are fewer inputs than tasks: lower --task_count {task_count}")
    bad = bad_shards(out_dir, manifest) if manifest["complete"] else []
    if manifest["complete"] and not bad:
        return manifest
    if not manifest["complete"]:
        done = 2 * sum(shard["tokens"] for shard in manifest["shards"])
        needed = max(expected_bytes(inputs, tokenizer, max_tokens) - done, 0)
        free = shutil.disk_usage(existing_folder(out_dir)).free
        sizes = f"about {needed / 1e9:,.2f} GB to {out_dir}, where {free / 1e9:,.2f} GB are free"
        print(f"{'warning: ' if needed > free else ''}writing {sizes}")
    # A folder for each task, because the first one to finish deletes its own.
    fetcher = Fetcher(inputs, out_dir / task_name("downloads", task_index, task_count), keep_downloads)
    if names:
        shards = TokenShardSet(out_dir, manifest, fetcher, lock=lock)
    else:
        shards = ShardSet(out_dir, manifest, fetcher, BatchTokenizer(tokenizer), workers, lock)
    if not manifest["complete"]:
        shards.save_manifest()
        shards.extend()
    for number in bad:
        print(f"rebuilding {manifest['shards'][number]['name']}: it is missing or damaged")
        shards.repair(number)
    if not keep_downloads:
        shutil.rmtree(fetcher.folder, ignore_errors=True)
    return manifest


def find_shards(data_dir: Path, split: str, manifest: dict) -> list[Path]:
    """Return the shards of a split, sorted by name; `manifest` is the result of `read_manifest`.

    If it lists shards, the .npy files of the folder have to be exactly those. If not, they are all those with
    the split in their name. Raises FileNotFoundError if there are none, and ValueError if
    files are missing, not listed, or named after both splits.
    """
    paths = sorted(data_dir.iterdir()) if data_dir.exists() else []
    names = [path.name for path in paths if path.suffix == ".npy"]
    if both := [name for name in names if "train" in name and "val" in name]:
        raise ValueError(f"{data_dir / both[0]} has both train and val in its name: rename it")
    if listed := {shard["name"] for shard in manifest["shards"]}:
        if missing := sorted(listed - set(names)):
            raise ValueError(
                f"{len(missing)} of the {len(listed)} shards in the manifest of {data_dir} are missing, the "
                f"first is {missing[0]}: repeat the fineweb.py command, or copy them again"
            )
        if others := sorted(set(names) - listed):
            raise ValueError(f"the manifest of {data_dir} does not list {others[0]}: move it elsewhere")
    paths = [data_dir / name for name in names if split in name]
    if not paths:
        raise FileNotFoundError(
            f"no {split} shards in {data_dir}/: `python fineweb.py --out_dir {data_dir}` makes them from "
            "FineWeb-Edu, `python train.py --preset demo` trains without them"
        )
    return paths


def read_set(data_dir: str | Path, tokenizer: str | None) -> dict:
    """Return the manifest of a folder that holds shards of both splits, with their `tokenizer` in any case.

    Raises FileNotFoundError if there are none, and ValueError if they were made with another tokenizer.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    for split in ("val", "train"):
        find_shards(data_dir, split, manifest)
    made_with = manifest.get("tokenizer", tokenizer or "gpt2")
    if tokenizer not in (None, made_with):
        raise ValueError(
            f"--tokenizer is {tokenizer}, but the shards in {data_dir} were made with {made_with}: "
            "omit --tokenizer or make other shards"
        )
    return {**manifest, "tokenizer": made_with}


class Shards:
    """The shards of one split, whose tokens are read from their files when they are asked for.

    They are not mapped into memory, where a file that is cut short or a network drive that fails would kill
    the process without a word. `lengths` are their numbers of tokens, and `digest` tells sets apart. Warnings
    go to `say`. Raises FileNotFoundError if there are no shards, and ValueError for one that is damaged.
    """

    def __init__(self, data_dir: str | Path, split: str, say: Callable[[str], None] = print):
        manifest, self.say = read_manifest(Path(data_dir)), say
        self.paths = find_shards(Path(data_dir), split, manifest)
        listed = {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
        # Each holds a file descriptor, through which the shard stays readable if it is deleted.
        self.files = lru_cache(maxsize=256)(open_shard)
        self.lengths, digest = [], hashlib.sha256()
        for path in self.paths:
            tokens = self.files(path)
            if len(tokens) != listed.get(path.name, len(tokens)):
                expected = f"its manifest says {listed[path.name]}"
                raise ValueError(f"{path} has {len(tokens)} tokens, but {expected}: make it again")
            self.lengths.append(len(tokens))
            digest.update(path.name.encode() + fingerprint(tokens))
        self.digest = digest.hexdigest()
        self.stamps = list(map(stamp, self.paths))

    def read(self, shard: int, start: int, end: int) -> np.ndarray:
        """Return some tokens of a shard. A network drive may come back, so its errors are retried."""
        for delay_s in (*RETRY_S, None):
            try:
                return self.files(self.paths[shard])[start:end]
            except OSError as error:
                if delay_s is None:
                    raise
                self.say(f"warning: cannot read {self.paths[shard]} ({error}), trying again in {delay_s} s")
                self.files.cache_clear()
                time.sleep(delay_s)

    def warn_of_changes(self) -> None:
        """Name the files that have changed since the last call."""
        for shard, path in enumerate(self.paths):
            if (now := stamp(path)) != self.stamps[shard]:
                self.say(f"warning: {path} has {'changed' if now else 'vanished'} since the run began")
                self.stamps[shard] = now


def stamp(path: Path) -> tuple[int, int] | None:
    """Return the size of a file and when it was changed, or None if it cannot be found."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class ShardFile:
    """The tokens of a file, of which only slices are read: `tokens[start:end]`."""

    def __init__(self, path: Path, tokens: int, offset: int):
        self.path, self.tokens, self.offset = path, tokens, offset
        self.file = open(path, "rb", buffering=0)

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, _ = part.indices(self.tokens)
        self.file.seek(self.offset + 2 * start)
        data = self.file.read(2 * (end - start))
        if len(data) < 2 * (end - start):
            raise ValueError(f"{self.path} was cut short while it was in use: make it again")
        return np.frombuffer(data, dtype=np.uint16)


def open_shard(path: Path) -> ShardFile:
    """Open a shard. Raises ValueError if it is not a complete one-dimensional uint16 array."""
    with parsing(path, "a .npy file", "make it again"):
        tokens = np.load(path, mmap_mode="r")
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"it is {tokens.ndim}-dimensional {tokens.dtype}, not 1-dimensional uint16")
        return ShardFile(path, len(tokens), tokens.offset)


def fingerprint(tokens: ShardFile) -> bytes:
    """Return a hash of a shard's length and of a few blocks of its tokens.

    It tells shards apart without reading all of them, and needs no manifest.
    """
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in np.linspace(0, max(len(tokens) - 1024, 0), 8).astype(int):
        digest.update(tokens[start : start + 1024].tobytes())
    return digest.digest()


def difference(name: str, found: object, wanted: object) -> str:
    """Return a description of how two values differ, down to the first part that does."""
    while isinstance(found, dict) and isinstance(wanted, dict):
        name = next(each for each in {**found, **wanted} if found.get(each) != wanted.get(each))
        found, wanted = found.get(name), wanted.get(name)
    if isinstance(found, list) and isinstance(wanted, list):
        changed = [pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]]
        found, wanted = changed[0] if changed else (f"{len(found)} files", f"{len(wanted)} files")
    return f"{name} {found}, not {wanted}"


def check_same_set(out_dir: Path, wanted: dict, replaced: dict | None) -> None:
    """Raise ValueError if a folder holds anything but tasks of the wanted set and one that is replaced.

    The tasks of a set agree in SAME_IN_ALL_TASKS. Every .npy file has to belong to one of them.
    """
    # Listed before the manifests are read: other tasks may be writing.
    names = {path.name for path in out_dir.glob("*.npy")}
    manifests = read_manifests(out_dir)
    for manifest in manifests:
        for name in SAME_IN_ALL_TASKS:
            if manifest != replaced and manifest.get(name) != wanted[name]:
                found = difference(name, manifest.get(name), wanted[name])
                raise ValueError(f"{out_dir} already holds shards with {found}: use another --out_dir")
    if foreign := sorted(names - {name for manifest in manifests for name in shard_names(manifest)}):
        raise ValueError(f"{out_dir} holds {foreign[0]}, which no manifest describes: use another --out_dir")


def verify(out_dir: Path, task_index: int, task_count: int) -> None:
    """Compare a finished set with its hashes. Raises ValueError with a line for each bad shard."""
    manifest = read_task_manifest(out_dir, task_index, task_count)
    if manifest is None or not manifest["complete"]:
        raise ValueError(f"no finished set in {out_dir}: make one with the same command without --verify")
    bad = [manifest["shards"][number]["name"] for number in bad_shards(out_dir, manifest)]
    if bad:
        lines = [f"{name} is missing or damaged: rerun the command that made it" for name in bad]
        raise ValueError("\n".join(lines))
    print(f"all {len(manifest['shards'])} shards in {out_dir} are intact")


def prepare_demo(out_dir: str | Path) -> None:
    """Make a set from the sources of Python's standard library, unless there is a finished one."""
    found = read_task_manifest(Path(out_dir))
    if not (found and found["complete"]):
        print(f"making shards from Python's standard library in {out_dir}/")
        source = {"standard library of Python": platform.python_version(), "text_column": None}
        with locked_folder(Path(out_dir), ".lock"):
            prepare(stdlib_inputs(), out_dir, source=source, tokenizer="byte")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    at_least_1 = Range(count, 1)
    add = parser.add_argument_group("documents").add_argument
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="dataset on the Hugging Face Hub")
    add("--name", help="its configuration (None: sample-10BT for the default dataset)")
    add("--files", nargs="+", help=f"local files or globs instead: {', '.join(SUFFIXES)}")
    add("--text_column", default="text", help="column or key that holds the text")
    add = parser.add_argument_group("shards").add_argument
    add("--tokenizer", choices=NAMES, default="gpt2", help="gpt2, or byte, which needs no download")
    add("--out_dir", default="edu_fineweb10B", help="folder for the shards")
    add("--shard_size", type=at_least_1, default=100_000_000, help="tokens per shard")
    add("--max_tokens", type=at_least_1, help="stop after this many tokens per task (None: no limit)")
    add("--workers", type=at_least_1, default=os.cpu_count(), help="threads that tokenize")
    add("--task_index", type=Range(int, 0), default=0, help="index of this machine, from 0")
    add("--task_count", type=at_least_1, default=1, help="machines that share the inputs, file by file")
    add("--keep_downloads", action="store_true", help="keep the Hub's files in --out_dir/downloads")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue or repair the set in --out_dir; --no-resume deletes it first",
    )
    add("--verify", action="store_true", help="only compare a finished set with the hashes in its manifest")
    args = parser.parse_args(argv)
    check_options(parser, args)
    if args.task_index >= args.task_count:
        raise ValueError(f"--task_index is {args.task_index}: use 0 to {args.task_count - 1}")
    if args.name is None and args.dataset == parser.get_default("dataset"):
        args.name = "sample-10BT"
    return args


def find_inputs(args: argparse.Namespace) -> tuple[list[Input], dict]:
    """Return the files to read, and what the manifest says about them."""
    if args.files:
        inputs = local_inputs(args.files)
        files = [[Path(each.path).name, each.size] for each in inputs]
        return inputs, {"files": files, "text_column": args.text_column}
    source = {"dataset": args.dataset, "name": args.name, "text_column": args.text_column}
    # An interrupted set, and that of several tasks, is completed from the revision it started with.
    begun = [
        manifest["source"]
        for manifest in read_manifests(Path(args.out_dir))
        if (args.resume or manifest["task_index"] != args.task_index)
        and "inputs" in manifest.get("source", {})
        and all(manifest["source"].get(name) == value for name, value in source.items())
    ]
    if begun:
        inputs = [Input(*each) for each in begun[0]["inputs"]]
    else:
        inputs = hub_inputs(args.dataset, args.name)
    return inputs, {**source, "inputs": [list(astuple(each)) for each in inputs]}


def main(args: argparse.Namespace) -> None:
    keep_freed_memory()
    out_dir, task = Path(args.out_dir), (args.task_index, args.task_count)
    if args.verify:
        return verify(out_dir, *task)
    names = ("tokenizer", "shard_size", "max_tokens", "workers", "task_index", "task_count")
    options = {name: getattr(args, name) for name in (*names, "keep_downloads", "resume")}
    with locked_folder(out_dir, task_name(".lock", *task)) as lock:
        inputs, source = find_inputs(args)
        manifest = prepare(inputs, out_dir, source=source, lock=lock, **options)
    for split in ("val", "train"):
        shards = [shard for shard in manifest["shards"] if split in shard["name"]]
        tokens, documents = (sum(shard[what] for shard in shards) for what in ("tokens", "documents"))
        print(f"{split:>5}: {tokens:,} tokens in {len(shards)} shard(s), {documents:,} documents start there")
    print(f"skipped: {manifest['skipped_documents']:,} documents that are empty or not text")
    preset = "--preset text " if tokens < SMALL_TEXT else ""
    print(f"next:  python train.py {preset}--data_dir {args.out_dir}")


def explain_interruption(error: BaseException, args: argparse.Namespace) -> str | None:
    """Return what to do after Ctrl-C, or None for any other error."""
    return "interrupted: rerun the same command to continue" if isinstance(error, KeyboardInterrupt) else None


if __name__ == "__main__":
    run(main, parse_args, explain_interruption, needs_output=False)
