"""Turn documents into token shards that train.py reads.

    python fineweb.py                                             # FineWeb-Edu, 10 billion tokens
    python fineweb.py --files input.txt --out_dir shakespeare     # your own .txt, .jsonl, .jsonl.gz, .parquet
    python fineweb.py --dataset Salesforce/wikitext --name wikitext-103-raw-v1 --shard_size 1e7 --out_dir wiki
    python fineweb.py --verify                                    # compare the shards with their hashes

Writes `edufineweb_{val|train}_{index:06d}.npy` to --out_dir: one-dimensional uint16 arrays of --shard_size
tokens. The first shard is for validation, and every document starts with the end-of-text token.
`manifest.json` describes the set. A set that fits into one shard is split instead: the last tenth of each of
its --files becomes `val` and the rest `train`, as is usual for Tiny Shakespeare. FineWeb-Edu's sample of
about 10 billion tokens gives about 100 shards of 200 MB. The same command continues an interrupted set and
repairs a finished one.
"""

import argparse
import contextlib
import hashlib
import io
import platform
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpus.documents import Chunk, Format, Position, not_empty, read_chunks, read_token_file
from corpus.inputs import (
    AHEAD,
    SUFFIXES,
    TOKEN_FILES,
    Fetcher,
    Input,
    check_content,
    hub_inputs,
    local_inputs,
    stdlib_inputs,
)
from corpus.shards import SAME_IN_ALL_TASKS, difference, read_manifests, read_task_manifest
from corpus.tokenizer import END_OF_TEXT, NAMES, SIZES, BatchTokenizer, get_tokenizer
from runtime.cli import (
    Parser,
    Range,
    check_options,
    command_line,
    count,
    run,
    this_command,
    user_path,
    watched,
    watching,
)
from runtime.files import (
    FolderLock,
    existing_folder,
    file_hash,
    locked_folder,
    write_atomically,
    write_json,
)
from runtime.machine import keep_freed_memory, usable_cores

SMALL_TEXT = 100_000_000  # tokens; `train.py --preset text` is meant for fewer
# By default. A token takes 8 to 12 ns in the one thread that collects, hashes and writes, and 23 to 90 in
# those that tokenize, so three to nine of them keep it busy (LOG.md, 2026-11-29).
MOST_WORKERS = 8
MOST_VALIDATION = 0.2  # share of a set; where the first shard is more, a tenth of the set is validation
MOST_NAMED, SHOWN_TOKENS = 5, 12  # files, and the beginning of a document, on the console
SHORTEST_REPEAT = 32  # tokens of a repeated document: lines of a chat or a poem repeat naturally


def encode_chunk(chunk: Chunk, tokenizer: BatchTokenizer) -> tuple[np.ndarray, int]:
    """Return the documents' ids in uint16, each after an end-of-text token, and the number of skipped ones.

    Documents that are empty or null are skipped.
    """
    texts = chunk.read()
    documents = not_empty(texts)
    ids, starts = tokenizer.encode(documents)
    starts = starts[1:-1] if chunk.continues else starts[:-1]
    return np.insert(ids, starts, tokenizer.encoding.eot_token), len(texts) - len(documents)


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
        command = this_command()
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


def expected_downloads(inputs: list[Input], recipe: "Recipe", keep: bool) -> int:
    """Return about how many bytes of downloads are on the disk at a time, at most."""
    sizes, left = [], 2.0 * (recipe.max_tokens or sys.maxsize)
    for each in inputs:
        if each.repo and left > 0:
            sizes.append(each.size)
        left -= expected_bytes([each], recipe.tokenizer, None)
    # Beside the one being read and those ahead, the one before stays until its last tokens are in a shard.
    return sum(sizes if keep else sorted(sizes)[-AHEAD - 2 :])


