"""Ranks: joining and leaving torchrun's process group, and agreeing on sums, errors and signals."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.cli import USER_ERRORS, error_lines
from runtime.launcher import Launcher, read_launcher
from runtime.machine import shared_memory

# Around the loop, ranks wait for rank 0: for a download, for the last checkpoint on a slow disk. In the loop,
# all of them work at the same pace, and a rank that hangs is paid for until this time has passed.
TIMEOUT, STEP_TIMEOUT = timedelta(hours=2), timedelta(minutes=10)
NCCL_SHARED_BYTES = 1e9  # NCCL's documentation, Troubleshooting, "Docker"
SECOND_THREAD_S = 0.3  # far more than it takes to free a tensor, also on a machine that is busy
SAME_SIGNAL_S = 1.0  # torchrun repeats a signal that a terminal or Slurm has already sent to every process


@dataclass(frozen=True)
class Distributed:
    """The place of this process among the ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, on the main rank only."""
        if self.is_main:
            tqdm.write(text)

    def sum(self, *values: float) -> list[float]:
        """Sum each value over the ranks in float64. Every rank has to call this."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def any(self, value: object) -> bool:
        """Return whether a value is true on any rank. Every rank has to call this."""
        (ranks,) = self.sum(bool(value))
        return ranks > 0

    def union(self, lines: list[str]) -> list[str]:
        """Return the distinct lines of all ranks, in the same order. Every rank has to call this."""
        gathered = [lines]
        if self.world_size > 1:
            gathered = [[] for _ in range(self.world_size)]
            torch.distributed.all_gather_object(gathered, lines)
        return list(dict.fromkeys(line for lines in gathered for line in lines))

    def check_same(self, value: object, message: str) -> None:
        """Raise ValueError with the message and all values if the ranks have different ones.

        Every rank has to call this.
        """
        if len(values := self.union([str(value)])) > 1:
            raise ValueError(f"{message} ({'; '.join(values)})")

    def leave(self) -> None:
        """Leave the process group, if there is one. Every rank has to call this."""
        if torch.distributed.is_initialized():
            # A gloo thread needs the interpreter lock to free the tensors of a collective. If the group is
            # freed meanwhile, which holds the lock and waits for that thread, both wait for ever: seen in
            # tests. The barrier lets the thread finish, and `work` keeps it from freeing the barrier itself.
            # The group has a second thread, which may still be freeing an earlier collective: sleeping gives
            # it the lock.
            work = torch.distributed.barrier(async_op=True)
            work.wait()
            time.sleep(SECOND_THREAD_S)
            torch.distributed.destroy_process_group()

    def leave_with_error(self, message: str) -> BaseException:
        """Leave the process group and return the exception to raise for an error that all ranks have found.

        The main rank reports the message; the others only exit. Every rank has to call this.
        """
        self.leave()
        return ValueError(message) if self.is_main else SystemExit(1)


def setup_distributed(device: torch.device) -> Distributed:
    """Join torchrun's process group if there is one: with nccl on GPUs, gloo on CPUs.

    `device` is that of this rank (`hardware.choose_device`); ranks that have no GPU use the CPU. Raises
    ValueError if the launcher's variables contradict each other. Prints a line about one without effect, and
    on each node one about too little shared memory.
    """
    launcher = read_launcher()
    if launcher.address is None:
        if launcher.ignored:
            tqdm.write(launcher.ignored)
        return Distributed(rank=0, world_size=1, device=device)
    on_gpu = device.type == "cuda"
    if on_gpu and launcher.local_world_size > 1 and not launcher.local_rank:
        if (shared := shared_memory()) < NCCL_SHARED_BYTES:  # without enough, NCCL fails to start
            size, options = tqdm.format_sizeof(shared, "B"), "--ipc=host or --shm-size=1g"
            tqdm.write(f"warning: /dev/shm has {size}, and NCCL may need 1 GB: start docker with {options}")
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=fresh_store(launcher),
        rank=launcher.rank,
        world_size=launcher.world_size,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    return Distributed(launcher.rank, launcher.world_size, device if on_gpu else torch.device("cpu"))


