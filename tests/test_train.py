import functools
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from transformers import GPT2LMHeadModel

import fineweb
import train
from model import GPT
from train import DataLoaderLite, Distributed

MUON = "--optimizer muon --schedule wsd --decay_share 0.5 --min_lr 0"


def losses(records):
    return [record["loss"] for record in records["train"]]


def loader(folder, rank=0, world_size=1, **options):
    options = {"batch_size": 2, "block_size": 16, "vocab_size": 257, **options}
    return DataLoaderLite(folder, "train", dist=Distributed(rank, world_size, torch.device("cpu")), **options)


def plain_windows(folder, block_size=16):
    """All training windows in file order, cut by a plain loop."""
    windows = []
    for path in sorted(folder.glob("*train*.npy")):
        tokens = np.load(path).astype(int).tolist()
        starts = range(0, len(tokens) - block_size, block_size)
        windows += [tokens[start : start + block_size + 1] for start in starts]
    return windows


def test_learning_rate_is_that_of_the_124m_reproduction():
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
def test_a_step_reads_the_same_windows_on_any_topology(shards, world_size, batch_size):
    windows = plain_windows(shards)
    accum = 8 // (world_size * batch_size)
    ranks = [loader(shards, rank, world_size, batch_size=batch_size) for rank in range(world_size)]
    for step in range(30):  # two epochs of 110 windows, across the ends of shards and of the epoch
        got = []
        for _ in range(accum):
            for rank in ranks:
                x, y = rank.next_batch()
                assert torch.equal(x[:, 1:], y[:, :-1])
                got += torch.cat((x, y[:, -1:]), dim=1).tolist()
        assert got == [windows[i % len(windows)] for i in range(8 * step, 8 * step + 8)]


def test_shuffle_permutes_each_epoch_and_seek_finds_any_step(shards):
    windows = plain_windows(shards)
    shuffled = loader(shards, shuffle=True, seed=3)
    seen = [torch.cat((x, y[:, -1:]), dim=1).tolist() for x, y in (shuffled.next_batch() for _ in range(110))]
    flat = [row for rows in seen for row in rows]
    epochs = flat[: len(windows)], flat[len(windows) :]
    assert epochs[0] != windows and epochs[1] != epochs[0]
    assert all(sorted(epoch) == sorted(windows) for epoch in epochs)
    again = loader(shards, shuffle=True, seed=3)
    again.seek(77)
    x, y = again.next_batch()
    assert torch.cat((x, y[:, -1:]), dim=1).tolist() == seen[77]


