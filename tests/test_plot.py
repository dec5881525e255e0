import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import plot


def write_log(folder, steps, cut=False):
    Path(folder).mkdir()
    records = [{"step": 0, "kind": "run"}]
    for step in range(steps):
        values = {"loss": None if step == 3 else 5 / (step + 1), "lr": 1e-3, "norm": 1.0, "tokens_per_s": 9.0}
        records.append({"step": step, "kind": "train", **values})
    records += [{"step": step, "kind": "val", "loss": 4.0 - step / 100} for step in range(0, steps, 10)]
    records += [{"step": 0, "kind": "hellaswag", "acc_norm": 0.25}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    Path(folder, "log.jsonl").write_text(lines + '{"step": 9, "ki' * cut)


def test_curves_hold_what_the_log_says(tmp_path):
    write_log("log", 6, cut=True)
    log = plot.read_log("log")
    assert plot.curve(log["train"], "loss") == ([0, 1, 2, 4, 5], [5.0, 2.5, 5 / 3, 1.0, 5 / 6])
    assert plot.curve(log["val"], "loss") == ([0], [4.0])
    assert plot.smooth([0, 1, 2], [3.0, 4.0, 5.0]) == ([0, 1, 2], [3.0, 4.0, 5.0])
    steps, values = plot.smooth(list(range(1000)), [float(i) for i in range(1000)])
    assert len(steps) == plot.SMOOTHING_POINTS and steps == values and steps[0] == 2.0


def test_one_picture_compares_runs_and_needs_no_torch(tmp_path):
    write_log("log", 30)
    write_log("other", 500)
    code = "import sys, plot; plot.main(plot.parse_args(['log', 'other'])); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert Path("log/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("log").iterdir()) == ["log.jsonl", "loss.png"]


def test_missing_and_empty_runs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log at nowhere"):
        plot.plot(["nowhere"], "a.png")
    write_log("log", 0)
    with pytest.raises(ValueError, match="no training steps in log: train first"):
        plot.plot(["log"], "a.png")
