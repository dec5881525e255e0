import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, begin

import bench
import train
from model import GPT

TINY = "--n_layer 1 --n_head 2 --n_embd 16 --device cpu"


def test_ratios_are_taken_round_by_round():
    seconds = {"slow": iter([9.0, 4.0, 6.0, 8.0]), "quick": iter([9.0, 2.0, 2.0, 2.0])}
    ways = {name: lambda each=each: next(each) for name, each in seconds.items()}
    rows, results = bench.alternate(ways, 3, torch.device("cpu"), 12, "tokens")
    assert rows[0] == {"way": "slow", "tokens/s": 2, "min": 1.5, "max": 3, "ratio": 1}
    assert rows[1] == {"way": "quick", "tokens/s": 6, "min": 6, "max": 6, "ratio": 3}
    assert results == [8.0, 2.0]


@pytest.mark.parametrize(
    "command, ways",
    [
        (
            f"generate {TINY} --max_new_tokens 9 --prompt_tokens 4 --rounds 1",
            [
                *("transformers", "sample.generate", "memory", "transformers, top-k"),
                *("sample.generate, top-k", "sample.generate, all"),
            ],
        ),
        (f"hellaswag {TINY} --data items.jsonl --limit 3 --rounds 1 --alone", ["hellaswag"]),  # of 2
    ],
)
def test_subcommand_writes_its_figures(command, ways, tmp_path, capsys):
    items = (REPOSITORY / "corpus" / "hellaswag_demo.jsonl").read_text().splitlines()
    Path("items.jsonl").write_text("\n".join(items[:2]))
    bench.main(bench.parse_args([*command.split(), "--output", str(tmp_path / "out.json")]))
    record, (printed, progress) = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr()
    dtype = record["args"]["dtype"]
    assert dtype == str(bench.hardware.choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    assert printed.startswith(f"dtype: {dtype}\n")
    assert f"round 1 of 2, {record['rows'][0]['way']}: 0 of " in progress
    for row, way in zip(record["rows"], ways, strict=True):
        assert row["way"].startswith(way)
    assert all(row["way"] in printed and list(row.values())[1] > 0 for row in record["rows"])
    assert record["versions"]["torch"] == torch.__version__ and record["args"]["device"] == "cpu"


def test_usual_script_encodes_documents(monkeypatch):
    """Its imports are not seen by the linter."""
    monkeypatch.setattr(sys, "argv", ["usual.py", "byte", "100", "out"])
    names = {"__name__": "usual"}
    exec(bench.USUAL_DATA_SCRIPT, names)
    assert names["encode"]({"text": "ab"}).tolist() == [256, 97, 98]


def test_steps_to_a_loss_are_interpolated_between_validations():
    log = {
        "val": [{"step": s, "loss": loss} for s, loss in ((0, 5.0), (10, 4.0), (20, 3.0), (30, 3.5))],
    }
    assert bench.steps_to(3.25, log) == pytest.approx(17.5)
    assert bench.steps_to(4.0, log) == 10
    assert bench.steps_to(2.9, log) == float("inf")


def test_p_of_two_settings_is_that_of_students_tables():
    three = [-1.0, 0.0, 1.0]
    for t, p in ((2.776445, 0.05), (4.604095, 0.01), (8.610302, 0.001)):  # 4 degrees of freedom
        lower = [each - t * (2 / 3) ** 0.5 for each in three]
        assert bench.welch_p(three, lower) == pytest.approx(p, rel=1e-4)
    assert bench.welch_p([0.0, 2.0], [2.0, 2.0]) == pytest.approx(0.5)  # 1 degree: Cauchy's distribution
    assert bench.welch_p([0.0, 0.2, 0.1], [0.1, 0.1, 0.1]) == pytest.approx(1)
    assert math.isnan(bench.welch_p([1.0], three)) and math.isnan(bench.welch_p([1.0, 1.0], [1.0, 1.0]))


def test_sweep_runs_what_is_missing_and_compares_all_runs(monkeypatch, tmp_path, capsys):
    seen = []

    def run(command, **options):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="")
        args = train.parse_args(command[2:])
        seen.append((args.learning_rate, args.seed))
        assert options["env"]["OMP_NUM_THREADS"] and args.shuffle and args.device == "cpu"
        if args.learning_rate == 0.1:
            return subprocess.CompletedProcess(command, 1, stderr="warning: x\ntrain.py: error: no shards")
        losses = [5, 3 - args.learning_rate + 0.1 * args.seed]
        records = [{"kind": "run", "step": 0, "args": vars(args)}]
        records += [{"kind": "train", "step": 0, "dt_ms": 500, "tokens_per_s": 1}]
        records += [{"kind": "val", "step": step, "loss": x} for step, x in zip((0, 10), losses, strict=True)]
        Path(args.out_dir).mkdir(parents=True)
        Path(args.out_dir, "log.jsonl").write_text("\n".join(map(json.dumps, records)))
        return subprocess.CompletedProcess(command, 0)

    def sweep(words):
        bench.main(bench.parse_args(f"sweep --device cpu --output out.json {words} --max_steps 10".split()))
        return {row["way"]: row for row in json.loads(Path("out.json").read_text())["rows"]}

    monkeypatch.setattr(bench.subprocess, "run", run)
    sweep("--name a --seeds 1 3 -- --shuffle --learning_rate 0.5 0.1")
    assert seen == [(0.5, 1), (0.1, 1), (0.5, 3), (0.1, 3)]
    assert "a,learning_rate=0.1,seed=3: train.py: error: no shards\n" in capsys.readouterr().out
    rows = sweep("--name b --baseline a,learning_rate=0.5 --seeds 1 -- --shuffle --learning_rate 1 0.5")
    sweep("--name b --jobs 2 --seeds 1 -- --shuffle --learning_rate 1 0.5")
    assert seen[4:] == [(1, 1), (0.5, 1)]  # finished runs are skipped
    assert rows.keys() == {"a,learning_rate=0.5", "b,learning_rate=0.5", "b,learning_rate=1"}
    base, better = rows["a,learning_rate=0.5"], rows["b,learning_rate=1"]
    assert base["seeds"] == 2 and base["val loss"] == pytest.approx(2.7)
    assert base["spread"] == pytest.approx(0.2 / 2**0.5) and base["to target"] == 10 and base["p"] == 1
    assert better["to target"] == pytest.approx(10 * (5 - 2.7) / (5 - 2.1))
    with pytest.raises(ValueError, match="b,learning_rate=1,seed=1 was run with --shuffle True: use"):
        sweep("--name b --seeds 1 -- --no-shuffle --learning_rate 1 0.5")
    with pytest.raises(ValueError, match="no setting c in sweep: choose from a,learning_rate=0.5, b,"):
        sweep("--name b --baseline c --seeds 1 -- --shuffle --learning_rate 1")


