"""--dry_run: planted faults that it has to catch, the forecast, and that nothing is written."""

import functools
import math
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

import train
from corpus import shards as shards_module
from diagnosis import published
from runtime import hardware
from runtime.distributed import Distributed
from training import dry_run

FAULTY = "transformer.h.1.mlp.c_fc.weight"
ONE = Distributed(0, 1, torch.device("cpu"))


@pytest.fixture
def rehearse(shards, monkeypatch):
    """Run train.py --dry_run on the tiny model with a string of options."""
    monkeypatch.setattr(dry_run, "STEPS_S", 0.01)
    monkeypatch.setattr(dry_run, "EVALUATION_S", 0.001)
    return lambda options="": train.main(train.parse_args(f"{TINY} --dry_run {options}".split()))


class HalvedGradient(torch.nn.Module):
    """Stands in for a compiler that halves the gradient of one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs, **options):
        weight = self.model.get_parameter(FAULTY)
        halved = {FAULTY: weight / 2 + weight.detach() / 2}
        return torch.func.functional_call(self.model, halved, inputs, options)


class ForgetfulModel(HalvedGradient):
    """Stands in for code that loses the gradients of earlier micro-steps."""

    def forward(self, *inputs, **options):
        self.model.zero_grad()
        return self.model(*inputs, **options)


class InfiniteGradient(HalvedGradient):
    def forward(self, *inputs, **options):
        _, loss = self.model(*inputs, **options)
        return None, loss * math.inf if torch.is_grad_enabled() else loss


@pytest.mark.parametrize("options", ["", "--dtype bfloat16 --dropout 0.1", "--dtype float16 --batch_size 1"])
@pytest.mark.parametrize(
    "compiler, what",
    [
        (HalvedGradient, f"compiled and eager differ by 50.00% in {FAULTY}"),
        (ForgetfulModel, "two micro-steps and one differ by"),
        (InfiniteGradient, "compiled and eager differ by what is not a finite number in "),
    ],
)
def test_wrong_gradient_ends_the_command_and_names_the_tensor(rehearse, monkeypatch, options, compiler, what):
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(train.hardware, "can_compile", lambda device, say: True)
    with pytest.raises(ValueError, match=f"wrong gradients: {what}"):
        rehearse(f"{options} --compile")


@pytest.mark.parametrize(
    "options",
    [
        "--compile --n_layer 1",
        "--compile --n_layer 1 --dtype bfloat16 --optimizer muon --recompute",
        "--dtype float16 --dropout 0.1",
        "--batch_size 1 --block_size 15 --total_batch_size 60",
    ],
)
def test_correct_gradients_differ_by_rounding(rehearse, monkeypatch, capsys, options):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    rehearse(options)
    differences = re.findall(r"(\w+ and \w+) differ by at most ([\d.]+)%, in", capsys.readouterr().out)
    compared = ["compiled and eager"] if "--compile" in options else []
    assert [what for what, _ in differences] == [*compared, "steps and one"]
    assert all(float(percent) < 1 for _, percent in differences)


TWO_RANKS = """
import os, torch, train
from training import dry_run
dry_run.STEPS_S, dry_run.EVALUATION_S = 0.01, 0.001

class Summed(train.DistributedDataParallel):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, add_up)

def add_up(state, bucket):
    group = torch.distributed.group.WORLD
    work = torch.distributed.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])

for ddp in (train.DistributedDataParallel, Summed):
    train.DistributedDataParallel = ddp
    try:
        train.main(train.parse_args({words}))
    except (ValueError, SystemExit) as error:
        print(f"{{type(error).__name__}}: {{error}}\\n", end="", flush=True)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # a second process group needs a store of its own
