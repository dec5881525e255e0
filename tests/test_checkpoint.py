"""Checkpoints: background writes, recovery from any crash; foreign, damaged and malicious files."""

import argparse
import errno
import io
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_GPT, begin, count_lines, inode, read_losses, tiny_gpt, wait_until
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import train
from formats import checkpoint
from formats.checkpoint import is_plain, load_checkpoint
from model import GPT, GPTConfig
from runtime.cli import THIS_COMMAND, as_words
from runtime.distributed import Distributed
from training import checkpoints
from training.checkpoints import CheckpointWriter
from training.folder import RunFolder

KILLS = 8


def test_run_killed_at_random_instants_loses_nothing(shards):
    options = (
        f"--data_dir {shards} --tokenizer byte --n_layer 2 --n_head 2 --n_embd 48 --block_size 16 "
        f"--batch_size 16 --total_batch_size 256 --warmup_steps 2 --max_steps 30 --dropout 0.1 --shuffle "
        f"--val_every 3 --val_tokens 600 --hellaswag_every 15 --hellaswag_data demo --hellaswag_limit 4 "
        "--sample_every 0 --checkpoint_every 3 --device cpu --dtype float32 --resume --out_dir"
    )
    whole = begin(f"{options} whole")
    whole.join()
    assert whole.exitcode == 0 and len(read_losses("whole")) == 30

    rng, half_written = random.Random(0), 0
    for i in range(KILLS):
        before = inode("killed/log.jsonl")
        life = begin(f"{options} killed")

        def wait(condition, life=life):
            wait_until(lambda: condition() or not life.is_alive())

        wait(lambda before=before: inode("killed/log.jsonl") != before)  # a run rewrites its log
        enough = count_lines("killed") + rng.randint(0, 6)
        wait(lambda enough=enough: count_lines("killed") >= enough)
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
    assert read_losses("killed") == read_losses("whole")
    assert read_losses("killed", "val") == read_losses("whole", "val")
    a, b = (load_checkpoint(f"{folder}/model_00030.pt")["model"] for folder in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(Path("killed").glob("*.tmp"))
    assert half_written > 0
    print(f"{KILLS} kills, {half_written} of them while a file was being written")


@pytest.fixture
def disk_full(monkeypatch):
    """Make the writes of these checkpoints (counted from 0) fail after 50 kB."""
    write = torch.save

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

        monkeypatch.setattr(checkpoints.torch, "save", save)

    return limit


def test_full_disk_costs_one_checkpoint(run_train, disk_full, capfd):
    whole = run_train("--val_every 0 --checkpoint_every 2")
    disk_full(1)
    records = run_train("--val_every 0 --checkpoint_every 2", out_dir="full")
    assert "warning: could not write" in capfd.readouterr().out
    assert records["train"][-1]["loss"] == whole["train"][-1]["loss"]
    assert [record["step"] for record in records["checkpoint"]] == [2, 6]
    assert {path.name for path in Path("full").glob("model*")} == {"model_00002.pt", "model_00006.pt"}


def test_disk_that_stays_full_ends_the_run(run_train, disk_full):
    disk_full(1, 2)
    with pytest.raises(ValueError, match="model_00006.pt .*large.* previous write failed .*model_00002.pt"):
        run_train("--val_every 0 --checkpoint_every 2 --max_steps 100")
    assert len(read_losses()) < 100
    disk_full(2)
    with pytest.raises(ValueError, match="not write .*model_00006.pt .*--resume .* from .*model_00004.pt"):
        run_train("--val_every 0 --checkpoint_every 2")  # the last one


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def damage(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def test_altered_checkpoint_is_skipped_and_nothing_else_is_deleted(run_train):
    whole = run_train("--val_every 0 --keep 1 --milestone_every 0 --checkpoint_every 1 --max_steps 4")
    shutil.copytree("log", "earlier")
    run_train("--val_every 0 --keep 1 --milestone_every 0 --checkpoint_every 1 --resume")
    shutil.copy("earlier/model_00004.pt", "log")  # which the run has deleted after 5
    damage(Path("log/model_00006.pt"))
    with pytest.warns(UserWarning, match="skipping .*model_00006.pt .*fails its checksum"):
        run_train("--val_every 0 --keep 1 --milestone_every 0 --checkpoint_every 1 --resume")
    assert read_losses()[:4] == [(record["step"], record["loss"]) for record in whole["train"]]
    assert len(read_losses()) == 6
    names = {path.name for path in Path("log").glob("*.pt")}
    assert names == {"model_00006.pt"} and load_checkpoint("log")["step"] == 6


def test_every_damaged_byte_is_damage_and_never_an_error_of_the_system(tmp_path):
    path = tmp_path / "model_00001.pt"
    torch.save({"a": torch.arange(100), "step": 1}, path)
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        altered = bytearray(data)
        altered[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(altered if rng.random() < 0.7 else data[: rng.randrange(len(data))])
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert "is damaged or not a checkpoint" in str(error) and "\n" not in str(error)


class FailingFile(io.FileIO):
    """A file on a disk that fails after some reads."""

    reads = 3

    def readinto(self, buffer):
        self.reads -= 1
        if self.reads < 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(buffer)


def refuse(number):
    def fail(path, *mode):
        raise OSError(number, os.strerror(number), str(path))

    return fail


def test_resumed_run_does_not_depend_on_its_file(run_train):
    run_train("--max_steps 3")
    wanted = train.parse_args(["--max_steps", "9"])
    resumed = checkpoints.load_training_state(wanted)
    states = resumed["optimizer"]["state"].values()
    expected = [moment.clone() for state in states for moment in state.values()]
    model = GPT(GPTConfig(**resumed["config"]))
    args, dist = train.parse_args(TINY.split()), Distributed(0, 1, torch.device("cpu"))
    optimizer = train.build_optimizer(model, args, dist)
    resumed = checkpoints.load_training_state(wanted)  # mapped again: nothing has been read
    checkpoints.restore_optimizer(optimizer, resumed["optimizer"]["state"])
    for path in Path("log").glob("*.pt"):
        with open(path, "r+b") as file:  # in place, which nobody should do
            file.write(bytes(path.stat().st_size))
    got = [moment for state in optimizer.state_dict()["state"].values() for moment in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and any(m.any() for m in got)


LOAD_SCRIPT = """
import sys
from pathlib import Path
from formats.checkpoint import load_checkpoint

def private():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return 1024 * int(line.split()[1])

load_checkpoint(sys.argv[1])
before = private()
checkpoint = load_checkpoint(sys.argv[2])
assert checkpoint["model"].sum() == 20_000_000
print(private() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_ranks_that_resume_share_the_memory_of_the_checkpoint():
    torch.save({"model": torch.ones(1)}, "small.pt")
    torch.save({"model": torch.ones(20_000_000)}, "large.pt")  # 80 MB
    Path("load.py").write_text(LOAD_SCRIPT)
    begin("small.pt large.pt", "printed", script="load.py").join(60)
    printed = Path("printed").read_text()
    assert printed.strip().isdecimal() and int(printed) < 20e6, printed


@pytest.mark.parametrize(
    "trouble, message",
    [
        (refuse(errno.EACCES), "Permission denied"),
        (refuse(errno.ESTALE), "Stale file handle"),
        (lambda path, mode: io.BufferedReader(FailingFile(path), 64), "Input/output error"),
        ("memory", "too little memory to load"),
    ],
)
@pytest.mark.parametrize("name", ["model_00006.pt", "model_best.pt"])
def test_unreadable_checkpoint_ends_the_command(run_train, monkeypatch, trouble, message, name):
    run_train()
    if name == "model_best.pt":  # the newest, as after a kill between two checkpoints
        Path("log/model_00006.pt").unlink()
    before, load = contents("log"), torch.load

    def opens(path, mode):
        return trouble(path, mode) if Path(path).name == name else open(path, mode)

    def allocates(file, **options):
        if Path(file.name if hasattr(file, "name") else file).name == name:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return load(file, **options)

    if trouble == "memory":
        monkeypatch.setattr(checkpoint.torch, "load", allocates)
    else:
        monkeypatch.setattr(checkpoint, "open", opens, raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        run_train("--resume")
    assert "nothing has been changed" in str(caught.value) and "\n" not in str(caught.value)
    assert contents("log") == before and not Path("log.1").exists()


def test_damaged_best_checkpoint_is_reported_even_if_it_is_not_the_newest(run_train):
    run_train()
    damage(Path("log/model_best.pt"), 0.05)
    Path("log/model_best.pt").write_bytes(Path("log/model_best.pt").read_bytes()[:-500])
    with pytest.warns(UserWarning, match="skipping a checkpoint: .*model_best.pt is damaged"):
        assert load_checkpoint("log")["step"] == 6


def test_links_and_folders_with_the_name_of_a_checkpoint_are_not_loaded(run_train):
    run_train()
    Path("log/model_00009.pt").symlink_to("nowhere.pt")
    Path("log/model_00010.pt").mkdir()
    assert load_checkpoint("log")["step"] == 6 and len(run_train("--max_steps 8 --resume")["train"]) == 8


def test_entry_that_claims_to_be_a_folder_is_damage(tmp_path):
    path = tmp_path / "model_00001.pt"
    torch.save({"a": torch.arange(100), "step": 1}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 38] |= 0x10  # of the first entry in the directory of the file
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged or not a checkpoint .*claims to be a folder"):
        load_checkpoint(path)


def test_too_little_memory_for_a_step_is_one_line_about_memory(run_train, monkeypatch):
    run_train()
    load = torch.load

    def loads(file, **options):
        if options.get("mmap"):
            raise RuntimeError("unable to mmap 9 bytes from file <log>: Cannot allocate memory (12)")
        return load(file, **options)

    monkeypatch.setattr(torch, "load", loads)
    with pytest.raises(ValueError, match="too little memory to load log/model_best.pt: nothing has been"):
        run_train("--resume")


def test_unreadable_folder_or_step_ends_the_command(run_train, monkeypatch):
    run_train()
    before, load, iterdir = contents("log"), torch.load, Path.iterdir

    def loads(file, **options):
        return refuse(errno.EIO)(file) if options.get("mmap") else load(file, **options)

    def lists(folder):
        return refuse(errno.EACCES)(folder) if folder.name == "log" else iterdir(folder)

    for owner, name, fails, message in (
        (torch, "load", loads, "cannot read log/model_best.pt .Input/output error.: nothing has been"),
        (Path, "iterdir", lists, "log: Permission denied: change the permissions"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(ValueError, match=message):
                run_train("--resume")
        assert contents("log") == before and not Path("log.1").exists()


def test_run_with_only_damaged_checkpoints_is_not_started_again(run_train):
    run_train("--max_steps 3")
    for name in ("model_00003.pt", "model_best.pt"):
        Path("log", name).write_bytes(b"damaged")
    before = contents("log")
    with pytest.warns(UserWarning, match="skipping a checkpoint"):
        with pytest.raises(ValueError, match="no checkpoint in log is complete: omit --resume"):
            run_train("--resume")
    assert contents("log") == before and not Path("log.1").exists()
    Path("empty").mkdir()
    assert len(run_train("--resume", out_dir="empty")["train"]) == 6  # nothing to resume: a new run


def test_truncated_checkpoint_is_skipped(tmp_path):
    for step in (9, 10, 100):
        state = {"model": tiny_gpt().state_dict(), "config": vars(TINY_GPT), "step": step}
        torch.save(state, tmp_path / f"model_{step}.pt")
    torch.save({"step": 1000}, tmp_path / "model_01000_mine.pt")  # not a name of the run
    newest = tmp_path / "model_100.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"model_100.pt is damaged"):
        assert load_checkpoint(tmp_path)["step"] == 10
    assert "\n" not in str(pytest.raises(ValueError, load_checkpoint, newest).value)


@pytest.fixture
def run_folder(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.begin(is_new=True)
        yield folder


def test_writer_deletes_only_what_its_run_has_written(run_folder, tmp_path):
    others = ("model_00030.pt", "model_00007.pt", "model_00009_mine.pt", "notes.tmp")
    for name in (*others, "model_00027.pt", "model_00028.pt.tmp"):
        (tmp_path / name).touch()
    writer = CheckpointWriter(run_folder, 1, 0, lambda step, **values: None, {"model_00027.pt": True})
    for step in (28, 29):
        writer.save([f"model_{step:05d}.pt"], {"step": step}, torch.device("cpu"))
    writer.close()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "model_00029.pt", ".lock"}


@pytest.mark.parametrize(
    "first, then, kept",
    [
        ("--keep 1 --milestone_every 2", "--keep 1 --milestone_every 0", {2, 4, 6, 9}),
        ("--keep 1 --milestone_every 2", "--keep 1 --milestone_every 2", {2, 4, 6, 8, 9}),
        ("--keep 0", "--keep 1 --milestone_every 0", {*range(1, 8), 9}),
        ("--keep 2 --milestone_every 3", "--keep 1 --milestone_every 3", {3, 6, 9}),
        ("--keep 1 --milestone_every 0", "--keep 1 --milestone_every 0 --checkpoint_every 2", {9}),
    ],
)
def test_resumed_run_keeps_what_its_first_part_kept_for_good(run_train, first, then, kept):
    run_train(f"--checkpoint_every 1 {first} --max_steps 7 --learning_rate 1e-9")
    run_train(f"--checkpoint_every 1 {then} --max_steps 9 --learning_rate 1e-9 --resume")
    assert {checkpoint.step_of(path) for path in Path("log").glob("model_0*.pt")} == kept


def test_run_that_is_killed_before_it_deletes_does_so_when_it_is_resumed(run_train, monkeypatch):
    options = "--checkpoint_every 1 --keep 1 --milestone_every 0 --val_every 0"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "_delete", lambda writer, name: None)
        run_train(f"{options} --max_steps 3")
    assert {path.name for path in Path("log").glob("*.pt")} == {f"model_0000{i}.pt" for i in (1, 2, 3)}
    run_train(f"{options} --max_steps 4 --resume")
    assert "model_00002.pt" not in {path.name for path in Path("log").glob("*.pt")}


def test_numbered_checkpoint_is_written_before_the_best(run_train, disk_full):
    disk_full(1)
    with pytest.raises(ValueError, match="model_00006.pt"):
        run_train("--val_every 6 --checkpoint_every 6 --max_steps 6")
    assert load_checkpoint("log/model_best.pt")["step"] == 0  # that of step 6 came second


def test_resumed_run_has_the_files_of_an_uninterrupted_one(run_train):
    options = "--checkpoint_every 1 --keep 2 --milestone_every 4"
    run_train(f"{options} --max_steps 7", out_dir="whole")
    for steps in (2, 5, 7):
        run_train(f"{options} --max_steps {steps} --warmup_steps 1 --resume")
    assert {path.name for path in Path("log").glob("*.pt")} == {p.name for p in Path("whole").glob("*.pt")}


def test_disk_check_counts_what_a_resumed_run_has_yet_to_write(run_train, monkeypatch):
    options = "--checkpoint_every 1 --keep 2 --milestone_every 0"
    run_train(f"{options} --max_steps 4")
    size = Path("log/model_00004.pt").stat().st_size
    usage = checkpoints.shutil._ntuple_diskusage
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(0, 0, int(1.2 * size)))
    assert len(run_train(f"{options} --max_steps 6 --resume")["train"]) == 6
    with pytest.raises(ValueError, match="checkpoints in new need 0.0 GB, but only 0.0 GB are free"):
        run_train(options, out_dir="new")
    for step in range(100, 120):  # another run's, which this one will not delete
        shutil.copy("log/model_best.pt", f"log/model_{step:05d}.pt")
        torch.save({**torch.load("log/model_00006.pt", weights_only=True), "step": 5}, "log/model_00005.pt")
    for path in Path("log").glob("model_001*.pt"):
        path.write_bytes(b"")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(0, 0, int(0.8 * size)))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="checkpoints in log need"):
        run_train(f"{options} --max_steps 8 --resume")


def test_checkpoint_holds_the_state_at_the_time_of_saving(run_folder, tmp_path, monkeypatch):
    release, write = threading.Event(), torch.save
    monkeypatch.setattr(checkpoints.torch, "save", lambda *a: release.wait(60) and write(*a))
    logged = []
    writer = CheckpointWriter(run_folder, 0, 0, lambda step, names, **times: logged.append((step, names)))
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
    assert logged == [(1, ["model_00001.pt", "model_best.pt"]), (2, ["model_00002.pt"])]


@pytest.mark.parametrize("on_cuda", [True, False])
def test_copies_to_the_host_are_pinned_and_asynchronous_from_cuda_devices_only(on_cuda):
    calls = {}

    class Elsewhere(torch.Tensor):
        """A tensor in host memory that says where it is, and notes what is asked of it."""

        is_cuda = on_cuda

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            options = calls[function.__name__] = kwargs or {}
            possible = {name: value for name, value in options.items() if name != "pin_memory"}
            return super().__torch_function__(function, types, args, possible)

    (copy,) = checkpoints.to_host([torch.arange(3.0).as_subclass(Elsewhere)], {})
    assert calls["empty_like"]["pin_memory"] == calls["copy_"]["non_blocking"] == on_cuda
    assert copy.tolist() == [0, 1, 2]


def test_newest_milestones_and_best_are_kept(run_train):
    run_train("--checkpoint_every 1 --milestone_every 2 --keep 1 --max_steps 7 --learning_rate 1e-9")
    best = torch.load("log/model_best.pt", weights_only=True)
    names = {path.name for path in Path("log").glob("*.pt")}
    assert names == {"model_00002.pt", "model_00004.pt", "model_00006.pt", "model_00007.pt", "model_best.pt"}
    losses = dict(read_losses(kind="val"))
    assert losses[best["step"]] == min(losses.values())


def test_speedrun_can_be_extended_from_before_the_fall_of_its_rates(run_train):
    options = "--preset speedrun --checkpoint_every 1 --keep 1"
    longer = run_train(f"{options} --max_steps 12", out_dir="longer")
    run_train(f"{options} --max_steps 8", out_dir="short")  # the rates fall from step 4
    Path("extended").mkdir()
    shutil.copy("short/model_00004.pt", "extended")
    extended = run_train(f"{options} --max_steps 12 --resume", out_dir="extended")
    assert [record["loss"] for record in extended["train"]] == [r["loss"] for r in longer["train"][4:]]


def test_save_pretrained_trims_padding_and_round_trips(tmp_path):
    ours = tiny_gpt()
    ours.save_pretrained(tmp_path / "hf", vocab_size=257)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert (theirs.config.resid_pdrop, theirs.config.embd_pdrop, theirs.config.attn_pdrop) == (0, 0, 0)
    idx = torch.randint(0, 257, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx)[0][..., :257], atol=1e-4, rtol=0)
    assert theirs.config.eos_token_id == 256
    back = GPT.from_pretrained(tmp_path / "hf").state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(back[name], weight[:257] if "wte" in name or "lm_head" in name else weight), name
    with pytest.raises(ValueError, match="not empty"):
        ours.save_pretrained(tmp_path / "hf")


def test_padding_of_gpt2_is_trimmed_by_default(tmp_path):
    GPT(GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").transformer.wte.weight.shape == (50257, 4)


def test_load_errors_are_one_line(tmp_path, hf_folder):
    with pytest.raises(FileNotFoundError, match="no model at lgo: use a checkpoint"):
        GPT.from_pretrained("lgo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in"):
        GPT.from_pretrained(tmp_path / "empty")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text.pt is damaged or not a checkpoint"):
        GPT.from_pretrained(tmp_path / "text.pt")
    for name, what in (("loss.png", "a picture"), ("log.jsonl", "a log"), ("a.npy", "a shard of tokens")):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
        with pytest.raises(ValueError, match=f"{name} is {what}, not a checkpoint: use a run folder, one of"):
            GPT.from_pretrained(tmp_path / name)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is .* not a GPT-2 .it has no transformer.wte.weight"):
        GPT.from_pretrained(tmp_path / "other.pt")
    weights = hf_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="hf is damaged or not a GPT-2 .*deserializing header"):
        GPT.from_pretrained(hf_folder)
    tensors = {k: v for k, v in load_tensors(whole).items() if k != "transformer.h.1.mlp.c_fc.bias"}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=" .transformer.h.1.mlp.c_fc.bias is missing.: use another model"):
        GPT.from_pretrained(hf_folder)
    weights.write_bytes(whole)
    config = hf_folder / "config.json"
    config.write_text(config.read_text().replace('"gelu_new"', '"relu"'))
    with pytest.raises(ValueError, match="activation_function is relu"):
        GPT.from_pretrained(hf_folder)


class Settings:
    """The config object of another repository, whose class is unknown when it is read."""


def foreign_checkpoints(model):
    """Return the same model as other repositories save it."""
    state, sizes = model.state_dict(), vars(model.config)
    settings = Settings()
    vars(settings).update(sizes)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    transposed = {
        name: w.t() if w.dim() == 2 and (".c_" in name) else w
        for name, w in state.items()
        if name != "lm_head.weight"
    }
    compiled = {f"_orig_mod.{name}": w for name, w in (state | masks).items()}
    return {
        "config object, validation loss": {"model": state, "config": settings, "step": 7, "val_loss": 3.5},
        "compiled, model_args, training settings": {
            "model": compiled,
            "model_args": {**sizes, "bias": True},
            "config": {"dataset": "openwebtext", "batch_size": 12},
            "iter_num": 7,
            "best_val_loss": torch.tensor(3.5),
        },
        "DDP around compile": {
            "model": {f"module.{name}": w for name, w in compiled.items()},
            "args": argparse.Namespace(n_head=2, out=pathlib.PurePosixPath("log")),
        },
        "wrapped module": {"state_dict": {f"model.{name}": w for name, w in state.items()}, "hparams": sizes},
        "bare state dict in OpenAI's layout": transposed,
        "half precision": {"model": {name: w.bfloat16() for name, w in state.items()}, "config": sizes},
    }


@pytest.mark.parametrize("kind", foreign_checkpoints(tiny_gpt()))
def test_checkpoints_of_other_repositories_load(kind, tmp_path):
    torch.manual_seed(0)
    # Without a config, heads are taken to be 64 wide.
    config = GPTConfig(**{**vars(TINY_GPT), "n_embd": 128}) if "bare" in kind else TINY_GPT
    model, idx = GPT(config).eval(), torch.randint(0, 320, (2, 16))
    torch.save(foreign_checkpoints(model)[kind], tmp_path / "foreign.pt")
    read = GPT.from_pretrained(tmp_path / "foreign.pt").eval()
    assert read.config == config
    tolerance = 0.05 if kind == "half precision" else 0
    with torch.no_grad():
        torch.testing.assert_close(read(idx)[0], model(idx)[0], atol=tolerance, rtol=0)
    if kind.startswith("config object"):
        unknown = dict.fromkeys(("windows", "args", "best_step", "best_val_loss"))
        assert read.metadata == {"step": 7, "val_loss": 3.5, **unknown, "notes": []}
    assert any("exact GELU" in note for note in read.metadata["notes"]) == ("model_args" in kind)
    assert any("heads of 64" in note for note in read.metadata["notes"]) == ("bare" in kind)


def test_heads_of_a_bare_state_dict_can_be_given():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(16, 320, 1, 4, 128)).eval(), torch.randint(0, 320, (2, 16))
    torch.save(model.state_dict(), "bare.pt")
    assumed, given = (GPT.from_pretrained("bare.pt", n_head=n_head).eval() for n_head in (None, 4))
    with torch.no_grad():
        assert torch.equal(given(idx)[0], model(idx)[0]) and not torch.equal(assumed(idx)[0], model(idx)[0])
    assert assumed.config.n_head == 2 and given.metadata["notes"] == []
    with pytest.raises(ValueError, match="^--n_head 3 does not divide the width 128 of bare.pt: change it$"):
        GPT.from_pretrained("bare.pt", n_head=3)
    GPT(GPTConfig(16, 320, 1, 1, 200)).save_pretrained("hf")
    torch.save(GPT.from_pretrained("hf").state_dict(), "odd.pt")
    notes = GPT.from_pretrained("odd.pt").metadata["notes"]
    assert notes == ["has no n_head: assuming 1 head of 200; --n_head sets it"]
    for source in ("hf", {"model": model.state_dict(), "config": vars(model.config)}):
        with pytest.raises(ValueError, match="^--n_head is 2, but (hf|the checkpoint) has [14]: leave it"):
            GPT.from_pretrained(source, n_head=2)


def test_training_takes_the_heads_of_a_bare_state_dict_from_its_option(run_train, capsys):
    torch.save(GPT(GPTConfig(16, 320, 2, 4, 128)).state_dict(), "bare.pt")
    run_train("--init_from bare.pt --n_embd 128 --n_head 4 --max_steps 3")
    assert GPT.from_pretrained("log").config.n_head == 4
    assert "has no n_head" not in "".join(capsys.readouterr())
    words = "--data_dir shards --tokenizer byte --init_from bare.pt --batch_size 2 --total_batch_size 64"
    words += " --val_every 3 --val_tokens 160 --hellaswag_every 0 --sample_every 0 --device cpu --eval_only"
    train.main(train.parse_args(words.split()))
    line = "bare.pt has no n_head: assuming 2 heads of 64; --n_head sets it"
    assert capsys.readouterr().out.splitlines().count(line) == 1


def test_missing_biases_become_zeros(tmp_path):
    model = tiny_gpt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(not name.endswith(".bias"))
    state = {name: w for name, w in model.state_dict().items() if not name.endswith(".bias")}
    torch.save({"model": state, "model_args": {"n_head": 2, "bias": False}}, tmp_path / "foreign.pt")
    read = GPT.from_pretrained(tmp_path / "foreign.pt")
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in read.state_dict().items())
    torch.save({"model": {**state, "transformer.ln_f.bias": torch.ones(32)}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="not a GPT-2 .*Missing key.*c_attn.bias"):
        GPT.from_pretrained(tmp_path / "foreign.pt")


def attack(name):
    os.mkdir(name)


class Attack:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("attacked",)


def test_file_never_runs_code_and_untied_head_is_rejected(tmp_path):
    model = tiny_gpt()
    weights = {"model": model.state_dict(), "n_head": 2}
    torch.save({**weights, "config": Attack(attack)}, tmp_path / "inert.pt")
    torch.save({**weights, "config": Attack(os.mkdir)}, tmp_path / "blocked.pt")
    torch.save(Attack(attack), tmp_path / "object.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Attack(attack)))
    assert GPT.from_pretrained(tmp_path / "inert.pt").config == TINY_GPT
    for name, message in (
        ("blocked.pt", "mkdir.* is blocked"),
        ("object.pt", "not a checkpoint: it holds a"),
        ("pickle.pt", "not a checkpoint"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            GPT.from_pretrained(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not pathlib.Path("attacked").exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes())
    assert pathlib.Path("attacked").exists()  # what it would have done
    untied = {**model.state_dict(), "lm_head.weight": torch.zeros(320, 32)}
    torch.save({"model": untied, "config": vars(TINY_GPT)}, tmp_path / "untied.pt")
    with pytest.raises(ValueError, match="lm_head is not tied"):
        GPT.from_pretrained(tmp_path / "untied.pt")


class Greedy:
    def __reduce__(self):
        return bytearray, (10**10,)


def test_checkpoint_that_asks_for_memory_is_damaged(tmp_path):
    torch.save({"model": {}, "x": Greedy()}, tmp_path / "model_best.pt")
    for source in (tmp_path / "model_best.pt", tmp_path):
        with pytest.raises((ValueError, FileNotFoundError)), warnings.catch_warnings(action="ignore"):
            load_checkpoint(source)
    assert checkpoint.step_of(tmp_path / "model_best.pt") == float("inf")


def test_names_in_a_checkpoint_delete_nothing_outside_its_folder(run_train):
    run_train("--checkpoint_every 1 --keep 1 --milestone_every 0 --max_steps 3 --learning_rate 1e-9")
    state = torch.load("log/model_00003.pt", weights_only=True)
    torch.save({**state, "recent": {"../keep.pt": True, "notes.txt": True}}, "log/model_00003.pt")
    for path in (Path("keep.pt"), Path("log/notes.txt")):
        path.touch()
    options = "--checkpoint_every 1 --keep 1 --milestone_every 0 --max_steps 6 --learning_rate 1e-9"
    run_train(f"{options} --resume")
    assert Path("keep.pt").exists() and Path("log/notes.txt").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["optimizer"]["state"].pop(0),
        lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state: state["args"].update(block_size=0),
        lambda state: state.update(windows=-1),
        lambda state: state.update(step="3"),
        lambda state: state["model"].update({"transformer.wpe.weight": torch.zeros(1).expand(10**6, 32)}),
    ],
)
def test_checkpoint_whose_parts_do_not_fit_is_refused(run_train, change):
    run_train("--max_steps 3 --val_every 0")
    state = torch.load("log/model_00003.pt", weights_only=True)
    change(state)
    torch.save(state, "log/model_00003.pt")
    with pytest.raises(ValueError, match="damaged|no checkpoint in log is complete"):
        with warnings.catch_warnings(action="ignore"):
            run_train("--resume")


def test_checkpoint_is_rebuilt_from_its_own_config(run_train):
    run_train("--max_steps 3 --val_every 0")
    state = torch.load("log/model_00003.pt", weights_only=True)

    def load(**changes):
        config = {name: value for name, value in {**state["config"], **changes}.items() if value != "newer"}
        return GPT.from_pretrained({**state, "config": config})

    assert load().config == GPT.from_pretrained("log").config
    with pytest.raises(ValueError, match="its qk_norm is unknown here: use the model.py that it was trained"):
        load(qk_norm=True)
    with pytest.raises(ValueError, match="its n_layer is 3, but its tensors have 2"):
        load(n_layer=3)
    with pytest.warns(UserWarning, match="the checkpoint is older than dropout, which is 0.0 now"):
        assert load(dropout="newer").config.dropout == 0


def test_options_may_be_lists(run_train):
    assert is_plain([1, "a", None]) and not is_plain([torch.ones(1)]) and not is_plain({"a": 1})
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", nargs="+", type=int)
    parser.add_argument_group(THIS_COMMAND).add_argument("--out_dir")
    words = as_words(parser, {"heads": [4, 8], "out_dir": "log", "unknown": 1})
    assert words == ["--heads", "4", "8"] and parser.parse_args(words).heads == [4, 8]
