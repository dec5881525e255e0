"""Files and folders are complete or absent."""

import contextlib
import errno
import hashlib
import os
import socket
from pathlib import Path

import pytest
from conftest import FORKED

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
    Path("link").symlink_to("out")
    with pytest.raises(KeyError), files.whole_folder("link") as partial:
        (partial / "half").touch()
        raise KeyError
    assert not any(Path("out").iterdir())
    before = os.stat("out")
    with files.whole_folder("link") as partial:
        (partial / "whole").touch()
        (partial / "folder").mkdir()
        assert not Path("out/whole").exists()
    assert {path.name for path in Path("out").iterdir()} == {"whole", "folder"}
    assert os.path.samestat(before, os.stat("out"))  # which may be a mount point
    Path("here/lost+found").mkdir(parents=True)
    with contextlib.chdir("here"), files.whole_folder(".") as partial:
        (partial / "whole").touch()
    assert Path("here/whole").exists() and not Path("here/.tmp").exists()
    with pytest.raises(ValueError, match="out exists and is not empty"), files.whole_folder("out"):
        pass
    Path("file").touch()
    with pytest.raises(ValueError, match="file exists"), files.whole_folder("file"):
        pass
    assert not Path("out.tmp").exists()


def hold_lock(folder: str, ready, end) -> None:
    lock = files.FolderLock(Path(folder))
    lock.acquire()
    ready.set()
    end.wait()


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked a folder."""
    ready, end = FORKED.Event(), FORKED.Event()
    process = FORKED.Process(target=hold_lock, args=(str(tmp_path), ready, end), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()


def test_locked_folder_is_refused_with_its_holder_until_that_is_killed(holder, tmp_path):
    lock = files.FolderLock(tmp_path)
    for _ in range(2):
        message = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}, since 20.*: wait"
        with pytest.raises(ValueError, match=message):
            lock.acquire()
        assert not lock.is_held()
    files.FolderLock(tmp_path, ".lock_0001_of_0002").acquire()  # another task
    holder.kill()
    holder.join()
    lock.acquire()  # no file had to be deleted
    assert lock.is_held() and f"process {os.getpid()} on " in Path(tmp_path, ".lock").read_text()


def test_lock_belongs_to_the_folder_that_has_the_name(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    first, second = files.FolderLock(folder), files.FolderLock(folder)
    first.acquire()
    folder.rename(tmp_path / "old")
    assert not first.is_held()
    folder.mkdir()
    second.acquire()
    first.release()  # leaves the lock of the second alone
    assert second.is_held()
    second.release()
    assert list(folder.iterdir()) == []
    first.acquire()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        second.acquire()


def test_lock_that_is_removed_while_it_is_awaited_is_taken_again(tmp_path, monkeypatch):
    first, second, flock = files.FolderLock(tmp_path), files.FolderLock(tmp_path), files.fcntl.flock
    first.acquire()

    def flocks(file, how):
        first.release()  # after the second one has opened the file that is removed now
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flocks)
    second.acquire()
    assert second.is_held() and (tmp_path / ".lock").exists()


def test_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", fails)
    lock = files.FolderLock(tmp_path)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: make sure that no other"):
        lock.acquire()
    assert lock.is_held()


def test_folder_that_stays_empty_is_removed(tmp_path):
    for name, exists_before in (("new", False), ("old", True)):
        folder = tmp_path / name
        if exists_before:
            folder.mkdir()
        with pytest.raises(KeyError), files.locked_folder(folder, ".lock"):
            raise KeyError
        assert folder.exists() == exists_before
    with files.locked_folder(tmp_path / "filled", ".lock"):
        (tmp_path / "filled" / "file").touch()
    assert [path.name for path in (tmp_path / "filled").iterdir()] == ["file"]


@pytest.mark.parametrize("check", [files.check_output, files.check_folder])
@pytest.mark.parametrize(
    "path, code",
    [("file/below", errno.ENOTDIR), ("x" * 300, errno.ENAMETOOLONG), ("folder", errno.EISDIR), ("ok", None)],
)
def test_outputs_are_checked_before_the_work(check, path, code):
    Path("file").touch()
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    code = None if check is files.check_folder and path == "folder" else code
    try:
        check(Path(path))
    except OSError as error:
        assert error.errno == code
    else:
        assert code is None
    assert sorted(Path().rglob("*")) == before
    Path("ok.tmp").write_text("of another command")
    files.check_output("ok")
    assert Path("ok.tmp").read_text() == "of another command"


def test_whatever_a_parser_raises_is_one_line_but_errors_of_the_system_stay():
    for error in (KeyError("a"), RecursionError("x\ny"), ZeroDivisionError(), RuntimeError("z " * 999)):
        with pytest.raises(ValueError, match="^f.x is damaged or not a y .*: do z$") as caught:
            with files.parsing("f.x", "a y", "do z"):
                raise error
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    for error in (OSError(5, "a"), MemoryError()):
        with pytest.raises(type(error)), files.parsing("f.x", "a y", "do z"):
            raise error


def test_release_never_replaces_the_error_of_the_work(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(KeyError), files.locked_folder(tmp_path, ".lock"):
        monkeypatch.setattr(os, "stat", fails)
        raise KeyError
    monkeypatch.undo()
    Path(tmp_path, ".lock").write_bytes(b"\xff\xfe")
    assert os.stat(tmp_path / ".lock").st_mode & 0o777 == 0o666  # for other users, after a kill
    lock = files.FolderLock(tmp_path)
    lock.acquire()
    Path(tmp_path, ".lock").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is in use by .*: wait"):
        files.FolderLock(tmp_path).acquire()