def limit_of(manifest: dict) -> int:
    """Return the most tokens that a task of a set may have."""
    return manifest.get("max_tokens") or sys.maxsize


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
        self.input_tokens = np.zeros(len(fetcher.inputs), dtype=int)  # those that `shards` has read

    def shards(
        self, start: Position, size: int, left: int, done: int = 0, skipped: int = 0
    ) -> Iterator[tuple[np.ndarray, Position | None, int]]:
        """For each shard, yield its tokens, where the next one begins (None after the last), and how many
        documents have been skipped so far."""
        total = limit_of(self.manifest)
        source = self.manifest["source"]
        form = Format(source["text_column"], source.get("separator"), self.manifest["tokenizer"] == "byte")
        chunks = read_chunks(self.fetcher, form, start[:2])
        stream = encode_chunks(chunks, self.tokenizer, self.workers)
        buffer, filled, drop = np.empty(size, dtype=np.uint16), 0, start[2]
        self.input_tokens[:] = 0
        if left + done == sys.maxsize:  # no limit
            self.fetcher.prefetch(start[0], len(self.sizes))
        with watching("tokenizing", unit="tokens", unit_scale=True, initial=done) as work:
            for chunk, tokens, skipped_here in stream:
                taken = min(drop, len(tokens))
                drop -= taken
                tokens = tokens[: taken + left]
                new = len(tokens) - taken
                self.input_tokens[chunk.input] += new
                left -= new
                done += new
                work.update(new)
                done_bytes = self.sizes[chunk.input] + chunk.share * self.fetcher.inputs[chunk.input].size
                work.total = min(int(done * self.sizes[-1] / max(done_bytes, 1)), total)
                # A limited set ends about here, with as many tokens per byte as before.
                last_byte = done_bytes * (1 + left / max(done, 1))
                self.fetcher.prefetch(chunk.input, np.searchsorted(self.sizes, last_byte))
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
        left = limit_of(self.manifest) - done
        size, skipped = self.manifest["shard_size"], self.manifest["skipped_documents"]
        for tokens, following, skipped_now in self.shards(start, size, left, done, skipped):
            parts = [tokens]
            if following is None and not records and task_count == 1:
                is_val = self.held_out(len(tokens))
                if is_val.all():
                    raise ValueError(
                        f"{len(tokens)} tokens are too few for a val and a train shard: add more text"
                    )
                self.describe_split(tokens, is_val)
                parts = [tokens[is_val], tokens[~is_val]]
            made = [self.write(len(records) + i, part) for i, part in enumerate(parts)]
            records += [{**record, "next": following, "skipped": skipped_now} for record in made]
            if following is None and task_count == 1 and len(parts) == 1:
                self.shrink_validation()
            self.manifest["skipped_documents"] = skipped_now
            self.manifest["complete"] = following is None
            self.save_manifest()
            self.fetcher.release(following[0] if following else len(self.fetcher.inputs))

    def held_out(self, total: int) -> np.ndarray:
        """Return which tokens of a set that is split are for validation: the last tenth of each file.

        Sets of older versions, and those that are not made of --files, have the last tenth of all tokens.
        """
        is_val = np.zeros(total, dtype=bool)
        ends = np.cumsum(self.input_tokens) if self.manifest.get("splits_each_file") else [total]
        for start, end in pairwise([0, *ends]):
            is_val[start + int(0.9 * (end - start)) : end] = True
        return is_val

    def describe_split(self, tokens: np.ndarray, is_val: np.ndarray) -> None:
        """Say which files have a part in the validation shard, and which documents are also in training."""
        if self.manifest.get("splits_each_file"):
            names = [self.fetcher.inputs[index].path for index in np.flatnonzero(self.input_tokens)]
            more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            tqdm.write(f"validation is the last tenth of each file: {', '.join(names[:MOST_NAMED])}{more}")
        with watching("looking for repeated documents"):
            found = repeated_documents(tokens, is_val, self.manifest["eot_token"])
        if found:
            index = np.searchsorted(np.cumsum(self.input_tokens), found[0], side="right")
            beginning = self.tokenizer.encoding.decode(tokens[found[0] + 1 :][:SHOWN_TOKENS].tolist())
            tqdm.write(
                f"warning: {len(found):,} document(s) are in both training and validation, the first is in "
                f"{self.fetcher.inputs[index].path} and begins with {beginning.partition(END_OF_TEXT)[0]!r}: "
                "remove repeated documents, or the validation loss is too low"
            )

    def reopen(self) -> None:
        """Make a set that a limit has ended one that `extend` continues, as if there had been no limit.

        Its last shard and the rest of its first one, which went to training, will be made again.
        """
        records, size = self.manifest["shards"], self.manifest["shard_size"]
        regular = [record for record in records if record["next"]]
        if regular and regular[0]["tokens"] < size:
            tokens, _, _ = next(self.shards((0, 0, 0), size, limit_of(self.manifest)))
            regular[0] |= self.write(0, tokens)
        skipped = regular[-1].get("skipped", self.manifest["skipped_documents"]) if regular else 0
        self.manifest |= {"shards": regular, "skipped_documents": skipped, "complete": False}
        self.save_manifest()  # before it lacks a shard
        for record in records[len(regular) :]:
            (self.out_dir / record["name"]).unlink(missing_ok=True)

    def check_folder(self) -> None:
        """Raise ValueError if the folder is no longer the one that was locked."""
        if self.lock and not self.lock.is_held():
            raise ValueError(f"{self.out_dir} was deleted, moved or replaced: repeat the command")

    def save_manifest(self) -> None:
        self.check_folder()
        if contents := self.fetcher.contents(self.manifest.get("contents", [])):
            self.manifest["contents"] = contents
        with explained(self.out_dir, 0):
            write_json(self.path, self.manifest)

    def write(self, number: int, tokens: np.ndarray, sha256: str | None = None) -> dict:
        """Write a shard and return its record. If its hash is not `sha256`, raises ValueError instead."""
        name, header, digest = shard_name(number, self.manifest), io.BytesIO(), hashlib.sha256()
        # What np.save writes, without a copy of the tokens.
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
        parts = header.getvalue(), memoryview(tokens)
        for part in parts:
            digest.update(part)
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"the inputs of {name} have changed: --no-resume makes the whole set again")
        self.check_folder()
        with explained(self.out_dir, len(parts[0]) + tokens.nbytes):
            write_atomically(self.out_dir / name, lambda file: file.writelines(parts))
        documents = int(np.count_nonzero(tokens == self.manifest["eot_token"]))
        return {"name": name, "tokens": len(tokens), "documents": documents, "sha256": digest.hexdigest()}

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
        if number == 0:
            return (0, 0, 0)
        # Nothing follows the last regular shard but the rest of the first one.
        return tuple(records[number - 1]["next"] or (0, 0, records[0]["tokens"]))

    def repair(self, number: int) -> None:
        """Rebuild one shard. Raises ValueError if the inputs no longer give the same tokens."""
        records = self.manifest["shards"]
        record, sizes = records[number], [each["tokens"] for each in records]
        if len(records) == 2 and records[0]["next"] is None:  # one shard that was split
            tokens, _, _ = next(self.shards((0, 0, 0), sum(sizes), sum(sizes)))
            is_val = self.held_out(len(tokens))
            tokens = tokens[~is_val if number else is_val]
        else:
            done = sum(sizes[:number])
            tokens, _, _ = next(self.shards(self.start(number), sizes[number], sizes[number], done))
        self.write(number, tokens, record["sha256"])


