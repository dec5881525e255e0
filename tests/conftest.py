"""Fixtures and helpers that several test files share: tiny shards, tiny runs of train.py, ranks, models."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for each other, in models this small

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext
from torch.distributed.launcher import elastic_launch
from torch.distributed.run import config_from_args as torchrun_config
from torch.distributed.run import parse_args as torchrun_options

import train
from model import GPT, GPTConfig
from training import records

REPOSITORY = Path(train.__file__).parent
if not torch.cuda.is_available():
    # torch.manual_seed formats the stack for each kind of GPU that is absent: a sixth of a tiny run.
    for kind in (torch.cuda, torch.mtia, torch.xpu):
        kind.manual_seed_all = lambda seed: None
with contextlib.suppress(ImportError):  # test_damage.py is skipped without it
    from hypothesis import HealthCheck, Phase, settings

    # The fixtures of a test are the same for all of its examples.
    checks, phases = list(HealthCheck), [Phase.generate]
    examples = settings(None, deadline=None, database=None, phases=phases, suppress_health_check=checks)
    settings.register_profile("short", examples, max_examples=15, derandomize=True)
    settings.register_profile("long", examples, max_examples=1000)
    settings.load_profile("short")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        for marker in item.iter_markers("needs"):
            if not importlib.util.find_spec(marker.args[0]):
                reason = f"needs the optional package {marker.args[0]}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Run every test in its own folder, so that nothing is written to the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """torch.compile keeps at most eight versions of a function, of all tests together."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def shards(tmp_path):
    """A folder without a manifest: one val and two train shards of random bytes, some more likely."""
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


# What holds with and without the optional package.
WITHOUT_AND_WITH_TENSORBOARD = pytest.mark.parametrize(
    "tensorboard", ["", pytest.param("--tensorboard", marks=pytest.mark.needs("tensorboard"))]
)
MUON = "--optimizer muon --schedule wsd --decay_share 0.5 --min_lr 0"


def no_picture(log: records.Log) -> Path:
    return log.folder.path / "loss.png"


@pytest.fixture
def run_train(shards, monkeypatch):
    """Run train.main on a tiny model in fp32 with a string of options; return the log's records by kind."""
    draw = records.Log.draw

    def run(options: str = "", out_dir: Path | str = "log", picture: bool = False) -> dict[str, list[dict]]:
        monkeypatch.setattr(records.Log, "draw", draw if picture else no_picture)
        train.main(train.parse_args(f"{TINY} --out_dir {out_dir} {options}".split()))
        by_kind: dict[str, list[dict]] = {}
        log = Path(out_dir) / "log.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():  # checks write none
            record = json.loads(line)
            by_kind.setdefault(record["kind"], []).append(record)
        return by_kind

    return run


def losses(by_kind: dict[str, list[dict]]) -> list[float]:
    """Return the training losses of a run."""
    return [record["loss"] for record in by_kind["train"]]


def read_losses(folder: str | Path = "log", kind: str = "train") -> list[tuple[int, float]]:
    """Return the steps and losses of a run, in the order of its log."""
    lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in lines if record["kind"] == kind]


def assert_close(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> None:
    """Check that steps match and losses differ only by summation order."""
    assert ours == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in theirs]


def plain_windows(folder: Path, block_size: int = 16) -> list[list[int]]:
    """Return all training windows in file order, cut by a plain loop."""
    windows = []
    for path in sorted(folder.glob("*train*.npy")):
        tokens = np.load(path).astype(int).tolist()
        starts = range(0, len(tokens) - block_size, block_size)
        windows += [tokens[start : start + block_size + 1] for start in starts]
    return windows


TINY_GPT = GPTConfig(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=32)


