"""Draw the curves of one or more runs from their log.jsonl.

    python plot.py log                                  # writes log/loss.png
    python plot.py log log.1 log.2 --output runs.png    # compared, one colour a run

Panels: training and validation loss, learning rate, gradient norm, tokens/s, and HellaSwag where a run scored
it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

SMOOTHING_POINTS = 200  # a training curve is averaged down to about this many points


def read_log(run: str | Path) -> dict[str, list[dict]]:
    """Records of a run folder (or a log.jsonl) by kind. Raises FileNotFoundError where there is no log."""
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no log at {path}: give a folder that train.py wrote")
    records: dict[str, list[dict]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)
        except (ValueError, KeyError, TypeError):
            continue  # the run is writing this line, or was killed while it did
    return records


def curve(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity; records without it (a skipped step has no loss) are left out."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """Averages of consecutive points, about SMOOTHING_POINTS of them."""
    size = max(len(steps) // SMOOTHING_POINTS, 1)
    chunks = range(0, len(steps), size)
    return tuple(
        [sum(part[i : i + size]) / len(part[i : i + size]) for i in chunks] for part in (steps, values)
    )


def plot(runs: list[str | Path], output: str | Path) -> None:
    """Write one PNG with every run's curves against steps. Raises ValueError when no run has a training
    step."""
    from matplotlib.figure import Figure

    logs = {os.path.relpath(run): read_log(run) for run in runs}
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
        axes.set(title=title, ylabel=unit, xlabel="step")
        axes.grid(alpha=0.3)
        for i, (run, log) in enumerate(logs.items()):
            for kind, name in curves:
                steps, values = curve(log.get(kind, []), name)
                if not steps:
                    continue
                if kind == "train":
                    axes.plot(*smooth(steps, values), color=f"C{i}", lw=1, label=f"{run}: {kind}")
                else:
                    label = f"{run}: {kind}, last {values[-1]:.4f}"
                    axes.plot(steps, values, color=f"C{i}", marker="o", ms=4, ls="--", label=label)
        if title in ("tokens/s", "gradient norm"):
            axes.set_ylim(bottom=0)
        if title == "loss":
            axes.legend()
    partial = Path(f"{output}.tmp")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, output)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders or log.jsonl files")
    parser.add_argument(
        "--output", default=None, help="PNG to write; by default loss.png in the first folder"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    first = Path(args.runs[0])
    output = args.output or (first if first.is_dir() else first.parent) / "loss.png"
    plot(args.runs, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"plot.py: error: {error}")
