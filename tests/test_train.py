"""The recipe of train.py: data order, schedule, validation, the loop, options."""

import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MUON, REPOSITORY, TINY, TINY_GPT, begin, losses, plain_windows, read_losses
from transformers import GPT2LMHeadModel

import fineweb
import plot
import train
from corpus import shards as shards_module
from corpus.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from runtime.cli import shell_word
from runtime.distributed import Distributed
from train import DataLoaderLite
from training import overfit, prepare
from training.checkpoints import CheckpointWriter


def loader(folder, rank=0, world_size=1, **options):
    options = {"batch_size": 2, "block_size": 16, "vocab_size": 257, **options}
    return DataLoaderLite(folder, "train", dist=Distributed(rank, world_size, torch.device("cpu")), **options)


def test_learning_rate_matches_the_124m_reproduction():
    args = train.parse_args([])
    assert train.learning_rate_at(0, args) == pytest.approx(6e-4 / 715)
    assert train.learning_rate_at(714, args) == pytest.approx(6e-4) == train.learning_rate_at(715, args)
    assert train.learning_rate_at((715 + 19073) // 2, args) == pytest.approx((6e-4 + 6e-5) / 2)
    assert train.learning_rate_at(19073, args) == pytest.approx(6e-5)
    wsd = train.parse_args("--schedule wsd --max_steps 1000 --warmup_steps 100 --min_lr 6e-5".split())
    rates = {step: train.learning_rate_at(step, wsd) for step in (0, 99, 100, 799, 800, 900, 1000)}
    peak, middle = 6e-4, (6e-4 + 6e-5) / 2
    expected = {0: 6e-6, 99: peak, 100: peak, 799: peak, 800: peak, 900: middle, 1000: 6e-5}
    assert rates == pytest.approx(expected)
    wsd.decay_share = 0
    assert train.learning_rate_at(999, wsd) == 6e-4


@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_every_topology_reads_the_same_windows(shards, world_size, batch_size):
    windows = plain_windows(shards)
    accum = 8 // (world_size * batch_size)
    ranks = [loader(shards, rank, world_size, batch_size=batch_size) for rank in range(world_size)]
    for step in range(30):  # two epochs of 110 windows, across the ends of shards and of the epoch
        got = []
        for _ in range(accum):
            for rank in ranks:
                ((x, y),) = rank.next_batches()
                assert torch.equal(x[:, 1:], y[:, :-1])
                got += torch.cat((x, y[:, -1:]), dim=1).tolist()
        assert got == [windows[i % len(windows)] for i in range(8 * step, 8 * step + 8)]


def test_shuffle_permutes_each_epoch_and_seek_reaches_any_step(shards):
    windows = plain_windows(shards)
    shuffled = loader(shards, shuffle_seed=3)
    batches = [batch for _ in range(55) for batch in shuffled.next_batches(2)]
    seen = [torch.cat((x, y[:, -1:]), dim=1).tolist() for x, y in batches]
    flat = [row for rows in seen for row in rows]
    epochs = flat[: len(windows)], flat[len(windows) :]
    assert epochs[0] != windows and epochs[1] != epochs[0]
    assert all(sorted(epoch) == sorted(windows) for epoch in epochs)
    again = loader(shards, shuffle_seed=3)
    again.seek(77 * 2)
    ((x, y),) = again.next_batches()
    assert torch.cat((x, y[:, -1:]), dim=1).tolist() == seen[77]


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1", "mps"])
def test_batches_are_pinned_and_copied_asynchronously_on_every_cuda_device_only(shards, monkeypatch, device):
    pinned, copies = [], []

    def pin_memory(rows):
        pinned.append(rows)
        return rows

    def to(rows, device, non_blocking=False):
        copies.append((device, non_blocking, any(rows is each for each in pinned)))
        return rows

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    dist = Distributed(0, 1, torch.device(device))
    batches = DataLoaderLite(shards, "train", batch_size=2, block_size=16, vocab_size=257, dist=dist)
    for _ in range(2):
        batches.next_batches()
    batches.pool.shutdown()  # it reads ahead, and must not pin without the patch
    on_cuda = device.startswith("cuda")
    assert copies == 2 * [(torch.device(device), on_cuda, on_cuda)]


def test_folder_of_texts_is_made_into_shards_by_the_command_in_the_error():
    folder = Path("my texts")
    folder.mkdir()
    (folder / "a.txt").write_text("What is it? " * 50)
    with pytest.raises(FileNotFoundError, match="no train shards in my texts/, but a.txt") as error:
        loader(folder)
    command = shlex.split(str(error.value).split("`")[1])
    assert command[:2] == ["python", "fineweb.py"]
    fineweb.main(fineweb.parse_args([*command[2:], "--tokenizer", "byte"]))
    data = loader(str(error.value).partition("--data_dir ")[2])
    assert bytes(data.read(0)[1:].tolist()) == b"What is it? What"
    with pytest.raises(ValueError, match="a.txt is a file: make shards from it with .* --files .*a.txt"):
        loader(folder / "a.txt")
    Path("train_000001.npy").touch()
    with pytest.raises(ValueError, match="^train_000001.npy is a file: use --data_dir .$"):
        loader("train_000001.npy")


def test_bad_shards_are_reported_by_name(shards):
    with pytest.raises(FileNotFoundError, match="^there is no folder nowhere: .*--preset demo"):
        loader("nowhere")
    with pytest.raises(ValueError, match="holds token id 256, but the vocabulary ends at 249"):
        loader(shards, vocab_size=250)
    with pytest.raises(ValueError, match="holds a window of 1000 . 1 tokens: lower --block_size"):
        loader(shards, block_size=1000)
    bad = shards / "train_000003.npy"
    np.save(bad, np.zeros(100, dtype=np.int32))
    with pytest.raises(ValueError, match="000003.npy .*is 1-dimensional int32, not 1-dimensional uint16"):
        loader(shards)
    np.save(bad, np.zeros((10, 10), dtype=np.uint16))
    with pytest.raises(ValueError, match="is 2-dimensional uint16"):
        loader(shards)
    np.save(bad, np.zeros(1000, dtype=np.uint16))
    bad.write_bytes(bad.read_bytes()[:-500])
    with pytest.raises(ValueError, match="train_000003.npy is damaged or not a .npy file .*: make it again"):
        loader(shards)
    np.save(bad, np.zeros(1000, dtype=np.uint16))
    records = [{"name": path.name, "tokens": len(np.load(path))} for path in shards.glob("*.npy")]
    cases = [
        ([{**r, "tokens": 2000} if r["name"] == bad.name else r for r in records], "its manifest says 2000"),
        (records[1:], f"manifest of .* does not list {records[0]['name']}: move it elsewhere"),
        ([*records, {"name": "a_train.npy", "tokens": 1}], "1 of the 5 shards .* first is a_train.npy: rep"),
    ]
    for listed, message in cases:
        (shards / "manifest.json").write_text(json.dumps({"complete": True, "shards": listed}))
        with pytest.raises(ValueError, match=message):
            loader(shards)
    incomplete = '{"complete": false, "shards": []}'
    cases = ((incomplete, "are incomplete"), ("{", "json is damaged"), ("[]", "json is damaged"))
    for text, message in cases:
        (shards / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            loader(shards)
    (shards / "manifest.json").unlink()
    bad.rename(shards / "train_of_validation.npy")
    with pytest.raises(ValueError, match="train_of_validation.npy has both train and val in its name"):
        loader(shards)


def test_shard_that_cannot_be_read_is_not_called_damaged(shards, monkeypatch):
    def fails(*args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "load", fails)
    with pytest.raises(OSError, match="Input/output error"):
        loader(shards)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000])
