"""The files that a set of shards is made of: of this machine, of the Hugging Face Hub, of Python itself."""

import glob
import hashlib
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from runtime import hub
from runtime.cli import this_command
from runtime.files import file_hash

if TYPE_CHECKING:
    from datasets import DatasetBuilder

PATIENCE_S = 900  # of trying and waiting: a set may be made overnight
CONVERTED = "refs/convert/parquet"  # the branch for which the Hub converts datasets itself
SUFFIXES = (".txt", ".py", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
# Downloads that are made while one is read: a connection may be slower than the network, and a file of
# FineWeb-Edu takes 2 GB of disk.
AHEAD = 3
SMALL_FILE = 1_000_000  # bytes, which are hashed sooner than a thread starts
TOKEN_FILES = ".bin"  # of GPT-2's tokens, in llm.c's format


@dataclass(frozen=True)
class Input:
    """One file of documents: local or, with `repo` and `revision`, from a dataset on the Hub."""

    path: str
    size: int
    sha256: str | None = None
    repo: str | None = None
    revision: str | None = None


def check_format(path: str) -> None:
    """Raise ValueError for an unsupported file format."""
    if not path.endswith((*SUFFIXES, TOKEN_FILES)):
        supported = ", ".join((*SUFFIXES, f"{TOKEN_FILES} (tokens)"))
        raise ValueError(f"cannot read {path}: supported formats are {supported}")


def files_in(folder: str | Path) -> list[str]:
    """Return the files of documents in a folder, sorted by name, or else its token files."""
    paths = sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(str(folder)), "*"))))
    documents = [path for path in paths if path.endswith(SUFFIXES)]
    return documents or [path for path in paths if path.endswith(TOKEN_FILES)]


def first_names(names: list[str]) -> str:
    return ", ".join(names[:3] + ["…"] * (len(names) > 3))


def local_inputs(patterns: list[str]) -> list[Input]:
    """Return the files that match, sorted by name within each pattern, token files for validation first.

    A file that several patterns match counts once. A pattern may be a folder, but folders that a glob matches
    are skipped. Raises FileNotFoundError for a pattern that matches no file, and ValueError for an
    unsupported format.
    """
    paths: dict[str, str] = {}  # by the file that a path leads to
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if os.path.isdir(pattern):
            matches = files_in(pattern)
            names = [Path(path).name for path in matches]
            line = f"{pattern} is a folder: reading {len(names)} files in it: {first_names(names) or 'none'}"
            visible = {name for name in os.listdir(pattern) if not name.startswith(".")}
            if others := sorted(visible - set(names)):
                line += f"; skipping {first_names(others)}"
            tqdm.write(line)
        files = [path for path in matches if not os.path.isdir(path)]
        if not files:
            raise FileNotFoundError(f"no file matches {pattern!r}: check the path, or use 'FOLDER/**/*.txt'")
        if folders := len(matches) - len(files):
            tqdm.write(f"skipping {folders} folder(s) that match {pattern!r}")
        for path in files:
            paths.setdefault(os.path.realpath(path), path)
    for path in paths.values():
        check_format(path)
    return [Input(path, os.path.getsize(path)) for path in validation_first([*paths.values()])]


def hub_inputs(dataset: str, name: str | None) -> list[Input]:
    """Return the files of a dataset at its current revision: those of its `train` split, or its token files.

    If the Hub has only a script or formats that are not supported, the parquet files that it has made of them
    are used. The dataset may be a folder of this machine, and with HF_HUB_OFFLINE the files come from the
    local cache. Raises ValueError if there are none, and ConnectionError if the Hub cannot be reached.
    """
    if Path(dataset).is_dir():
        return folder_inputs(dataset, name)
    if Path(dataset).is_file():
        raise ValueError(f"{dataset} is a file: use --files")
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        where = dict(repo_type="dataset", local_files_only=True)
        folder = ask_hub(lambda: snapshot_download(dataset, **where), f"find {dataset} in the cache")
        return folder_inputs(folder, name)
    info = ask_hub(lambda: HfApi().dataset_info(dataset, timeout=hub.ANSWER_S), f"list {dataset}")
    paths = [file.rfilename for file in info.siblings]
    if tokens := [path for path in paths if path.endswith(TOKEN_FILES)]:
        return describe_files(dataset, info.sha, validation_first(sorted(tokens)))
    if f"{Path(dataset).name}.py" in paths:  # a script, which the datasets library no longer runs
        return converted_files(dataset, name)
    builder = ask_hub(lambda: load_dataset_builder(dataset, name), f"list {dataset}")
    files = train_files(builder, dataset)
    if not all(file.endswith(SUFFIXES) for file in files):
        return converted_files(dataset, builder.config.name)
    at = f"hf://datasets/{dataset}@"
    revision = files[0].removeprefix(at).split("/")[0]
    return describe_files(dataset, revision, [file.removeprefix(f"{at}{revision}/") for file in files])