def test_bad_shards_are_named(shards):
    with pytest.raises(FileNotFoundError, match="no train shards in nowhere/: .*--preset demo"):
        loader("nowhere")
    with pytest.raises(ValueError, match="holds token id 256, but the model's vocabulary ends at 249"):
        loader(shards, vocab_size=250)
    with pytest.raises(ValueError, match="holds a window of 1000 . 1 tokens: lower --block_size"):
        loader(shards, block_size=1000)
    bad = shards / "train_000003.npy"
    np.save(bad, np.zeros(100, dtype=np.int32))
    with pytest.raises(ValueError, match="train_000003.npy is 1-dimensional int32, not 1-dimensional uint16"):
        loader(shards)
    np.save(bad, np.zeros((10, 10), dtype=np.uint16))
    with pytest.raises(ValueError, match="is 2-dimensional uint16"):
        loader(shards)
    np.save(bad, np.zeros(1000, dtype=np.uint16))
    bad.write_bytes(bad.read_bytes()[:-500])
    with pytest.raises(ValueError, match="train_000003.npy is cut short"):
        loader(shards)
    np.save(bad, np.zeros(1000, dtype=np.uint16))
    manifest = {"complete": True, "shards": [{"name": bad.name, "tokens": 2000}]}
    (shards / fineweb.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has 1000 tokens, its manifest says 2000"):
        loader(shards)
    (shards / fineweb.MANIFEST).write_text(json.dumps({"complete": False}))
    with pytest.raises(ValueError, match="are not complete"):
        loader(shards)


def test_a_run_writes_log_checkpoints_and_picture(run_train):
    options = f"--keep 1 --sample_every 3 --hellaswag_every 6 --hellaswag_data {train.DEMO_ITEMS}"
    records = run_train(options, picture=True)
    assert [record["step"] for record in records["train"]] == list(range(6))
    assert [record["step"] for record in records["val"]] == [0, 3, 6]
    assert [record["step"] for record in records["hellaswag"]] == [0, 6]
    written = {name: record["step"] for record in records["checkpoint"] for name in record["names"]}
    assert written == {"model_best.pt": 6, "model_00003.pt": 3, "model_00006.pt": 6}
    assert all(len(record["texts"]) == 2 for record in records["sample"])
    assert records["train"][0].keys() == {
        "step", "kind", "loss", "lr", "lrs", "norm", "dt_ms", "tokens_per_s", "mfu", "skipped",
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


def test_the_console_says_what_will_be_done_and_aligns_what_is_done(run_train, shards, capsys):
    run_train(f"{MUON} --log_every 1 --checkpoint_every 2 --keep 1 --milestone_every 2 --learning_rate 1e-3")
    lines = capsys.readouterr().out.splitlines()
    about = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("step", "muon", "adamw")))
    model, tokens = GPT.from_pretrained("log"), 16 * len(plain_windows(shards))
    assert about["model"].startswith(f"{model.num_params():,} parameters: 2 layers, 2 heads, width 32")
    assert about["batch"] == "64 tokens a step: 2 sequences x 16 tokens x 1 rank(s) x 2 micro-step(s)"
    assert about["run"] == f"6 steps, 384 tokens, {384 / tokens:.2f} epochs of {tokens:,} in shards"
    sizes = re.match(r"([\d.]+)kB each, at most ([\d.]+)MB in log, where \S+B are free", about["checkpoints"])
    files = [path.stat().st_size / 1000 for path in Path("log").glob("model_*.pt")]
    assert len(files) == 3  # 4, 6 and the best
    assert float(sizes[1]) == pytest.approx(max(files), rel=0.15)  # names and headers come on top
    assert 1000 * float(sizes[2]) == pytest.approx(4 * float(sizes[1]), abs=10)  # those, and one new
    steps = [line for line in lines if " tok/s | " in line]
    assert len(steps) == 6 and len({tuple(i for i, c in enumerate(line) if c == "|") for line in steps}) == 1
    assert steps[-1].endswith("left 00:00")


