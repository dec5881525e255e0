"""Draw the curves of one or more runs from their log.jsonl.

    python plot.py log                                            # writes log/loss.png
    python plot.py log --output report.html                       # interactive curves, samples, options
    python plot.py log --follow 30 --references                   # again every 30 s until the run has ended
    python plot.py log --references fineweb                       # where no manifest says that it is FineWeb
    python plot.py log log.1 --against minutes --output runs.png  # compares runs

Prints what each run is, how far it is, and whether it is normal: how its validation loss compares with the
published curve of GPT-2 (124M), if it does, and every warning. --references draws what is published, where it
can be compared with the runs, and says why the rest cannot. Panels: training and validation loss, learning
rates, gradient norm, tokens/s, and HellaSwag's items or others if a run has scored them. The loss panel cuts
off the high losses of the first tenth of a run. A report is one file of 5 MB that needs no network, because
plotly's code is in it.
"""

import argparse
import contextlib
import html
import os
import textwrap
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path

from diagnosis.published import CHANCE, REFERENCES, curve_points, items_of, name_of, unit_of, with_error
from diagnosis.watch import Watch
from runtime.cli import Parser, Range, check_options, user_path, watching
from runtime.cli import run as run_script
from runtime.files import check_output, write_atomically
from runtime.log import curves_of, is_number, read_log

SMOOTHING_POINTS = 200  # a training curve is averaged down to about this many points
TITLES = {"hellaswag": "HellaSwag"}  # other evaluations go by their names
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}  # of matplotlib, and of plotly
# What each training step adds on the horizontal axis.
AXES = {
    "step": lambda record: 1,
    "tokens": lambda record: record["tokens_per_s"] * record["dt_ms"] / 1000,
    "minutes": lambda record: record["dt_ms"] / 60000,
}


@dataclass(frozen=True)
class Logged:
    """A run as its log shows it; `watch` has seen the whole log."""

    log: dict[str, list[dict]]
    watch: Watch


Runs = dict[str, Logged]  # by their names
Curves = list[tuple[str, str]]  # the kind of the records, and the name of a number in them


@dataclass(frozen=True)
class Line:
    """A curve of a run, whose colour is that of the run's number. `errors` are standard errors, if known."""

    run: int
    kind: str
    label: str
    x: list[float]
    values: list[float]
    errors: list[float] | None
    dash: str  # of DASHES


