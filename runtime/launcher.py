"""What torchrun or another launcher of ranks sets in the environment, read in this file only."""

import contextlib
import json
import os
import time
from dataclasses import dataclass

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADVICE = "start several processes with torchrun, or unset WORLD_SIZE for a single one"


@dataclass(frozen=True)
class Launcher:
    """The place of this process among those that a launcher has started; by default it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int = 1
    address: str | None = None  # where ranks meet; None if there is nobody to meet
    port: int = 0
    shares_store: bool = False  # torchrun serves a store, through all restarts
    restart: int = 0
    ignored: str = ""  # a line for the user about a variable that has no effect


def read_launcher() -> Launcher:
    """Return what a launcher has set. Raises ValueError if that does not suffice to join the other ranks.

    Some clusters and notebooks set RANK=0, WORLD_SIZE=1 or LOCAL_RANK for every process: these alone have no
    effect.
    """
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if "WORLD_SIZE" not in missing:
        rank, world_size = read_number("RANK", 0), read_number("WORLD_SIZE")
        if missing and world_size > 1:
            raise ValueError(f"WORLD_SIZE is {world_size} without {', '.join(missing)}: {ADVICE}")
        if rank >= world_size:
            raise ValueError(f"RANK is {rank}, which is not less than WORLD_SIZE, {world_size}: {ADVICE}")
    if missing:
        ignored = f"RANK is ignored without {', '.join(missing)}: this is a single process"
        return Launcher(ignored="" if "RANK" in missing else ignored)
    return Launcher(
        rank=rank,
        world_size=world_size,
        local_rank=read_number("LOCAL_RANK"),
        local_world_size=read_number("LOCAL_WORLD_SIZE") or 1,
        address=os.environ["MASTER_ADDR"],
        port=read_number("MASTER_PORT"),
        shares_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart=read_number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def read_number(name: str, default: int | None = None) -> int | None:
    """Return a variable as a number, or the default if it is not set or empty."""
    text = os.environ.get(name)
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name} is {text}, which is not a number of at least 0: {ADVICE}")
    return int(text)


def is_first_rank() -> bool:
    """Return whether this is rank 0 or a single process. Unlike `read_launcher`, never raises."""
    return os.environ.get("RANK", "0") == "0"


def environment_of_helpers() -> dict[str, str]:
    """Return the environment for a command that a rank starts: its errors are not those of the rank."""
    return {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_ERROR_FILE"}


def tell_torchrun(message: str) -> bool:
    """Write an error to the file whose text ends torchrun's own report. Returns whether there is one.

    A rank cannot keep torchrun from printing that report, some ten lines a rank, after the error.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    error = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump({"message": error}, file)
    return True