def repeated_documents(tokens: np.ndarray, is_val: np.ndarray, eot_token: int) -> list[int]:
    """Return where the documents begin that are validated on what an equal one trains on; one of each kind.

    A document has its first tokens in training and the others in validation. Where two equal ones differ in
    how many that are, they share some. Documents of fewer than SHORTEST_REPEAT tokens do not count.
    """
    starts = np.flatnonzero(tokens == eot_token)
    ends = np.append(starts[1:], len(tokens))
    val_tokens = np.add.reduceat(is_val, starts, dtype=int)
    is_long = ends - starts >= SHORTEST_REPEAT
    starts, ends, val_tokens = starts[is_long], ends[is_long], val_tokens[is_long]
    spans = zip(starts, ends, strict=True)
    hashes = np.fromiter((hash(tokens[start:end].tobytes()) for start, end in spans), int, len(starts))
    order = np.lexsort((val_tokens, hashes))
    before, after = order[:-1], order[1:]
    repeats = after[(hashes[before] == hashes[after]) & (val_tokens[before] < val_tokens[after])]
    _, first_of_kind = np.unique(hashes[repeats], return_index=True)
    return sorted(starts[repeats[first_of_kind]].tolist())


class TokenShardSet(ShardSet):
    """A set made of token files, each of which becomes one shard. No tokenizer is needed."""

    def tokens_of(self, number: int) -> np.ndarray:
        tokens = read_token_file(path := self.fetcher.path(number))
        if len(tokens) and (largest := int(tokens.max())) >= self.manifest["vocab_size"]:
            raise ValueError(f"{path} holds token id {largest}: it was not made with GPT-2's tokenizer")
        return tokens

    def extend(self) -> None:
        """Write the shards that are still missing, each with a whole file, until there are enough tokens."""
        records, total = self.manifest["shards"], limit_of(self.manifest)
        inputs = self.fetcher.inputs
        for each in inputs[len(records) :]:
            if each.repo is None:
                read_token_file(Path(each.path))  # before anything is written
        with watching("reading", len(inputs), "files", initial=len(records)) as work:
            while not self.manifest["complete"]:
                number = len(records)
                done = sum(record["tokens"] for record in records)
                last_byte = self.sizes[number] + 2.0 * (total - done)
                self.fetcher.prefetch(number, np.searchsorted(self.sizes, last_byte))
                tokens = self.tokens_of(number)
                is_last = number + 1 == len(inputs) or done + len(tokens) >= total
                following = None if is_last else (number + 1, 0, 0)
                records.append({**self.write(number, tokens), "next": following})
                self.manifest["complete"] = is_last
                self.save_manifest()
                self.fetcher.release(number + 1)
                work.update()

    def reopen(self) -> None:
        """Make a set that a limit has ended one that `extend` continues."""
        records = self.manifest["shards"]
        self.manifest["complete"] = len(records) == len(self.fetcher.inputs)
        records[-1]["next"] = None if self.manifest["complete"] else (len(records), 0, 0)

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

    shards = watched(manifest["shards"], "verifying", "shards")
    return [number for number, record in enumerate(shards) if not is_intact(record)]


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


