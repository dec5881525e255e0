"""Files and folders are complete or absent."""

import hashlib
import os
from pathlib import Path

import pytest

from runtime import files


def test_failed_write_leaves_the_old_file_and_no_other(monkeypatch):
    path = Path("file.json")
    files.write_json(path, {"a": [1]})
    before = path.read_bytes()

    def fails(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, fails)
    assert list(Path().iterdir()) == [path] and path.read_bytes() == before

    def checked(*paths):
        assert synced and Path(paths[0]).read_bytes() == b"new" and path.read_bytes() == before
        replace(*paths)

    synced, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(number) or sync(number))
    monkeypatch.setattr(os, "replace", checked)
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert files.file_hash(path) == hashlib.sha256(b"new").hexdigest()


def test_folder_appears_when_it_is_complete_and_replaces_nothing():
    with pytest.raises(KeyError), files.whole_folder("out") as partial:
        (partial / "half").touch()
        raise KeyError
    assert not Path("out").exists()
    Path("out").mkdir()
    with files.whole_folder("out") as partial:
        (partial / "whole").touch()
        assert not any(Path("out").iterdir())
    assert [path.name for path in Path("out").iterdir()] == ["whole"]  # and nothing of the first try
    with pytest.raises(ValueError, match="out exists and is not empty"), files.whole_folder("out"):
        pass
    Path("file").touch()
    with pytest.raises(ValueError, match="file exists"), files.whole_folder("file"):
        pass
    assert not Path("out.tmp").exists()