@contextlib.contextmanager
def no_hangs(dist: Distributed, progress) -> Iterator[None]:
    """In a block of training steps, end this rank if it waits for the others for longer than STEP_TIMEOUT.

    HANG_TIMEOUT_S, in seconds, replaces that time. A line names `progress.step` and the collective. gloo
    raises an error. NCCL aborts the process instead, so there a thread prints the line.
    """
    if dist.world_size == 1:
        yield
        return
    limit = STEP_TIMEOUT
    if seconds := os.environ.get("HANG_TIMEOUT_S"):
        if not seconds.isdecimal() or int(seconds) == 0:
            raise ValueError(f"HANG_TIMEOUT_S is {seconds}: set it to seconds, such as 600")
        limit = timedelta(seconds=int(seconds))
    torch.distributed.distributed_c10d._set_pg_timeout(limit)
    ended = threading.Event()
    if dist.device.type == "cuda":
        words = dist.rank, progress, limit.total_seconds(), threading.get_ident(), ended
        threading.Thread(target=name_hang, args=words, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        where = innermost(traceback.extract_tb(error.__traceback__))
        reason = str(error).split("]")[-1].strip()
        raise ConnectionError(
            f"rank {dist.rank}: step {progress.step} failed in {where}, because another rank hangs or has "
            f"ended ({reason}): see what the others say, then repeat the command with --resume"
        ) from error
    finally:
        ended.set()
    torch.distributed.distributed_c10d._set_pg_timeout(TIMEOUT)


def name_hang(rank: int, progress, limit_s: float, thread: int, ended: threading.Event) -> None:
    """Print a line when `progress.step` has not changed for `limit_s`, with what that thread is doing."""
    step, since = progress.step, time.monotonic()
    while not ended.wait(min(limit_s / 10, 1.0)):
        if progress.step != step:
            step, since = progress.step, time.monotonic()
        elif time.monotonic() - since > limit_s:
            where = innermost(traceback.extract_stack(sys._current_frames()[thread]))
            tqdm.write(
                f"rank {rank}: step {step} has taken {limit_s:.0f} s so far, in {where}: a rank may hang"
            )
            return


def innermost(stack: traceback.StackSummary) -> str:
    """Return the collective that a stack is in, if there is one, and the innermost line of this project."""
    calls = [each.name for each in stack if Path(each.filename).name == "distributed_c10d.py"]
    collective = next((f"{name}, " for name in reversed(calls) if name != "wrapper"), "")
    folders = Path(__file__).parent.parent, Path(__file__).parent
    ours = [each for each in stack if Path(each.filename).parent in folders]
    return f"{collective}{Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line}"


def fresh_store(launcher: Launcher) -> torch.distributed.Store | None:
    """Return a store that no earlier restart of torchrun has used, or None to use torchrun's own.

    All restarts share torchrun's store, where a new rank may find the address of a dead one
    (pytorch/pytorch#135712) and NCCL the errors of a dead group. So the first rank opens another store and
    publishes its port in torchrun's. Each node counts its own restarts, so this works on a single node only.
    """
    if launcher.local_world_size != launcher.world_size or not launcher.shares_store:
        return None
    shared = torch.distributed.TCPStore(launcher.address, launcher.port)
    key, is_first = f"port of restart {launcher.restart}", launcher.rank == 0
    port = 0 if is_first else int(shared.get(key))
    store = torch.distributed.TCPStore(launcher.address, port, is_master=is_first, wait_for_workers=False)
    if is_first:
        shared.set(key, str(store.port))
    return store


class Problems:
    """What is wrong with a command, collected so that everything is reported at once and every rank ends."""

    def __init__(self, dist: Distributed):
        self.dist, self.lines = dist, []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Note an error that the user can fix, and continue."""
        try:
            yield
        except USER_ERRORS as error:
            self.lines += error_lines(error)

    def call(self, function: Callable, *args):
        """Return what the function returns, or None after noting its error."""
        with self.collect():
            return function(*args)

    def none_on_any_rank(self) -> bool:
        """Exchange problems and return whether no rank has any. Every rank has to call this."""
        if self.dist.any(self.lines):
            self.lines = self.dist.union(self.lines)
        return not self.lines

    def raise_all(self) -> None:
        """End every rank if any has problems: the main one with a ValueError that lists all.

        Every rank has to call this.
        """
        if not self.none_on_any_rank():
            raise self.dist.leave_with_error("\n".join(self.lines))


@contextlib.contextmanager
def together(dist: Distributed) -> Iterator[None]:
    """Run a block on every rank. An error of the user or machine on one of them ends all."""
    problems = Problems(dist)
    with problems.collect():
        yield
    problems.raise_all()


class OnOtherRanks:
    """Stands in for what only the main rank has: every method does nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **values: None


class Interrupted(Exception):
    """A signal has ended an evaluation: raised on all ranks, after a collective that told them."""


class StopSignal:
    """True once SIGTERM, SIGINT or the end of the terminal (SIGHUP) has arrived after `listen`; a second one
    ends the process at once.

    Under nohup, SIGHUP is ignored, but not under `nohup torchrun`: torchrun forwards it to its ranks unless
    its --signals_to_handle leaves it out (pytorch/pytorch#67538).
    """

    def __init__(self):
        self.arrived, self.before = None, {}

    def listen(self) -> None:
        """Handle the signals, until `restore`."""
        signals = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        self.before = {each: signal.signal(each, self._handle) for each in signals}

    def _handle(self, number: int, frame) -> None:
        if self.arrived is None:
            self.arrived = time.monotonic()
        elif time.monotonic() - self.arrived > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __bool__(self) -> bool:
        return self.arrived is not None

    def check(self, *_) -> None:
        """Raise Interrupted if a signal has arrived here; other ranks may not know of it."""
        if self:
            raise Interrupted

    def __enter__(self) -> "StopSignal":
        self.listen()
        return self

    def __exit__(self, *error) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
