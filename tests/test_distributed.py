"""Ranks, nodes and signals: real processes that train together, are killed and are stopped."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    MUON,
    REPOSITORY,
    TINY,
    assert_close,
    begin,
    count_lines,
    losses,
    read_losses,
    torchrun,
    wait_until,
    workers,
)

import hellaswag
import sample
import train
from formats.checkpoint import load_checkpoint
from runtime import distributed
from runtime.distributed import SAME_SIGNAL_S

STANDALONE = "--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:0 --local-addr=127.0.0.1"
TWO_RANKS_SCRIPT = """
import argparse, functools, hashlib, os, torch, train
reductions, graphs = [], []

def counted(graph, inputs):
    graphs.append(graph)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

torch.compile = functools.partial(torch.compile, backend=counted)

class Counted(train.DistributedDataParallel):
    def __init__(self, *args, **options):
        super().__init__(*args, **options, bucket_cap_mb={bucket_cap_mb})
        self.register_comm_hook(None, reduce)

    def __del__(self):
        for p in self.parameters():  # gradients are kept once: as views of the buckets that are reduced
            assert not p.grad.any() and p.grad._is_view()
        weights = b"".join(p.detach().numpy().tobytes() for p in self.parameters())
        print(f"weights {{hashlib.sha256(weights).hexdigest()}}\\n", end="", flush=True)

def reduce(state, bucket):
    reductions.append(bucket)
    group = torch.distributed.group.WORLD
    work = torch.distributed.all_reduce(bucket.buffer().div_(2), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])

train.DistributedDataParallel = Counted
for i, args in enumerate({runs}):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)  # a second process group needs a store of its own
    train.main(argparse.Namespace(**args))
    # One write, because two ranks print at once.
    print(f"{{len(reductions)}} reductions, {{len(graphs)}} graphs\\n", end="", flush=True)
    reductions.clear()
    graphs.clear()