def test_shuffled_windows_are_a_permutation(n):
    for epoch in range(3):
        assert sorted(train.shuffled(i, n, 7, epoch) for i in range(n)) == list(range(n))


def test_shuffled_windows_are_uniform_and_independent_of_the_length_of_the_epoch():
    # Chi-square with 9 degrees of freedom: mean 9, standard deviation 4.2.
    for index in (0, 7):
        counts = np.bincount([train.shuffled(index, 10, seed, 1) for seed in range(2000)], minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 26
    follows = [(train.shuffled(i + 1, 500, 1, 0) - train.shuffled(i, 500, 1, 0)) % 500 for i in range(499)]
    assert len(set(follows)) > 250 and max(map(follows.count, follows)) < 10
    windows = [train.shuffled(i, 10**15, 1, 0) for i in range(1000)]  # at once, whatever the length
    assert len(set(windows)) == 1000 and abs(np.mean(windows) / 10**15 - 0.5) < 0.05


def test_run_writes_log_checkpoints_and_picture(run_train):
    options = "--keep 1 --sample_every 3 --hellaswag_every 6 --hellaswag_data demo --hellaswag_limit 12"
    records = run_train(options, picture=True)
    assert [record["step"] for record in records["train"]] == list(range(6))
    assert [record["step"] for record in records["val"]] == [0, 3, 6]
    assert [record["step"] for record in records["hellaswag"]] == [0, 6]
    written = {name: record["step"] for record in records["checkpoint"] for name in record["names"]}
    assert written == {"model_best.pt": 6, "model_00003.pt": 3, "model_00006.pt": 6}
    assert all(len(record["texts"]) == 2 for record in records["sample"])
    assert records["train"][0].keys() == {
        "step", "kind", "loss", "lr", "lrs", "norm", "dt_ms", "tokens_per_s", "mfu", "waited_ms", "skipped",
    }  # fmt: skip
    assert records["train"][0]["mfu"] is None
    assert records["val"][0]["loss"] == pytest.approx(math.log(320), abs=0.2)
    assert records["val"][-1]["loss"] < records["val"][0]["loss"] - 0.1
    (run,) = records["run"]
    assert run["args"]["n_embd"] == 32 and run["versions"]["torch"] == torch.__version__

    names = {path.name for path in Path("log").iterdir()}
    assert names == {"log.jsonl", "loss.png", "model_00006.pt", "model_best.pt"}
    assert Path("log/loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = torch.load("log/model_00006.pt", weights_only=True)
    assert checkpoint["step"] == 6 and checkpoint["val_loss"] == records["val"][-1]["loss"]
    assert checkpoint["config"] == vars(GPT.from_pretrained("log").config)


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ("--dtype float32", 1e-4),
        ("--dtype bfloat16", 0.02),
        ("--beta1 0.8 --beta2 0.98 --weight_decay 0.5 --grad_clip 0.3", 1e-4),
    ],
)
def test_training_matches_plain_loop_with_transformers(run_train, shards, hf_folder, options, tolerance):
    """Twenty steps; the plain loop is fp32, so bf16 may differ by its rounding, 2^-8 of a loss of 5."""
    ours = losses(run_train(f"--init_from {hf_folder} --max_steps 20 --learning_rate 3e-3 {options}"))
    betas, decay, clip = ((0.8, 0.98), 0.5, 0.3) if "beta1" in options else ((0.9, 0.95), 0.1, 1.0)
    model = GPT2LMHeadModel.from_pretrained(hf_folder).train()
    decayed = [p for n, p in model.named_parameters() if p.dim() >= 2]
    others = [p for n, p in model.named_parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=betas, eps=1e-8)
    windows, theirs = torch.tensor(plain_windows(shards)), []
    for step in range(20):
        warm = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warm
        batch = windows[torch.arange(4 * step, 4 * step + 4) % len(windows)]
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=tolerance)
    assert theirs[-1] < theirs[0] - 0.1


def test_rates_and_momentum_reach_their_groups():
    words = "--optimizer muon --learning_rate 1e-2 --muon_lr 0.05 --embedding_lr 3e-2 --position_lr 2e-3"
    args = train.parse_args(f"{words} --momentum 0.8 --beta1 0.7 --beta2 0.9".split())
    dist = Distributed(0, 1, torch.device("cpu"))
    groups = {g["name"]: g for g in train.build_optimizer(GPT(TINY_GPT), args, dist).param_groups}
    rates = {name: pytest.approx(1e-2 * group["lr_scale"]) for name, group in groups.items()}
    assert rates == {
        **{"embeddings": 3e-2, "positions": 2e-3, "c_attn": 0.05, "matrices": 0.05},
        **{"gains and biases": 1e-2},
    }
    assert groups["c_attn"]["momentum"] == groups["matrices"]["momentum"] == 0.8
    assert all(group["betas"] == (0.7, 0.9) for name, group in groups.items() if "momentum" not in group)


@pytest.mark.parametrize(
    "options", ["", "--dropout 0.1 --shuffle", "--dtype bfloat16", "--dtype float16", MUON]
)
def test_resumed_run_matches_uninterrupted_run(run_train, options):
    whole = run_train(options)
    for name in ("model_00006.pt", "model_best.pt"):
        Path("log", name).unlink()
    with open("log/log.jsonl", "a") as log:
        log.write('{"step": 6, "kind": "tr')  # killed in the middle of a line
    resumed = run_train(options + " --resume")
    assert losses(resumed) == losses(whole)
    assert [r["loss"] for r in resumed["val"]] == [r["loss"] for r in whole["val"]]
    assert [record["step"] for record in resumed["train"]] == list(range(6))
    assert [record["step"] for record in resumed["run"]] == [0, 3]


def test_run_resumes_in_another_precision(run_train):
    run_train("--max_steps 3")
    for dtype in ("float16", "bfloat16"):
        records = run_train(f"--max_steps 6 --resume --dtype {dtype}")
        assert [record["step"] for record in records["train"]] == list(range(6))


