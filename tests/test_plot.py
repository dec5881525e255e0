import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import REPOSITORY
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import plot
from diagnosis import published
from diagnosis.published import DEMO_FINGERPRINT


def write_log(folder, steps, cut=False, max_steps=30, **args):
    Path(folder).mkdir(exist_ok=True)
    args = {"max_steps": max_steps, "block_size": 1024, "val_tokens": 1_000_000, **args}
    records = [{"step": 0, "kind": "run", "args": args, "planned_tokens": 9600}]
    for step in range(steps):
        values = {"loss": None if step == 3 else 5 / (step + 1), "lr": 1e-3, "norm": 1.0}
        # Twice as many tokens a step from step 20 on, at the same speed.
        values |= {"tokens_per_s": 8.0, "dt_ms": 30000 if step < 20 else 60000}
        records.append({"step": step, "kind": "train", **values})
    records += [{"step": step, "kind": "val", "loss": 4.0 - step / 100} for step in range(0, steps, 10)]
    scores = {"acc": 0.2, "acc_norm": 0.25, "acc_norm_stderr": 0.066, "n": 44}
    records += [{"step": 0, "kind": "hellaswag", **scores, "fingerprint": DEMO_FINGERPRINT}]
    records += [{"step": steps, "kind": "end"}] * (steps >= max_steps)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    Path(folder, "log.jsonl").write_text(lines + '{"step": 9, "ki' * cut)


def test_curves_match_the_log(tmp_path):
    write_log("log", 6, cut=True)
    log = plot.read_log("log")
    assert plot.curve(log["train"], "loss") == ([0, 1, 2, 4, 5], [5.0, 2.5, 5 / 3, 1.0, 5 / 6])
    assert plot.curve(log["val"], "loss") == ([0], [4.0])
    assert plot.smooth([0, 1, 2], [3.0, 4.0, 5.0]) == ([0, 1, 2], [3.0, 4.0, 5.0])
    steps, values = plot.smooth(list(range(1000)), [float(i) for i in range(1000)])
    assert len(steps) == plot.SMOOTHING_POINTS and steps == values and steps[0] == 2.0


def test_runs_are_compared_by_steps_tokens_or_time(tmp_path):
    write_log("log", 30)
    log = plot.read_log("log")
    steps = [0, 1, 20, 22, 30]  # the last one is an evaluation after the last step
    assert plot.positions(steps, log, "step") == steps
    assert plot.positions(steps, log, "tokens") == [0, 240, 4800, 4800 + 2 * 480, 4800 + 10 * 480]
    assert plot.positions(steps, log, "minutes") == [0, 0.5, 10, 12, 20]
    log["train"] = log["train"][10:]  # begins late, as the log of a run that went on in another folder
    assert plot.positions([10, 12], log, "step") == [10, 12]
    assert plot.positions([10, 12], log, "minutes") == [0, 1]


def test_follow_redraws_until_the_run_ends(tmp_path, monkeypatch, capsys):
    write_log("log", 10)
    waits, reads, read = [], [], plot.read_log

    def sleep(seconds):
        waits.append(seconds)
        write_log("log", 10 * len(waits) + 10)

    monkeypatch.setattr(plot.time, "sleep", sleep)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)  # takes a second
    monkeypatch.setattr(plot, "read_log", lambda folder: reads.append(folder) or read(folder))
    plot.main(plot.parse_args(["log", "--follow", "7"]))
    out = capsys.readouterr().out.splitlines()
    assert waits == [7, 7] and out.count(f"wrote {Path('log/loss.png')}") == len(reads) == 3
    # The last ten steps have twice as many tokens.
    left = ["step 10 of 30, about 15 min left without evaluations"]
    left += ["step 20 of 30, about 10 min left without evaluations", "step 30 of 30, ended"]
    assert [line for line in out if "step" in line] == [f"log: {line}" for line in left]
    assert out.count("log: no sign that anything is wrong") == 1  # what does not change is said once
    plot.main(plot.parse_args(["log"]))
    assert len(waits) == 2
    with pytest.raises(ValueError, match="--follow is -1.0: use at least 0"):
        plot.parse_args(["log", "--follow", "-1"])


def test_follow_waits_for_the_first_step_and_for_all_runs(tmp_path, monkeypatch, capsys):
    def begin():
        write_log("log", 0)

    def first_steps():
        write_log("log", 10)

    def early_stop():
        with open("log/log.jsonl", "a") as log:
            log.write('{"step": 9, "kind": "end"}\n')

    def other_begins():
        write_log("other", 0)

    def other_ends():
        write_log("other", 30)

    events = [begin, first_steps, early_stop, other_begins, other_ends]
    monkeypatch.setattr(plot.time, "sleep", lambda seconds: events.pop(0)())
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)  # takes a second
    plot.main(plot.parse_args(["log", "other", "--follow", "7", "--output", "a.png"]))
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("w")]
    assert out == 2 * ["waiting for the first step"] + 4 * ["wrote a.png"]
    assert events == []