@pytest.mark.parametrize(
    "words, message",
    [
        ("train -- --batch_size 1", "train takes no options of train.py after --"),
        ("sweep --name a -- 1", "-- must be followed by an option of train.py, not 1"),
    ],
)
def test_only_a_sweep_takes_options_after_the_dashes(words, message):
    with pytest.raises(ValueError, match=message):
        bench.parse_args(words.split())


def test_gpu_parts_are_written_as_they_end_and_a_failure_is_a_row(monkeypatch, capsys):
    """One part of `bench.py gpu` on CPUs; before it one that fails and one that takes too long."""
    parts = [words for words in bench.gpu_parts(False) if words.startswith("hellaswag")]
    parts = {"train --steps 0": 60, "memory": 0.01, **dict.fromkeys(parts, 60)}
    monkeypatch.setattr(bench, "gpu_parts", lambda on_gpu, card: parts)
    monkeypatch.setattr(bench, "GRACE_S", 0.1)
    Path("measured").mkdir()
    Path("measured/0_train.json").write_text('{"rows": [{"way": "of an earlier command"}]}')
    bench.main(bench.parse_args("gpu --device cpu --output measured".split()))
    outcomes = json.loads(Path("measured/gpu.json").read_text())["rows"]
    assert [row["failed"] for row in outcomes] == [1, 1, 0]
    assert {path.stem for path in Path("measured").iterdir()} == {"gpu", "2_hellaswag"}
    printed = capsys.readouterr().out
    assert "stopped after 0.01 s" in printed and "468,000" in printed
    *_, head, dashes, row = printed.splitlines()
    assert head.startswith("| card |") and head.count("|") == dashes.count("|") == row.count("|")
    assert row == "| 1 x cpu | train.py |  |  |  |  |  |"  # it failed


