"""Turn documents into token shards that train.py reads.

    python fineweb.py                                             # FineWeb-Edu, 10 billion tokens
    python fineweb.py --files input.txt --out_dir shakespeare     # your own .txt, .jsonl, .jsonl.gz, .parquet
    python fineweb.py --dataset Salesforce/wikitext --name wikitext-103-raw-v1 --shard_size 1e7 --out_dir wiki

Writes `edufineweb_{val|train}_{index:06d}.npy` to --out_dir: one-dimensional uint16 arrays of --shard_size
tokens, the first one for validation, every document headed by the end-of-text token; and `manifest.json`,
which describes them. A set that fits into one shard is cut instead: its last tenth is `val`, the rest
`train`, as is usual for Tiny Shakespeare. FineWeb-Edu's sample of about 10 billion tokens gives about 100
shards of 200 MB.
"""

import argparse
import glob
import gzip
import hashlib
import json
import multiprocessing
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from tokenizer import NAMES, get_tokenizer

MANIFEST = "manifest.json"
DOCUMENTS_PER_CHUNK = 64  # enough to hide the cost of passing a chunk between processes
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def file_documents(paths: list[Path], text_column: str) -> Iterator[str | None]:
    """Yield the texts of .txt (one document each), .jsonl, .jsonl.gz and .parquet files, in order.

    Raises ValueError naming the file, and the line where there is one, for what cannot be read.
    """
    for path in paths:
        try:
            if path.suffix == ".txt":
                yield path.read_bytes().decode("utf-8")
            elif path.suffix == ".parquet":
                yield from _parquet_documents(path, text_column)
            else:
                yield from _jsonl_documents(path, text_column)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}): convert it with iconv") from error
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from error


def _jsonl_documents(path: Path, text_column: str) -> Iterator[str | None]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)[text_column]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} is no JSON object with a {text_column!r} ({error}): "
                    "mend it or name another --text_column"
                ) from error


def _parquet_documents(path: Path, text_column: str) -> Iterator[str | None]:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(path)
    names = parquet.schema_arrow.names
    if text_column not in names:
        raise ValueError(f"no column {text_column!r}: set --text_column to one of {names}")
    for batch in parquet.iter_batches(batch_size=1024, columns=[text_column]):
        yield from batch.column(0).to_pylist()


def hub_documents(dataset: str, name: str | None, text_column: str) -> Iterator[str | None]:
    """Stream the texts of a Hub dataset's `train` split. Raises FileNotFoundError when it is out of reach."""
    from datasets import load_dataset

    try:
        stream = load_dataset(dataset, name=name, split="train", streaming=True)
        for row in stream:
            if text_column not in row:
                raise ValueError(
                    f"{dataset} has no column {text_column!r}: set --text_column to one of {list(row)}"
                )
            yield row[text_column]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"cannot read {dataset} from the Hub ({reason}): check name and network, or give local --files"
        ) from error


def stdlib_documents() -> Iterator[str]:
    """Yield the sources of Python's standard library, about 10 MB of text that every machine with Python has.

    Left out are its tests, what is installed beside it, and two packages of tables. The order is by hash of
    the file name, so that the last tenth is a fair sample.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name.as_posix() for name in names if not left_out & set(name.parts)]
    if not names:
        raise FileNotFoundError(
            f"no Python sources in {root}: make shards with `python fineweb.py --files …`"
        )
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield (root / name).read_text(encoding="utf-8", errors="replace")


def encode_chunk(texts: list[str | None], tokenizer_name: str) -> tuple[np.ndarray, int]:
    """Return the documents' ids in uint16, end-of-text before each, and how many empty ones were skipped."""
    tokenizer = get_tokenizer(tokenizer_name)
    eot = np.array([tokenizer.eot_token], dtype=np.uint16)
    parts = []
    for text in filter(None, texts):
        # disallowed_special=(): "<|endoftext|>" in a text is ordinary text
        parts += [eot, tokenizer.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)]
    return np.concatenate(parts or [eot[:0]]), len(texts) - len(parts) // 2


