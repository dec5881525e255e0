"""Draw the curves of one or more runs from their log.jsonl.

    python plot.py log                                            # writes log/loss.png
    python plot.py log --follow 30 --references                   # again every 30 s until the run has ended
    python plot.py log log.1 --against minutes --output runs.png  # compares runs, one color per run

Panels: training and validation loss, learning rate, gradient norm, tokens/s, and HellaSwag if a run has
scored it. The loss panel cuts off the high losses of the first tenth of a run.
"""

import argparse
import contextlib
import os
import time
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path

from runtime.cli import Range, check_options, run
from runtime.files import check_output, read_records, write_atomically

# The numbers of a record that are drawn, by its kind, and those that it may lack or that were not finite.
NEEDED = {"train": ("dt_ms", "tokens_per_s"), "hellaswag": ("acc", "acc_norm", "n")}
OPTIONAL = ("loss", "lr", "norm")
LARGEST = 1e15  # no run has larger numbers, and matplotlib cannot draw all that are
SMOOTHING_POINTS = 200  # a training curve is averaged down to about this many points
# What each training step adds on the horizontal axis.
AXES = {
    "step": lambda record: 1,
    "tokens": lambda record: record["tokens_per_s"] * record["dt_ms"] / 1000,
    "minutes": lambda record: record["dt_ms"] / 60000,
}
# Published for 124M weights, by the data that they were trained and measured on: losses on one set say
# nothing about the other. FineWeb-Edu: build-nanogpt's log, and OpenAI's GPT-2 as measured there
# (play.ipynb). FineWeb: the loss at which modded-nanogpt's runs end, and llm.c's discussion 481. HellaSwag is
# acc_norm.
REFERENCES = {
    "fineweb-edu": {
        "loss": {"build-nanogpt": 3.05, "GPT-2": 3.2924},
        "HellaSwag": {"GPT-2": 0.2955, "build-nanogpt": 0.304, "GPT-3": 0.337},
    },
    "fineweb": {
        "loss": {"modded-nanogpt": 3.28},
        "HellaSwag": {"GPT-2": 0.2955, "llm.c": 0.299, "GPT-3": 0.337},
    },
}


def read_log(source: str | Path) -> dict[str, list[dict]]:
    """Return the records of a run folder or log.jsonl by kind. Raises FileNotFoundError if there is none.

    Lines that are no records are left out: one may be half written, others damaged.
    """
    path = Path(source)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no log at {path}: use a folder that train.py wrote")
    by_kind: dict[str, list[dict]] = {}
    for record in filter(is_record, read_records(path)):
        by_kind.setdefault(record["kind"], []).append(record)
    return by_kind


def is_record(record: dict) -> bool:
    """Return whether a JSON object is a record of a run, with numbers where one is drawn."""

    def is_number(value: object, kinds: type = int | float) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < LARGEST

    kind = record.get("kind")
    return (
        isinstance(kind, str)
        and is_number(record.get("step"), int)
        and all(is_number(record.get(name)) for name in NEEDED.get(kind, ()))
        and all(record.get(name) is None or is_number(record[name]) for name in OPTIONAL)
    )