def tiny_gpt(seed: int = 0) -> GPT:
    """Return a tiny model whose biases and gains are not trivial, so that a lost one shows."""
    torch.manual_seed(seed)
    model = GPT(TINY_GPT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_stream(folder: str | Path) -> list[int]:
    """Return the tokens of a set of fineweb.py in the order of its documents."""
    records = json.loads(Path(folder, "manifest.json").read_text())["shards"]
    shards = [np.load(Path(folder, record["name"])) for record in records]
    if len(records) > 2 and records[-2]["next"] is None:  # the last shard is the rest of the first
        shards.insert(1, shards.pop())
    return np.concatenate(shards).tolist()


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def count_lines(folder: str | Path) -> int:
    path = Path(folder, "log.jsonl")
    return len(path.read_text().splitlines()) if path.exists() else 0


def inode(path: str) -> int:
    return os.stat(path).st_ino if os.path.exists(path) else 0


def workers(process: multiprocessing.Process) -> list[int]:
    """Return the process ids of a torchrun's workers."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


if os.name != "nt":
    # A process that is forked from a server with everything imported starts at once.
    FORKED = multiprocessing.get_context("forkserver")
    FORKED.set_forkserver_preload([__name__, "torch._dynamo", "matplotlib.backends.backend_agg"])


STARTED: list[multiprocessing.Process] = []


def start(target, words: tuple, daemon: bool) -> multiprocessing.Process:
    STARTED.append(FORKED.Process(target=target, args=words, daemon=daemon))
    STARTED[-1].start()
    return STARTED[-1]


@pytest.fixture(autouse=True)
def end_processes():
    """A test that fails may leave processes that wait for each other; an agent ends its workers itself."""
    yield
    for end in (multiprocessing.Process.terminate, multiprocessing.Process.kill):
        for process in filter(multiprocessing.Process.is_alive, STARTED):
            end(process)
            process.join(10 if process.daemon else 40)
    STARTED.clear()


def run_script(
    script: str, argv: list[str], output: str, errors: str, environment: dict[str, str], data_bytes: int
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    if errors:
        sys.stderr = open(errors, "w", buffering=1)
    if data_bytes:
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
    records.Log.draw = no_picture
    runpy.run_path(script, run_name="__main__")


def begin(
    options: str,
    output: str = os.devnull,
    errors: str = "",
    environment: dict[str, str] | None = None,
    data_bytes: int = 0,
    script: str = str(REPOSITORY / "train.py"),
) -> multiprocessing.Process:
    """Fork a process that runs a script and writes what it prints to `output`, its errors to `errors`."""
    words = (script, options.split(), output, errors, environment or {}, data_bytes)
    return start(run_script, words, daemon=True)


def run_agent(launcher: list[str], argv: list[str], output: str, nohup: bool) -> None:
    if nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stderr = open(output, "a", buffering=1)
    script = str(REPOSITORY / "train.py")
    config, _, _ = torchrun_config(torchrun_options([*launcher, script]))
    config.start_method = "fork"
    close = MultiprocessContext._close

    def close_at_once(context, *args, **kwargs):
        """A forked worker that a signal has ended waits 30 s for an event that nobody sets.

        To set it hangs if a worker was killed while it waited.
        """
        context._worker_finished_event.set()
        close(context, *args, **kwargs)

    MultiprocessContext._close = close_at_once
    elastic_launch(config, run_script)(script, argv, output, "", {}, 0)


def torchrun(
    launcher: str, options: str, output: str = os.devnull, nohup: bool = False
) -> multiprocessing.Process:
    """Fork an agent of torchrun whose workers are forked as well, where torchrun starts interpreters."""
    words = (launcher.split(), options.split(), output, nohup)
    return start(run_agent, words, daemon=False)  # it has children


@pytest.fixture
def two_ranks():
    """Run a script on two forked ranks and return what they print."""

    def run(script: str) -> str:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
        about |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        about |= {"LOCAL_WORLD_SIZE": "2"}
        outputs, ranks = ["rank0.txt", "rank1.txt"], []
        for rank, output in enumerate(outputs):
            environment = {**about, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(begin("", output, os.devnull, environment, script=script))
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
        return "".join(Path(output).read_text() for output in outputs)

    return run


@pytest.fixture
def hf_folder(tmp_path):
    """A Hugging Face folder with a tiny GPT-2 whose weights, biases and gains are all random."""
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