"""


def test_two_ranks_match_one_with_one_reduction_per_step(run_train, two_ranks):
    one = run_train("--batch_size 4 --sample_every 3 --sample_tokens 4")
    args = {**one["run"][0]["args"], "batch_size": 1}
    shutil.copytree("log", "resumed")
    Path("resumed/model_00006.pt").unlink()
    Path("resumed/model_best.pt").unlink()
    runs = [{**args, "out_dir": "two", "recompute": True}]
    runs += [{**args, "resume": True, "out_dir": "resumed"}]
    muon = run_train(f"{MUON} --muon_lr 0.05", out_dir="one_muon")
    runs += [{**muon["run"][0]["args"], "batch_size": 1, "out_dir": "two_muon"}]
    Path("two.py").write_text(TWO_RANKS_SCRIPT.format(runs=runs, bucket_cap_mb=None))
    output = two_ranks("two.py")
    for folder in ("two", "resumed"):
        two = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        for kind in ("train", "val"):
            expected = [record["loss"] for record in one[kind]]
            assert [r["loss"] for r in two if r["kind"] == kind] == pytest.approx(expected, abs=1e-5), kind
        assert [r for r in two if r["kind"] == "run"][-1]["world_size"] == 2
    weights = [line for line in output.splitlines() if line.startswith("weights")]
    assert len(weights) == 6 and len(set(weights)) == 3  # those of both ranks are the same
    # Muon rounds to bf16, which makes more of the rounding of sums.
    two = [json.loads(line) for line in Path("two_muon/log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in two if r["kind"] == "train"] == pytest.approx(losses(muon), abs=1e-3)
    # Two micro-steps, one bucket of gradients: 6 steps from the start, twice, and 3 from step 3; two ranks.
    assert (output.count("6 reductions"), output.count("3 reductions")) == (4, 2)


def test_compiled_ranks_with_several_buckets_match_eager_ones(shards, two_ranks):
    # The block and the head are larger than a bucket of 1 MB.
    sizes = "--n_layer 1 --n_embd 160 --vocab_size 2048 --batch_size 1"
    options = f"{TINY} {sizes} --dtype bfloat16 --max_steps 3 --checkpoint_every 0"
    args = vars(train.parse_args(options.split()))
    runs = [{**args, "out_dir": "eager"}, {**args, "compile": True, "recompute": True, "out_dir": "compiled"}]
    Path("two.py").write_text(TWO_RANKS_SCRIPT.format(runs=runs, bucket_cap_mb=1))
    output = two_ranks("two.py")
    figures = []
    for folder in ("eager", "compiled"):
        records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        figures.append([record[name] for name in ("loss", "norm") for record in records if name in record])
    assert len(figures[0]) == (3 + 2) + 3 and figures[1] == pytest.approx(figures[0], rel=1e-3)
    weights = re.findall("weights (.*)", output)
    assert len(weights) == 4 and weights[:2] == weights[2:]  # those of both ranks are the same
    counts = re.findall(r"(\d+) reductions, (\d+) graphs", output)
    assert len(counts) == 4 and all(int(reductions) > 3 for reductions, _ in counts)
    # Besides a trial, validation and training are compiled. Unsplit, they would have a graph each.
    assert [int(graphs) > 3 for _, graphs in counts] == [False, True, False, True]


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
ONE = {**WHOLE, "WORLD_SIZE": "1"}


@pytest.fixture
def launched(monkeypatch):
    """Set the variables of a launcher, and no others of them."""
    for each in (*WHOLE, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(each, raising=False)
    return lambda variables: [monkeypatch.setenv(*each) for each in variables.items()]


@pytest.mark.parametrize(
    "variables, line",
    [
        ({"RANK": "0"}, "RANK is ignored without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: this is a single"),
        ({"RANK": "x", "MASTER_PORT": "1"}, "RANK is ignored without WORLD_SIZE, MASTER_ADDR: "),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is ignored without MASTER_ADDR, MASTER_PORT: "),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "8"}, ""),
        ({"RANK": "", "WORLD_SIZE": ""}, ""),
    ],
)
def test_variables_that_no_launcher_has_set_are_ignored_with_a_line(launched, capsys, variables, line):
    launched(variables)
    cpu = torch.device("cpu")
    assert distributed.setup_distributed(cpu) == distributed.Distributed(0, 1, cpu)
    printed = capsys.readouterr().out
    assert printed.startswith(line) and printed.count("\n") == bool(line)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 without RANK, MASTER_ADDR, MASTER_PORT"),
        ({**WHOLE, "MASTER_PORT": ""}, "WORLD_SIZE is 2 without MASTER_PORT"),
        ({**WHOLE, "RANK": "2"}, "RANK is 2, which is not less than WORLD_SIZE, 2"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1, which is not less than WORLD_SIZE, 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two, which is not a number of at least 0"),
        *(
            ({**WHOLE, name: "-1"}, f"{name} is -1, which is not a number of at least 0")
            for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        ),
    ],
)
def test_variables_that_do_not_suffice_for_several_ranks_are_refused(launched, run_train, variables, message):
    launched(variables)
    with pytest.raises(ValueError, match=f"^{message}: start several processes with torchrun, or unset .*$"):
        run_train()
    assert not Path("log").exists()


def test_one_rank_with_everything_set_joins_a_group(launched, run_train, monkeypatch):
    whole = run_train(out_dir="alone")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched({**ONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)})
    launched({"TORCHELASTIC_USE_AGENT_STORE": "True"})
    joined, init = [], torch.distributed.init_process_group

    def join(*args, **options):
        joined.append(options["world_size"])
        init(*args, **options)

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    assert losses(run_train(out_dir="one")) == losses(whole) and joined == [1]


def test_variables_of_launchers_are_read_in_one_file():
    names = "RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_[A-Z_]+"
    folders = (".", "runtime", "corpus", "formats", "training")
    files = [path for folder in folders for path in (REPOSITORY / folder).glob("*.py")]
    reading = {path.name for path in files if re.search(f"[\"']({names})[\"']", path.read_text())}
    assert reading == {"launcher.py"}


@pytest.mark.parametrize("device, backend", [("cuda:1", "nccl"), ("cpu", "gloo"), ("mps", "gloo")])
def test_ranks_join_with_their_device_and_wait_for_hours(monkeypatch, capsys, device, backend):
    seen = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **o: seen.update(o, name=name))
    for name, value in {**WHOLE, "RANK": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    order: list[bool] = []
    monkeypatch.setattr(distributed, "shared_memory", lambda: order.append("name" in seen) or 64e6)
    monkeypatch.setattr(distributed, "fresh_store", lambda launcher: None)
    advice = "start docker with --ipc=host or --shm-size=1g"
    line = f"warning: /dev/shm has 64.0MB, and NCCL may need 1 GB: {advice}\n"
    for ranks, local_rank, expected in [("2", "1", ""), ("1", "0", ""), ("2", "0", line)]:
        seen.clear()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        dist = distributed.setup_distributed(torch.device(device))
        assert capsys.readouterr().out == (expected if backend == "nccl" else "")
    assert order == [False] * (backend == "nccl")  # before NCCL needs the memory
    assert seen["name"] == backend and (seen["rank"], seen["world_size"], seen["store"]) == (1, 2, None)
    assert seen["device_id"] == (torch.device(device) if backend == "nccl" else None)
    assert seen["timeout"].total_seconds() >= 3600
    assert dist == distributed.Distributed(1, 2, torch.device(device if backend == "nccl" else "cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops_and_the_run_can_be_resumed(shards, run_train, number):
    options = "--max_steps 30 --total_batch_size 128 --checkpoint_every 400 --log_every 1 --dropout 0.1"
    life = begin(f"{TINY} {options}", "printed")
    wait_until(lambda: count_lines("log") > 10)
    os.kill(life.pid, number)
    life.join()
    printed = Path("printed").read_text()
    assert life.exitcode == 0 and "step/s" not in printed, printed  # no bar: this is not a terminal
    stopped_at = len(read_losses())
    assert f"stopped by a signal before step {stopped_at}" in printed and stopped_at < 30
    assert load_checkpoint("log")["step"] == stopped_at
    run_train(f"{options} --resume")
    run_train(options, out_dir="whole")
    assert read_losses() == read_losses("whole") and read_losses(kind="val") == read_losses("whole", "val")


EVALUATIONS = {
    "val": (train.DataLoaderLite, "next_batches", lambda loader, *_: "val" in loader.shards.paths[0].name),
    "hellaswag": (hellaswag, "score_batch", lambda *_: True),
    "sample": (sample, "_draw", lambda *_: True),
}


@pytest.mark.parametrize("kind", EVALUATIONS)
@pytest.mark.parametrize("step", [0, 3])
def test_signal_ends_an_evaluation_and_the_run_can_be_resumed(run_train, monkeypatch, capsys, kind, step):
    options = "--hellaswag_data demo --hellaswag_every 3 --sample_every 3 --dropout 0.1 "
    options += "--hellaswag_limit 12 --sample_tokens 4"
    run_train(options, out_dir="whole")
    where, name, counts = EVALUATIONS[kind]
    original, calls = getattr(where, name), []

    def stops(*args, **others):
        if counts(*args) and Path("log/log.jsonl").exists() and len(read_losses()) >= step:
            calls.append(name)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **others)

    monkeypatch.setattr(where, name, stops)
    by_kind = run_train(options)
    assert len(calls) == 1 and f"stopped by a signal before step {step}" in capsys.readouterr().out
    assert not any(record["step"] == step for record in by_kind.get(kind, []))
    assert "end" not in by_kind and load_checkpoint("log")["step"] == step
    monkeypatch.setattr(where, name, original)
    run_train(f"{options} --resume")
    for each in ("train", "val"):
        assert read_losses(kind=each) == read_losses("whole", each)
    kinds = [[json.loads(line)["kind"] for line in open(f"{log}/log.jsonl")] for log in ("log", "whole")]
    evaluations = [[each for each in found if each in EVALUATIONS] for found in kinds]
    assert sorted(evaluations[0]) == sorted(evaluations[1])


def test_second_signal_ends_at_once(shards):
    # A step of 2**20 tokens takes minutes: the first signal waits for its end.
    life = begin(f"{TINY} --total_batch_size 1048576 --max_steps 3 --val_every 0 --checkpoint_every 1")
    wait_until(lambda: count_lines("log") == 1)
    time.sleep(0.2)
    for _ in range(2):  # torchrun repeats the signal of Ctrl-C: two in quick succession count as one
        os.kill(life.pid, signal.SIGINT)
        time.sleep(0.05)
    time.sleep(SAME_SIGNAL_S)
    assert life.is_alive()
    os.kill(life.pid, signal.SIGINT)
    life.join(timeout=20)
    assert life.exitcode == -signal.SIGINT


def test_torchrun_restarts_a_killed_worker_and_the_run_continues(shards, run_train):
    options = "--max_steps 40 --checkpoint_every 5 --resume"
    launcher = f"{STANDALONE} --nproc_per_node=2 --max-restarts=2 --monitor-interval=0.1"
    agent = torchrun(launcher, f"{TINY} {options} --batch_size 1")
    wait_until(lambda: count_lines("log") > 15)
    os.kill(workers(agent)[1], signal.SIGKILL)
    agent.join(timeout=120)
    assert agent.exitcode == 0
    records = [json.loads(line) for line in Path("log/log.jsonl").read_text().splitlines()]
    resumed_at = [record["step"] for record in records if record["kind"] == "run"]
    assert resumed_at[0] == 0 and len(resumed_at) == 2 and resumed_at[1] > 0
    run_train(f"{options} --batch_size 4", out_dir="one")
    assert_close(read_losses(), read_losses("one"))
    assert_close(read_losses(kind="val"), read_losses("one", "val"))


def test_closed_terminal_stops_torchrun_under_nohup_unless_it_leaves_the_signal_alone(shards):
    def start(folder: str, launcher: str = ""):
        options = f"{TINY} --max_steps 4000 --checkpoint_every 4000 --val_every 0 --out_dir {folder}"
        launcher = f"{STANDALONE} --nproc_per_node=1 --monitor-interval=0.1 {launcher}"
        return torchrun(launcher, options, f"{folder}.txt", nohup=True)

    stops, goes_on = start("stops"), start("goes_on", "--signals_to_handle=SIGTERM,SIGINT")
    for folder, process in (("stops", stops), ("goes_on", goes_on)):
        wait_until(lambda folder=folder: count_lines(folder) > 10)
        os.kill(process.pid, signal.SIGHUP)
    stops.join(60)
    assert stops.exitcode == 1
    done = len(read_losses("stops"))
    assert load_checkpoint("stops")["step"] == done < 4000
    again = "python train.py --resume --out_dir stops continues"
    assert f"before step {done}: {again}" in Path("stops.txt").read_text()
    before = count_lines("goes_on")
    wait_until(lambda: count_lines("goes_on") > before + 10)
    goes_on.terminate()
    goes_on.join(60)


def test_rank_that_hangs_ends_the_others_with_step_and_collective(shards):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    about |= {"LOCAL_WORLD_SIZE": "2", "HANG_TIMEOUT_S": "2"}
    options = f"{TINY} --batch_size 1 --max_steps 100000 --val_every 0 --checkpoint_every 0 --log_every 1"
    ranks = []
    for rank in ("0", "1"):
        environment = {**about, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(begin(options, f"rank{rank}.txt", environment=environment))
    wait_until(lambda: count_lines("log") > 20)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ranks[0].join(60)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert ranks[0].exitcode == 1
    printed = Path("rank0.txt").read_text().splitlines()
    last_step = re.match(r"step +(\d+)", [line for line in printed if line.startswith("step")][-1])[1]
    where = r"(all_reduce, )?\S+, line \d+: .+"
    found = re.search(rf"rank 0: step (\d+) failed in ({where}), because", printed[-1])
    assert int(found[1]) == int(last_step) + 1 and ("backward" in found[2] or "all_reduce" in found[2])
    assert "Timed out waiting 2000ms" in printed[-1] and "Traceback" not in "".join(printed)


def test_time_until_a_hang_is_checked(monkeypatch):
    monkeypatch.setenv("HANG_TIMEOUT_S", "ten")
    dist = distributed.Distributed(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="^HANG_TIMEOUT_S is ten: set it to seconds, such as 600$"):
        with distributed.no_hangs(dist, SimpleNamespace(step=0)):
            pass


def test_hang_on_gpus_is_named_before_nccl_aborts_the_process(capsys, monkeypatch):
    ended, inside = threading.Event(), threading.Event()
    wait = {"wait": lambda: (inside.set(), ended.wait(20))}
    exec(compile("def all_reduce(total):\n    wait()", "torch/distributed_c10d.py", "exec"), wait)
    monkeypatch.setattr(torch.distributed, "all_reduce", wait["all_reduce"])
    dist = distributed.Distributed(3, 8, torch.device("cpu"))
    hanging = threading.Thread(target=dist.sum, args=[1.0])
    hanging.start()
    inside.wait(20)
    distributed.name_hang(dist.rank, SimpleNamespace(step=12), 0.1, hanging.ident, ended)
    ended.set()
    hanging.join()
    line = "rank 3: step 12 has taken 0 s so far, in all_reduce, distributed.py, line "
    assert capsys.readouterr().out.startswith(line)


def test_two_nodes_match_one_process(shards, run_train):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = f"--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{port} --rdzv_id=test"
    launcher = f"--nnodes=2 --nproc_per_node=1 --local-addr=127.0.0.1 {rendezvous}"
    agents = [torchrun(launcher, f"{TINY} --out_dir two") for _ in range(2)]
    for agent in agents:
        agent.join(timeout=120)
        assert agent.exitcode == 0
    run_train("--batch_size 4", out_dir="one")
    assert_close(read_losses("two"), read_losses("one"))
    assert_close(read_losses("two", "val"), read_losses("one", "val"))


def test_failing_rank_ends_the_job_with_its_error(shards):
    Path("one_fails.py").write_text(
        "import sys, train\n"
        "def fails(step, args):\n"
        "    if step == 2 and train.torch.distributed.get_rank() == 1:\n"
        "        raise RuntimeError('rank 1 is broken')\n"
        "    return 1e-3\n"
        "train.learning_rate_at = fails\n"
        "train.main(train.parse_args(sys.argv[1:]))\n"
    )
    # Forked ranks would only report the first one that ends, which may be the other.
    command = f"-m torch.distributed.run --standalone --nproc_per_node=2 one_fails.py {TINY}".split()
    options = dict(capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    ended = subprocess.run([sys.executable, *command], **options, timeout=120)
    assert ended.returncode == 1 and "RuntimeError: rank 1 is broken" in ended.stderr


UNREADABLE_SHARDS_SCRIPT = """
import os, train
from corpus import shards as shards_module
shards_module.RETRY_S = ()
read, rank = shards_module.Shards.read, os.environ["RANK"]

