"""Kernels, compilers and memory."""

import os
import resource
import termios

import pytest
import torch
from conftest import read_losses

from model import GPT, GPTConfig


@pytest.mark.parametrize("options", ["--dtype float32", "--dtype bfloat16", "--dropout 0.1"])
def test_reported_attention_backend_is_the_one_that_runs(run_train, capsys, options):
    with torch.profiler.profile() as profile:
        run_train(f"{options} --warmup_steps 0 --max_steps 1 --val_every 0 --checkpoint_every 0")
    ran = {event.key for event in profile.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in ran
    assert flash != ("aten::_softmax_backward_data" in ran)
    assert ("attention flash" if flash else "attention math") in capsys.readouterr().out


def test_out_of_memory_suggests_a_batch_size(start):
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
    model = GPT(GPTConfig(16, 320, 2, 2, 32))
    fits_2 = model.training_bytes(2, 16, torch.float32)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2 * fits_2 + 2)
    assert run_train("--batch_size auto")["run"][0]["args"]["batch_size"] == 2
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.raises(ValueError, match="not even --batch_size 1 fits into memory: use --recompute"):
        run_train("--batch_size auto")


def test_missing_compiler_warns_once_and_terminal_shows_a_bar(start, tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    terminal, its_other_end = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = start("--compile --max_steps 3", env=environment, stderr=its_other_end)
    output, _ = process.communicate(timeout=120)
    os.close(its_other_end)  # reading past the end now raises
    bar = os.read(terminal, 65536).decode()
    assert process.returncode == 0, bar
    assert output.count("warning: torch.compile does not work here") == 1 and "float32, eager, " in output
    assert len(read_losses()) == 3
    assert "3/3" in bar and "step/s" in bar and "step/s" not in output


@pytest.mark.gpu
def test_gpu_batch_size_auto_trains_within_memory(run_train):
    options = "--device cuda --vocab_size 50304 --total_batch_size 4194304 --max_steps 1 --warmup_steps 0"
    (run,) = run_train(f"{options} --batch_size auto --val_every 0 --checkpoint_every 0")["run"]
    # 2 ** 18 windows of 16 tokens would have 2.5 TB of logits, one in fp32 has 10 MB with its gradients.
    assert 16 <= run["args"]["batch_size"] < 2**18