def test_constant_phase_of_wsd_can_be_extended_and_branched(run_train):
    longer = run_train(f"{MUON} --max_steps 12", out_dir="longer")
    run_train(f"{MUON} --max_steps 8 --keep 0")
    Path("branch").mkdir()
    shutil.copy("log/model_00003.pt", "branch")  # before the decay, which starts at 4
    branch = run_train(f"{MUON} --max_steps 12 --resume", out_dir="branch")
    assert losses(branch) == losses(longer)[3:]
    assert branch["val"] == longer["val"][1:]
    assert plot.positions([3, 12], plot.read_log("branch"), "tokens") == pytest.approx([3 * 64, 12 * 64])
    extended = run_train(f"{MUON} --max_steps 12 --resume")  # from the end: the rate rises again
    assert len(losses(extended)) == 12
    assert [record["lr"] for record in extended["train"][8:]] == [r["lr"] for r in longer["train"][8:]]
    # The evaluation of the short run's end is kept: the longer run has none at that step.
    assert [record["step"] for record in extended["val"]] == [0, 3, 6, 8, 9, 12]
    assert [name for r in extended["checkpoint"] for name in r["names"] if name.startswith("model_0")] == [
        f"model_{step:05d}.pt" for step in (3, 6, 8, 9, 12)
    ]
    assert [record["step"] for record in extended["end"]] == [12]


def test_speedrun_model_loads_in_transformers(run_train):
    records = run_train("--preset speedrun")
    args = records["run"][0]["args"]
    assert (args["optimizer"], args["schedule"], args["min_lr"]) == ("muon", "wsd", 0)
    model = GPT.from_pretrained("log").eval()
    model.save_pretrained("exported", vocab_size=257)
    theirs = GPT2LMHeadModel.from_pretrained("exported").eval()
    idx = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0][..., :257], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options, warmup_steps",
    [
        ("", 715),
        ("--max_steps 76292", 715),
        ("--max_steps 200", 7),
        ("--max_steps 500 --warmup_steps 100", 100),
        ("--max_steps 5", 0),
        ("--preset gpt2-xl", 715),
        ("--preset speedrun", 250),
        ("--preset demo --max_steps 400", 12),
        ("--preset demo --warmup_steps 0", 0),
    ],
)
def test_warmup_is_scaled_to_shorter_runs_unless_it_is_given(options, warmup_steps):
    assert train.parse_args(options.split()).warmup_steps == warmup_steps


@pytest.fixture
def read_windows(monkeypatch):
    """The windows that training reads, as (first, count) of each micro-batch in order."""
    read, seen = DataLoaderLite.next_batches, []

    def next_batches(self, micro_steps=1):
        if "train" in self.shards.paths[0].name:
            seen.extend((self.window + i * self.batch_size, self.batch_size) for i in range(micro_steps))
        return read(self, micro_steps)

    monkeypatch.setattr(DataLoaderLite, "next_batches", next_batches)
    return seen


@pytest.mark.parametrize("shuffle", ["", "--shuffle"])
def test_run_resumed_with_another_total_batch_size_reads_every_window_once(
    run_train, read_windows, capsys, shuffle
):
    run_train(f"{shuffle} --max_steps 3")
    state = torch.load("log/model_00003.pt", weights_only=True)
    assert (state["windows"], state["epoch_windows"]) == (12, 110)
    run_train(f"{shuffle} --resume --total_batch_size 96 --max_steps 5 --batch_size 3")
    windows = [window for first, count in read_windows for window in range(first, first + count)]
    assert windows == list(range(24))
    out = capsys.readouterr().out
    assert "continues at window 12 of epoch 0, the first one that it has not read" in out
    assert f"5 steps, continuing at step 3, {24 * 16} bytes, " in out  # 3 steps of 64, then 2 of 96
    assert torch.load("log/model_00005.pt", weights_only=True)["windows"] == 24


def test_checkpoint_of_an_older_version_continues_at_the_same_window(run_train, read_windows, capsys):
    whole = run_train()
    read_windows.clear()
    older = torch.load("log/model_00003.pt", weights_only=True)
    for name in ("windows", "epoch_windows", "data", "recent"):
        del older[name]
    for path in Path("log").glob("*.pt"):
        path.unlink()
    torch.save(older, "log/model_00003.pt")
    resumed = run_train("--resume")
    assert losses(resumed) == losses(whole) and read_windows[0] == (12, 2)
    assert "warning" not in capsys.readouterr().out


def test_resumed_run_notices_other_data_and_another_order(run_train, shards, capsys):
    run_train("--max_steps 3 --shuffle")
    extra = shards / "edufineweb_train_000003.npy"
    shutil.copy(shards / "edufineweb_train_000002.npy", extra)
    run_train("--max_steps 6 --shuffle --resume")
    printed = capsys.readouterr().out
    assert "warning: the training data have changed: training continues at window 12 of epoch 0" in printed
    run_train("--max_steps 9 --resume --no-shuffle")
    assert "warning: the order of the data has changed" in capsys.readouterr().out
    shutil.move("shards", "moved")
    run_train("--max_steps 12 --resume --data_dir moved")
    assert "warning" not in capsys.readouterr().out  # the same files in another folder


def test_best_loss_counts_only_for_the_same_validation_tokens(run_train, shards, capsys):
    run_train("--max_steps 3")
    state = torch.load("log/model_best.pt", weights_only=True)
    torch.save({**state, "best_val_loss": 0.1}, "log/model_00003.pt")
    run_train("--resume --max_steps 6")
    assert torch.load("log/model_best.pt", weights_only=True)["step"] == 3  # nothing was better
    run_train("--resume --max_steps 9 --val_tokens 320")
    assert "the validation tokens have changed: earlier losses no longer" in capsys.readouterr().out
    best = torch.load("log/model_best.pt", weights_only=True)
    assert best["step"] >= 6 and best["best_val_loss"] > 1
    torch.save({**best, "best_val_loss": 0.1}, "log/model_00009.pt")
    run_train("--resume --max_steps 12 --val_tokens 335")  # the same 20 windows
    assert "validation tokens" not in capsys.readouterr().out


def test_data_are_told_apart_without_a_manifest(run_train, shards, capsys):
    run_train("--max_steps 3")
    manifest = {"complete": True, "tokenizer": "byte", "vocab_size": 257}
    listed = [{"name": path.name, "tokens": len(np.load(path))} for path in shards.glob("*.npy")]
    (shards / "manifest.json").write_text(json.dumps({**manifest, "shards": listed}))
    run_train("--max_steps 6 --resume")
    assert "warning" not in capsys.readouterr().out  # the same tokens, now with a manifest
    path = shards / "edufineweb_train_000001.npy"
    np.save(path, np.roll(np.load(path), 1))
    run_train("--max_steps 9 --resume")
    assert "warning: the training data have changed" in capsys.readouterr().out