def folder_inputs(folder: str, name: str | None) -> list[Input]:
    """Return the files of the `train` split of a dataset in a folder of this machine, without the Hub.

    Raises ValueError if the datasets library finds none.
    """
    from datasets import load_dataset_builder

    with tempfile.TemporaryDirectory() as cache:  # the library's own may be one that cannot be written
        try:
            builder = load_dataset_builder(folder, name, cache_dir=cache)
        except ValueError:  # about --name
            raise
        except Exception as error:  # of many kinds: a script, no files, a README.md that is not YAML
            reason = f"cannot read {folder} as a dataset ({hub.first_line(error)})"
            advice = "name its .parquet, .jsonl or .txt files with --files, or convert it to one of these"
            raise ValueError(f"{reason}: {advice}") from error
    return local_inputs([glob.escape(file) for file in train_files(builder, folder)])


def train_files(builder: "DatasetBuilder", dataset: str) -> list[str]:
    """Return the addresses of a dataset's `train` split. Raises ValueError if it has none."""
    config = builder.config
    if files := (config.data_files or {}).get("train"):
        return list(files)
    raise ValueError(f"{dataset} ({config.name}) has no train split: choose another --name")


def converted_files(dataset: str, config: str | None) -> list[Input]:
    """Return the parquet files that the Hub has made of the `train` split of a dataset in another format.

    Without a configuration, it is the default or only one. Raises ValueError if there are no such files.
    """
    from huggingface_hub import HfApi

    what = f"list the parquet files of {dataset}"
    info = ask_hub(lambda: HfApi().dataset_info(dataset, revision=CONVERTED, timeout=hub.ANSWER_S), what)
    found: dict[str, list[str]] = {}
    for path in sorted(file.rfilename for file in info.siblings):
        if match := re.fullmatch(r"([^/]+)/(partial-)?train/.*\.parquet", path):
            found.setdefault(match[1], []).append(path)
    if config is None and len(found) > 1 and "default" not in found:
        raise ValueError(f"{dataset} has several configurations: choose --name from {', '.join(found)}")
    if config is None:
        config = next(iter(found)) if len(found) == 1 else "default"
    if config not in found:
        raise ValueError(f"the Hub has no parquet files of {dataset} ({config}): download it and use --files")
    return describe_files(dataset, info.sha, found[config])


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


def ask_hub(call: Callable, what: str):
    """Return what `call` gets from the Hub; see `hub.retrying`."""
    advice = "check its name, HF_TOKEN and HF_HUB_OFFLINE, or use --files"
    return hub.retrying(call, what, f"{advice}; to continue: {this_command()}", PATIENCE_S)


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

    return ask_hub(fetch, f"download {source.path}")


def content_of(path: str) -> dict:
    """Return the size, time of change and hash of a file. Raises ValueError if it changes meanwhile."""
    status, digest = os.stat(path), file_hash(Path(path))
    size, time_ns = status.st_size, status.st_mtime_ns
    if (size, time_ns) != ((now := os.stat(path)).st_size, now.st_mtime_ns):
        raise ValueError(f"{path} changes while it is read: repeat the command with --no-resume")
    return {"size": size, "modified_ns": time_ns, "sha256": digest}


def check_content(path: str, before: dict) -> None:
    """Raise ValueError if a file no longer has the content that `content_of` returned before."""
    status = os.stat(path)
    if (status.st_size, status.st_mtime_ns) == (before["size"], before["modified_ns"]):
        return
    if file_hash(Path(path)) != before["sha256"]:
        raise ValueError(
            f"{path} has changed since shards were made of it: --no-resume makes the set again, another "
            "--out_dir keeps it"
        )


class Fetcher:
    """The inputs as local files; the next ones can be downloaded while one is being read.

    A file of this machine is also hashed when it is read. Downloads and the hashes of large files are made by
    daemon threads, so that no command waits for the end of one that it does not need.
    """

    def __init__(self, inputs: list[Input], folder: Path, keep: bool):
        self.inputs, self.folder, self.keep = inputs, folder, keep
        self.pending: dict[int, Future] = {}
        self.hashes: dict[int, Future] = {}

    def path(self, index: int) -> Path:
        if self.inputs[index].repo is None:
            self._hash(index)
            return Path(self.inputs[index].path)
        self._download(index)
        return self.pending[index].result()

    def _hash(self, index: int) -> Future:
        if index not in self.hashes:
            each = self.inputs[index]
            call = partial(content_of, each.path)
            if each.size > SMALL_FILE:
                self.hashes[index] = hub.started(call)
            else:
                self.hashes[index] = Future()
                self.hashes[index].set_result(call())
        return self.hashes[index]

    def contents(self, known: list[dict]) -> list[dict]:
        """Return `content_of` each local file up to the last one read; `known` are the first of them."""
        number = max(self.hashes, default=-1) + 1
        return known + [self._hash(index).result() for index in range(len(known), number)]

    def prefetch(self, index: int, end: int) -> None:
        """Start to download this input of the Hub and the AHEAD that follow it, except from `end` on."""
        for each in range(index, min(index + AHEAD + 1, end, len(self.inputs))):
            if self.inputs[each].repo:
                self._download(each)

    def _download(self, index: int) -> None:
        if index not in self.pending:
            self.pending[index] = hub.started(partial(download, self.inputs[index], self.folder))

    def release(self, before: int) -> None:
        """Delete the downloads before this input, whose tokens have been written."""
        for index in [index for index in self.pending if index < before and not self.keep]:
            # One that has failed was not needed after all.
            if self.pending[index].done() and not (future := self.pending.pop(index)).exception():
                future.result().unlink(missing_ok=True)


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
