"""log.jsonl, console, TensorBoard and Weights & Biases, and the folder of a run."""

import dataclasses
import errno
import importlib.machinery
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    MUON,
    TINY,
    WITHOUT_AND_WITH_TENSORBOARD,
    begin,
    count_lines,
    losses,
    plain_windows,
    read_losses,
    wait_until,
)

import plot
import train
from model import GPT
from runtime import cli
from runtime.distributed import Distributed, Interrupted
from runtime.launcher import Launcher
from training import describe, dry_run, prepare, records
from training.checkpoints import CheckpointWriter
from training.folder import RunFolder


def test_console_describes_the_run_and_aligns_steps(run_train, shards, capsys):
    run_train(f"{MUON} --log_every 1 --checkpoint_every 2 --keep 1 --milestone_every 2 --learning_rate 1e-3")
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step"))
    about = dict(line.split(maxsplit=1) for line in lines[:first])
    model, tokens = GPT.from_pretrained("log"), 16 * len(plain_windows(shards))
    assert about["model"] == (
        f"GPT from scratch, {model.num_params():,} parameters: 2 layers, 2 heads, width 32; predicts the "
        "next byte from up to 16 before it"
    )
    ids = np.load(shards / "edufineweb_train_000001.npy")
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    guessing, frequencies = math.log(model.config.vocab_size), -(shares * np.log(shares)).sum()
    assert about["loss"] == (
        f"in nats per byte, the lower the better: guessing has {guessing:.2f}, knowing only how frequent "
        f"each byte is {frequencies:.2f}"
    )
    assert about["plan"].startswith("every 3 steps validations; every 2 steps checkpoints; the lines of")
    weights = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() > 1)
    rest = model.num_params() - weights
    assert sorted(about["optimizer"].split("; ")) == [
        f"adamw with learning rates up to 1.00e-03 for {rest:,} parameters",
        f"muon with learning rates up to 2.00e-02 for {weights:,} parameters",
    ]
    assert sum(line.count("nats per") for line in lines) == 1 and "expect" not in about
    assert len([line for line in lines[:first] if not line.startswith("warning")]) <= 10
    assert about["batch"] == "64 tokens per step: 2 sequences x 16 tokens x 1 rank(s) x 2 micro-step(s)"
    assert about["run"] == f"6 steps, 384 bytes, {384 / tokens:.2f} epochs of {tokens:,} in shards"
    assert "scores" not in about
    sizes = re.match(r"([\d.]+)kB each, at most ([\d.]+)MB in log, where \S+B are free", about["checkpoints"])
    files = [path.stat().st_size / 1000 for path in Path("log").glob("model_*.pt")]
    assert len(files) == 3  # 4, 6 and the best
    assert float(sizes[1]) == pytest.approx(max(files), rel=0.15)  # names and headers come on top
    assert 1000 * float(sizes[2]) == pytest.approx(4 * float(sizes[1]), abs=10)  # those, and one new
    steps = [line for line in lines if " tok/s" in line]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in steps[1:]}) == 1
    assert len(steps) == 6 and "left" not in steps[0] and steps[-1].endswith("left 00:00")


def test_first_step_is_shown_and_then_one_every_ten_seconds(run_train, monkeypatch, capsys):
    def shown(options):
        capsys.readouterr()
        run_train(f"--log_every 100 {options}")
        out = capsys.readouterr().out
        return [int(step) for step in re.findall(r"^step +(\d+) \| loss", out, re.MULTILINE)]

    assert shown("") == [0]
    assert shown("--resume --max_steps 9") == [6]
    monkeypatch.setattr(records, "LINE_EVERY_S", -1.0)
    assert shown("--resume --max_steps 12") == [9, 10, 11]