def test_run_folder_that_contains_the_data_is_refused(run_train):
    with pytest.raises(ValueError, match="--out_dir shards contains --data_dir: use another folder"):
        run_train("--max_steps 3", out_dir="shards")
    assert sorted(path.suffix for path in Path("shards").iterdir()) == [".npy"] * 3


def test_dropout_differs_from_step_to_step(run_train, capsys):
    with pytest.raises(ValueError, match="one batch still has loss"):
        run_train("--overfit_batch --dropout 0.5 --learning_rate 1e-9 --max_steps 4 --log_every 1")
    losses = re.findall(r"step +\d \| loss +([\d.]+)", capsys.readouterr().out)
    assert len(set(losses)) == 4 == len(losses)  # one batch, one set of weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_does_not_change_losses(run_train, dtype):
    for dropout in ("0", "0.1"):
        options = f"--dtype {dtype} --dropout {dropout}"
        assert losses(run_train(f"{options} --recompute")) == losses(run_train(options))


def test_accumulation_does_not_change_losses(run_train):
    wide, narrow = run_train("--batch_size 4"), run_train("--batch_size 1")
    assert losses(wide) == pytest.approx(losses(narrow), abs=1e-5)


VALIDATE_SCRIPT = """
import argparse, sys, torch, train
from types import SimpleNamespace
from bench import resident
from model import GPT, GPTConfig
from runtime.distributed import setup_distributed
from runtime.machine import keep_freed_memory
keep_freed_memory()
sizes = dict(block_size=32, vocab_size=20000)
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, **sizes))
dist = setup_distributed(torch.device("cpu"))
loader = train.DataLoaderLite(sys.argv[1], "val", batch_size=16, dist=dist, **sizes)
for batches in (3, 20):
    parts = dict(args=argparse.Namespace(val_tokens=batches * 16 * 32), dist=dist, model=model, stop=False)
    parts |= dict(val_data=loader, autocast=torch.autocast("cpu", enabled=False))
    train.validate(SimpleNamespace(**parts), batches)
    print(resident("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_validation_needs_the_memory_of_one_batch(tmp_path):
    np.save(tmp_path / "val_000000.npy", np.zeros(20 * 16 * 32 + 1, dtype=np.uint16))
    Path("validate.py").write_text(VALIDATE_SCRIPT)
    begin(str(tmp_path), "printed", script="validate.py").join(60)
    few, many = map(int, Path("printed").read_text().split())
    logits = 16 * 32 * 20000 * 4
    assert many - few < 8 * logits  # 17 batches more, in a heap that has a few holes


def test_evaluation_does_not_change_training(run_train):
    without = run_train("--dropout 0.2 --val_every 0")
    often = "--val_every 1 --sample_every 1 --sample_tokens 4 --checkpoint_every 1"
    evaluated = run_train(f"--dropout 0.2 {often}")
    assert losses(evaluated) == losses(without)


def test_validation_loss_is_the_mean_over_all_windows(run_train, shards, hf_folder):
    # 600 val tokens hold 37 windows of 16: neither --val_tokens nor a batch of 4 divides them.
    options = f"--init_from {hf_folder} --batch_size 4 --val_tokens 999999"
    ours = run_train(options)["val"][0]["loss"]
    tokens = torch.from_numpy(np.load(shards / "edufineweb_val_000000.npy").astype(int))
    model = GPT2LMHeadModel.from_pretrained(hf_folder).eval()
    with torch.no_grad():
        each = [model(w[None, :-1]).logits[0] for w in tokens.unfold(0, 17, 16)]
    expected = torch.nn.functional.cross_entropy(torch.cat(each), tokens[1 : 37 * 16 + 1])
    assert ours == pytest.approx(expected.item(), abs=1e-5)


def test_overfit_batch_reaches_near_zero_or_fails_and_leaves_a_run_alone(run_train, capsys):
    run_train("--max_steps 3 --warmup_steps 0")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("log").iterdir()}
    options = "--overfit_batch --total_batch_size 32 --schedule wsd --decay_share 0 --max_steps"
    run_train(f"{options} 300")
    passed = re.search(r"overfit check passed: loss ([\d.]+) after (\d+) steps", capsys.readouterr().out)
    assert float(passed[1]) < overfit.ENOUGH and 3 < int(passed[2]) < 300
    with pytest.raises(ValueError, match=r"one batch still has loss 5\.\d+ after 3 steps"):
        run_train(f"{options} 3")
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("log").iterdir()}
    assert before == after and {path.name for path in Path().iterdir()} == {"log", "shards"}


def test_ids_that_only_pad_the_vocabulary_are_refused(run_train, shards):
    path = shards / "edufineweb_train_000001.npy"
    tokens = np.load(path)
    tokens[7] = 257  # one more than the tokenizer has; the model has 320
    np.save(path, tokens)
    with pytest.raises(ValueError, match="000001.npy holds token id 257, but the vocabulary ends at 256"):
        run_train()
    run_train("--vocab_size 512")  # not a padded one, so it is that of other shards


def test_seed_too_large_for_the_order_of_data_is_one_line(run_train):
    with pytest.raises(ValueError, match="--seed is 9999999999999999999: use at least 0 and at most 9223"):
        run_train("--seed 9999999999999999999 --shuffle")


def test_early_stop_keeps_the_best_checkpoint(run_train):
    # Random bytes: the model memorises the training windows and gets worse on others.
    options = "--max_steps 200 --val_every 5 --early_stop 2 --learning_rate 3e-2"
    records = run_train(options)
    validations = records["val"]
    best = min(validations, key=lambda record: record["loss"])
    assert validations[-1]["step"] == best["step"] + 10 < 200
    checkpoint = torch.load("log/model_best.pt", weights_only=True)
    assert (checkpoint["step"], checkpoint["val_loss"]) == (best["step"], best["loss"])
    for path in Path("log").glob("model_0*.pt"):
        path.unlink()
    resumed = run_train(f"{options} --resume")  # from the best, which stores its step
    assert [r["loss"] for r in resumed["val"]] == [r["loss"] for r in validations]


def test_non_finite_gradients_are_skipped_and_end_the_run(run_train):
    run_train("--max_steps 3")
    before = torch.load("log/model_00003.pt", weights_only=True)["model"]
    before["transformer.wte.weight"][0] = math.nan
    torch.save({**torch.load("log/model_00003.pt", weights_only=True), "model": before}, "log/model_00003.pt")
    with pytest.raises(ValueError, match="not finite for 10 steps in a row, up to step 12 .* --resume"):
        run_train("--max_steps 50 --resume --checkpoint_every 0 --val_every 0")
    records = [json.loads(line) for line in Path("log/log.jsonl").read_text().splitlines()]
    skipped = [record for record in records if record["kind"] == "train" and record["step"] >= 3]
    assert [record["skipped"] for record in skipped] == list(range(1, 11))
    assert all(record["loss"] is None for record in skipped)


def test_fp16_overflow_is_skipped_and_recovers(run_train):
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


def test_recompute_does_not_change_losses(run_train):
    kept, again = (run_train(f"--dropout 0.1 {option}") for option in ("", "--recompute"))
    assert [r["loss"] for r in again["train"]] == [r["loss"] for r in kept["train"]]


def test_fine_tuning_works_with_shorter_windows(run_train, hf_folder):
    records = run_train(f"--init_from {hf_folder} --block_size 8 --max_steps 3")
    assert GPT.from_pretrained("log").config.block_size == 16
    assert records["run"][0]["args"]["block_size"] == 8
    run_train(f"--init_from {hf_folder} --block_size 8 --max_steps 6 --resume")
    assert GPT.from_pretrained("log").metadata["step"] == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ("--batch_size 3", r"not divisible by --batch_size 3 .* use --total_batch_size 48 or another"),
        ("--n_head 3", "--n_embd 32 is not divisible by --n_head 3"),
        ("--tokenizer gpt2", "--tokenizer is gpt2, but the shards in .* were made with byte"),
        ("--vocab_size 100", "--vocab_size is 100, but the shards' tokenizer has 257 ids"),
        ("--init_from nowhere", "no model at nowhere"),
        ("--init_from hf --n_layer 3", "--n_layer is 3, but hf has 2"),
        ("--init_from hf --block_size 32", "--block_size is 32, but hf has 16"),
        ("--early_stop 1 --val_every 0", "--early_stop counts validations"),
        ("--out_dir .", "--out_dir . contains the working directory"),
        ("--hellaswag_every 1 --hellaswag_data none.jsonl", "no HellaSwag items at none.jsonl"),
        ("--device cuda:99", "device cuda:99 is not available"),
        ("--decay_share 1.5", "--decay_share is 1.5: use at least 0 and at most 1"),
        ("--muon_lr 0", "--muon_lr is 0.0: use more than 0"),
        ("--warmup_steps 6", "--warmup_steps is 6, but --max_steps is 6: the run would end during warm-up"),
        ("--preset gpt3", "unknown --preset 'gpt3': choose from gpt2, "),
    ],
)
def test_option_errors_are_one_line_with_a_fix(run_train, shards, hf_folder, options, message):
    manifest = {"complete": True, "tokenizer": "byte", "vocab_size": 257, "shards": []}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run_train(options)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("log").exists()


def test_all_problems_are_reported_at_once(run_train):
    with pytest.raises(ValueError) as caught:
        run_train("--batch_size 0 --max_steps -1 --data_dir nowhere --hellaswag_every 1 --hellaswag_data x")
    for part in ("--batch_size is 0", "--max_steps is -1", "nowhere", "no HellaSwag items at x"):
        assert part in str(caught.value)


def test_resuming_with_another_config_names_option_and_values(run_train):
    run_train("--max_steps 3")
    with pytest.raises(ValueError, match="--n_layer is 3, but .*log has 2") as caught:
        run_train("--resume --n_layer 3 --block_size 32")
    assert "--block_size is 32, but" in str(caught.value)
    with pytest.raises(ValueError, match="--max_steps is 2, but the checkpoint in log is at step 3"):
        run_train("--resume --warmup_steps 0 --max_steps 2")
    with pytest.raises(ValueError, match="--overfit_batch does not continue a run: leave out --resume"):
        run_train("--resume --overfit_batch")
    weights = torch.load("log/model_best.pt", weights_only=True)
    torch.save({"model": weights["model"], "config": weights["config"]}, "log/model_00009.pt")
    with pytest.raises(ValueError, match="holds only weights: pass it to --init_from"):
        run_train("--resume")


def test_resumed_run_gets_its_options_back_and_given_ones_win(run_train, capsys):
    options = "--max_steps 8 --optimizer muon --seed 3 --dropout 0.1 --shuffle --sample_prompt=--x "
    options += "--checkpoint_every 4"
    run_train(f"{options} --batch_size 1")
    Path("log/model_00008.pt").unlink()
    Path("log/model_best.pt").unlink()
    shutil.copytree("log", "again")
    train.main(train.parse_args(["--resume", "--out_dir", "again"]))
    assert "resuming again at step 4, with the same options" in capsys.readouterr().out
    assert read_losses("again") == read_losses("log")
    args = [vars(train.parse_args(words.split())) for words in (f"{TINY} {options} --resume", "--resume")]
    assert args[0] == {**args[1], "batch_size": 2}
    train.main(train.parse_args("--resume --no-shuffle --learning_rate 3e-3".split()))
    changes = "--learning_rate 0.003 (was 0.01), --min_lr 0.0003 (was 0.001), --shuffle False (was True)"
    assert f"resuming log at step 4, changed options: {changes}" in capsys.readouterr().out
    for words, message in {
        "--preset demo": "--preset is demo, but log was started with gpt2",
        "--optimizer adamw": "--optimizer is adamw, but the checkpoint in log has the state of muon",
    }.items():
        with pytest.raises(ValueError, match=message):
            train.main(train.parse_args(f"--resume {words}".split()))


def test_lower_rate_of_a_resumed_run_says_which_weights_it_leaves_alone(run_train, capsys):
    def resumed(folder, options):
        run_train(f"{options} --max_steps 3 --checkpoint_every 3", out_dir=folder)
        capsys.readouterr()
        rates = run_train(f"{options} --resume --learning_rate 5e-3", out_dir=folder)["train"]
        return rates[3]["lrs"], capsys.readouterr().out

    lrs, printed = resumed("muon", f"{MUON} --muon_lr 0.03 --embedding_lr 0.04")
    assert lrs["matrices"] == pytest.approx(6 * lrs["gains and biases"])  # three times before
    assert lrs["embeddings"] == pytest.approx(8 * lrs["gains and biases"])
    stay = "--learning_rate does not change --muon_lr 0.03, --embedding_lr 0.04: give these options, too"
    assert stay in printed
    assert "does not change --position_lr 0.02:" in resumed("adamw", "--position_lr 0.02")[1]
    assert "does not change" not in resumed("one", "")[1]
    again = run_train(f"{MUON} --embedding_lr 0.04 --resume --max_steps 7 --muon_lr 0.01", out_dir="muon")
    assert len(again["train"]) == 7 and "does not change --embedding_lr 0.04:" in capsys.readouterr().out


def test_options_that_followed_from_others_follow_again(run_train):
    run_train("--max_steps 8 --checkpoint_every 4 --shuffle --embedding_lr 2e-2")
    resumed = train.parse_args("--resume --learning_rate 5e-3 --no-shuffle".split())
    assert resumed.min_lr == 5e-4 and not resumed.shuffle and resumed.embedding_lr == 2e-2
    assert resumed.warmup_steps == 2  # was given
    given = "--min_lr 1e-3 --max_steps 190"
    run = {**vars(train.parse_args(f"{TINY} {given}".split())), "warmup_steps": 7}  # 715 * 190 / 19073
    Path("log/log.jsonl").write_text(json.dumps({"step": 0, "kind": "run", "args": run}) + "\n")
    for words, warmup, min_lr in (("", 7, 1e-3), ("--max_steps 54", 2, 1e-3), ("--min_lr 0", 7, 0)):
        resumed = train.parse_args(f"--resume {words}".split())
        assert (resumed.warmup_steps, resumed.min_lr) == (warmup, min_lr)


def test_options_come_back_from_a_checkpoint_without_a_log(run_train, capsys):
    run_train("--max_steps 8 --checkpoint_every 4 --seed 5 --shuffle")
    Path("branch").mkdir()
    shutil.copy("log/model_00004.pt", "branch")
    train.main(train.parse_args(["--resume", "--out_dir", "branch"]))
    assert "resuming branch at step 4, with the same options" in capsys.readouterr().out
    assert read_losses("branch") == read_losses("log")[4:]


def test_restart_of_a_run_that_ended_before_its_first_checkpoint_says_whose_options_it_has(run_train, capsys):
    run_train("--max_steps 3 --checkpoint_every 0 --seed 5")
    train.main(train.parse_args(["--resume"]))
    line = "nothing to resume in log: starting a new run, with the options of the one there, which has no che"
    assert line in capsys.readouterr().out
    assert json.loads(Path("log/log.jsonl").read_text().splitlines()[0])["args"]["seed"] == 5


def test_signal_while_the_last_checkpoint_is_written_does_not_lose_it(run_train, monkeypatch):
    close = CheckpointWriter.close

    def interrupted(writer):
        os.kill(os.getpid(), signal.SIGTERM)
        close(writer)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(CheckpointWriter, "close", interrupted)
    run_train("--max_steps 6")
    assert Path("log/model_00006.pt").exists() and signal.getsignal(signal.SIGTERM) == before

    def fails(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(RuntimeError, match="broken"):
        run_train("--max_steps 6")
    assert signal.getsignal(signal.SIGTERM) == before


def test_interrupted_check_promises_nothing(run_train, monkeypatch, capsys):
    take_step = train.train_step

    def stopped(*words):
        os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*words)

    monkeypatch.setattr(train, "train_step", stopped)
    for options, end in {
        "--overfit_batch": "the check has no result",
        "--checkpoint_every 0": "with --checkpoint_every 0 there is nothing to resume",
        "": "python train.py --resume --out_dir log continues",
    }.items():
        run_train(options)
        assert f"stopped by a signal before step 1: {end}\n" in capsys.readouterr().out


def test_model_of_another_tokenizer_is_not_trained_on_bytes(run_train):
    for size, message in (
        (1024, "the model has 1,024 token ids: neither"),
        (50257, "theirs50257 has the token ids of gpt2, the shards those of byte: prepare shards with"),
    ):
        GPT(GPTConfig(16, size, 1, 1, 8)).save_pretrained(f"theirs{size}")
        with pytest.raises(ValueError, match=message) as caught:
            run_train(f"--init_from theirs{size} --n_layer 1 --n_head 1 --n_embd 8")
        assert "\n" not in str(caught.value)
    assert not Path("log").exists()
    run_train("--vocab_size 1024 --max_steps 3")
    run_train("--eval_only --init_from log")  # it was trained on bytes


def test_damaged_options_of_a_run_are_one_line(run_train):
    run_train("--max_steps 3")
    lines = Path("log/log.jsonl").read_text()
    for args in ('{"preset": "speedrun"}', '{"preset": "speedrun", "help": true}'):
        Path("log/log.jsonl").write_text(f'{lines}{{"step": 3, "kind": "run", "args": {args}}}\n')
        assert train.parse_args(["--resume"]).embedding_lr is None  # older runs had none
    for args in ('{"n_layer": [1]}', '{"preset": "x"}', '{"seed": "a b", "preset": "gpt2"}', '{"dtype": 3}'):
        Path("log/log.jsonl").write_text(f'{lines}{{"step": 3, "kind": "run", "args": {args}}}\n')
        with pytest.raises(ValueError) as caught:
            train.parse_args(["--resume"])
        assert len(str(caught.value).splitlines()) == 1
    Path("log/log.jsonl").write_text('{"args": {"unknown": 1, "out_dir": "elsewhere", "n_layer": 3}}\n')
    args = train.parse_args(["--resume"])
    assert (args.n_layer, args.out_dir, args.preset) == (3, "log", "gpt2")


def test_nothing_to_resume_is_said_and_the_run_beside_it_named(run_train, capsys):
    run_train("--max_steps 3", out_dir="mine")
    run_train("--max_steps 3 --resume", out_dir="mime")
    assert "nothing to resume in mime: starting a new run (there is one in mine)" in capsys.readouterr().out


def test_evaluation_alone_gives_what_the_run_measured_and_changes_nothing(run_train, capsys):
    options = "--hellaswag_data demo --hellaswag_every 3 --sample_every 3 --hellaswag_limit 7"
    run = run_train(f"{options} --max_steps 3")
    before = {path: path.stat().st_mtime_ns for path in Path("log").iterdir()}
    trained = capsys.readouterr().out
    run_train(f"{options} --eval_only --init_from log --total_batch_size 100")
    printed = capsys.readouterr().out
    results = json.loads(printed.splitlines()[-1])
    assert "\nbatch" not in printed and "\nmodel" in printed and "\nwarning" not in printed
    assert results["val_loss"] == run["val"][-1]["loss"] and results["val_tokens"] == 160
    assert results["hellaswag"]["acc_norm"] == run["hellaswag"][-1]["acc_norm"]
    assert results["hellaswag"]["n"] == 7 == run["hellaswag"][-1]["n"]
    acc_norm = results["hellaswag"]["acc_norm"]
    line = f"acc_norm {acc_norm:.1%} ± {math.sqrt(acc_norm * (1 - acc_norm) / 6):.1%}, acc "
    for text in (trained, printed):
        assert line in text and " of 7 demo items\n" in text
        assert "scores       of 7 demo items; chance is 25%, ± is one standard error\n" in text
    assert results["samples"] == run["sample"][-1]["texts"]
    tokens = np.load("shards/edufineweb_val_000000.npy")[1:161]
    size = (tokens != 256).sum()  # every other token of the byte tokenizer is a byte
    assert results["bits_per_byte"] == pytest.approx(results["val_loss"] * 160 / size / np.log(2))
    assert f"{results['val_loss']:.4f} nats per byte, {results['bits_per_byte']:.4f} bits" in printed
    assert before == {path: path.stat().st_mtime_ns for path in Path("log").iterdir()}
    assert {path.name for path in Path().iterdir()} == {"log", "shards"}
    for words in ("", "--init_from log --resume", "--init_from log --dry_run"):
        with pytest.raises(ValueError, match="--eval_only"):
            run_train(f"--eval_only {words}")


@pytest.mark.parametrize("checkpoint_every, older", [(100, []), (2, ["model_00002.pt"])])
def test_run_killed_after_its_best_step_resumes_from_there(run_train, checkpoint_every, older):
    options = f"--checkpoint_every {checkpoint_every} --keep 0"
    whole = run_train(options)
    best = torch.load("log/model_best.pt", weights_only=True)["step"]
    for path in Path("log").glob("model_0*.pt"):
        if path.name not in older:
            path.unlink()
    resumed = run_train(f"{options} --resume")
    assert [record["step"] for record in resumed["run"]] == [0, best] and best > 2
    assert losses(resumed) == losses(whole)


def test_command_line_prints_one_line_and_exits_with_1():
    process = begin("", "printed", "errors")
    process.join(60)
    errors = Path("errors").read_text()
    assert process.exitcode == 1 and "there is no folder edu_fineweb10B: `python fineweb.py" in errors
    assert all(line.startswith("train.py: error: ") for line in errors.splitlines())
    assert {path.name for path in Path().iterdir()} == {"printed", "errors"}


def test_importing_has_no_effect_and_loads_no_heavy_packages():
    heavy = ("transformers", "datasets", "matplotlib", "pyarrow", "requests", "huggingface_hub")
    code = f"import train, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True) == "[]\n"


def test_compiled_training_matches_eager_and_compiles_once(run_train, monkeypatch):
    # Skips inductor, whose C++ takes long: this tests our graph, its names and its fixed shapes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    options = "--n_layer 1 --sample_every 3 --hellaswag_every 3 --hellaswag_data demo"
    options += " --hellaswag_limit 12"
    eager, compiled = (run_train(f"{options} {option}") for option in ("", "--compile"))
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
    assert compiled["val"][-1]["loss"] == pytest.approx(eager["val"][-1]["loss"], abs=1e-4)
    # Validation, then training: scoring and sampling at many lengths add none.
    assert [record["compilations"] for record in compiled["hellaswag"]] == [1, 2, 2]
    names = torch.load("log/model_00006.pt", weights_only=True)["model"].keys()
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_compiled_training_matches_cpu(run_train, dtype, optimizer):
    # With the default seed, AdamW amplifies rounding in step 10, to more than these tolerances.
    options = f"--n_embd 64 --max_steps 12 --optimizer {optimizer} --seed 2"
    cpu = run_train(options)
    gpu = run_train(f"{options} --device cuda --compile --sample_every 6 --dtype {dtype}")
    tolerance = 1e-2 if dtype == "float32" else 5e-2  # fp32 includes TF32
    kept = [(a, b) for a, b in zip(losses(cpu), losses(gpu), strict=True) if b is not None]
    assert len(kept) >= 10
    if dtype != "float16":  # its first steps are skipped until the loss scale fits
        assert [a for a, _ in kept] == pytest.approx([b for _, b in kept], abs=tolerance)
    assert losses(gpu)[-1] < losses(gpu)[0]


@pytest.mark.gpu
def test_gpu_resumed_run_matches_uninterrupted_run(run_train):
    options = "--device cuda --dtype bfloat16 --no-compile --dropout 0.1"
    whole = run_train(options)
    for name in ("model_00006.pt", "model_best.pt"):  # either may be at the last step
        Path("log", name).unlink()
    resumed = run_train(options + " --resume")
    assert [record["step"] for record in resumed["run"]] == [0, 3]
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-2)


def test_run_whose_shards_vanish_goes_on_and_then_saves(run_train, shards, monkeypatch, capsys):
    alone = run_train("--max_steps 60 --val_every 0 --checkpoint_every 50", out_dir="alone")
    take_step = train.train_step

    def step_without_shards(*words):
        if words[1] == 10:
            shutil.rmtree(shards)
        if words[1] == 40:  # as if more shards had been read since than may be open
            words[0].train_data.shards.files.cache_clear()
        return take_step(*words)

    monkeypatch.setattr(train, "train_step", step_without_shards)
    monkeypatch.setattr(shards_module.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="train_00000[12].npy: No such file or directory: check the path"):
        run_train("--max_steps 60 --val_every 0 --checkpoint_every 50")
    printed = capsys.readouterr().out
    for words in ("train_000001.npy has vanished since the run began", "cannot read ", "again in 125 s"):
        assert words in printed
    done = read_losses()
    assert done == [(record["step"], record["loss"]) for record in alone["train"][: len(done)]]
    state = torch.load(f"log/model_{len(done):05d}.pt", weights_only=True)  # nothing is lost
    assert state["step"] == len(done) >= 40 and state["windows"] == 4 * len(done)


def test_finetune_preset_improves_weights_from_a_folder(shards, hf_folder, monkeypatch):
    assert train.parse_args(["--preset", "finetune"]).init_from == "gpt2"
    monkeypatch.chdir(shards.parent)
    options = f"--preset finetune --init_from {hf_folder} --data_dir shards --tokenizer byte --device cpu"
    options += " --sample_tokens 4"
    train.main(train.parse_args([*options.split(), "--total_batch_size", "128", "--learning_rate", "1e-2"]))
    records = [json.loads(line) for line in open("log/log.jsonl")]
    by_kind = {record["kind"]: record for record in records}
    assert by_kind["run"]["args"]["dropout"] == 0.1 and "hellaswag" not in by_kind and by_kind["sample"]
    val = [record["loss"] for record in records if record["kind"] == "val"]
    assert len(val) == 4 and min(val) < val[0] - 1  # 41 steps: 3 epochs of 110 windows, 8 a step


def test_text_preset_follows_the_size_of_the_text(shards, monkeypatch, capsys):
    monkeypatch.chdir(shards.parent)
    options = "--preset text --data_dir shards --tokenizer byte --n_layer 1 --n_embd 16 --block_size 16"
    options += " --batch_size 8 --total_batch_size 128 --val_every 30 --sample_tokens 4 --device cpu"
    options += " --dtype float32 --epochs 5"
    options = options.split()
    train.main(train.parse_args(options))
    printed = capsys.readouterr().out
    run = next(json.loads(line) for line in open("log/log.jsonl"))["args"]
    # 110 windows of 16 tokens, 5 times, in steps of 128; warm-up is a fiftieth, as in the whole preset.
    assert run["max_steps"] == 69 and run["warmup_steps"] == 1 and run["epochs"] is None
    assert run["dropout"] == 0.1
    tokens = np.load("shards/edufineweb_val_000000.npy")[:17]  # of the first window
    text = bytes(token for token in tokens.tolist() if token < 256).decode(errors="replace")
    prompt = " ".join(text.strip("\ufffd").split()[:5])
    assert run["sample_prompt"] == prompt and shell_word(prompt) in printed
    middle = np.frombuffer(b"the end.\n\nA new line begins here, and goes on", np.uint8)
    assert prepare.first_words(middle, get_tokenizer("byte")) == "A new line begins here,"
    assert prepare.first_words(np.array([256, *middle]), get_tokenizer("byte")) == "the end. A new line"
    before = train.parse_args(["--resume"])
    assert (before.max_steps, before.preset, before.data_dir) == (69, "text", "shards")
    assert before.epochs is None and train.parse_args(["--resume", "--max_steps", "99"]).max_steps == 99
    short = train.parse_args([*options, "--epochs", "2"])
    prepare.limit_steps(short, 110 * 16, train.tokens_at)
    assert (short.max_steps, short.warmup_steps) == (28, 1)
    short = train.parse_args([*options, "--epochs", "2", "--warmup_steps", "1999"])
    prepare.limit_steps(short, 110 * 16, train.tokens_at)
    assert short.warmup_steps < short.max_steps
    for words, message in {"--total_batch_size 0": "--total_batch_size is 0", "--epochs inf": "less"}.items():
        with pytest.raises(ValueError, match=message):
            train.main(train.parse_args([*options, *words.split()]))
    long = train.parse_args([*options, "--max_steps", "50", "--warmup_steps", "7"])
    prepare.limit_steps(long, 110 * 16, train.tokens_at)
    assert (long.max_steps, long.warmup_steps) == (50, 7)


def test_text_preset_chooses_sizes_and_epochs_by_the_text(shards, hf_folder, monkeypatch):
    def chosen(words: str, tokens: int | None) -> list:
        args = train.parse_args(f"--preset text {words}".split())
        train.fit_to_text(args, tokens)
        return [args.n_layer, args.n_head, args.n_embd, args.epochs]

    *small, epochs = chosen("--tokenizer byte", 1000)
    *larger, _ = chosen("--tokenizer byte", 10**6)
    assert larger[0] > small[0] and larger[2] > small[2] and epochs == 40
    assert chosen("--tokenizer gpt2", 1000) == [*small, 5]
    assert chosen("--tokenizer gpt2 --epochs 7 --n_embd 32", 10**6) == [*larger[:2], 32, 7]
    assert chosen("--tokenizer byte", None) == [*larger, None]
    assert chosen("--tokenizer byte --init_from hf", 1000) == [None, None, None, 40]

    monkeypatch.chdir(shards.parent)
    options = "--preset text --data_dir shards --tokenizer byte --block_size 16 --max_steps 1 --device cpu"
    options += " --warmup_steps 0 --val_every 0 --early_stop 0 --sample_every 0 --checkpoint_every 0"
    for words, wanted in (("", small), ("--init_from hf", [2, 2, 32])):
        train.main(train.parse_args(f"{options} {words}".split()))
        run = next(json.loads(line) for line in open("log/log.jsonl"))["args"]
        assert [run["n_layer"], run["n_head"], run["n_embd"]] == wanted


def growing(step: int, args) -> int:
    """In place of train.tokens_at: batches of a half until step 4."""
    return args.total_batch_size // (2 if step < 4 else 1)


def test_steps_may_take_more_and_more_tokens(run_train, monkeypatch, capsys):
    """A run whose `tokens_at` was edited is resumed where it was, and knows its end."""
    monkeypatch.setattr(train, "tokens_at", growing)
    options = "--max_steps 8 --val_every 4"
    whole = run_train(options, out_dir="whole")
    assert "8 steps, 384 bytes, 0.22 epochs of 1,760" in capsys.readouterr().out
    run_train(f"{options} --checkpoint_every 5 --keep 0")
    for name in ("model_00008.pt", "model_best.pt"):
        Path("log", name).unlink()
    assert losses(run_train(f"{options} --resume")) == losses(whole)
    state = torch.load("log/model_00008.pt", weights_only=True)
    assert state["windows"] == 384 // 16
    assert [record["tokens"] for record in whole["val"]] == [0, 128, 384]
    uneven = "step 0 takes 32 tokens, which is not a multiple of the 64 in a micro-step: use --batch_size 2"
    with pytest.raises(ValueError, match=uneven):
        run_train(f"{options} --batch_size 4", out_dir="uneven")
    limited = train.parse_args(f"{TINY} --epochs 1 --max_steps 99".split())
    prepare.limit_steps(limited, 1760, growing)
    assert abs(sum(growing(step, limited) for step in range(limited.max_steps)) - 1760) <= 32
    monkeypatch.setattr(train, "tokens_at", lambda step, args: 8 if step < 2 else args.total_batch_size)
    with pytest.raises(ValueError, match="step 0 takes 8 tokens, .* use more tokens, or fewer ranks"):
        run_train("--batch_size 1", out_dir="uneven")
    with pytest.raises(ValueError, match="a step of 8 tokens has less than a window of 16 tokens"):
        run_train("--batch_size auto", out_dir="uneven")


def test_option_of_an_older_version_is_named_when_its_run_is_resumed(run_train, capsys):
    run_train()
    for name in ("model_00006.pt", "model_best.pt"):
        state = torch.load(f"log/{name}", weights_only=True)
        state["args"] |= {"once_an_option": 4, "once_disabled": 0}
        torch.save(state, f"log/{name}")
    run_train("--resume --max_steps 8")
    assert "warning: this version has no --once_an_option\n" in capsys.readouterr().out


def test_a_result_is_expected_only_of_a_run_with_the_options_of_its_preset():
    for preset in train.EXPECTED:
        args = train.parse_args(["--preset", preset, "--tokenizer", "byte"])
        train.fit_to_text(args, 10**6)
        assert train.expected_of(args) == train.EXPECTED[preset]
        args.n_layer = 3
        assert train.expected_of(args) is None
    args.n_layer, args.tokenizer = 4, "gpt2"  # of the preset text
    assert args.preset == "text" and train.expected_of(args) is None
    assert train.expected_of(train.parse_args([])) is None


def test_resumed_run_that_epochs_would_end_before_its_checkpoint_is_refused(run_train):
    run_train("--max_steps 6")
    before = Path("log/log.jsonl").read_text()
    for check in ("", "--dry_run"):
        with pytest.raises(ValueError, match="--max_steps is 3, but the checkpoint in log is at step 6"):
            run_train(f"--resume --max_steps 99 --epochs 0.1 {check}")
    with pytest.raises(ValueError, match="--epochs only shortens a run, and this one has done its 6 steps"):
        run_train("--resume --epochs 9")
    assert Path("log/log.jsonl").read_text() == before