def curve(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one quantity, without records that lack it (skipped steps have no loss)."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def positions(steps: list[int], log: dict[str, list[dict]], against: str) -> list[float]:
    """Return the horizontal positions of steps: the sum of AXES[against] over the training steps before."""
    records = log.get("train", [])
    done = [record["step"] for record in records]
    sums = list(accumulate(map(AXES[against], records), initial=done[0] if done and against == "step" else 0))
    return [sums[bisect_left(done, step)] for step in steps]


def smooth(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average consecutive points down to about SMOOTHING_POINTS."""
    size = max(len(steps) // SMOOTHING_POINTS, 1)
    chunks = range(0, len(steps), size)
    return tuple(
        [sum(part[i : i + size]) / len(part[i : i + size]) for i in chunks] for part in (steps, values)
    )


def plot(
    folders: list[str | Path], output: str | Path, against: str = "step", references: str | None = None
) -> None:
    """Write one PNG with the curves of all runs and, for a set in REFERENCES, the published values.

    Raises ValueError if no run has a training step.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    logs = {os.path.relpath(folder): read_log(folder) for folder in folders}
    if not any(log.get("train") for log in logs.values()):
        raise ValueError(f"no training steps in {', '.join(logs)}: train first")
    panels = [
        ("loss", "nats per token", [("train", "loss"), ("val", "loss")]),
        ("learning rate", None, [("train", "lr")]),
        ("gradient norm", None, [("train", "norm")]),
        ("tokens/s", None, [("train", "tokens_per_s")]),
    ]
    if any(log.get("hellaswag") for log in logs.values()):
        panels.append(("HellaSwag", "acc_norm", [("hellaswag", "acc_norm")]))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, len(panels) - 1, height_ratios=(2, 1))
    places = [grid[0, :], *(grid[1, i] for i in range(len(panels) - 1))]
    for place, (title, unit, curves) in zip(places, panels, strict=True):
        axes = figure.add_subplot(place)
        axes.set(title=title, ylabel=unit, xlabel=against)
        axes.grid(alpha=0.3)
        if against == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        late = []  # values that the loss panel has to show
        for i, (folder, log) in enumerate(logs.items()):
            for kind, name in curves:
                steps, values = curve(log.get(kind, []), name)
                if not steps:
                    continue
                x = positions(steps, log, against)
                if kind == "train":
                    x, values = smooth(x, values)
                    axes.plot(x, values, color=f"C{i}", lw=1, label=f"{folder}: {kind}")
                else:
                    label = f"{folder}: {kind}, last {values[-1]:.4f}"
                    axes.plot(x, values, color=f"C{i}", marker="o", ms=4, ls="--", label=label)
                late += [value for at, value in zip(x, values, strict=True) if at >= x[-1] / 10]
        published = REFERENCES.get(references, {}).get(title, {})
        for name, value in published.items():
            axes.axhline(value, color="black", lw=1, ls=":")
            place = dict(transform=axes.get_yaxis_transform(), ha="right", fontsize="small")
            va = "top" if value == min(published.values()) else "bottom"  # the lines are close
            axes.text(0.99, value, f"published: {name} {value:.4g}", va=va, **place)
            late.append(value)
            axes.margins(y=0.12)
        if title in ("tokens/s", "gradient norm"):
            axes.set_ylim(bottom=0)
        if title == "loss" and late:
            room = 0.05 * (max(late) - min(late)) or 0.05
            axes.set_ylim(min(late) - room, max(late) + room)
            axes.legend(fontsize="small")
    write_atomically(Path(output), lambda file: figure.savefig(file, dpi=110, format="png"))


def has_ended(log: dict[str, list[dict]]) -> bool:
    """Return whether a run has ended; one that died or was stopped by a signal may still be resumed."""
    return "end" in log


def has_begun(source: str | Path) -> bool:
    """Return whether a run has logged its first step."""
    try:
        return "train" in read_log(source)
    except FileNotFoundError:
        return False


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", help="run folders or log.jsonl files")
    add("--output", help="PNG to write (default: loss.png in the first folder)")
    add("--against", choices=AXES, default="step", help="horizontal axis; minutes exclude evaluations")
    help = "draw published values of the 124M model: of FineWeb-Edu, or on fineweb (None: none)"
    add("--references", nargs="?", choices=REFERENCES, const="fineweb-edu", help=help)
    add("--follow", type=Range(float, 0), default=0, help="redraw every N seconds until all end (0: once)")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    first = Path(args.runs[0])
    output = args.output or (first if first.is_dir() else first.parent) / "loss.png"
    check_output(output)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            begun = [folder for folder in args.runs if not args.follow or has_begun(folder)]
            all_ended = begun == args.runs and all(has_ended(read_log(folder)) for folder in begun)
            if begun:
                plot(begun, output, args.against, args.references)
            print(f"wrote {output}" if begun else "waiting for the first step", flush=True)
            if all_ended or not args.follow:
                break
            time.sleep(args.follow)


if __name__ == "__main__":
    run(main, parse_args)