def test_run_stopped_by_a_signal_is_followed_and_an_early_stop_ends(run_train):
    run_train("--max_steps 200 --val_every 5 --early_stop 2 --learning_rate 3e-2")
    log = plot.read_log("log")
    assert plot.has_ended(log) and log["end"][0]["step"] == log["val"][-1]["step"] < 200
    del log["end"]
    assert not plot.has_ended(log)


def test_references_are_drawn_as_lines(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **style: drawn.append((axes.get_title(), y)))
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)  # takes a second
    write_log("log", 30, tokenizer="gpt2")
    write_log("bytes", 30, tokenizer="byte")

    def lines(*words):
        drawn.clear()
        plot.main(plot.parse_args([*words, "--output", "picture.png"]))
        assert {title for title, y in drawn if y == published.CHANCE} == {drawn[-1][0]}
        return [y for _, y in drawn if y != published.CHANCE]

    assert lines("log") == lines("log", "--references") == lines("bytes", "--references", "edu") == []
    assert lines("log", "--references", "edu") == [3.05, 3.2924] and drawn[-1][0] == "demo items"
    assert lines("log", "bytes", "--references", "edu") == []
    monkeypatch.setattr(published, "PUBLISHED_FINGERPRINT", DEMO_FINGERPRINT)
    assert lines("log", "--references", "edu") == [3.05, 3.2924, 0.2955, 0.304, 0.337]
    assert lines("log", "--references", "fineweb") == [3.28, 0.2955, 0.299, 0.337]
    assert lines("log", "--references") == [0.2955, 0.304, 0.337] and drawn[-1][0] == "HellaSwag"


def test_scores_have_error_bars_and_rates_are_those_of_all_groups(tmp_path, monkeypatch):
    write_log("log", 30)
    drawn, errors = {}, {}
    lines = [json.loads(line) for line in Path("log/log.jsonl").read_text().splitlines()]
    for record in lines:
        if record["kind"] == "train":
            record["lrs"] = {"embeddings": 0.3, "c_attn": 0.02, "matrices": 0.02, "gains": record["lr"]}
    Path("log/log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    for draw, found in ((Axes.plot, drawn), (Axes.errorbar, errors)):

        def noted(axes, x, y, *words, draw=draw, found=found, **style):
            found.setdefault(axes.get_title(), []).append((style.get("label"), y, words))
            return draw(axes, x, y, *words, **style)

        monkeypatch.setattr(Axes, draw.__name__, noted)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)
    runs = plot.read_runs(["log"])
    plot.plot(runs, "picture.png")
    assert errors == {"demo items": [(None, [0.25], ([0.066],))]}
    rates = {label: set(y) for label, y, _ in drawn["learning rate"]}
    assert rates == {"log: embeddings": {0.3}, "log: c_attn, matrices": {0.02}, "log: gains": {1e-3}}
    assert [unit for _, unit, _ in plot.panels_of(runs)][-1] == "acc_norm ± standard error"
    plot.report(runs, "report.html")
    page = Path("report.html").read_text(encoding="utf-8")
    assert '"name":"log: c_attn, matrices"' in page and '"array":[0.066]' in page


def test_picture_compares_runs_without_torch(tmp_path):
    write_log("log", 30)
    write_log("other", 500)
    code = "import sys, plot; plot.main(plot.parse_args(sys.argv[1:])); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "log", "other", "--against", "tokens", "--references"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert Path("log/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("log").iterdir()) == ["log.jsonl", "loss.png"]


