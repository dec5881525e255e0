"""What several test files share: tiny shards, tiny runs of train.py, and Hugging Face models to compare
with."""

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train

REPOSITORY = Path(train.__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Every test works in its own folder, so that nothing lands in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shards(tmp_path):
    """A folder with one val and two train shards of random bytes, some likelier than others, no manifest."""
    folder = tmp_path / "shards"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, tokens in (("val_000000", 600), ("train_000001", 1000), ("train_000002", 777)):
        ids = np.minimum(rng.geometric(0.03, tokens), 256).astype(np.uint16) - 1
        ids[0] = 256  # end-of-text
        np.save(folder / f"edufineweb_{name}.npy", ids)
    return folder


TINY = (
    "--data_dir shards --tokenizer byte --n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 2 "
    "--total_batch_size 64 --learning_rate 1e-2 --warmup_steps 2 --max_steps 6 --val_every 3 "
    "--val_tokens 160 --hellaswag_every 0 --sample_every 0 --checkpoint_every 3 --log_every 100 --device cpu "
    "--dtype float32 "
)


@pytest.fixture
def run_train(shards, monkeypatch):
    """Run train.main on a tiny model in fp32 and return the log's records by kind; options are a string."""
    draw = train.plot.plot

    def run(options: str = "", out_dir: Path | str = "log", picture: bool = False) -> dict[str, list[dict]]:
        monkeypatch.setattr(train.plot, "plot", draw if picture else lambda runs, output: None)
        train.main(train.parse_args(f"{TINY} --out_dir {out_dir} {options}".split()))
        records: dict[str, list[dict]] = {}
        for line in (Path(out_dir) / "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)
        return records

    return run


def torchrun_command(*options: str) -> tuple[str, ...]:
    """What comes between the interpreter and a script that torchrun starts."""
    return ("-m", "torch.distributed.run", *options)


# Forked from a server that has imported all there is to import, a process begins at once.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, "torch._dynamo", "matplotlib.backends.backend_agg"])


def run_rank(script: str, environment: dict[str, str], output: str) -> None:
    """Run a script as torchrun does: one thread, and in the environment where to find the other ranks."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = open(output, "w", buffering=1)
    runpy.run_path(script, run_name="__main__")


@pytest.fixture
def two_ranks():
    """Run a script on two ranks that are forked instead of started, and return what they print."""

    def run(script: str) -> str:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
        about |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        about |= {"LOCAL_WORLD_SIZE": "2"}
        outputs, ranks = ["rank0.txt", "rank1.txt"], []
        for rank, output in enumerate(outputs):
            environment = {**about, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(FORKED.Process(target=run_rank, args=(script, environment, output), daemon=True))
            ranks[-1].start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
        return "".join(Path(output).read_text() for output in outputs)

    return run


@pytest.fixture
def hf_folder(tmp_path):
    """A Hugging Face folder with a tiny GPT-2 of random weights, biases and gains included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=320,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"