def encode_documents(
    documents: Iterable[str | None], tokenizer: str, workers: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield what `encode_chunk` returns for chunks of the documents, in their order, from `workers`
    processes."""
    documents = iter(documents)
    chunks = iter(lambda: list(islice(documents, DOCUMENTS_PER_CHUNK)), [])
    if workers == 1:
        yield from (encode_chunk(chunk, tokenizer) for chunk in chunks)
        return
    # Spawn works everywhere and inherits no threads; the bounded queue keeps memory flat.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(encode_chunk, chunk, tokenizer))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write(file)` fill a file that appears under its name only when it is whole and on disk."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise


def write_json(path: str | Path, record: dict) -> None:
    """Write a JSON file, whole or not at all."""
    data = json.dumps(record, indent=1).encode()
    write_atomically(Path(path), lambda file: file.write(data))


class ShardWriter:
    """Cut a stream of tokens into shards and keep the manifest beside them true."""

    def __init__(self, out_dir: Path, shard_size: int, manifest: dict):
        self.out_dir = out_dir
        self.manifest = manifest
        self.buffer = np.empty(shard_size, dtype=np.uint16)
        self.filled = 0
        self._write_manifest()

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.filled == len(self.buffer):
                self._write_shard(self.buffer)
                self.filled = 0
            taken = min(len(tokens), len(self.buffer) - self.filled)
            self.buffer[self.filled : self.filled + taken] = tokens[:taken]
            self.filled += taken
            tokens = tokens[taken:]

    def close(self) -> None:
        """Write what is left; the set is complete. Raises ValueError when there is too little to cut in
        two."""
        tokens = self.buffer[: self.filled]
        if not self.manifest["shards"]:
            cut = int(0.9 * len(tokens))
            if cut == 0:
                raise ValueError(
                    f"{len(tokens)} tokens are too few for a val and a train shard: give more text"
                )
            self._write_shard(tokens[cut:])
            tokens = tokens[:cut]
        self._write_shard(tokens)
        self.manifest["complete"] = True
        self._write_manifest()

    def _write_shard(self, tokens: np.ndarray) -> None:
        index = len(self.manifest["shards"])
        name = f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"
        write_atomically(self.out_dir / name, lambda file: np.save(file, tokens))
        with open(self.out_dir / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        documents = int((tokens == self.manifest["eot_token"]).sum())
        self.manifest["shards"].append(
            {"name": name, "tokens": len(tokens), "documents": documents, "sha256": digest}
        )
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_json(self.out_dir / MANIFEST, self.manifest)


def prepare(
    documents: Iterable[str | None],
    out_dir: str | Path,
    *,
    source: dict,
    tokenizer: str = "gpt2",
    shard_size: int = 100_000_000,
    max_tokens: int | None = None,
    workers: int = 1,
) -> dict:
    """Write the shards and the manifest of `documents` to `out_dir` and return the manifest.

    `source` says in plain types where the documents come from. A complete set made with the same arguments is
    left as it is; one that was interrupted is made anew. Raises ValueError when the folder holds any other
    shards.
    """
    out_dir = Path(out_dir)
    encoding = get_tokenizer(tokenizer)
    manifest = {
        "tokenizer": tokenizer,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "source": source,
        "shard_size": shard_size,
        "max_tokens": max_tokens,
        "skipped_documents": 0,
        "shards": [],
        "complete": False,
    }
    if (out_dir / MANIFEST).exists():
        found = json.loads((out_dir / MANIFEST).read_text())
        if found["complete"]:
            for name in ("source", "tokenizer", "shard_size", "max_tokens"):
                if found.get(name) != manifest[name]:
                    raise ValueError(
                        f"{out_dir} already holds shards with {name} {found.get(name)}, "
                        f"not {manifest[name]}: choose another --out_dir"
                    )
            return found
        for shard in found["shards"]:
            (out_dir / shard["name"]).unlink(missing_ok=True)
    if any(out_dir.glob("*.npy")):
        raise ValueError(
            f"{out_dir} already holds .npy files that no manifest describes: choose another --out_dir"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out_dir, shard_size, manifest)
    left = max_tokens if max_tokens is not None else sys.maxsize
    with tqdm(unit="tok", unit_scale=True, desc="tokenising", disable=None, leave=False) as bar:
        for tokens, skipped in encode_documents(documents, tokenizer, workers):
            manifest["skipped_documents"] += skipped
            tokens = tokens[:left]
            left -= len(tokens)
            writer.add(tokens)
            bar.update(len(tokens))
            if left == 0:
                break
    writer.close()
    return manifest


def count(text: str) -> int:
    """A whole number above zero as people write it: 100000000, 100_000_000 or 1e8."""
    number = float(text)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above zero")
    return int(number)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("documents").add_argument
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="dataset on the Hugging Face Hub")
    add("--name", help="its configuration; sample-10BT for the default dataset")
    add("--files", nargs="+", help=f"local files or globs instead: {', '.join(SUFFIXES)}")
    add("--text_column", default="text", help="column or key that holds the text")
    add = parser.add_argument_group("shards").add_argument
    add("--tokenizer", choices=NAMES, default="gpt2", help="gpt2, or byte, which needs no download")
    add("--out_dir", default="edu_fineweb10B", help="folder for the shards")
    add("--shard_size", type=count, default=100_000_000, help="tokens per shard")
    add("--max_tokens", type=count, help="stop after this many tokens; None takes all")
    add("--workers", type=count, default=os.cpu_count(), help="processes that tokenise")
    args = parser.parse_args(argv)
    if args.name is None and args.dataset == parser.get_default("dataset"):
        args.name = "sample-10BT"
    return args


def main(args: argparse.Namespace) -> None:
    if args.files:
        paths = []
        for pattern in args.files:
            matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
            if not matches:
                raise FileNotFoundError(f"no file matches {pattern!r}: check the path given to --files")
            paths += [Path(match) for match in matches]
        unknown = [path for path in paths if not path.name.endswith(SUFFIXES)]
        if unknown:
            raise ValueError(f"cannot read {unknown[0]}: --files takes {', '.join(SUFFIXES)}")
        source = {
            "files": [[path.name, path.stat().st_size] for path in paths],
            "text_column": args.text_column,
        }
        documents = file_documents(paths, args.text_column)
    else:
        source = {"dataset": args.dataset, "name": args.name, "text_column": args.text_column}
        documents = hub_documents(args.dataset, args.name, args.text_column)
    manifest = prepare(
        documents,
        args.out_dir,
        source=source,
        tokenizer=args.tokenizer,
        shard_size=args.shard_size,
        max_tokens=args.max_tokens,
        workers=args.workers,
    )
    for split in ("val", "train"):
        shards = [shard for shard in manifest["shards"] if split in shard["name"]]
        tokens, documents = (sum(shard[what] for shard in shards) for what in ("tokens", "documents"))
        print(f"{split:>5}: {tokens:,} tokens in {len(shards)} shard(s), {documents:,} documents begin there")
    print(f"next:  python train.py --data_dir {args.out_dir}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"fineweb.py: error: {error}")
