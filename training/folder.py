"""The folder of a run, which one process at a time writes to."""

import contextlib
import errno
import itertools
import os
import tempfile
import threading
from pathlib import Path

from tqdm import tqdm

from runtime.files import FolderLock, check_folder

OF_A_RUN = ("model_*.pt*", "*.png", "tensorboard", "wandb", "report.html")  # besides log.jsonl


class RunFolder:
    """The folder of a run, which is locked while the run writes to it. `name` and `path` are what it is now.

    A run whose folder is deleted, moved or replaced continues in a new one, see `ensure`. At the end of a
    `with` block, its lock is released. A temporary one takes the place of `out_dir`, and is then removed,
    as is the folder that `scratch` makes.
    """

    def __init__(self, out_dir: str | Path, is_temporary: bool = False):
        self.temporary: list[tempfile.TemporaryDirectory] = []
        self.name = self.scratch() if is_temporary else str(out_dir)
        self.path = Path(self.name).resolve()  # of a link, the folder that it leads to
        self.lock, self.status, self.mutex = FolderLock(self.path), None, threading.Lock()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error) -> None:
        self.lock.release()
        for each in self.temporary:
            each.cleanup()

    def scratch(self) -> str:
        """Return a new folder that is removed at the end of the `with` block."""
        self.temporary.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        return self.temporary[-1].name

    def _acquire(self) -> None:
        """Create the folder if it does not exist, and lock it. Raises ValueError if it is in use."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.folder = self.path
        self.lock.acquire()
        self.status = os.stat(self.path)

    def check(self, data_dir: str, lock: bool) -> None:
        """Check that the folder can be that of a run, and `lock` it if it exists.

        It has to be writable, and must not contain what a new run, which renames it, would take away. Raises
        OSError if it cannot be written, and ValueError if another run uses it.
        """
        path = self.path
        if Path.cwd().is_relative_to(path):
            raise ValueError(f"--out_dir {self.name} contains the working directory: use another folder")
        if Path(data_dir).resolve().is_relative_to(path):
            raise ValueError(f"--out_dir {self.name} contains --data_dir: use another folder")
        check_folder(path)
        if lock and path.exists():
            self._acquire()

    def free_name(self, inside: bool = False) -> Path:
        """Return the folder's name with .1, .2, … appended, whichever is free first, beside or inside it."""
        parent = self.path if inside else self.path.parent
        names = (parent / f"{self.path.name}.{number}" for number in itertools.count(1))
        return next(path for path in names if not path.exists())

    def _set_aside(self) -> Path:
        """Rename the folder or, where it is a mount point, move its run into a folder inside it."""
        try:
            return self.path.rename(self.free_name())
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
        old = self.free_name(inside=True)
        old.mkdir()
        # The log comes last: without it, the next run sets aside what this one has left.
        found = [path for pattern in (*OF_A_RUN, "log.jsonl") for path in sorted(self.path.glob(pattern))]
        for path in found:
            path.rename(old / path.name)
        return old

    def begin(self, is_new: bool) -> None:
        """Create and lock the folder of a run. If a new one finds another run in it, that is renamed."""
        self._acquire()
        if is_new and ((self.path / "log.jsonl").exists() or any(self.path.glob("model_*.pt"))):
            if os.name == "nt":  # Windows does not rename folders with open files
                self.lock.release()
            old = self._set_aside()
            if old.parent == self.path.parent:
                self.lock.folder = old
            print(f"moved the run in {self.path} to {old} (--resume would have continued it)")
            self.lock.release()
            self._acquire()

    def nothing_to_resume(self) -> str:
        """Return the line that says so, and names the folder beside this one that has a checkpoint."""
        line = f"nothing to resume in {self.name}: starting a new run"
        if (self.path / "log.jsonl").exists():
            line += ", with the options of the one there, which has no checkpoint"
        with contextlib.suppress(OSError):  # another run may be deleting its checkpoints
            newest = max(self.path.parent.glob("*/model_*.pt"), key=os.path.getmtime, default=None)
            line += f" (there is one in {Path(self.name).with_name(newest.parent.name)})" if newest else ""
        return line

    def ensure(self) -> bool:
        """If the folder is gone, make it again; if there is another one in its place, use a free name.

        Return whether that has happened.
        """
        with self.mutex:
            if self.lock.is_held():
                return False
            if self.path.exists() and os.path.samestat(self.status, os.stat(self.path)):
                self._acquire()  # only the file of the lock was removed
                return False
            was = self.path
            if was.exists():
                self.path = self.free_name()
                self.name = str(self.path)
            tqdm.write(f"warning: {was} was deleted, moved or replaced: the run continues in {self.path}")
            self._acquire()
            return True