def test_gpu_ends_with_a_table_of_its_training(tmp_path, monkeypatch):
    rows = [
        {"way": "train.py", "tokens/s": 468123.4, "GB": 25.46, "compile s": 31.7, "mfu": 0.4012},
        {"way": "transformers", "tokens/s": 201000.0, "GB": 70.0, "compile s": 20.0},  # an unknown card
        {"way": "train.py, no flash", "tokens/s": None, "GB": None, "compile s": None, "mfu": None},
    ]
    (tmp_path / "1_train.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "3_compile.json").write_text('{"rows": [{"way": "model.py", "tokens/s": 635000.4}]}')
    parts = ["memory --n_layer 1", "train --n_layer 1", "train --n_layer 2", "compile --card h100"]
    monkeypatch.setattr(bench, "ranks_on", lambda device: 8)
    table = bench.table_of_training(tmp_path, parts, torch.device("cpu"))
    assert table.splitlines() == [
        "| card | way | tokens/s | roofline | MFU | GB | seconds to compile |",
        "|---|---|---|---|---|---|---|",
        "| 8 x cpu | train.py | 468,123 | 5,080,003 | 40.1% | 25.5 | 32 |",
        "| 8 x cpu | transformers | 201,000 |  |  | 70.0 | 20 |",
        "| 8 x cpu | train.py, no flash |  |  |  |  |  |",
        "| 8 x cpu | train.py |  | 5,080,003 |  |  |  |",
    ]


def test_seconds_to_compile_are_what_the_first_steps_take_more():
    assert bench.step_times([31.0, 2.5, 2.0, 1.5, 2.0, 9.0]) == (2.0, 31 + 2.5 + 2 - 3 * 2)
    assert bench.step_times([1.0, 1.0, 1.0, 2.0]) == (2.0, 0.0)


def test_training_is_compared_with_the_rate_of_the_machine(monkeypatch):
    options = argparse.Namespace(**{"n_layer": 1, "n_head": 1, "n_embd": 4, "batch_size": 2, "block_size": 8})
    config = bench.config_of(options, vocab_size=6)
    rows = [{"way": "train.py", "tokens/s": 1000.0}]
    flops = GPT(config).flops_per_token()
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1000 * flops)
    monkeypatch.setattr(bench.hardware, "peak_flops", lambda device, dtype: 2000 * flops)
    bench.add_shares(rows, config, torch.device("cpu"), torch.bfloat16, ranks=2)
    assert (rows[0]["of matmul"], rows[0]["mfu"]) == (0.5, 0.25)


def test_gpu_parts_exist_at_full_size():
    for words, limit_s in bench.gpu_parts(True, "h100").items():
        args = bench.parse_args(words.split())
        assert (args.n_layer, args.n_embd) == (12, 768) and limit_s >= 60
        assert getattr(args, "rounds", 2) <= 2


def test_way_that_runs_out_of_memory_has_a_row_without_figures(capsys):
    calls = []

    def fails():
        calls.append("fails")
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 6.14 GiB")

    compile_s = iter([20.0, 1.0])  # cached in the second round
    ways = {"large": fails, "small": lambda: calls.append("small") or (0.5, next(compile_s), 3e9)}
    large, small = bench.train_in_turn(ways, 2, torch.device("cpu"), 100)
    assert calls == ["fails", "small", "small"]  # not tried again
    assert all(math.isnan(large[name]) for name in ("tokens/s", "GB", "compile s"))
    assert (small["tokens/s"], small["GB"], small["compile s"]) == (200, 3, 20)
    assert capsys.readouterr().out == "large: CUDA out of memory. Tried to allocate 6.14 GiB\n"


def test_patched_training_reports_its_error(monkeypatch):
    def forked(command, **options):
        process = begin(" ".join(command[2:]), "printed", "errors", script=command[1])
        process.join(60)
        streams = Path("printed").read_text(), Path("errors").read_text()
        return subprocess.CompletedProcess(command, process.exitcode, *streams)

    monkeypatch.setattr(bench.subprocess, "run", forked)
    options = {"n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 1, "block_size": 8, "max_steps": 4}
    patched = bench.run_train({**options, "vocab_size": 50304}, "cpu", "torch.is_patched = True")
    seconds, compile_s, peak = patched
    assert 0 < seconds < 60 and 0 <= compile_s < 60 and peak > 1e8
    with pytest.raises(RuntimeError, match="train.py: error: --n_embd 17 is not divisible by --n_head 2"):
        bench.run_train({**options, "n_embd": 17}, torch.device("cpu"))