@pytest.mark.parametrize("options", ["--dtype float32", "--dtype bfloat16", "--dropout 0.1"])
def test_the_attention_backend_is_the_one_that_runs(run_train, capsys, options):
    with torch.profiler.profile() as profile:
        run_train(f"{options} --max_steps 1 --val_every 0 --checkpoint_every 0")
    ran = {event.key for event in profile.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in ran
    assert flash != ("aten::_softmax_backward_data" in ran)
    assert ("attention flash" if flash else "attention math") in capsys.readouterr().out


def test_tensorboard_holds_the_log_and_hides_what_a_resumed_run_repeats(run_train):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_train("--tensorboard")
    Path("log/model_00006.pt").unlink()
    Path("log/model_best.pt").unlink()
    hellaswag = f"--hellaswag_every 6 --hellaswag_data {train.DEMO_ITEMS}"
    records = run_train(f"--tensorboard --resume {hellaswag}")
    events = event_accumulator.EventAccumulator("log/tensorboard").Reload()
    for tag, kind, name in (
        ("train/loss", "train", "loss"),
        ("train/tokens_per_s", "train", "tokens_per_s"),
        ("train/lr c_attn", "train", "lr"),
        ("val/loss", "val", "loss"),
        ("hellaswag/acc_norm", "hellaswag", "acc_norm"),
    ):
        expected = [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records[kind]]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected, tag


def wandb_history(path):
    """The rows of a run-ID.wandb file: a log in LevelDB's format, of blocks of 32 KiB, behind 7 bytes."""
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


def test_wandb_gets_the_log_and_a_resumed_run_goes_on_under_its_id(run_train, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_train("--wandb --max_steps 3")
    records = run_train("--wandb --max_steps 6 --resume")
    ids = [record["wandb"] for record in records["run"]]
    assert len(ids) == 2 and ids[0] == ids[1]
    paths = sorted(Path("log/wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    rows = [row for path in paths for row in wandb_history(path)]
    assert len(paths) == 2
    logged = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert logged == [(record["step"], record["loss"]) for record in records["train"]]

    def refuse(**options):
        raise wandb.errors.UsageError("no key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"^Weights & Biases: no key \(without an account: WANDB_MODE=off"):
        run_train("--wandb")


def test_missing_packages_are_found_before_the_first_step(run_train, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError) as caught:
        run_train("--tensorboard --wandb")
    for package in ("tensorboard", "wandb"):
        expected = f"--{package} needs a package that is not installed: pip install {package}"
        assert expected in str(caught.value).splitlines()
    assert not Path("log").exists()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.02)])
def test_training_is_that_of_a_plain_loop_with_transformers(run_train, shards, hf_folder, dtype, tolerance):
    """Fifty steps; the plain loop is fp32, so bf16 may differ by its rounding, 2^-8 of a loss of 5."""
    ours = losses(run_train(f"--init_from {hf_folder} --max_steps 50 --learning_rate 3e-3 --dtype {dtype}"))
    model = GPT2LMHeadModel.from_pretrained(hf_folder).train()
    decayed = [p for n, p in model.named_parameters() if p.dim() >= 2]
    others = [p for n, p in model.named_parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    windows, theirs = torch.tensor(plain_windows(shards)), []
    for step in range(50):
        warm = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 48))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warm
        batch = windows[torch.arange(4 * step, 4 * step + 4) % len(windows)]
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=tolerance)
    assert theirs[-1] < theirs[0] - 0.1


@pytest.mark.parametrize(
    "options", ["", "--dropout 0.1 --shuffle", "--dtype bfloat16", "--dtype float16", MUON]
)
def test_a_resumed_run_repeats_the_losses_bit_for_bit(run_train, options):
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


def test_a_run_resumes_in_another_precision(run_train):
    run_train("--max_steps 3")
    for dtype in ("float16", "bfloat16"):
        records = run_train(f"--max_steps 6 --resume --dtype {dtype}")
        assert [record["step"] for record in records["train"]] == list(range(6))


def test_the_constant_phase_of_wsd_is_extended_and_branched(run_train):
    longer = run_train(f"{MUON} --max_steps 12", out_dir="longer")
    run_train(f"{MUON} --max_steps 8 --keep 0")
    Path("branch").mkdir()
    shutil.copy("log/model_00003.pt", "branch")  # before the decay, which starts at 4
    branch = run_train(f"{MUON} --max_steps 12 --resume", out_dir="branch")
    assert losses(branch) == losses(longer)[3:]
    extended = run_train(f"{MUON} --max_steps 12 --resume")  # from the end: the rate rises again
    assert len(losses(extended)) == 12
    assert [record["lr"] for record in extended["train"][8:]] == [r["lr"] for r in longer["train"][8:]]


def test_groups_have_their_rates_and_decay_in_the_log(run_train):
    records = run_train(f"{MUON} --muon_lr 0.03 --weight_decay 0.2")
    groups = {group["name"]: group for group in records["run"][0]["groups"]}
    model = GPT.from_pretrained("log")
    assert sum(group["params"] for group in groups.values()) == model.num_params()
    assert groups["c_attn"]["params"] == 2 * 3 * 32 * 32
    rates = {name: (g["optimizer"], g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {
        "embeddings": ("adamw", pytest.approx(1e-2), 0.2),
        "c_attn": ("muon", pytest.approx(3e-2), 0.2),
        "matrices": ("muon", pytest.approx(3e-2), 0.2),
        "gains and biases": ("adamw", pytest.approx(1e-2), 0.0),
    }
    for record in records["train"]:
        assert record["lrs"]["matrices"] == pytest.approx(3 * record["lr"]) == record["lrs"]["c_attn"]
        assert record["lrs"]["embeddings"] == record["lrs"]["gains and biases"] == record["lr"]


def test_a_speedrun_is_a_gpt2_for_transformers(run_train):
    records = run_train("--preset speedrun")
    args = records["run"][0]["args"]
    assert (args["optimizer"], args["schedule"], args["min_lr"]) == ("muon", "wsd", 0)
    model = GPT.from_pretrained("log").eval()
    model.save_pretrained("exported", vocab_size=257)
    theirs = GPT2LMHeadModel.from_pretrained("exported").eval()
    idx = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0][..., :257], atol=1e-4, rtol=0)


def test_dropout_differs_from_step_to_step(run_train):
    with pytest.raises(ValueError, match="one batch still has loss"):
        run_train("--overfit_batch --dropout 0.5 --learning_rate 1e-9 --max_steps 4")
    records = [json.loads(line) for line in Path("log/log.jsonl").read_text().splitlines()[1:]]
    assert len({round(record["loss"], 4) for record in records}) == 4  # one batch, one set of weights


def test_accumulation_changes_nothing(run_train):
    wide, narrow = run_train("--batch_size 4"), run_train("--batch_size 1")
    assert losses(wide) == pytest.approx(losses(narrow), abs=1e-5)


VALIDATE_SCRIPT = """
import sys, torch, train
from bench import resident
from model import GPT, GPTConfig
train.keep_freed_memory()
sizes = dict(block_size=32, vocab_size=20000)
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, **sizes))
loader = train.DataLoaderLite(sys.argv[1], "val", batch_size=16, dist=train.setup_distributed("cpu"), **sizes)
for batches in (3, 40):
    train.validate(model, loader, batches * 16 * 32, torch.autocast("cpu", enabled=False))
    print(resident("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_validation_needs_the_memory_of_a_batch(tmp_path):
    np.save(tmp_path / "val_000000.npy", np.zeros(40 * 16 * 32 + 1, dtype=np.uint16))
    command = [sys.executable, "-c", VALIDATE_SCRIPT, str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    few, many = map(int, result.stdout.split())
    logits = 16 * 32 * 20000 * 4
    assert many - few < 3 * logits  # 37 batches more


def test_evaluation_leaves_training_alone(run_train):
    without = run_train("--dropout 0.2 --val_every 0")
    evaluated = run_train("--dropout 0.2 --val_every 1 --sample_every 1 --checkpoint_every 1")
    assert losses(evaluated) == losses(without)


def test_validation_is_the_mean_over_its_windows(run_train, shards, hf_folder):
    # 600 val tokens hold 37 windows of 16: neither --val_tokens nor a batch of 4 divides them.
    options = f"--init_from {hf_folder} --batch_size 4 --val_tokens 999999"
    ours = run_train(options)["val"][0]["loss"]
    tokens = torch.from_numpy(np.load(shards / "edufineweb_val_000000.npy").astype(int))
    model = GPT2LMHeadModel.from_pretrained(hf_folder).eval()
    with torch.no_grad():
        each = [model(w[None, :-1]).logits[0] for w in tokens.unfold(0, 17, 16)]
    expected = torch.nn.functional.cross_entropy(torch.cat(each), tokens[1 : 37 * 16 + 1])
    assert ours == pytest.approx(expected.item(), abs=1e-5)


TWO_RANKS_SCRIPT = """
import argparse, functools, hashlib, os, torch, train
torch.compile = functools.partial(torch.compile, backend="aot_eager")
reductions = []

class Counted(train.DistributedDataParallel):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, reduce)

    def __del__(self):
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
    print(f"{{len(reductions)}} reductions\\n", end="", flush=True)  # one write: two ranks print at once
    reductions.clear()