"""


def test_ranks_are_compared_with_one(shards, two_ranks):
    words = f"{TINY} --dry_run --batch_size 1 --price 3".split()
    Path("two.py").write_text(TWO_RANKS.format(words=words))
    printed = two_ranks("two.py")
    good, bad = re.findall(r"2 ranks and one differ by at most ([\d.]+)%", printed)
    assert float(good) < 0.01 and float(bad) > 50
    assert "ValueError: wrong gradients: 2 ranks and one differ by 100.00%" in printed
    assert "SystemExit: 1" in printed  # the other rank ends too, without a second message
    assert "for 2 rank(s) at 3 per GPU-hour" in printed and not Path("log").exists()


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


def test_nothing_is_written_and_a_run_is_left_as_it_is(rehearse, run_train):
    run_train("--max_steps 3")
    Path("log/model_00009.pt.tmp").write_bytes(b"is being written")
    before = snapshot("log")
    rehearse("--resume")
    rehearse("--out_dir log")
    assert snapshot("log") == before
    assert {path.name for path in Path().iterdir()} == {"log", "shards"}
    with pytest.raises(ValueError, match="--dry_run and --overfit_batch are different checks"):
        rehearse("--overfit_batch")


@pytest.mark.parametrize("resume", ["", "--resume"])
def test_forecast_counts_what_the_run_does(rehearse, run_train, capsys, monkeypatch, resume):
    monkeypatch.setattr(dry_run, "process_age", lambda: 5.0 + hardware.compilation_seconds())
    options = "--max_steps 10 --sample_every 4 --hellaswag_every 5 --hellaswag_data demo "
    options += "--checkpoint_every 2 --val_every 3"
    if resume:
        run_train("--max_steps 3 --checkpoint_every 3")
    capsys.readouterr()
    rehearse(f"{options} {resume} --price 1000000")
    printed = capsys.readouterr().out
    counts = {name: int(n) for name, n in re.findall(r"([a-zA-Z]+) +([\d,]+) x [\d.]+ m?s = ", printed)}
    records = run_train(f"{options} {resume}")
    first = 3 if resume else 0
    assert counts["steps"] == 10 - first == sum(record["step"] >= first for record in records["train"])
    for name, kind in (("validations", "val"), ("items", "hellaswag"), ("samples", "sample")):
        assert counts[name] == sum(record["step"] >= first for record in records[kind]), name
    # Had every validation been the best so far: at 0, 2, 3, 4, 6, 8, 9 and 10.
    assert counts["checkpoints"] == (6 if resume else 8)
    line = r"([\d.]+) s in all, (\d+)% of it training.*, ([\d,.]+) for 1 rank\(s\) at 1e\+06 per GPU-hour"
    total, share, cost = (float(text.replace(",", "")) for text in re.findall(line, printed)[0])
    assert cost == pytest.approx(1e6 * total / 3600, rel=0.1)
    found = re.findall(r"([a-zA-Z]+) +[\d,]+ x [\d.]+ m?s = ([\d.]+) (m?s)", printed)
    parts = {name: float(n) / (1000 if unit == "ms" else 1) for name, n, unit in found}
    assert parts["start"] == 5 and total == pytest.approx(sum(parts.values()), abs=0.2)
    assert share == pytest.approx(100 * parts["steps"] / total, abs=2)


def test_checkpoints_without_validation_start_later(rehearse, run_train, capsys):
    options = "--max_steps 5 --checkpoint_every 2 --val_every 0"
    rehearse(options)
    assert re.search(r"checkpoints +3 x", capsys.readouterr().out)
    assert [record["step"] for record in run_train(options)["checkpoint"]] == [2, 4, 5]


@pytest.mark.parametrize("start, end", [(0, 60), (7, 60), (6, 61), (60, 60)])
@pytest.mark.parametrize("intervals", [(1,), (6,), (7,), (6, 4), (4, 0), (0, 9), (100, 7), (5, 5)])
def test_steps_that_are_due_are_counted_without_a_loop(start, end, intervals):
    steps = [s for s in range(start, end + 1) if s == end or any(s % n == 0 for n in intervals if n)]
    assert dry_run.times_due(start, end, *intervals) == len(steps)
    assert dry_run.times_due(0, 10**15, 3) == 10**15 // 3 + 2  # at once


def test_run_that_is_finished_has_nothing_to_forecast(rehearse, run_train, capsys):
    run_train("--max_steps 3")
    capsys.readouterr()
    rehearse("--resume --max_steps 3")
    printed = capsys.readouterr().out
    assert "the run in log is at its last step: use a larger --max_steps" in printed
    assert "with the same options" in printed and "forecast" not in printed


def test_what_to_expect_is_said_where_it_is_known(rehearse, shards, monkeypatch, capsys):
    rehearse()
    assert "\nexpect " not in capsys.readouterr().out
    np.save(shards / "edufineweb_train_000003.npy", np.load(shards / "edufineweb_train_000002.npy"))
    shards.rename("fineweb")
    monkeypatch.setattr(published, "why_not", lambda *_: {})  # as for GPT-2 (124M)
    rehearse("--data_dir fineweb")
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    values = "11.01 at the end"
    assert ["expect", f"comparable with the published run, which it should not be above: {values}"] in lines
    assert any(line[0] == "warning" and "hold the same tokens" in line[1] for line in lines)


def test_diverging_run_is_refused(rehearse, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_, **__: {"loss": math.nan, "norm": math.nan})
    with pytest.raises(ValueError, match="the loss is not finite: lower --learning_rate"):
        rehearse()


class VirtualClock(dry_run.Stopwatch):
    """Time passes only in `spend`."""

    def __init__(self):
        super().__init__(ONE)
        self.now = 0.0

    def spend(self, seconds):
        self.now += seconds

    def __call__(self, call, *args):
        before = self.now
        call(*args)
        return self.now - before


@pytest.mark.parametrize(
    "micro_step_s, accum", [(0.01, 1), (0.1, 8), (3.0, 1), (3.0, 128), (6.0, 21.3), (9, 1.5)]
)
def test_long_steps_are_extrapolated(micro_step_s, accum):
    clock = VirtualClock()
    run = SimpleNamespace(args=SimpleNamespace(max_steps=10), dist=ONE, planned_tokens=10 * accum * 32)
    run.train_data, run.progress = SimpleNamespace(batch_size=2, block_size=16), SimpleNamespace(step=0)

    def train_step(run, step, micro_steps):
        clock.spend(micro_steps * micro_step_s + 0.02 * micro_step_s)

    seconds, results = dry_run.time_steps(run, train_step, clock)
    assert sum(seconds) / len(seconds) == pytest.approx(accum * micro_step_s, rel=0.03)
    assert clock.now < 45 and len(results) == len(seconds) + 2 <= dry_run.MOST_STEPS + 2


def test_long_evaluations_are_extrapolated():
    clock, taken = VirtualClock(), []
    seconds = clock.extrapolate(lambda n: taken.append(n) or clock.spend(0.3 * n), 1000)
    assert seconds == pytest.approx(300) and taken == [1, 1, 4, 16] and clock.now < 10
    taken.clear()
    assert clock.extrapolate(lambda n: taken.append(n) or clock.spend(1e-6 * n), 10) == pytest.approx(1e-5)
    assert taken == [1, 1, 4, 10]


def test_batch_that_takes_long_is_cut(rehearse, monkeypatch, capsys):
    rehearse()
    assert "measured with" not in capsys.readouterr().out
    monkeypatch.setattr(dry_run, "MICRO_STEP_S", 1e-9)
    rehearse()
    printed = capsys.readouterr().out
    assert printed.count("measured with --batch_size 1: 2 would take long here") == 2  # speed and memory


def test_micro_batch_of_one_token_passes(rehearse, capsys):
    rehearse("--block_size 1 --batch_size 1 --total_batch_size 1 --val_tokens 1")
    printed = capsys.readouterr().out
    assert "differ" not in printed and "in all" in printed


def test_only_the_chosen_targets_count():
    rows = torch.arange(15).view(3, 5)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    same, kept = dry_run.keep_targets((x, y), 3, 9)
    assert same is x
    expected = [[-100, -100, -100, 4], [6, 7, 8, 9], [11, -100, -100, -100]]
    assert kept.tolist() == expected


def test_difference_is_relative_to_each_tensor():
    reference = {"small": torch.tensor([1e-6, 0.0]), "large": torch.tensor([1e3, 0.0])}
    reference["zero"] = torch.zeros(2)
    ours = {**reference, "small": torch.tensor([1e-6, 5e-7]), "large": torch.tensor([1e3, 1.0])}
    assert dry_run.largest_difference(ours, reference) == (pytest.approx(0.5), "small")
    for broken in (math.nan, math.inf):
        ours["large"] = torch.tensor([broken, 0.0])
        assert dry_run.largest_difference(ours, reference) == (math.inf, "large")
    assert dry_run.largest_difference({**reference, "zero": torch.ones(2)}, reference) == (math.inf, "zero")


def test_without_data_random_ones_are_forecast_and_removed(rehearse, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.rglob("*.npy"))
    rehearse("--data_dir nowhere --val_tokens 64")
    out = capsys.readouterr().out
    assert "there is no nowhere: the dry run reads random bytes instead" in out
    assert "in all" in out and "384 bytes, here of random bytes" in out
    assert "of the training data will be read" not in out
    with pytest.raises(ValueError, match="--epochs needs the data in nowhere: use --max_steps"):
        rehearse("--data_dir nowhere --epochs 1")
    train.main(train.parse_args(f"{TINY} --preset text --n_layer 1 --data_dir nowhere --dry_run".split()))
    assert "6 steps, 384 bytes, here of random bytes" in capsys.readouterr().out  # no epochs of these
    assert sorted(tmp_path.rglob("*.npy")) == before and not Path("nowhere").exists()
    with pytest.raises(ValueError, match="there is no folder nowhere: "):
        train.main(train.parse_args("--data_dir nowhere --preset text".split()))


def test_suggestions(monkeypatch):
    run = SimpleNamespace(args=train.parse_args([]), dist=ONE, dtype=torch.float32, is_compiled=False)
    step_tokens = run.args.total_batch_size
    assert dry_run.suggest(run, 0.0, step_tokens) == []
    assert "local disk" in dry_run.suggest(run, 0.1, step_tokens)[0]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    run.dtype = torch.bfloat16
    assert "only emulates" in dry_run.suggest(run, 0.0, step_tokens)[0]
    run.dist = Distributed(0, 1, torch.device("cuda:0"))
    monkeypatch.setattr(dry_run.hardware, "memory", lambda device: (30e9, 50e9))
    eager, larger = dry_run.suggest(run, 0.0, step_tokens)
    assert "use --compile" in eager and larger.startswith("--batch_size 128 fits")
    assert dry_run.suggest(run, 0.0, 64 * 1024) == [eager]  # the first steps have one micro-step
    monkeypatch.setattr(dry_run.hardware, "memory", lambda device: (50e9, 30e9))
    run.is_compiled = True
    assert dry_run.suggest(run, 0.0, step_tokens) == []


@pytest.mark.gpu
def test_gpu_dry_run_passes_and_reports_memory(rehearse, capsys):
    rehearse("--device cuda --dtype bfloat16 --n_embd 64")
    printed = capsys.readouterr().out
    assert "compiled and eager differ" in printed and "at the peak" in printed and "forecast" in printed


def test_shard_that_cannot_be_read_is_not_called_a_wrong_gradient(rehearse, monkeypatch):
    read, calls = shards_module.Shards.read, []

    def fails(shards, *where):
        calls.append(where)
        if len(calls) > 8:  # after the first batches of both loaders
            raise OSError(5, "Input/output error", "drive")
        return read(shards, *where)

    monkeypatch.setattr(shards_module, "RETRY_S", ())
    monkeypatch.setattr(shards_module.Shards, "read", fails)
    with pytest.raises(ValueError, match="^drive: Input/output error: the disk or network drive fails"):
        rehearse("")