def fails(shards, shard, start, end):
    if rank == "1" and {split!r} in shards.paths[0].name and os.path.exists("log/model_00003.pt"):
        raise OSError(5, "Input/output error", "drive")
    return read(shards, shard, start, end)

shards_module.Shards.read = fails
try:
    train.main(train.parse_args({options!r}.split()))
except (SystemExit, ValueError) as error:
    print(f"rank {{rank}}: {{error}}\\n", end="", flush=True)
"""


@pytest.mark.parametrize("split", ["train", "val"])
def test_rank_that_cannot_read_its_shards_ends_all_after_a_checkpoint(run_train, two_ranks, split):
    options = f"{TINY} --batch_size 1 --max_steps 200 --val_every 20 --checkpoint_every 3 --keep 0"
    Path("two.py").write_text(UNREADABLE_SHARDS_SCRIPT.format(options=options, split=split))
    output = two_ranks("two.py")
    assert "rank 0: drive: Input/output error: the disk or network drive fails; check it, then" in output
    assert "rank 1: 1\n" in output
    done = len(read_losses())
    assert load_checkpoint("log")["step"] == done < 200  # no step is lost
    run_train(f"{options} --batch_size 4 --max_steps {done + 2} --warmup_steps 1 --resume")


def test_refused_command_is_reported_once_and_ends_all_ranks(shards, two_ranks):
    options = f"{TINY} --batch_size 3"
    Path("two.py").write_text(UNREADABLE_SHARDS_SCRIPT.format(options=options, split="none"))
    output = two_ranks("two.py")
    assert output.count("not divisible by --batch_size 3") == 1 and "rank 1: 1\n" in output


NO_COMPILER_SCRIPT = """
import os, torch, train
from runtime import hardware

def fails(function):
    raise RuntimeError(f"no compiler on rank {{rank}}")

rank, check = os.environ["RANK"], hardware.can_compile
torch.compile = fails
os.environ.update(PATH="", CC="")
hardware.can_compile = lambda device, say: check(torch.device("cuda"), say)
try:
    train.main(train.parse_args({options!r}.split()))
except (SystemExit, ValueError) as error:
    print(f"rank {{rank}}: {{error}}\\n", end="", flush=True)
"""


def test_missing_compiler_is_reported_once_and_ends_all_ranks_before_the_first_step(shards, two_ranks):
    Path("two.py").write_text(NO_COMPILER_SCRIPT.format(options=f"{TINY} --batch_size 1 --compile"))
    output = two_ranks("two.py")
    assert "rank 0: torch.compile does not work here: Triton needs a C compiler" in output
    assert "rank 1: 1\n" in output and output.count("build-essential") == 1 and not Path("log").exists()


def test_end_of_the_terminal_is_a_signal_to_stop_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):  # nohup ignores it
            signal.signal(signal.SIGHUP, handler)
            stop = distributed.StopSignal()
            stop.listen()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
            assert bool(stop) == stops
            stop.restore()
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