"""


def test_two_ranks_train_as_one_compiled_and_resumed_with_one_reduction_a_step(run_train, two_ranks):
    one = run_train("--batch_size 4 --sample_every 3")
    args = {**one["run"][0]["args"], "batch_size": 1}
    shutil.copytree("log", "resumed")
    Path("resumed/model_00006.pt").unlink()
    Path("resumed/model_best.pt").unlink()
    runs = [{**args, "compile": True, "out_dir": "two", "recompute": True}]
    runs += [{**args, "resume": True, "out_dir": "resumed"}]
    muon = run_train(f"{MUON} --muon_lr 0.05", out_dir="one_muon")
    runs += [{**muon["run"][0]["args"], "batch_size": 1, "out_dir": "two_muon"}]
    Path("two.py").write_text(TWO_RANKS_SCRIPT.format(runs=runs))
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


def test_overfit_batch_reaches_zero_or_says_so(run_train):
    options = "--overfit_batch --total_batch_size 32 --schedule wsd --decay_share 0 --max_steps"
    records = run_train(f"{options} 300")
    assert losses(records)[-1] < train.OVERFIT_LOSS and len(losses(records)) < 300
    with pytest.raises(ValueError, match=r"one batch still has loss 5\.\d+ after 3 steps"):
        run_train(f"{options} 3")


def test_early_stop_keeps_the_best(run_train):
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
    resumed = run_train(f"{options} --resume")  # from the best: it knows when that was
    assert [r["loss"] for r in resumed["val"]] == [r["loss"] for r in validations]


def test_gradients_that_are_not_finite_are_skipped_and_end_the_run(run_train):
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


def test_a_new_run_moves_an_old_one_aside(run_train):
    first = run_train("--seed 1")
    second = run_train("--seed 2")
    run_train("--seed 3")
    for folder, records in (("log.1", first), ("log.2", second)):
        lines = Path(folder, "log.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines if '"train"' in line] == records["train"]
        assert Path(folder, "model_00006.pt").exists()


def test_fine_tuning_starts_from_the_weights_with_shorter_windows(run_train, hf_folder):
    records = run_train(f"--init_from {hf_folder} --block_size 8 --max_steps 3")
    assert GPT.from_pretrained("log").config.block_size == 16
    assert records["run"][0]["args"]["block_size"] == 8
    run_train(f"--init_from {hf_folder} --block_size 8 --max_steps 6 --resume")
    assert GPT.from_pretrained("log").metadata["step"] == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ("--batch_size 3", r"does not divide by --batch_size 3 .* give --total_batch_size 48 or another"),
        ("--n_head 3", "--n_embd 32 does not divide by --n_head 3"),
        ("--tokenizer gpt2", "--tokenizer is gpt2, but the shards in .* were made with byte"),
        ("--vocab_size 100", "--vocab_size is 100, but the shards' tokenizer has 257 ids"),
        ("--init_from nowhere", "no model at nowhere"),
        ("--init_from hf --n_layer 3", "--n_layer is 3, but hf has 2"),
        ("--init_from hf --block_size 32", "--block_size is 32, but hf has 16"),
        ("--early_stop 1 --val_every 0", "--early_stop counts validations"),
        ("--out_dir .", "--out_dir . holds your working folder"),
        ("--hellaswag_every 1 --hellaswag_data none.jsonl", "no HellaSwag items at none.jsonl"),
        ("--device cuda:99", "device cuda:99 cannot be used here"),
        ("--decay_share 1.5", "--decay_share is 1.5: give at most 1"),
        ("--muon_lr 0", "--muon_lr is 0.0: give more than 0"),
        ("--preset gpt3", "unknown --preset 'gpt3': choose from gpt2, "),
    ],
)
def test_bad_options_are_one_line_with_the_mend(run_train, shards, hf_folder, options, message):
    manifest = {"complete": True, "tokenizer": "byte", "vocab_size": 257, "shards": []}
    (shards / fineweb.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run_train(options)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("log").exists()


def test_all_problems_are_said_at_once(run_train):
    with pytest.raises(ValueError) as caught:
        run_train("--batch_size 0 --max_steps -1 --data_dir nowhere --hellaswag_every 1 --hellaswag_data x")
    for part in ("--batch_size is 0", "--max_steps is -1", "nowhere", "no HellaSwag items at x"):
        assert part in str(caught.value)


def test_resuming_another_config_names_the_field_and_both_values(run_train):
    run_train("--max_steps 3")
    with pytest.raises(ValueError, match="--n_layer is 3, but .*log has 2") as caught:
        run_train("--resume --n_layer 3 --block_size 32")
    assert "--block_size is 32, but" in str(caught.value)
    for name in ("model_00003.pt", "model_best.pt"):
        Path("log", name).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="passing over a checkpoint"):
        records = run_train("--resume")
    assert len(records["train"]) == 6 and Path("log.1").exists()  # nothing whole to continue: a new run
    weights = torch.load("log/model_best.pt", weights_only=True)
    torch.save({"model": weights["model"], "config": weights["config"]}, "log/model_00009.pt")
    with pytest.raises(ValueError, match="holds weights only: give it to --init_from"):
        run_train("--resume")


@pytest.mark.parametrize("checkpoint_every, older", [(100, []), (2, ["model_00002.pt"])])
def test_a_run_killed_after_its_best_resumes_from_there(run_train, checkpoint_every, older):
    options = f"--checkpoint_every {checkpoint_every} --keep 0"
    whole = run_train(options)
    best = torch.load("log/model_best.pt", weights_only=True)["step"]
    for path in Path("log").glob("model_0*.pt"):
        if path.name not in older:
            path.unlink()
    resumed = run_train(f"{options} --resume")
    assert [record["step"] for record in resumed["run"]] == [0, best] and best > 2
    assert losses(resumed) == losses(whole)


def test_the_command_line_prints_one_line_and_exits_with_1():
    result = subprocess.run([sys.executable, REPOSITORY / "train.py"], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "edu_fineweb10B/: `python fineweb.py" in result.stderr and "--preset demo" in result.stderr
    assert all(line.startswith("train.py: error: ") for line in result.stderr.splitlines())
    assert list(Path().iterdir()) == []


def test_importing_has_no_effect_and_heavy_packages_wait():
    heavy = ("transformers", "datasets", "matplotlib", "pyarrow", "requests")
    code = f"import train, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True) == "[]\n"


def test_compiled_training_is_eager_training_and_compiles_once(run_train, monkeypatch):
    # Without inductor, whose C++ takes long: what is ours is the graph, its names and its fixed shapes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    options = f"--n_layer 1 --sample_every 3 --hellaswag_every 3 --hellaswag_data {train.DEMO_ITEMS}"
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
def test_gpu_training_compiled_follows_the_cpu(run_train, dtype, optimizer):
    options = f"--n_embd 64 --max_steps 12 --optimizer {optimizer}"
    cpu = run_train(options)
    gpu = run_train(f"{options} --device cuda --compile --sample_every 6 --dtype {dtype}")
    tolerance = 2e-3 if dtype == "float32" else 5e-2
    kept = [(a, b) for a, b in zip(losses(cpu), losses(gpu), strict=True) if b is not None]
    assert len(kept) >= 10
    if dtype != "float16":  # its first steps are skipped until the loss scale fits
        assert [a for a, _ in kept] == pytest.approx([b for _, b in kept], abs=tolerance)
    assert losses(gpu)[-1] < losses(gpu)[0]


@pytest.mark.gpu
def test_gpu_batch_size_auto_is_less_than_everything_and_trains(run_train):
    options = "--device cuda --vocab_size 50304 --total_batch_size 4194304 --max_steps 1 --val_every 0"
    (run,) = run_train(f"{options} --batch_size auto --checkpoint_every 0")["run"]
    # 2 ** 18 windows of 16 tokens would have 2.5 TB of logits, one in fp32 has 10 MB with its gradients.
    assert 16 <= run["args"]["batch_size"] < 2**18


@pytest.mark.gpu
def test_gpu_resume_repeats_the_losses(run_train):
    options = "--device cuda --dtype bfloat16 --no-compile --dropout 0.1"
    whole = run_train(options)
    Path("log/model_00006.pt").unlink()
    assert losses(run_train(options + " --resume")) == pytest.approx(losses(whole), abs=1e-2)
