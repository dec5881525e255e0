"""Runs of train.py that something happens to: real processes, killed, stopped and starved."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import FORKED, REPOSITORY, TINY, torchrun_command

import train
from model import load_checkpoint

KILLS = 20


def read(folder: str | Path = "log", kind: str = "train") -> list[tuple[int, float]]:
    """Steps and losses of a run, in the order of its log."""
    records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == kind]


def assert_close(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> None:
    """The same steps, and losses that differ by the order of additions only."""
    assert ours == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in theirs]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def lines(folder: str | Path) -> int:
    path = Path(folder, "log.jsonl")
    return len(path.read_text().splitlines()) if path.exists() else 0


def inode(path: str) -> int:
    return os.stat(path).st_ino if os.path.exists(path) else 0


@pytest.fixture
def start(shards):
    """Start train.py on the tiny model as a process of its own; options are a string."""
    processes = []

    def start(options: str, launcher: tuple[str, ...] = (), **popen) -> subprocess.Popen:
        command = [sys.executable, *launcher, REPOSITORY / "train.py", *f"{TINY} {options}".split()]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, **{**pipes, **popen}))
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()  # torchrun takes its workers with it, which have sessions of their own
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that a torchrun has started."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def train_into(output: str, argv: list[str]) -> None:
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    train.main(train.parse_args(argv))


def begin(options: str, output: str = os.devnull) -> multiprocessing.Process:
    """Start train.py as a process that writes what it prints to a file."""
    life = FORKED.Process(target=train_into, args=(output, options.split()), daemon=True)
    life.start()
    return life


def test_a_run_killed_at_random_instants_loses_nothing(shards):
    options = (
        f"--data_dir {shards} --tokenizer byte --n_layer 2 --n_head 2 --n_embd 64 --block_size 16 "
        f"--batch_size 8 --total_batch_size 512 --warmup_steps 2 --max_steps 80 --dropout 0.1 --shuffle "
        f"--val_every 3 --val_tokens 600 --hellaswag_every 40 --hellaswag_data {train.DEMO_ITEMS} "
        "--sample_every 0 --checkpoint_every 4 --device cpu --dtype float32 --resume --out_dir"
    )
    whole = begin(f"{options} whole")
    whole.join()
    assert whole.exitcode == 0 and len(read("whole")) == 80

    rng, half_written = random.Random(0), 0
    for i in range(KILLS):
        before = inode("killed/log.jsonl")
        life = begin(f"{options} killed")

        def wait(condition, life=life):
            wait_until(lambda: condition() or not life.is_alive())

        wait(lambda before=before: inode("killed/log.jsonl") != before)  # a run writes its log anew
        enough = lines("killed") + rng.randint(0, 6)
        wait(lambda enough=enough: lines("killed") >= enough)
        time.sleep(rng.uniform(0, 0.02))
        if i % 2:  # in the middle of a checkpoint
            wait(lambda: any(Path("killed").glob("*.tmp")))
        assert life.is_alive(), "the run ended before it was killed"
        os.kill(life.pid, signal.SIGKILL)
        life.join()
        assert life.exitcode == -signal.SIGKILL
        half_written += any(Path("killed").glob("*.tmp"))
    last = begin(f"{options} killed")
    last.join()
    assert last.exitcode == 0
    assert read("killed") == read("whole")
    assert read("killed", "val") == read("whole", "val")
    a, b = (load_checkpoint(f"{folder}/model_00080.pt")["model"] for folder in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(Path("killed").glob("*.tmp"))
    assert half_written > 0
    print(f"{KILLS} kills, {half_written} of them while a file was being written")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on(shards, run_train, number):
    options = "--max_steps 40 --total_batch_size 512 --checkpoint_every 400 --log_every 1 --dropout 0.1"
    life = begin(f"{TINY} {options}", "printed")
    wait_until(lambda: lines("log") > 10)
    os.kill(life.pid, number)
    life.join()
    printed = Path("printed").read_text()
    assert life.exitcode == 0 and "step/s" not in printed, printed  # no bar: this is not a terminal
    stopped_at = len(read())
    assert f"stopped by a signal after step {stopped_at - 1}" in printed and stopped_at < 40
    assert load_checkpoint("log")["step"] == stopped_at
    run_train(f"{options} --resume")
    run_train(options, out_dir="whole")
    assert read() == read("whole") and read(kind="val") == read("whole", "val")


def test_a_second_signal_ends_at_once(shards):
    # A step of 2**20 tokens takes minutes: the first signal waits for its end.
    life = begin(f"{TINY} --total_batch_size 1048576 --max_steps 2 --val_every 0 --checkpoint_every 1")
    wait_until(lambda: lines("log") == 1)
    time.sleep(0.2)
    for _ in range(2):  # torchrun sends again what Ctrl-C has sent to all: within moments these are one
        os.kill(life.pid, signal.SIGINT)
        time.sleep(0.05)
    time.sleep(train.SAME_SIGNAL_S)
    assert life.is_alive()
    os.kill(life.pid, signal.SIGINT)
    life.join(timeout=20)
    assert life.exitcode == -signal.SIGINT


def test_torchrun_restarts_a_killed_worker_and_the_run_goes_on(start, run_train):
    options = "--max_steps 40 --checkpoint_every 5 --resume"
    standalone = ("--standalone", "--nproc_per_node=2", "--max-restarts=2", "--monitor-interval=0.1")
    process = start(f"{options} --batch_size 1", torchrun_command(*standalone))
    wait_until(lambda: lines("log") > 15)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    records = [json.loads(line) for line in Path("log/log.jsonl").read_text().splitlines()]
    resumed_at = [record["step"] for record in records if record["kind"] == "run"]
    assert resumed_at[0] == 0 and len(resumed_at) == 2 and resumed_at[1] > 0
    run_train(f"{options} --batch_size 4", out_dir="one")
    assert_close(read(), read("one"))
    assert_close(read(kind="val"), read("one", "val"))


def test_two_nodes_train_as_one_process(start, run_train):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test")
    launcher = torchrun_command("--nnodes=2", "--nproc_per_node=1", "--local-addr=127.0.0.1", *rendezvous)
    nodes = [start("--out_dir two", launcher) for _ in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors
    run_train("--batch_size 4", out_dir="one")
    assert_close(read("two"), read("one"))
    assert_close(read("two", "val"), read("one", "val"))


def test_a_rank_that_fails_ends_the_job_with_its_error(start, tmp_path):
    script = tmp_path / "one_fails.py"
    script.write_text(
        "import sys, train\n"
        "def fails(step, args):\n"
        "    if step == 2 and train.torch.distributed.get_rank() == 1:\n"
        "        raise RuntimeError('rank 1 is broken')\n"
        "    return 1e-3\n"
        "train.learning_rate_at = fails\n"
        "train.main(train.parse_args(sys.argv[2:]))\n"
    )
    launcher = (*torchrun_command("--standalone", "--nproc_per_node=2"), str(script))
    process = start("--max_steps 8", launcher, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "RuntimeError: rank 1 is broken" in errors
    process = start("--batch_size 3", torchrun_command("--standalone", "--nproc_per_node=2"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count("does not divide by --batch_size 3") == 1


@pytest.fixture
def disk_full(monkeypatch):
    """Let the writes of these checkpoints (counted from 0) hit a limit of the system after 50 kB."""
    write = train.torch.save

    def limit(*failing: int) -> None:
        calls = iter(range(1000))

        def save(checkpoint, file):
            old = resource.getrlimit(resource.RLIMIT_FSIZE)
            soft = 50_000 if next(calls) in failing else old[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, old[1]))
            try:
                write(checkpoint, file)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)

        monkeypatch.setattr(train.torch, "save", save)

    return limit


def test_a_full_disk_costs_one_checkpoint(run_train, disk_full, capfd):
    whole = run_train("--val_every 0 --checkpoint_every 2")
    disk_full(1)
    records = run_train("--val_every 0 --checkpoint_every 2", out_dir="full")
    assert "warning: could not write" in capfd.readouterr().out
    assert records["train"][-1]["loss"] == whole["train"][-1]["loss"]
    assert [record["step"] for record in records["checkpoint"]] == [2, 6]
    assert {path.name for path in Path("full").glob("model*")} == {"model_00002.pt", "model_00006.pt"}


def test_a_disk_that_stays_full_ends_the_run(run_train, disk_full):
    disk_full(1, 2)
    with pytest.raises(ValueError, match="model_00006.pt .*large.* nor the one before: .*model_00002.pt"):
        run_train("--val_every 0 --checkpoint_every 2 --max_steps 100")
    assert len(read()) < 100
    disk_full(2)
    with pytest.raises(ValueError, match="not write .*model_00006.pt .* --resume from .*model_00004.pt"):
        run_train("--val_every 0 --checkpoint_every 2")  # the last one


def test_an_altered_checkpoint_is_passed_over(run_train):
    whole = run_train("--val_every 0")
    newest = Path("log/model_00006.pt")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match="passing over .*model_00006.pt .*fails its checksum"):
        resumed = run_train("--val_every 0 --resume")
    assert resumed["train"] != whole["train"]  # trained again, from step 3
    assert read() == [(record["step"], record["loss"]) for record in whole["train"]]


def test_a_checkpoint_holds_what_was_there_when_it_was_saved(tmp_path, monkeypatch):
    release, write = threading.Event(), torch.save
    monkeypatch.setattr(train.torch, "save", lambda *a: release.wait(60) and write(*a))
    logged = []
    writer = train.CheckpointWriter(tmp_path, 0, 0, lambda step, kind, **values: logged.append((step, kind)))
    wte = torch.ones(1000)
    tensors = {"wte": wte, "lm_head": wte.view(1000), "state": [torch.arange(3), {"plain": (0.9, None)}]}
    writer.save(["model_00001.pt", "model_best.pt"], {"step": 1, **tensors}, torch.device("cpu"))
    wte.zero_()  # training goes on while the file is written
    assert not list(tmp_path.glob("*.pt"))
    release.set()
    writer.save(["model_00002.pt"], {"step": 2, **tensors}, torch.device("cpu"))
    writer.close()
    first, second = (torch.load(tmp_path / f"model_0000{i}.pt", weights_only=True) for i in (1, 2))
    assert first["wte"].sum() == 1000 and second["wte"].sum() == 0
    assert first["wte"].data_ptr() == first["lm_head"].data_ptr()
    assert first["state"][1] == {"plain": (0.9, None)}
    assert (tmp_path / "model_best.pt").read_bytes()[:4] == b"PK\x03\x04"
    assert logged == [(1, "checkpoint"), (2, "checkpoint")]


def test_the_last_the_milestones_and_the_best_are_kept(run_train):
    run_train("--checkpoint_every 1 --milestone_every 2 --keep 1 --max_steps 7 --learning_rate 1e-9")
    best = torch.load("log/model_best.pt", weights_only=True)
    names = {path.name for path in Path("log").glob("*.pt")}
    assert names == {"model_00002.pt", "model_00004.pt", "model_00006.pt", "model_00007.pt", "model_best.pt"}
    losses = dict(read(kind="val"))
    assert losses[best["step"]] == min(losses.values())


def test_running_out_of_memory_names_the_batch_size_to_try(start):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    process = start("--vocab_size 1000000 --batch_size 64 --total_batch_size 1024", preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(
        "train.py: error: out of memory with --batch_size 64: try --batch_size 32 or --recompute"
    )


def test_batch_size_auto_is_the_largest_that_fits(run_train, monkeypatch, capsys):
    chosen = run_train("--batch_size 4")
    auto = run_train("--batch_size auto")
    assert auto["run"][0]["args"]["batch_size"] == 4  # 64 tokens of 16 to a sequence
    assert [r["loss"] for r in auto["train"]] == [r["loss"] for r in chosen["train"]]
    model = train.GPT(train.GPTConfig(16, 320, 2, 2, 32))
    fits_2 = model.training_bytes(2, 16, torch.float32)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2 * fits_2 + 2)
    assert run_train("--batch_size auto")["run"][0]["args"]["batch_size"] == 2
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.raises(ValueError, match="not even --batch_size 1 fits into memory: give --recompute"):
        run_train("--batch_size auto")


def test_without_a_compiler_training_is_eager_after_one_warning_and_a_terminal_shows_a_bar(start, tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    terminal, its_other_end = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = start("--compile --max_steps 3", env=environment, stderr=its_other_end)
    output, _ = process.communicate(timeout=120)
    os.close(its_other_end)  # to read nothing is an error now
    bar = os.read(terminal, 65536).decode()
    assert process.returncode == 0, bar
    assert output.count("warning: torch.compile does not work here") == 1 and "float32, eager, " in output
    assert len(read()) == 3
    assert "3/3" in bar and "step/s" in bar and "step/s" not in output


def test_an_overflow_of_fp16_is_skipped_counted_and_recovered_from(run_train):
    fp32 = run_train("--max_steps 3")
    run_train("--max_steps 3 --dtype float16")
    path = Path("log/model_00003.pt")
    checkpoint = torch.load(path, weights_only=True)
    # The norm is that of the true gradient: unscaled before it is clipped.
    records = [json.loads(line) for line in Path("log/log.jsonl").read_text().splitlines()]
    norms = [record["norm"] for record in records if record["kind"] == "train"]
    assert norms == pytest.approx([record["norm"] for record in fp32["train"]], rel=0.05)
    checkpoint["scaler"]["scale"] = 2.0**40
    torch.save(checkpoint, path)
    shutil.copy(path, "log/model_best.pt")
    records = run_train("--max_steps 60 --max_skipped 40 --dtype float16 --resume")["train"]
    skipped = [record["skipped"] for record in records]
    assert max(skipped) >= 2 and skipped[-1] == max(skipped) and records[-1]["loss"] < 5.5
    after = torch.load("log/model_00060.pt", weights_only=True)["scaler"]
    assert after["scale"] == 2.0 ** (40 - skipped[-1])
    assert all((record["norm"] is None) == (record["skipped"] > before) for record, before in
               zip(records[3:], skipped[2:], strict=False))  # fmt: skip


def test_recomputed_activations_change_nothing_but_memory(run_train):
    kept, again = (run_train(f"--dropout 0.1 {option}") for option in ("", "--recompute"))
    assert [r["loss"] for r in again["train"]] == [r["loss"] for r in kept["train"]]


@pytest.mark.parametrize("recompute", [False, True])
def test_training_bytes_counts_what_a_block_saves(recompute):
    def saved(n_layer: int) -> int:
        model = train.GPT(train.GPTConfig(16, 64, n_layer, 2, 32))
        model.recompute = recompute
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
            return tensor

        idx = torch.zeros(8, 16, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert math.isfinite(model(idx, idx)[1].item())
        return sum(sizes.values()), model.training_bytes(8, 16, torch.float32) - 16 * model.num_params()

    (one, formula_one), (three, formula_three) = saved(1), saved(3)
    # LayerNorm's mean and deviation and the softmax' normaliser are small beside the rest.
    assert three - one == pytest.approx(formula_three - formula_one, rel=0.05)