def test_every_long_part_of_a_command_shows_itself(run_train, monkeypatch):
    seen, begin = set(), cli.Work.__init__
    begin_seen = lambda work, what, *rest: seen.add(what) or begin(work, what, *rest)  # noqa: E731
    monkeypatch.setattr(cli.Work, "__init__", begin_seen)
    run_train("--sample_every 3 --batch_size auto", picture=True)
    start = {"checking options and data", "loading or initializing the model", "opening the shards"}
    assert seen == start | {
        *("largest batch size", "validation", "samples", *(f"step {step}" for step in range(6))),
        *("finishing the previous checkpoint", "writing the last checkpoint", "drawing the loss curve"),
    }
    seen.clear()
    run_train("--dry_run --max_steps 3 --compile --n_layer 1")
    assert seen >= start | {"trying torch.compile", "measuring a micro-step", "comparing gradients", "step 0"}
    assert seen >= {"measuring steps", "measuring an evaluation", "validation", "copying a checkpoint"}


def test_log_has_rates_and_decay_of_each_group(run_train):
    by_kind = run_train(f"{MUON} --muon_lr 0.03 --embedding_lr 0.04 --position_lr 0.005 --weight_decay 0.2")
    groups = {group["name"]: group for group in by_kind["run"][0]["groups"]}
    model = GPT.from_pretrained("log")
    assert sum(group["params"] for group in groups.values()) == model.num_params()
    assert groups["c_attn"]["params"] == 2 * 3 * 32 * 32
    rates = {name: (g["optimizer"], g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {
        "embeddings": ("adamw", pytest.approx(4e-2), 0.2),
        "positions": ("adamw", pytest.approx(5e-3), 0.2),
        "c_attn": ("muon", pytest.approx(3e-2), 0.2),
        "matrices": ("muon", pytest.approx(3e-2), 0.2),
        "gains and biases": ("adamw", pytest.approx(1e-2), 0.0),
    }
    for record in by_kind["train"]:
        assert record["lrs"]["matrices"] == pytest.approx(3 * record["lr"]) == record["lrs"]["c_attn"]
        assert record["lrs"]["embeddings"] == pytest.approx(4 * record["lr"])
        assert record["lrs"]["positions"] == pytest.approx(record["lr"] / 2)
        assert record["lrs"]["gains and biases"] == record["lr"]


def test_only_records_that_are_measured_again_are_dropped(run_train):
    options = "--val_every 4 --checkpoint_every 4 --hellaswag_every 0 --sample_every 3 --sample_tokens 3"
    first = run_train(f"{options} --max_steps 6")
    assert [record["step"] for record in first["val"]] == [0, 4, 6]
    longer = run_train(f"{options} --max_steps 8 --resume")  # from 6, where neither is due again
    assert longer["val"][:3] == first["val"] and [r["step"] for r in longer["val"]] == [0, 4, 6, 8]
    assert [record["step"] for record in longer["sample"]] == [0, 3, 6, 8]
    assert longer["sample"][:2] == first["sample"][:2]
    assert [record["step"] for record in longer["checkpoint"]] == [0, 4, 6, 8]
    assert [record["step"] for record in longer["train"]] == list(range(8))
    again = run_train(f"{options} --max_steps 8 --resume")  # nothing is left to do but the evaluations
    for kind in ("val", "sample", "train", "checkpoint", "end"):
        assert [record["step"] for record in again[kind]] == [record["step"] for record in longer[kind]], kind


def test_run_that_stopped_early_has_each_record_once_after_resuming(run_train):
    options = "--early_stop 1 --val_every 3 --checkpoint_every 7 --sample_every 5 --sample_tokens 3"
    run_train(f"{options} --max_steps 40 --learning_rate 9")  # which diverges
    first = run_train(f"{options} --max_steps 40 --learning_rate 9", out_dir="log")
    stopped = first["end"][0]["step"]
    again = run_train(f"{options} --max_steps 40 --learning_rate 9 --resume")
    assert 0 < stopped < 40 and [record["step"] for record in again["end"]] == [stopped]
    for kind in ("val", "sample", "train"):
        assert [record["step"] for record in again[kind]] == [record["step"] for record in first[kind]], kind
    assert [r["names"] for r in again["checkpoint"]] == [r["names"] for r in first["checkpoint"]]


def test_lines_that_are_not_records_do_not_stop_a_resumed_run(run_train):
    run_train("--max_steps 3")
    with open("log/log.jsonl", "ab") as log:
        log.write(b'{"step": 3, "kind": "note"}\n{"step": 3}\n[]\n\xff\xfe\n')
    assert len(run_train("--max_steps 6 --resume")["train"]) == 6


def test_picture_is_drawn_by_another_process_and_its_failure_is_a_warning(run_train, monkeypatch, capsys):
    run_train(picture=True)
    assert Path("log/loss.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run
    for error in (BlockingIOError(11, "Resource unavailable"), subprocess.TimeoutExpired("plot.py", 1)):

        def fails(command, error=error, **options):
            if "plot.py" in str(command[1]):
                raise error
            return again(command, **options)

        with monkeypatch.context() as patch:
            patch.setattr(records.subprocess, "run", fails)
            run_train(picture=True)
        assert "warning: no picture of the loss: " in capsys.readouterr().out
    monkeypatch.setattr(records, "PLOT", "nowhere.py")
    run_train(picture=True)
    assert re.search("warning: no picture of the loss: .*nowhere.py", capsys.readouterr().out)


def test_checkpoint_before_the_first_step_draws_no_picture(run_train, monkeypatch, capsys):
    def interrupted(run, n):
        raise Interrupted

    monkeypatch.setattr(records, "PICTURE_EVERY_S", -1)
    monkeypatch.setattr(train, "EVALUATIONS", [dataclasses.replace(train.EVALUATIONS[0], call=interrupted)])
    run_train(picture=True)
    out = capsys.readouterr().out
    assert "stopped by a signal before step 0" in out and "no picture" not in out
    assert Path("log/model_00000.pt").exists()


def test_new_run_renames_the_old_folder(run_train):
    first = run_train("--seed 1")
    second = run_train("--seed 2")
    run_train("--seed 3")
    for folder, by_kind in (("log.1", first), ("log.2", second)):
        lines = Path(folder, "log.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines if '"train"' in line] == by_kind["train"]
        assert Path(folder, "model_00006.pt").exists()


def test_new_run_stays_where_a_link_leads(run_train):
    Path("disk/big").mkdir(parents=True)
    Path("log").symlink_to("disk/big")
    first = run_train("--max_steps 3")
    run_train("--max_steps 4")
    assert Path("log").is_symlink() and Path("disk/big/model_00004.pt").exists()
    assert read_losses("disk/big.1") == [(record["step"], record["loss"]) for record in first["train"]]


def test_folder_that_cannot_be_renamed_keeps_its_place(run_train, monkeypatch):
    """As a mount point, whose rename gives EBUSY."""
    rename = Path.rename

    def busy(path, target):
        if path.name == "log":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    Path("log/lost+found").mkdir(parents=True)
    first = run_train("--max_steps 3")
    run_train("--max_steps 4")
    run_train("--max_steps 5")
    assert read_losses("log/log.1") == [(record["step"], record["loss"]) for record in first["train"]]
    assert len(read_losses("log/log.2")) == 4 and len(read_losses("log")) == 5
    assert {path.name for path in Path("log/log.1").glob("*.pt")} == {"model_00003.pt", "model_best.pt"}
    assert Path("log/lost+found").exists() and not list(Path().glob("log.*"))


@pytest.mark.needs("tensorboard")
def test_tensorboard_matches_the_log_and_hides_repeated_steps(run_train):
    from tensorboard.backend.event_processing import event_accumulator

    run_train("--tensorboard --sample_every 3")
    Path("log/model_00006.pt").unlink()
    Path("log/model_best.pt").unlink()
    hellaswag = "--max_steps 6 --hellaswag_every 6 --hellaswag_data demo --sample_every 3"
    run_train(f"--tensorboard --resume {hellaswag}")
    by_kind = run_train(f"--tensorboard --resume {hellaswag} --max_steps 9")
    events = event_accumulator.EventAccumulator("log/tensorboard").Reload()
    for tag, kind, name in (
        ("train/loss", "train", "loss"),
        ("train/tokens_per_s", "train", "tokens_per_s"),
        ("train/lr c_attn", "train", "lr"),
        ("val/loss", "val", "loss"),
        ("demo items/acc_norm", "hellaswag", "acc_norm"),
    ):
        expected = [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in by_kind[kind]]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected, tag
    # 64 tokens a step: those of earlier lives lie above the step at which TensorBoard hides what follows.
    for kind, tag in (("val", "val loss"), ("hellaswag", "demo items acc_norm")):
        name = tag.split()[-1]
        seen = [(64 * record["step"], pytest.approx(record[name], rel=1e-6)) for record in by_kind[kind]]
        assert [(event.step, event.value) for event in events.Scalars(f"by tokens/{tag}")] == seen
        assert [record["tokens"] for record in by_kind[kind]] == [tokens for tokens, _ in seen]
    texts = events.Tensors("sample/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in texts}
    assert texts.keys() == {0, 3, 6, 9}
    for record in by_kind["sample"]:
        lines = [f"    {line}" for text in record["texts"] for line in text.splitlines() if line.strip()]
        assert len(lines) >= 2 and all(line in texts[record["step"]] for line in lines)


def wandb_history(path):
    """Return the rows of a run-ID.wandb file: 7 bytes, then a log of LevelDB's format in 32 KiB blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        size, part = struct.unpack("<4xHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if 32768 - at % 32768 < 7:  # no room for a header: the block is padded
            at += 32768 - at % 32768
        if part in (1, 4):  # a whole record, or its last part
            row = Record.FromString(record).history
            rows.append({"/".join(item.nested_key): json.loads(item.value_json) for item in row.item})
            record = b""
    return [row for row in rows if row]


@pytest.mark.needs("wandb")
def test_wandb_receives_the_log_and_resumed_run_keeps_its_id(run_train, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    run_train("--wandb --max_steps 3 --sample_every 3 --sample_prompt=<b>")
    by_kind = run_train("--wandb --max_steps 6 --resume")
    ids = [record["wandb"] for record in by_kind["run"]]
    assert len(ids) == 2 and ids[0] == ids[1]
    paths = sorted(Path("log/wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    rows = [row for path in paths for row in wandb_history(path)]
    assert len(paths) == 2
    logged = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert logged == [(record["step"], record["loss"]) for record in by_kind["train"]]
    logged = [(row["tokens"], row["val/loss"]) for row in rows if "val/loss" in row]
    assert dict(logged) == {record["tokens"]: record["loss"] for record in by_kind["val"]}
    samples = sorted(Path("log/wandb").glob("offline-run-*/files/media/html/sample/texts_*.html"))
    assert len(samples) == 2 and all("<pre>&lt;b&gt;" in path.read_text() for path in samples)

    def refuse(**options):
        raise wandb.errors.UsageError("no key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"^Weights & Biases: no key \(without an account: WANDB_MODE=off"):
        run_train("--wandb")


# A folder named `wandb`, which wandb itself makes, can be imported too.
@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("wandb", None, is_package=True)])
def test_missing_packages_are_reported_before_the_first_step(run_train, monkeypatch, spec):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda package: spec)
    with pytest.raises(ValueError) as caught:
        run_train("--tensorboard --wandb")
    for package in ("tensorboard", "wandb"):
        expected = f"--{package} needs a package that is not installed: pip install {package}"
        assert expected in str(caught.value).splitlines()
    assert not Path("log").exists()


@pytest.mark.parametrize("check", ["", "--dry_run"])
def test_run_folder_that_cannot_be_written_is_refused_at_once(run_train, check):
    Path("file").write_text("not a folder")
    for out_dir in ("file", "file/log"):
        with pytest.raises(ValueError, match="/file.*: Not a directory: a part of the path is a file; use"):
            run_train(check, out_dir=out_dir)
    with pytest.raises(ValueError, match="--price is for the forecast of --dry_run: add it, or leave out"):
        run_train("--price 2")


def test_folder_in_use_is_refused_and_the_run_in_it_is_not_disturbed(run_train, shards, monkeypatch):
    alone = run_train("--max_steps 30 --val_every 0", out_dir="alone")
    process = begin(f"{TINY} --max_steps 30 --val_every 0")
    wait_until(lambda: count_lines("log") > 10)
    os.kill(process.pid, signal.SIGSTOP)  # it must not end before the others are refused
    for options in ("", "--resume"):
        with pytest.raises(ValueError, match=f"/log is in use by process {process.pid} on .*: wait until it"):
            run_train(options)
    plot.main(plot.parse_args(["log", "--output", "picture.png"]))  # readers are not refused
    monkeypatch.setattr(dry_run, "STEPS_S", 0.01)
    run_train("--dry_run --max_steps 20")
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0
    assert read_losses("log") == [(record["step"], record["loss"]) for record in alone["train"]]
    assert not Path("log.1").exists() and not Path("log/.lock").exists()
    run_train()  # free again


@WITHOUT_AND_WITH_TENSORBOARD
def test_run_continues_in_a_new_folder_if_its_own_is_deleted_or_replaced(
    run_train, monkeypatch, capsys, tensorboard
):
    alone = run_train("--max_steps 12 --checkpoint_every 2 --keep 0", out_dir="alone")
    take_step = train.train_step
    save = CheckpointWriter.save

    def save_and_wait(writer, *words):
        save(writer, *words)
        writer.pending.result()

    def replace():
        Path("log").rename("again")
        Path("log").mkdir()
        Path("log/log.jsonl").write_text("mine")

    events = {3: lambda: shutil.rmtree("log"), 6: lambda: Path("log").rename("moved"), 9: replace}

    def step_with_events(*words):
        events.pop(words[1], lambda: None)()
        return take_step(*words)

    monkeypatch.setattr(CheckpointWriter, "save", save_and_wait)
    monkeypatch.setattr(train, "train_step", step_with_events)
    options = f"--max_steps 12 --checkpoint_every 2 --keep 0 {tensorboard}"
    train.main(train.parse_args(f"{TINY} {options}".split()))
    assert not events and Path("log/log.jsonl").read_text() == "mine"
    assert read_losses("log.1") == [(record["step"], record["loss"]) for record in alone["train"]]
    assert {path.name for path in Path("log.1").glob("*.pt")} >= {"model_00010.pt", "model_00012.pt"}
    assert Path("log.1/tensorboard").exists() == bool(tensorboard)
    printed = capsys.readouterr().out
    assert printed.count("was deleted, moved or replaced: the run continues in ") == 3
    assert f"next:       python sample.py --model {Path('log.1').absolute()}" in printed


class FullDisk(io.FileIO):
    """A file that takes a few bytes of each write, and none while `full` is set."""

    full = False

    def write(self, data):
        if FullDisk.full:
            raise OSError(28, "No space left on device")
        return super().write(data[:100])


def test_records_that_do_not_fit_on_the_disk_are_written_later(run_train, monkeypatch, capsys):
    take_step = train.train_step

    def step_with_full_disk(*words):
        FullDisk.full = words[1] in (2, 3, 4)
        return take_step(*words)

    monkeypatch.setattr(train, "train_step", step_with_full_disk)
    monkeypatch.setattr(records, "open", lambda path, mode, buffering: FullDisk(path, "a+"), raising=False)
    by_kind = run_train("--max_steps 8 --val_every 0 --checkpoint_every 0")
    assert [record["step"] for record in by_kind["train"]] == list(range(8))
    lines = capsys.readouterr().out.splitlines()
    assert sum("log.jsonl (No space left on device); training continues" in line for line in lines) == 1


def test_records_that_are_lost_are_counted(run_train, monkeypatch, capsys):
    monkeypatch.setattr(records, "open", lambda path, mode, buffering: FullDisk(path, "a+"), raising=False)
    monkeypatch.setattr(FullDisk, "full", True)
    train.main(train.parse_args(f"{TINY} --max_steps 8 --val_every 0 --checkpoint_every 0".split()))
    assert "warning: the last 10 records could not be written to " in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@WITHOUT_AND_WITH_TENSORBOARD
def test_full_disk_ends_neither_log_nor_picture_nor_tensorboard(
    run_train, small_disk, monkeypatch, capsys, tensorboard
):
    take_step = train.train_step

    def step_with_full_disk(*words):
        if words[1] == 2:
            with pytest.raises(OSError), open(small_disk / "big", "wb", buffering=0) as big:
                while True:
                    big.write(bytes(4096))
            with pytest.raises(OSError, match="No space left"):
                plot.main(plot.parse_args([str(small_disk / "log")]))
        if words[1] == 30:
            Path(small_disk / "big").unlink()
        return take_step(*words)

    monkeypatch.setattr(train, "train_step", step_with_full_disk)
    monkeypatch.setattr(threading, "excepthook", cli.report_failed_thread)
    options = "--max_steps 40 --val_every 20 --checkpoint_every 40 --keep 1 --milestone_every 0"
    by_kind = run_train(f"{options} {tensorboard}", out_dir=small_disk / "log", picture=True)
    assert [record["step"] for record in by_kind["train"]] == list(range(40))
    printed = capsys.readouterr()
    warnings = ["cannot write ", "could not write "]
    for warning in [*warnings, "TensorBoard's files end at"] if tensorboard else warnings:
        assert printed.out.count(f"warning: {warning}") >= 1, warning
    assert "Traceback" not in printed.err
    assert GPT.from_pretrained(small_disk / "log").metadata["step"] == 40
    assert not list(small_disk.rglob("*.tmp")) and not Path(small_disk / "loss.png").exists()


@WITHOUT_AND_WITH_TENSORBOARD
def test_jumping_clock_changes_nothing(run_train, monkeypatch, tensorboard):
    first, clock, now = run_train(), itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: now() + (-1) ** next(clock) * 1e9)
    assert losses(run_train(tensorboard, out_dir="jumping")) == losses(first)


def test_folder_that_another_run_took_during_the_start_is_left_to_it(tmp_path):
    first, second = RunFolder("log"), RunFolder("log")
    for folder in (first, second):
        folder.check(str(tmp_path / "shards"), lock=True)  # there is nothing to lock yet
    first.begin(is_new=True)
    Path("log/log.jsonl").touch()
    for is_new in (True, False):
        with pytest.raises(ValueError, match="/log is in use by process"):
            second.begin(is_new)
    assert first.lock.is_held() and Path("log/log.jsonl").exists()
    first.lock.release()
    second.begin(is_new=True)
    assert Path("log.1/log.jsonl").exists() and not list(Path("log.1").glob(".lock"))


def test_lock_file_that_somebody_deletes_is_made_again(tmp_path, capsys):
    with RunFolder("log") as folder:
        folder.begin(is_new=True)
        Path("log/.lock").unlink()
        assert not folder.ensure() and folder.lock.is_held() and folder.path == Path("log").absolute()
    assert capsys.readouterr().out == ""


def test_lock_is_released_after_the_last_checkpoint(run_train, monkeypatch):
    save, held = torch.save, []

    def slow_save(*words):
        time.sleep(0.3)
        save(*words)
        held.append(Path("log/.lock").exists())

    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(records.Log, "report_end", lambda *words: 1 / 0)
    monkeypatch.setattr(CheckpointWriter, "close", lambda writer: None)
    with pytest.raises(ZeroDivisionError):
        run_train("--val_every 0 --checkpoint_every 6")
    assert held == [True] and not Path("log/.lock").exists()


@WITHOUT_AND_WITH_TENSORBOARD
def test_log_that_is_replaced_by_an_editor_keeps_its_curves(run_train, monkeypatch, tensorboard):
    take_step = train.train_step

    def step_with_editor(*words):
        if words[1] == 3:
            shutil.copy("log/log.jsonl", "edited")
            Path("edited").rename("log/log.jsonl")
        return take_step(*words)

    monkeypatch.setattr(train, "train_step", step_with_editor)
    by_kind = run_train(tensorboard)
    assert [record["step"] for record in by_kind["train"]] == list(range(6))
    assert len(list(Path("log").glob("tensorboard/*"))) == (1 if tensorboard else 0)


STEP = dict(loss=1.0, lr=1e-3, norm=1.0, dt_ms=1.0, tokens_per_s=1.0, mfu=None, skipped=0, lrs={})


def test_table_tells_the_rate_that_is_reached_and_what_will_disappoint(run_train, capsys, monkeypatch):
    def warnings(options: str) -> list[str]:
        capsys.readouterr()
        run_train(options)
        printed = capsys.readouterr().out.splitlines()
        return [line.removeprefix("warning").strip() for line in printed if line.startswith("warning ")]

    take_step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *_: STEP)
    # 110 windows of 16 tokens; a step reads 2.
    assert warnings("--max_steps 6 --total_batch_size 32 --val_every 0") == []
    (few,) = warnings("--max_steps 5 --total_batch_size 32 --val_every 0")
    assert few == "only 9.1% of the training data will be read: raise --max_steps if you can"
    (many,) = warnings("--max_steps 150 --total_batch_size 128 --val_every 0 --warmup_steps 0")
    assert many == "11 epochs memorize the text: lower --max_steps or use --early_stop"
    assert warnings("--max_steps 150 --total_batch_size 128 --val_every 150 --early_stop 9") == []
    (long,) = warnings("--max_steps 6 --total_batch_size 32 --val_tokens 320 --val_every 2")
    assert long.startswith("evaluations will take about 1.7 times as long as the training between them")
    monkeypatch.setattr(train, "train_step", take_step)
    records = run_train("--max_steps 8 --warmup_steps 7 --embedding_lr 9e-3 --val_every 0")
    reached = max(record["lrs"]["embeddings"] for record in records["train"])
    assert f"learning rates up to {reached:.2e}" in capsys.readouterr().out


def test_gpus_that_a_run_leaves_idle_are_named_with_the_command_that_uses_them(run_train, monkeypatch):
    def warnings(run) -> str:
        on_gpu = Distributed(rank=0, world_size=run.args.seed, device=torch.device("cuda"))
        return "\n".join(describe.what_disappoints(dataclasses.replace(run, dist=on_gpu), epochs=1))

    monkeypatch.setattr(train, "describe_run", lambda run, *rest: described.append(warnings(run)) or "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out_dir", "my run"])
    described: list[str] = []
    run_train("--max_steps 3 --val_every 0 --seed 1")
    run_train("--max_steps 3 --val_every 0 --seed 8")
    monkeypatch.setattr(describe, "read_launcher", lambda: Launcher(local_world_size=2))
    run_train("--max_steps 3 --val_every 0 --seed 4")  # two nodes
    run_train("--max_steps 3 --val_every 0 --seed 2")
    line = 'GPUs, this run uses {}: torchrun --standalone --nproc_per_node=8 train.py --out_dir "my run"'
    assert described == [f"8 {line.format(1)}", "", "", f"8 {line.format(2)}"]


def test_what_first_runs_fail_on_is_said_before_the_first_step(run_train, monkeypatch):
    class TwoGpus(Distributed):
        def union(self, lines):
            return [*lines, "NVIDIA A100 with 40 GiB"]

    def warnings(run) -> str:
        run = dataclasses.replace(run, dist=TwoGpus(rank=0, world_size=2, device=torch.device("cuda")))
        return "\n".join(describe.what_fails_later(run))

    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(train, "describe_run", lambda run, *rest: described.append(warnings(run)) or "")
    monkeypatch.setattr(describe, "open_file_limit", lambda: 66)
    monkeypatch.setattr(describe, "filesystem_of", lambda path: "overlay")
    described: list[str] = []
    run_train("--max_steps 3 --val_every 0")
    assert described[0].splitlines() == [
        "the GPUs differ, and all wait for the slowest: NVIDIA H100 with 80 GiB, NVIDIA A100 with 40 GiB",
        "up to 67 files will be open, but only 66 may: `ulimit -n 4096`",
        "log is on the container's own disk, and goes with the container",
    ]
    monkeypatch.setattr(describe, "open_file_limit", lambda: 67)
    monkeypatch.setattr(describe, "filesystem_of", lambda path: "ext4")
    monkeypatch.setattr(TwoGpus, "union", lambda dist, lines: lines)
    run_train("--max_steps 3 --val_every 0")
    assert described[1] == ""


def test_numbers_in_nested_records_have_curves():
    values = {"loss": 1.5, "blocks": {"0": {"norm": 2}, "1": {"norm": 3.0, "name": "last"}}, "texts": ["a"]}
    assert records.flat("train", values) == {
        "train/loss": 1.5,
        "train/blocks/0/norm": 2,
        "train/blocks/1/norm": 3.0,
    }