@dataclass(frozen=True)
class Recipe:
    """What a task of a set consists of, in the manifest's terms.

    `source` says in plain types where the documents come from. Each of `task_count` tasks processes every
    `task_count`-th input.
    """

    source: dict
    tokenizer: str = "gpt2"
    shard_size: int = 100_000_000
    max_tokens: int | None = None
    task_index: int = 0
    task_count: int = 1


def prepare(
    inputs: list[Input],
    out_dir: str | Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    keep_downloads: bool = False,
    resume: bool = True,
    lock: FolderLock | None = None,
) -> dict:
    """Write the documents of the inputs to a folder as shards with a manifest, and return the manifest.

    `lock` is that of the folder. Resumes an interrupted set, or one that a lower limit has ended, and
    rebuilds damaged shards of a finished one; without `resume`, rebuilds all. Raises ValueError if the folder
    holds a set made with another recipe or from files that have changed since, or other shards.
    """
    out_dir, names = Path(out_dir), token_files(recipe.source)
    task_index, task_count = recipe.task_index, recipe.task_count
    check_token_files(inputs, names, recipe.tokenizer)
    # Token files need no vocabulary, and so no download.
    n_vocab = SIZES["gpt2"] if names else get_tokenizer(recipe.tokenizer).n_vocab
    manifest = asdict(recipe) | {"vocab_size": n_vocab, "eot_token": n_vocab - 1}
    manifest |= {"skipped_documents": 0, "shards": [], "complete": False}
    manifest["splits_each_file"] = "files" in recipe.source and not names
    found = read_task_manifest(out_dir, task_index, task_count)
    is_continued = resume and found and found["shards"]
    check_same_set(out_dir, manifest, replaced=None if is_continued else found)
    inputs = inputs[task_index::task_count]
    if not inputs:
        raise ValueError(f"there are fewer inputs than tasks: lower --task_count {task_count}")
    if is_continued:
        manifest = found
        for each, before in zip(inputs, manifest.get("contents", []), strict=False):
            check_content(each.path, before)
    elif found and not resume:
        for name in shard_names(found):
            (out_dir / name).unlink(missing_ok=True)
    bad = bad_shards(out_dir, manifest) if manifest["complete"] else []
    before, manifest["max_tokens"] = limit_of(manifest), recipe.max_tokens
    is_raised, done = before < limit_of(manifest), sum(shard["tokens"] for shard in manifest["shards"])
    if manifest["complete"] and not bad and not is_raised:
        return manifest
    reopens = manifest["complete"] and is_raised and before <= done
    if reopens or not manifest["complete"]:
        needed = max(expected_bytes(inputs, recipe.tokenizer, recipe.max_tokens) - 2 * done, 0)
        needed += expected_downloads(inputs, recipe, keep_downloads)
        free = shutil.disk_usage(existing_folder(out_dir)).free
        sizes = [tqdm.format_sizeof(n, "B") for n in (needed, free)]
        line = f"writing about {sizes[0]} to {out_dir}, where {sizes[1]} are free"
        print(f"warning: {line}" if needed > free else line)
    # A folder for each task, because the first one to finish deletes its own.
    fetcher = Fetcher(inputs, out_dir / task_name("downloads", task_index, task_count), keep_downloads)
    if names:
        shards = TokenShardSet(out_dir, manifest, fetcher, lock=lock)
    else:
        tokenizer = BatchTokenizer(recipe.tokenizer, workers, others=2 * recipe.shard_size)
        shards = ShardSet(out_dir, manifest, fetcher, tokenizer, workers, lock)
    if reopens:
        shards.reopen()
        bad = [number for number in bad if number < len(manifest["shards"])]
    shards.save_manifest()
    if not manifest["complete"]:
        shards.extend()
    for number in bad:
        print(f"rebuilding {manifest['shards'][number]['name']}: it is missing or damaged")
        shards.repair(number)
    if not keep_downloads:
        shutil.rmtree(fetcher.folder, ignore_errors=True)
    return manifest


