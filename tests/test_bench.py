import json
import subprocess

import pytest
import torch

import bench

TINY = "--n_layer 1 --n_head 2 --n_embd 16 --device cpu"


def test_ratios_are_those_of_each_round():
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
            f"generate {TINY} --max_new_tokens 9 --rounds 1",
            ["transformers", "sample.generate", "memory", "no cache"],
        ),
        (f"loader {TINY} --block_size 16", ["within a shard", "at a shard's end"]),
    ],
)
def test_a_subcommand_writes_its_figures(command, ways, tmp_path, capsys):
    bench.main(bench.parse_args([*command.split(), "--output", str(tmp_path / "out.json")]))
    record, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    for row, way in zip(record["rows"], ways, strict=True):
        assert row["way"].startswith(way)
    assert all(row["way"] in printed and list(row.values())[1] > 0 for row in record["rows"])
    assert record["versions"]["torch"] == torch.__version__ and record["args"]["device"] == "cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_runs_commands_that_exist(device, monkeypatch, tmp_path):
    seen = []

    def run(command):
        seen.append(bench.parse_args(command[2:]))
        return subprocess.CompletedProcess(command, returncode=len(seen) == 2)

    monkeypatch.setattr(bench.subprocess, "run", run)
    rows = bench.bench_all(bench.parse_args(["all", "--output", str(tmp_path)]), torch.device(device))
    assert {args.command for args in seen} >= {"ladder", "train", "loader", "memory", "startup", "generate"}
    assert {args.device for args in seen} == {device} and len({args.output for args in seen}) == len(seen)
    assert [row["failed"] for row in rows] == [0, 1] + [0] * (len(rows) - 2)
