"""A run that diverges leaves the states alone from which it can go on."""

import math
from pathlib import Path

import pytest
import torch

import train
from runtime.files import file_hash

RATE = "--grad_clip 0 --learning_rate"
TWO_RANKS = """
import train

try:
    train.main(train.parse_args({options!r}.split()))
except (SystemExit, ValueError) as error:
    print(error)
"""


def states():
    return {path.name: file_hash(path) for path in Path("log").glob("model_*.pt")}


@pytest.mark.parametrize(
    "options",
    ["", "--optimizer muon", "--dtype float16", "--checkpoint_every 1 --milestone_every 1 --val_every 0"],
)
def test_run_that_diverges_is_resumed_from_before(run_train, capsys, options):
    run_train(f"--max_steps 12 --checkpoint_every 4 --keep 1 {options}")
    before, worse = states(), "--muon_lr 1e20" if "muon" in options else ""
    diverging = f"{options} --max_steps 60 --max_skipped 3 --resume {RATE} 1e20 {worse}"
    for _ in range(2):  # again, from the same state
        message = r"not finite for 3 steps in a row.* \(continues from .*log/model_00012.pt\)"
        with pytest.raises(ValueError, match=message):
            run_train(diverging)
        assert states() == before
    assert "no checkpoint; --resume continues from" in capsys.readouterr().out
    log = run_train(f"{options} --max_steps 16 --checkpoint_every 4 --resume {RATE} 1e-2 --muon_lr 2e-2")
    assert all(record["loss"] for record in log["train"]) and log["train"][-1]["step"] == 15
    assert "model_00016.pt" in states()


def test_weights_that_the_last_step_has_ruined_are_not_saved(run_train, capsys):
    """The loss and the gradients of that step were finite, and so were those of all steps before."""
    run_train("--max_steps 3")
    before = states()
    log = run_train(f"--max_steps 4 --val_every 0 --checkpoint_every 1 --keep 1 --resume {RATE} 1e20")
    assert log["train"][-1]["norm"] and states() == before
    printed = capsys.readouterr().out
    assert "step     4 | loss or gradients are not finite: no checkpoint; --resume continues from" in printed


def test_nothing_is_saved_until_a_validation_is_finite_again(run_train, monkeypatch):
    validate, calls = train.validate, []

    def broken(run, batches):
        calls.append(run.progress.step)
        return {"loss": math.nan} if 3 <= run.progress.step < 9 else validate(run, batches)

    first = next(evaluation for evaluation in train.EVALUATIONS if evaluation.kind == "val")
    others = [evaluation for evaluation in train.EVALUATIONS if evaluation is not first]
    changed = train.Evaluation("val", broken, first.size, first.line, first.curve)
    monkeypatch.setattr(train, "EVALUATIONS", [changed, *others])
    run_train("--max_steps 12 --val_every 3 --checkpoint_every 4 --keep 0")
    assert sorted(states()) == ["model_00009.pt", "model_00012.pt", "model_best.pt"]
    overdue = torch.load("log/model_00009.pt", weights_only=True)
    assert overdue["step"] == 9 and math.isfinite(overdue["val_loss"])


def test_two_ranks_that_diverge_are_resumed_from_before(run_train, two_ranks):
    run_train("--max_steps 6 --batch_size 1")
    before = states()
    options = f"--max_steps 60 --max_skipped 3 --resume --out_dir log {RATE} 1e20"
    Path("two.py").write_text(TWO_RANKS.format(options=options))
    printed = two_ranks("two.py")
    assert "(continues from" in printed and "log/model_00006.pt)" in printed and states() == before