def check_same_set(out_dir: Path, wanted: dict, replaced: dict | None) -> None:
    """Raise ValueError if a folder holds anything but tasks of the wanted set and one that is replaced.

    The tasks of a set agree in SAME_IN_ALL_TASKS, but a smaller limit may be raised for one after the other.
    Every .npy file has to belong to one of them.
    """
    # Listed before the manifests are read: other tasks may be writing.
    names = {path.name for path in out_dir.glob("*.npy")}
    manifests = read_manifests(out_dir)
    for manifest in manifests:
        for name in SAME_IN_ALL_TASKS:
            if name == "max_tokens" and limit_of(manifest) < limit_of(wanted):
                continue
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
            prepare(stdlib_inputs(), out_dir, Recipe(source, tokenizer="byte"))


def unescaped(text: str) -> str:
    """Return a text in which \\n, \\r and \\t, which are hard to type, are what they stand for."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: leave it out, and every file is one document")
    return text.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    at_least_1 = Range(count, 1)
    add = parser.add_argument_group("documents").add_argument
    formats = ", ".join((*SUFFIXES, TOKEN_FILES))
    add("--files", type=user_path, nargs="+", help=f"files, globs or folders: {formats}")
    dataset = "HuggingFaceFW/fineweb-edu"
    where = "without --files: dataset on the Hugging Face Hub, or a folder"
    add("--dataset", type=user_path, default=dataset, help=where)
    add("--name", help="its configuration (default: sample-10BT for the default dataset)")
    add("--text_column", default="text", help="column or key that holds the text")
    separator = "what ends documents in .txt files: '<|endoftext|>' or '\\n\\n\\n' (default: nothing)"
    add("--separator", type=unescaped, help=separator)
    add = parser.add_argument_group("shards").add_argument
    add("--out_dir", type=user_path, default="edu_fineweb10B", help="folder for the shards")
    add("--tokenizer", choices=NAMES, default="gpt2", help="gpt2, or byte, which needs no download")
    add("--max_tokens", type=at_least_1, help="stop after this many tokens per task (default: no limit)")
    add("--shard_size", type=at_least_1, default=100_000_000, help="tokens per shard")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue or repair the set in --out_dir; --no-resume deletes it first",
    )
    add("--verify", action="store_true", help="only compare a finished set with the hashes in its manifest")
    add = parser.add_argument_group("work").add_argument
    workers = f"threads that tokenize; {MOST_WORKERS} keep the one that writes busy, each takes about 90 MB"
    add("--workers", type=at_least_1, default=min(usable_cores(), MOST_WORKERS), help=workers)
    add("--task_index", type=Range(int, 0), default=0, help="index of this machine, from 0")
    add("--task_count", type=at_least_1, default=1, help="machines that share the inputs, file by file")
    add("--keep_downloads", action="store_true", help="keep the Hub's files in --out_dir/downloads")
    args = parser.parse_args(argv)
    check_options(parser, args)
    if args.task_index >= args.task_count:
        raise ValueError(f"--task_index is {args.task_index}: use 0 to {args.task_count - 1}")
    if args.name is None and args.dataset == parser.get_default("dataset"):
        args.name = "sample-10BT"
    return args


def find_inputs(args: argparse.Namespace) -> tuple[list[Input], dict]:
    """Return the files to read, and what the manifest says about them."""
    form = {"text_column": args.text_column}
    if args.separator is not None:
        form["separator"] = args.separator
    if args.files:
        inputs = local_inputs(args.files)
        if args.separator and not any(each.path.endswith(".txt") for each in inputs):
            raise ValueError("--separator is for .txt files, of which there are none: leave it out")
        return inputs, {"files": [[Path(each.path).name, each.size] for each in inputs], **form}
    source = {"dataset": args.dataset, "name": args.name, **form}
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
    with locked_folder(out_dir, task_name(".lock", *task)) as lock:
        inputs, source = find_inputs(args)
        recipe = Recipe(source, **{each.name: getattr(args, each.name) for each in fields(Recipe)[1:]})
        how = dict(workers=args.workers, keep_downloads=args.keep_downloads, resume=args.resume, lock=lock)
        manifest = prepare(inputs, out_dir, recipe, **how)
    for split in ("val", "train"):
        shards = [shard for shard in manifest["shards"] if split in shard["name"]]
        tokens, documents = (sum(shard[what] for shard in shards) for what in ("tokens", "documents"))
        print(f"{split:>5}: {tokens:,} tokens in {len(shards)} shard(s), {documents:,} documents start there")
    preset = ["--preset", "text"] if tokens < SMALL_TEXT else []
    skipped, kept = manifest["skipped_documents"], sum(shard["documents"] for shard in manifest["shards"])
    print(f"skipped: {skipped:,} documents that are empty")
    print(f"next:  {command_line('train.py', *preset, '--data_dir', args.out_dir)}")
    if preset and manifest["tokenizer"] == "gpt2":  # the tokens of OpenAI's weights
        print(f"or:    {command_line('train.py', '--preset', 'finetune', '--data_dir', args.out_dir)}")
    if skipped > kept:
        print(
            f"warning: {skipped:,} of {skipped + kept:,} documents are empty or null: "
            f"is --text_column {args.text_column} the right one?"
        )


def explain_interruption(error: BaseException, args: argparse.Namespace) -> str | None:
    """Return what to do after Ctrl-C, or None for any other error."""
    return "interrupted: rerun the same command to continue" if isinstance(error, KeyboardInterrupt) else None


if __name__ == "__main__":
    run(main, parse_args, explain_interruption, needs_output=False)
