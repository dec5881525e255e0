"""Shards of tokens and their manifests, read. fineweb.py writes them."""

import hashlib
import json
import struct
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from corpus.inputs import Input, files_in
from runtime.cli import command_line
from runtime.files import check_types, parsing

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
NEWER_TYPES = {"contents": list, "splits_each_file": bool}  # which older versions lack
CONTENT_TYPES = {"size": int, "modified_ns": int, "sha256": str}  # of `corpus.inputs.content_of`
SHARD_TYPES = ({"name": str, "tokens": int}, {"documents": int, "sha256": str, "next": list | None})
NEWER_SHARD_TYPES = {"skipped": int}  # documents before its end; older versions lack it
SINGLE_TASK = {"task_index": 0, "task_count": 1}
MOST_OPEN = 256  # shards of a split, at a time
RETRY_S = (1, 5, 25, 125)  # delays after which a shard that cannot be read is tried again


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
            check_types(manifest, MANIFEST_TYPES[0], MANIFEST_TYPES[1] | NEWER_TYPES)
            for content in manifest.get("contents", []):
                check_types(content, CONTENT_TYPES)
            if not 0 < manifest.get("vocab_size", 1) <= 2**16 or not 0 < manifest.get("shard_size", 1):
                raise ValueError("its sizes are out of range")
            for shard in manifest["shards"]:
                check_types(shard, SHARD_TYPES[0], SHARD_TYPES[1] | NEWER_SHARD_TYPES)
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


def find_shards(data_dir: Path, split: str, manifest: dict) -> list[Path]:
    """Return the shards of a split, sorted by name; `manifest` is the result of `read_manifest`.

    If it lists shards, the .npy files of the folder have to be exactly those. If not, they are all those with
    the split in their name. Raises FileNotFoundError if there are none, and ValueError for a `data_dir` that
    is a file, or if files are missing, not listed, or named after both splits.
    """
    if data_dir.is_file():
        if data_dir.suffix == ".npy":
            raise ValueError(f"{data_dir} is a file: use --data_dir {data_dir.parent}")
        command = command_line("fineweb.py", "--files", data_dir, "--out_dir", "shards")
        raise ValueError(
            f"{data_dir} is a file: make shards from it with `{command}`, then use --data_dir shards"
        )
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
        if texts := files_in(data_dir):
            shards = data_dir / "shards"
            command = command_line("fineweb.py", "--files", data_dir, "--out_dir", shards)
            raise FileNotFoundError(
                f"no {split} shards in {data_dir}/, but {Path(texts[0]).name}: make shards with `{command}`, "
                f"then use --data_dir {shards}"
            )
        text = command_line("fineweb.py", "--files", "input.txt", "--out_dir", data_dir)
        command = command_line("fineweb.py", "--out_dir", data_dir)
        where = f"no {split} shards in {data_dir}/" if data_dir.exists() else f"there is no folder {data_dir}"
        raise FileNotFoundError(
            f"{where}: `{text}` makes shards from a text, `{command}` from FineWeb-Edu (28 GB), and `python "
            "train.py --preset demo` needs none"
        )
    return paths


def read_set(data_dir: str | Path, tokenizer: str | None) -> dict:
    """Return the manifest of a folder that holds shards of both splits.

    It always has their `tokenizer` and `train_tokens`, estimated from file sizes. Raises FileNotFoundError if
    there are none, and ValueError if they were made with another tokenizer.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    find_shards(data_dir, "val", manifest)
    train_bytes = sum(path.stat().st_size for path in find_shards(data_dir, "train", manifest))
    made_with = manifest.get("tokenizer", tokenizer or "gpt2")
    if tokenizer not in (None, made_with):
        raise ValueError(
            f"--tokenizer is {tokenizer}, but the shards in {data_dir} were made with {made_with}: "
            "omit --tokenizer or make other shards"
        )
    return {**manifest, "tokenizer": made_with, "train_tokens": train_bytes // 2}


class Shards:
    """The shards of one split, whose tokens are read from their files when they are asked for.

    They are not mapped into memory, where a file that is cut short or a network drive that fails would kill
    the process without a word. `lengths` are their numbers of tokens, `fingerprints` tell them apart, and
    `digest` tells sets apart. `source` is that of the manifest. Warnings go to `say`. Raises
    FileNotFoundError if there are no shards, and ValueError for one that is damaged.
    """

    def __init__(self, data_dir: str | Path, split: str, say: Callable[[str], None] = print):
        manifest, self.say = read_manifest(Path(data_dir)), say
        self.paths = find_shards(Path(data_dir), split, manifest)
        listed = {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
        # Each holds a file descriptor, through which the shard stays readable if it is deleted.
        self.files = lru_cache(MOST_OPEN)(open_shard)
        self.source = manifest.get("source", {})
        self.lengths, self.fingerprints, digest = [], [], hashlib.sha256()
        for path in self.paths:
            tokens = self.files(path)
            if len(tokens) != listed.get(path.name, len(tokens)):
                expected = f"its manifest says {listed[path.name]}"
                raise ValueError(f"{path} has {len(tokens)} tokens, but {expected}: make it again")
            self.lengths.append(len(tokens))
            self.fingerprints.append(fingerprint(tokens))
            digest.update(path.name.encode() + self.fingerprints[-1])
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
    if isinstance(found, list) and isinstance(wanted, list):  # the files' names, sizes and more
        found, wanted = (" ".join(map(str, each)) for each in (found, wanted))
    return f"{name} {found}, not {wanted}"


def shuffled(index: int, n: int, seed: int, epoch: int) -> int:
    """Return the index-th element of a permutation of range(n) that is drawn from (seed, epoch).

    A Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains")
    computes elements one by one, so that an epoch of any length starts at once and takes no memory.
    """
    bits = max((n - 1).bit_length() + 1, 2) // 2  # of each half
    while True:
        left, right = index >> bits, index & ((1 << bits) - 1)
        for round_number in range(4):
            key = struct.pack("<qqqq", seed, epoch, round_number, right)
            mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            left, right = right, left ^ (mixed & ((1 << bits) - 1))
        index = left << bits | right
        if index < n:
            return index