def test_evaluation_that_a_run_names_is_drawn_and_reported(tmp_path):
    """plot.py has never heard of it."""
    write_log("log", 6)
    records = [{"step": 0, "kind": "run", "args": {}, "curves": {"val": "loss", "lambada": "acc"}}]
    records += [{"step": step, "kind": "lambada", "acc": 0.1 * step, "seconds": 9.0} for step in (0, 3)]
    with open("log/log.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    runs = plot.read_runs(["log"])
    assert plot.panels_of(runs)[-1] == ("lambada", "acc", [("lambada", "acc")])
    plot.plot(runs, "picture.png")
    plot.report(runs, "report.html")
    page = Path("report.html").read_text()
    assert "log: lambada" in page and "<th>lambada acc</th>" in page and "<td>0.3</td>" in page


def test_missing_and_empty_runs_are_reported_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log at nowhere"):
        plot.read_runs(["nowhere"])
    write_log("log", 0)
    with pytest.raises(ValueError, match="no training steps in log: train first"):
        plot.read_runs(["log"])
    record = {"step": 0, "kind": "train", "loss": None, "lr": 1, "norm": None, "tokens_per_s": 8, "dt_ms": 1}
    Path("log/log.jsonl").write_text(json.dumps(record) + "\n")
    plot.plot(plot.read_runs(["log"]), "a.png")  # every step was skipped: there is no loss to draw


HOSTILE = "</script><script>document.title = 'taken over'</script>&<b>"
# What a reader does with the page, and what becomes of it.
READ = """<script>
const curves = document.getElementById("curves")
const texts = what => Array.from(document.querySelectorAll(what)).map(each => each.textContent)
Plotly.relayout(curves, {"xaxis.range": [10, 20]})
Plotly.Fx.hover(curves, [{curveNumber: 1, pointNumber: 1}])
setTimeout(() => {
    const seen = {
        title: document.title, range: curves.layout.xaxis.range,
        lines: document.querySelectorAll("#curves .scatterlayer .trace").length,
        hover: texts(".hoverlayer text"), legend: texts(".legendtext"), samples: texts(".samples pre"),
    }
    document.body.innerHTML = "<pre id=seen>" + btoa(encodeURIComponent(JSON.stringify(seen))) + "</pre>"
}, 1000)
</script>"""


def write_report(tokenizer="gpt2"):
    write_log("log", 30)
    write_log("a&b", 30, tokenizer="gpt2")
    args = {"tokenizer": tokenizer, "out_dir": HOSTILE, "n_layer": 7, "block_size": 1024, "val_tokens": 10**7}
    about = {"kind": "run", "args": args, "hardware": {"device": "H100"}, "versions": {"torch": "2.13"}}
    records = [{"step": 0, **about}, {"step": 30, "kind": "val", "loss": 3.5}]
    records += [{"step": step, "kind": "sample", "texts": [f"{HOSTILE} {step}", "é"]} for step in (0, 20)]
    with open("log/log.jsonl", "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    plot.main(plot.parse_args(["log", "a&b", "--output", "report.html", "--references", "fineweb"]))
    return Path("report.html").read_text(encoding="utf-8")


def test_report_has_results_samples_options_and_published_values(tmp_path):
    page = write_report()
    assert HOSTILE not in page and "taken over" in page
    assert "<tr><td>log</td><td>30</td><td>9,600</td><td>3.5000</td><td>3.5000</td>" in page
    assert "<td>25.0% ± 6.6% of 44 demo items</td>" in page
    assert "<p>log: not compared with the published curve: --n_layer is 7, not 12</p>" in page
    assert "<td>published: modded-nanogpt</td><td></td><td></td><td>3.28</td>" in page
    assert "29.55%" not in page
    reason = "it was scored on demo items, not on the 10,042 of HellaSwag"
    assert f"<p>log: not compared with the published HellaSwag scores: {reason}</p>" in page
    assert "<h3>step 20, validation loss 3.8000</h3><pre>" in page and "<pre>é</pre>" in page
    for name, value in {"device": "H100", "torch": "2.13", "--n_layer": 7}.items():
        assert f"<td>{name}</td><td>{value}</td><td></td>" in page


def test_losses_are_compared_with_published_ones_only_if_asked_and_per_token(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "PUBLISHED_FINGERPRINT", DEMO_FINGERPRINT)
    for tokenizer, unit in (("gpt2", "GPT-2 token"), ("byte", "byte")):
        write_log("log", 30, tokenizer=tokenizer)
        for references in (None, "fineweb-edu"):
            runs = plot.read_runs(["log"], references)
            plot.report(runs, "report.html", references=references)
            page = Path("report.html").read_text(encoding="utf-8")
            assert f'"text":"loss, nats per {unit}"' in page
            assert f"<th>last validation loss, nats per {unit}</th>" in page
            names = {"GPT-2", "build-nanogpt", "GPT-3"} if tokenizer == "gpt2" else set()
            assert set(re.findall("<td>published: ([^<]*)</td>", page)) == names
            assert ("<td>3.05</td>" in page) == (tokenizer == "gpt2" and references is not None)
    write_log("other", 30, tokenizer="gpt2")
    said = list(plot.what_runs_are(plot.read_runs(["log", "other"]), None))
    units = "nats per GPT-2 token or nats per byte"
    assert said[-1] == f"losses of these runs do not compare: they are in {units}"


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_report_can_be_hovered_and_zoomed_offline_in_a_browser(tmp_path):
    page = write_report()
    assert "http://" not in page.partition("<h2>Results")[2] and "<script src" not in page
    Path("read.html").write_text(page.replace("</body>", READ + "</body>"), encoding="utf-8")
    command = "chromium --headless --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom".split()
    url = Path("read.html").absolute().as_uri()
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/chromium"]
    dom = subprocess.run([*command, *offline, url], capture_output=True, text=True, timeout=120).stdout
    (seen,) = re.findall("<pre id=.?seen.?>(.*)</pre>", dom)
    seen = json.loads(unquote(base64.b64decode(seen)))
    assert seen["title"] == "log, a&b" and seen["range"] == [10, 20]
    assert seen["lines"] == 12  # of two runs: two of loss, four others
    assert seen["hover"] == ["log: val", "(10, 3.9)"]
    assert seen["legend"] == ["log: train", "log: val", "a&b: train", "a&b: val"]
    assert seen["samples"] == [f"{HOSTILE} 0", "é", f"{HOSTILE} 20", "é"]
