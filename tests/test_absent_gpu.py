"""Compiling for GPUs that are not there: `bench.py compile`. Needs a CUDA build of torch, but no GPU."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import bench
from bench import cuda_python
from runtime import absent_gpu

try:
    cuda_python()
    missing = ""
except FileNotFoundError as error:
    missing = str(error)
needs_cuda_build = pytest.mark.skipif(bool(missing), reason=missing)
SMALL = "--n_layer 1 --n_head 2 --n_embd 128 --top 3"


def compile_for_card(options: str) -> list[dict]:
    args = bench.parse_args(["compile", *f"{SMALL} {options}".split()])
    return args.bench(args, torch.device("cpu"))


@pytest.mark.skipif(not missing, reason="this torch can compile for GPUs")
def test_build_without_cuda_says_how_to_get_another():
    with pytest.raises(FileNotFoundError, match="cannot compile for GPUs: `bash runtime/cuda_env.sh` makes"):
        compile_for_card("")
    assert (REPOSITORY / bench.CUDA_SCRIPT).is_file()


def test_folder_without_a_model_is_refused():
    with pytest.raises(FileNotFoundError, match="no model.py in nowhere: name the folder of another version"):
        compile_for_card("--against nowhere")


def test_process_that_compiles_gets_the_folder_and_all_options(monkeypatch):
    script = "import json, sys; print(json.dumps({'folder': sys.argv[1], **json.loads(sys.argv[2])}))"
    Path("echo.py").write_text(script)
    monkeypatch.setattr(absent_gpu, "__file__", "echo.py")
    monkeypatch.setattr(bench, "cuda_python", lambda: sys.executable)
    args = bench.parse_args("compile --card t4 --what decoding --n_layer 1 --dropout 0.1 --recompute".split())
    got = bench.count_kernels(Path("other"), args)
    assert Path(got["folder"]) == Path("other").absolute()
    assert (got["card"], got["what"], got["n_layer"], got["n_embd"]) == ("t4", "decoding", 1, 768)
    assert (got["dropout"], got["recompute"], got["block_size"]) == (0.1, True, 1024)


@needs_cuda_build
@pytest.mark.parametrize("card", sorted(absent_gpu.CARDS))
@pytest.mark.parametrize(
    "options",
    [
        "--what training --batch_size 16 --block_size 1024",
        "--what training --batch_size 16 --block_size 256 --dropout 0.1 --recompute",
        "--what validation --batch_size 16 --block_size 1024",
        "--what decoding --batch_size 1 --block_size 1024",
        "--what decoding --batch_size 8 --block_size 256",
    ],
)
def test_every_kernel_compiles_for_every_card(card, options):
    (row,) = compile_for_card(f"--card {card} {options}")
    assert row["kernels"] >= 9 and row["MB/token"] > 0


@needs_cuda_build
def test_graph_does_not_grow_with_the_batch():
    rows = [compile_for_card(f"--batch_size {batch_size}")[0] for batch_size in (64, 256)]
    assert rows[0]["nodes"] == rows[1]["nodes"] < 500


@needs_cuda_build
def test_bytes_of_a_model_that_only_copies_are_those_of_its_tensors(tmp_path, capsys):
    """A matrix in fp32 is read for a sum of squares, and again for the gradient, which is written."""
    (tmp_path / "model.py").write_text(COPIER)
    rows = compile_for_card(f"--batch_size 8 --block_size 1024 --against {tmp_path}")
    matrix = 4 * 8 * 1024 * 4096
    assert 1e9 * rows[1]["generated"] == pytest.approx(3 * matrix, rel=0.01)
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 1
    assert f"{tmp_path}: training on h100" in capsys.readouterr().out


COPIER = """
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(8 * 1024, 4096))

    def forward(self, idx, targets):
        return None, (self.matrix**2).sum()
"""


def test_script_that_makes_the_environment_names_the_interpreter_that_is_looked_for():
    script = (REPOSITORY / bench.CUDA_SCRIPT).read_text()
    assert str(bench.CUDA_PYTHON.relative_to(REPOSITORY)) in script


@pytest.mark.parametrize(
    "device_name, card",
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("Tesla T4", "t4"), ("cpu", None)],
)
def test_known_cards_are_found_by_what_their_driver_calls_them(device_name, card):
    assert absent_gpu.card_in(device_name) == card
