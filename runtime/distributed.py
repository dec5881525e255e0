"""Ranks: joining and leaving torchrun's process group, and agreeing on sums, errors and signals."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from runtime.cli import USER_ERRORS, error_lines
from runtime.hardware import choose_device

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
        """Sum each value over the ranks in float64. A collective: every rank has to call it."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def union(self, lines: list[str]) -> list[str]:
        """Return the distinct lines of all ranks, in the same order on every rank. A collective."""
        gathered = [lines]
        if self.world_size > 1:
            gathered = [[] for _ in range(self.world_size)]
            torch.distributed.all_gather_object(gathered, lines)
        return list(dict.fromkeys(line for lines in gathered for line in lines))

    def check_same(self, value: object, message: str) -> None:
        """Raise ValueError with the message and all values if the ranks have different ones. A collective."""
        if len(values := self.union([str(value)])) > 1:
            raise ValueError(f"{message} ({'; '.join(values)})")

    def leave(self) -> None:
        """Leave the process group. A collective."""
        if self.world_size > 1:
            # A gloo thread may need the interpreter lock to free a tensor, while destroy_process_group holds
            # the lock and waits for that thread: a deadlock, seen in tests. The barrier lets the thread
            # finish.
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def leave_with_error(self, message: str) -> BaseException:
        """Leave the process group and return the exception to raise for an error that all ranks have found.

        The main rank reports the message; the others only exit. A collective.
        """
        self.leave()
        return ValueError(message) if self.is_main else SystemExit(1)


def setup_distributed(device: str) -> Distributed:
    """Join torchrun's process group if there is one: with nccl on GPUs, gloo on CPUs.

    Raises ValueError if this machine lacks the device or has fewer GPUs than ranks.
    """
    device = choose_device(device)
    if "RANK" not in os.environ:
        return Distributed(rank=0, world_size=1, device=device)
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, single_node = None, os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if single_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # All restarts of torchrun share one store, where a new rank may find the address of a dead one
        # (pytorch/pytorch#135712). A prefix per restart separates them. Each node counts its own restarts, so
        # this works on a single node only.
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = torch.distributed.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return Distributed(rank, world_size, device)


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
        """Exchange problems between the ranks and return whether there are none. A collective."""
        self.lines = self.dist.union(self.lines)
        return not self.lines

    def raise_all(self) -> None:
        """End every rank if any has problems: the main one with a ValueError that lists all. A collective."""
        if not self.none_on_any_rank():
            raise self.dist.leave_with_error("\n".join(self.lines))


class StopSignal:
    """True once SIGTERM or SIGINT has arrived; a second one ends the process at once."""

    def __init__(self):
        self.arrived = None
        self.before = {each: signal.signal(each, self._handle) for each in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame) -> None:
        if self.arrived is None:
            self.arrived = time.monotonic()
        elif time.monotonic() - self.arrived > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __bool__(self) -> bool:
        return self.arrived is not None

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
