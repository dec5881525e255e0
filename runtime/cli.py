"""What the command lines of all scripts share: options with a range, and errors that are one line."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path


class Range:
    """An argparse type: a number of type `kind` within bounds.

    Parsing only converts. `out_of_range` checks the bounds afterwards, so that all bad options are reported
    together and defaults and presets are checked as well.
    """

    def __init__(
        self,
        kind: Callable[[str], object],
        least: float = -math.inf,
        most: float = math.inf,
        *,
        above: float = -math.inf,
        below: float = math.inf,
    ):
        self.kind, self.least, self.most, self.above, self.below = kind, least, most, above, below
        self.__name__ = kind.__name__  # argparse quotes it for text that is not a number

    def __call__(self, text: str) -> object:
        return self.kind(text)

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.least, "at most": self.most, "more than": self.above}
        bounds["less than"] = self.below
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items() if math.isfinite(bound))


def count(text: str) -> int:
    """Convert a whole number as people write it: 100000000, 100_000_000 or 1e8."""
    number = float(text)
    if number != int(number):
        raise ValueError(f"{text} is not a whole number")
    return int(number)


def out_of_range(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Return a line for each option whose value is outside the `Range` that it was declared with."""
    return [
        f"--{action.dest} is {value}: use {action.type}"
        for action in parser._actions
        if isinstance(action.type, Range)
        and isinstance(value := getattr(args, action.dest), int | float)
        and value not in action.type
    ]


def run(
    main: Callable[[argparse.Namespace], None],
    parse_args: Callable[[], argparse.Namespace],
    explain: Callable[[BaseException, argparse.Namespace], str | None] = lambda error, args: None,
) -> None:
    """Run a script. What its user can fix ends it with one line per problem and exit status 1.

    `explain` returns the line for a RuntimeError or KeyboardInterrupt that deserves one, or else None.
    """
    try:
        args = parse_args()
        try:
            main(args)
        except (RuntimeError, KeyboardInterrupt) as error:
            if not (message := explain(error, args)):
                raise
            raise ValueError(message) from error
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        script = Path(sys.argv[0]).name
        sys.exit("\n".join(f"{script}: error: {line}" for line in str(error).splitlines()))