def curve(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one quantity, without records that lack it (skipped steps have no loss)."""
    points = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def positions(steps: list[int], log: dict[str, list[dict]], against: str) -> list[float]:
    """Return the horizontal positions of steps: the sum of AXES[against] over the training steps before.

    The log of a branch begins at the step and with the tokens of the run that it comes from.
    """
    records = log.get("train", [])
    done = [record["step"] for record in records]
    tokens = log["run"][0].get("tokens") if log.get("run") else 0
    before = {"step": done[0] if done else 0, "tokens": tokens if is_number(tokens) else 0}
    sums = list(accumulate(map(AXES[against], records), initial=before.get(against, 0)))
    return [sums[bisect_left(done, step)] for step in steps]


def smooth(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average consecutive points down to about SMOOTHING_POINTS."""
    size = max(len(steps) // SMOOTHING_POINTS, 1)
    chunks = range(0, len(steps), size)
    return tuple(
        [sum(part[i : i + size]) / len(part[i : i + size]) for i in chunks] for part in (steps, values)
    )


def panels_of(runs: Runs) -> list[tuple[str, str | None, Curves]]:
    """Return title, unit and curves of each panel that the runs have data for."""
    panels = [
        ("loss", units_of(runs), [("train", "loss"), ("val", "loss")]),
        ("learning rate", None, [("train", "lr")]),
        ("gradient norm", None, [("train", "norm")]),
        ("tokens/s", None, [("train", "tokens_per_s")]),
    ]
    for kind, number in scores_of(runs).items():
        records = [record for run in runs.values() for record in run.log.get(kind, [])]
        names = dict.fromkeys(name_of(kind, record) for record in records)
        has_errors = any(f"{number}_stderr" in record for record in records)
        unit = f"{number} ± standard error" if has_errors else number
        panels.append((" and ".join(TITLES.get(name, name) for name in names), unit, [(kind, number)]))
    return panels


def scores_of(runs: Runs) -> dict[str, str]:
    """Return the number to draw of each kind of evaluation, besides validation, that a run has done."""
    logs = [run.log for run in runs.values()]
    names = {kind: name for log in logs for kind, name in curves_of(log).items() if kind != "val"}
    return {kind: name for kind, name in names.items() if any(log.get(kind) for log in logs)}


def units_of(runs: Runs) -> str:
    """Return the unit of the runs' losses, or all of them, as far as it is known."""
    tokenizers = [run.watch.history.options.get("tokenizer") for run in runs.values()]
    units = {unit_of(each) for each in tokenizers if each is not None}
    return " or ".join(sorted(units or {unit_of(None)}))


def lines_of(runs: Runs, curves: Curves, against: str) -> Iterator[Line]:
    """Yield the lines of a panel."""
    for i, (folder, run) in enumerate(runs.items()):
        for kind, name in curves:
            records = run.log.get(kind, [])
            lines = rates_of(records) if name == "lr" else {kind: curve(records, name)}
            errors = [max(error, 0) for error in curve(records, f"{name}_stderr")[1]]
            for (label, (steps, values)), dash in zip(lines.items(), cycle(DASHES)):
                x = positions(steps, run.log, against)
                x, values = smooth(x, values) if kind == "train" else (x, values)
                known = errors if len(errors) == len(values) else None
                if values:
                    yield Line(i, kind, f"{folder}: {label}", x, values, known, dash)


def rates_of(records: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the steps and learning rates of training, by the parameter groups that share them."""
    rates = [{**lrs, "step": r["step"]} for r in records if isinstance(lrs := r.get("lrs"), dict)]
    groups: dict[tuple, list[str]] = {}
    for name in dict.fromkeys(name for each in rates for name in each if name != "step"):
        steps, values = curve(rates, name)
        groups.setdefault((tuple(steps), tuple(values)), []).append(name)
    if len(groups) < 2:  # one rate for all, or an older log
        return {"train": curve(records, "lr")}
    return {", ".join(names): (list(steps), list(values)) for (steps, values), names in groups.items()}


def published_for(runs: Runs, curves: Curves) -> dict[str, float]:
    """Return the published values that may stand beside all runs that have these curves."""
    shown = [run for run in runs.values() if any(run.log.get(kind) for kind, _ in curves)]
    values = [run.watch.comparison.values(curves[-1][0]) for run in shown] or [{}]
    return {name: value for name, value in values[0].items() if all(name in each for each in values)}


def limits(lines: list[Line], published: list[float]) -> tuple[float, float]:
    """Return limits of the loss panel that show the lines from the first tenth on, and published values."""
    # The last point always counts, even where the positions of a damaged log are negative.
    late = list(published)
    for line in lines:
        first = min(line.x[-1], line.x[-1] / 10)
        late += [y for x, y in zip(line.x, line.values, strict=True) if x >= first]
    room = 0.05 * (max(late) - min(late)) or 0.05
    return min(late) - room, max(late) + room


def marks(curves: Curves, published: dict[str, float]) -> dict[str, float]:
    """Return the horizontal lines of a panel by their labels."""
    lines = {"chance 25%": CHANCE} if curves[-1][0] == "hellaswag" else {}
    return lines | {f"published: {name} {value:.4g}": value for name, value in published.items()}


def published_lines(
    runs: Runs, against: str, references: str | None
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Yield label and points of the published curve, as far as the runs that it can be compared with.

    Runs of the same length share one line, except on an axis of minutes, where each needs its own.
    """
    drawn = set()
    for run in runs.values() if references else ():
        comparison = run.watch.comparison
        if comparison.reason or not run.log.get("train"):
            continue
        steps = range(run.log["train"][-1]["step"] + 2)
        consumed = positions(steps, run.log, "tokens")
        tokens, losses = zip(*curve_points(comparison, consumed[-1]), strict=True)
        steps = [bisect_left(consumed, each - 1) for each in tokens]  # sums of floats are not exact
        x = list(tokens) if against == "tokens" else positions(steps, run.log, against)
        if (line := (tuple(x), losses)) not in drawn:
            drawn.add(line)
            yield f"published: {comparison.source}", x, list(losses)


def what_runs_are(runs: Runs, references: str | None) -> Iterator[str]:
    """Yield lines that say of each run what it is, how far it is, and whether it is normal."""
    for name, run in runs.items():
        refused = run.watch.comparison.lines() if references else []
        for line in (run.watch.about(has_ended(run.log)), *run.watch.lines(), *refused):
            yield f"{name}: {line}"
    if " or " in (units := units_of(runs)):
        yield f"losses of these runs do not compare: they are in {units}"


def short_name(folder: str | Path) -> str:
    """Return a path as seen from here; on Windows, another drive cannot be."""
    try:
        return os.path.relpath(folder)
    except ValueError:
        return str(folder)


def read_runs(folders: list[str | Path], references: str | None = None, wait: bool = False) -> Runs:
    """Read the logs of runs, or with `wait` of those that have logged a step.

    Raises ValueError if no run has a training step, and FileNotFoundError if one has no log.
    """
    runs = {}
    for folder in folders:
        with contextlib.suppress(FileNotFoundError) if wait else contextlib.nullcontext():
            log = read_log(folder)
            if "train" in log or not wait:
                known = None if references == "own" else references
                runs[short_name(folder)] = Logged(log, Watch.of_log(log, known))
    if not wait and not any("train" in run.log for run in runs.values()):
        raise ValueError(f"no training steps in {', '.join(runs)}: train first")
    return runs


def plot(runs: Runs, output: str | Path, against: str = "step", references: str | None = None) -> None:
    """Write one PNG with the curves of all runs and, with `references`, what is published beside them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    panels = panels_of(runs)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, len(panels) - 1, height_ratios=(2, 1))
    places = [grid[0, :], *(grid[1, i] for i in range(len(panels) - 1))]
    for place, (title, unit, curves) in zip(places, panels, strict=True):
        axes = figure.add_subplot(place)
        axes.set(title=title, ylabel=unit, xlabel=against)
        axes.grid(alpha=0.3)
        if against == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        lines = list(lines_of(runs, curves, against))
        for line in lines:
            style, label = dict(color=f"C{line.run}", lw=1, ls=line.dash), line.label
            if line.kind != "train":
                style |= dict(marker="o", ms=4, lw=1.5, ls="--")
                label = f"{label}, last {line.values[-1]:.4f}"
            axes.plot(line.x, line.values, label=label, **style)
            if line.errors:
                axes.errorbar(line.x, line.values, line.errors, fmt="none", capsize=2, ecolor=style["color"])
        for label, x, values in published_lines(runs, against, references) if title == "loss" else ():
            style = "-." if "estimated" in label else "-"
            axes.plot(x, values, color="black", lw=1, ls=style, label=label)
        published = published_for(runs, curves) if references else {}
        for label, value in marks(curves, published).items():
            axes.axhline(value, color="black", lw=1, ls=":")
            style = dict(transform=axes.get_yaxis_transform(), ha="right", fontsize="small")
            # The lines are close.
            va = "top" if value <= min(published.values(), default=value) else "bottom"
            axes.text(0.99, value, label, va=va, **style)
            axes.margins(y=0.12)
        if title in ("tokens/s", "gradient norm"):
            axes.set_ylim(bottom=0)
        if title == "loss" and lines:
            axes.set_ylim(*limits(lines, list(published.values())))
            axes.legend(fontsize="small")
        if any(line.dash != "-" for line in lines):
            labels = [textwrap.fill(line.label, 30) for line in lines]
            legend = axes.legend(labels=labels, fontsize="xx-small")
            legend.set_in_layout(False)  # a wide one would take the panel's place
    write_atomically(Path(output), lambda file: figure.savefig(file, dpi=110, format="png"))


REPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 1.5em auto; max-width: 1200px; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ text-align: left; padding: 0.2em 1.2em 0.2em 0; border-bottom: 1px solid #ddd }}
.samples {{ display: flex; gap: 1em; overflow-x: auto }}
.samples > div {{ flex: 0 0 22em; background: #f6f6f6; padding: 0 1em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def report(runs: Runs, output: str | Path, against: str = "step", references: str | None = None) -> None:
    """Write one HTML file that works offline: what the runs are, curves, results, samples and options."""
    body = [f"<p>{html.escape(line)}</p>" for line in what_runs_are(runs, references)]
    body += [curves_html(runs, against, references)]
    body += ["<h2>Results</h2>", table_html(results(runs, references))]
    for name, run in runs.items():
        if run.log.get("sample"):
            body += [f"<h2>Samples of {html.escape(name)}</h2>", samples_html(run.log)]
    body += ["<h2>Options and machine</h2>", table_html(about(runs))]
    page = REPORT.format(title=html.escape(", ".join(runs)), body="\n".join(body))
    write_atomically(Path(output), lambda file: file.write(page.encode(errors="replace")))


def curves_html(runs: Runs, against: str, references: str | None) -> str:
    """Return the curves as a part of a page, with plotly's code."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    panels = panels_of(runs)
    rows = 1 + len(panels) // 2
    places = [(1, 1), *((2 + i // 2, 1 + i % 2) for i in range(len(panels) - 1))]
    cells = [{} for _ in panels[1:]] + [None]
    specs = [[{"colspan": 2}, None], *(cells[i : i + 2] for i in range(0, 2 * rows - 2, 2))]
    titles = [f"{title}, {unit}" if unit else title for title, unit, _ in panels]
    heights = [2, *([1] * (rows - 1))]
    figure = make_subplots(rows, 2, specs=specs, subplot_titles=titles, row_heights=heights)
    for (row, column), (title, _, curves) in zip(places, panels, strict=True):
        lines = list(lines_of(runs, curves, against))
        for line in lines:
            is_train = line.kind == "train"
            color, dash = COLORS[line.run % len(COLORS)], DASHES[line.dash] if is_train else "dash"
            style = dict(mode="lines" if is_train else "lines+markers", line=dict(color=color, dash=dash))
            errors = dict(type="data", array=line.errors)
            drawn = Scatter(x=line.x, y=line.values, error_y=errors, name=html.escape(line.label), **style)
            figure.add_trace(drawn.update(showlegend=title == "loss"), row, column)
        for label, x, values in published_lines(runs, against, references) if title == "loss" else ():
            style = dict(color="black", dash="dashdot" if "estimated" in label else "solid")
            figure.add_trace(Scatter(x=x, y=values, name=label, mode="lines", line=style), row, column)
        published = published_for(runs, curves) if references else {}
        for label, value in marks(curves, published).items():
            figure.add_hline(value, line_dash="dot", annotation_text=label, row=row, col=column)
        if title == "loss" and lines:
            figure.update_yaxes(range=limits(lines, list(published.values())), row=row, col=column)
    figure.update_xaxes(title_text=against)
    figure.update_layout(height=420 + 260 * (rows - 1), hovermode="x unified", legend_orientation="h")
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id="curves")


def results(runs: Runs, references: str | None) -> list[list[str]]:
    """Return the rows of a table with the results of the runs, and published ones that compare with all.

    Published losses are there only if references are asked for.
    """
    others = {kind: name for kind, name in scores_of(runs).items() if kind != "hellaswag"}
    head = ["", "steps", "tokens seen", f"last validation loss, {units_of(runs)}", "best"]
    rows = [[*head, "acc_norm ± one standard error", *(f"{kind} {name}" for kind, name in others.items())]]
    for name, run in runs.items():
        log = run.log
        losses = curve(log.get("val", []), "loss")[1]
        last, best = (f"{value:.4f}" for value in (losses[-1], min(losses))) if losses else ("", "")
        score = ""
        for record in log.get("hellaswag", [])[-1:]:
            score = f"{with_error(record, 'acc_norm')} of {record['n']:,} {items_of(record)}"
        row = [name, f"{len(log.get('train', [])):,}", f"{run.watch.history.tokens:,.0f}", last, best, score]
        last_of = [curve(log.get(kind, []), number)[1][-1:] for kind, number in others.items()]
        rows.append(row + [f"{value[0]:.4g}" if value else "" for value in last_of])
    losses = published_for(runs, [("val", "loss")]) if references else {}
    scores = published_for(runs, [("hellaswag", "acc_norm")])
    for name in dict.fromkeys([*losses, *scores]):
        loss = f"{losses[name]:.4g}" if name in losses else ""
        score = f"{scores[name]:.2%}" if name in scores else ""
        rows.append([f"published: {name}", "", "", loss, "", score, *("" for _ in others)])
    return rows


def about(runs: Runs) -> list[list[str]]:
    """Return the rows of a table with hardware, versions and options of the runs, one column each."""
    columns = []
    for run in runs.values():
        last = run.log.get("run", [{}])[-1]
        column = {"ranks": last.get("world_size"), "commit": last.get("commit"), "started": last.get("time")}
        for part in (last.get("hardware"), last.get("versions")):
            column |= part if isinstance(part, dict) else {}
        column |= {f"--{name}": value for name, value in run.watch.history.options.items()}
        columns.append({name: value for name, value in column.items() if value is not None})
    names = dict.fromkeys(name for column in columns for name in column)
    return [["", *runs], *([name, *(str(column.get(name, "")) for column in columns)] for name in names)]


def samples_html(log: dict[str, list[dict]]) -> str:
    """Return the samples of a run side by side, oldest first, each with the validation loss of its step."""
    losses = dict(zip(*curve(log.get("val", []), "loss"), strict=True))
    columns = []
    for record in log["sample"]:
        loss = f", validation loss {losses[record['step']]:.4f}" if record["step"] in losses else ""
        texts = record.get("texts")
        texts = [str(text) for text in texts] if isinstance(texts, list) else []
        boxes = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
        columns.append(f"<div><h3>step {record['step']:,}{loss}</h3>{boxes}</div>")
    return f'<div class="samples">{"".join(columns)}</div>'


def table_html(rows: list[list[str]]) -> str:
    """Return a table; the first row is its head."""
    head, *rest = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
    lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rest]
    return f"<table>{''.join(lines)}</table>"


def has_ended(log: dict[str, list[dict]]) -> bool:
    """Return whether a run has ended; one that died or was stopped by a signal may still be resumed."""
    return "end" in log


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", type=user_path, nargs="+", help="run folders or log.jsonl files")
    add("--output", type=user_path, help="PNG or report.html (default: loss.png in the first folder)")
    add("--against", choices=AXES, default="step", help="horizontal axis; minutes exclude evaluations")
    help = "draw what is published for the 124M model on the runs' data, or on the data set named here"
    name = {"edu": "fineweb-edu"}.get
    known = dict(
        type=lambda text: name(text, text), choices=("own", *REFERENCES), const="own", metavar="{edu,fineweb}"
    )
    add("--references", nargs="?", **known, help=help)
    add("--follow", type=Range(float, 0), default=0, help="redraw every N seconds until all end (0: once)")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    first = Path(args.runs[0])
    output = args.output or (first if first.is_dir() else first.parent) / "loss.png"
    check_output(output)
    said: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            with watching(f"drawing {output}"):
                runs = read_runs(args.runs, args.references, wait=args.follow > 0)
                if runs:
                    draw = report if str(output).endswith(".html") else plot
                    draw(runs, output, args.against, args.references)
            if runs:
                before, said = said, list(what_runs_are(runs, args.references))
                print(*(f"{line}\n" for line in said if line not in before), sep="", end="")
            print(f"wrote {output}" if runs else "waiting for the first step", flush=True)
            have_begun = runs.keys() == set(map(short_name, args.runs))
            if not args.follow or (have_begun and all(has_ended(run.log) for run in runs.values())):
                break
            time.sleep(args.follow)


if __name__ == "__main__":
    run_script(main, parse_args)
