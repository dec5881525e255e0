"""Damaged and malicious files, given to every command that reads them: one line, little memory, no hang.

    python -m pytest tests/test_damage.py                              # two hundred files
    python -m pytest tests/test_damage.py --hypothesis-profile=long    # sixty times as many
"""

import copy
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY
from matplotlib.figure import Figure

import fineweb
import hellaswag
import plot
import sample
import train
from runtime.cli import USER_ERRORS, error_lines
from training import records

st = pytest.importorskip("hypothesis.strategies")
given = pytest.importorskip("hypothesis").given
MOST_SECONDS, MOST_BYTES = 60, 300_000_000  # of a command, on top of what earlier ones have taken
TEXT = REPOSITORY / "tests" / "test_muon.py"
RUN = f"{TINY} --n_layer 1 --n_embd 8 --val_every 2 --max_steps 3 --data_dir set --out_dir log"
SAMPLE = ("--prompt", "a", "--max_new_tokens", "2")


class Hang(BaseException):
    """No error that a command could take for one of its user's."""


def forget_peak_memory() -> None:
    """Make the peak memory of this process its present memory: proc(5)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, or 0 where it cannot be forgotten."""
    if sys.platform != "linux":
        return 0
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def attempt(module, *argv: object) -> str | None:
    """Run a command and return its error message, or None if it succeeds."""

    def hang(*_):
        raise Hang(argv)

    before = signal.signal(signal.SIGALRM, hang)
    forget_peak_memory()
    bytes_before = peak_memory()
    signal.alarm(MOST_SECONDS)
    try:
        module.main(module.parse_args([str(word) for word in argv]))
    except USER_ERRORS as error:
        lines = error_lines(error)
        assert all(line and len(line) < 1000 for line in lines)
        return "\n".join(lines)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert peak_memory() - bytes_before < MOST_BYTES, argv


def check_names(message: str | None, *names: str) -> None:
    """Check that an error names the file or, where that is intact but unusual, an option or tokenizer."""
    assert message is None or any(name in message for name in (*names, "--", "tokenizer", "vocabulary"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request):
    """A folder with one intact file or folder of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(records.Log, "draw", lambda log: folder)
        shard_options = ("--tokenizer", "byte", "--shard_size", "400", "--out_dir", "set")
        assert attempt(fineweb, "--files", TEXT, *shard_options) is None
        assert attempt(train, *RUN.split()) is None
        assert attempt(sample, "--model", "log", "--export", "hf") is None
        lines = (REPOSITORY / "corpus" / "hellaswag_demo.jsonl").read_text().splitlines()[:2]
        Path("items.jsonl").write_text("\n".join(lines))
        for path in Path("log").glob("model_*.pt"):
            path.rename("model.pt")
    return folder


@pytest.fixture
def copies(whole, tmp_path, monkeypatch):
    """Return a function that copies the intact files to a new folder and changes to it."""
    monkeypatch.setattr(records.Log, "draw", lambda log: tmp_path)
    numbers = iter(range(10**9))

    def copy_to_new_folder() -> None:
        folder = tmp_path / str(next(numbers))
        shutil.rmtree(tmp_path / str(int(folder.name) - 1), ignore_errors=True)
        shutil.copytree(whole, folder)
        monkeypatch.chdir(folder)

    return copy_to_new_folder


@st.composite
def damage(draw) -> Callable[[bytes], bytes]:
    """Cut, flip, swap, repeat, remove or insert something in some places."""
    changes = draw(st.lists(st.tuples(st.integers(0, 6), *[st.floats(0, 1)] * 2), min_size=1, max_size=4))
    noise = draw(st.binary(min_size=1, max_size=20))

    def apply(data: bytes) -> bytes:
        for kind, a, b in changes:
            i, j = sorted((int(a * len(data)), int(b * len(data))))
            k = min(i + 1 + (j - i) % 16, len(data))
            data = {
                0: data[:i],
                1: data[:i] + bytes(each ^ 0xFF for each in data[i:k]) + data[k:],
                2: data[:i] + data[j : j + 64] + data[i + 64 : j] + data[i : i + 64] + data[j + 64 :],
                3: data[:j] + data[i:],
                4: data[:i] + data[j:],
                5: data[:i] + noise + data[i:],
                6: data[:i] + noise + data[i + len(noise) :],
            }[kind]
        return data

    return apply


deep = "[" * 100_000 + "]" * 100_000
WRONG = [None, True, -1, 0, 3, 10**30, 0.5, -1e300, float("nan"), float("inf"), "", "../../x", "x" * 5000]
WRONG += [[], {}, [1, "2", None], {"a": {"b": []}}, [[[], [1]], []], {"name": "../x", "tokens": 10**18}]
TENSORS = [torch.zeros(()), torch.zeros(3), torch.zeros(0, 8), torch.zeros(257, 8, 1), torch.ones(2, 2) * 1j]
TENSORS += [torch.zeros(1).expand(10**10), torch.zeros(1).expand(10**5, 10**5), torch.zeros(257, 8).long()]


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """Return the paths to everything in nested dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))][path == () :]


@st.composite
def replacements(draw, values: list) -> Callable[[object], object]:
    """Replace, remove or exchange some values of nested dicts and lists."""
    changes = draw(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), min_size=1, max_size=3))
    others = [draw(st.sampled_from(values)) for _ in changes]

    def apply(tree: object) -> object:
        for (kind, where), other in zip(changes, others, strict=True):
            other = copy.deepcopy(other)
            if not (found := places(tree)):
                break
            *path, key = found[min(int(where * len(found)), len(found) - 1)]
            parent = tree
            for each in path:
                parent = parent[each]
            if kind == 0:
                del parent[key]
            elif kind == 1 and isinstance(parent, dict):
                parent[str(other)[:20]] = parent.pop(key)
            else:
                parent[key] = other
        return tree

    return apply


def test_intact_files_are_read(copies):
    copies()
    assert attempt(sample, "--model", "model.pt", *SAMPLE) is None
    assert attempt(hellaswag, "--model", "hf", "--data", "items.jsonl") is None
    shutil.copy("model.pt", "log/model_00003.pt")
    assert attempt(train, *RUN.split(), "--resume", "--max_steps", 4) is None
    assert attempt(plot, "log") is None
    assert attempt(fineweb, "--verify", "--out_dir", "set") is None


def read_checkpoint() -> None:
    for message in (
        attempt(sample, "--model", "model.pt", *SAMPLE),
        attempt(train, *RUN.split(), "--init_from", "model.pt", "--out_dir", "new"),
    ):
        check_names(message, "model.pt")
    shutil.copy("model.pt", "log/model_00003.pt")
    shutil.copytree("log", "again")
    Path("again/model_00003.pt").rename("again/model_best.pt")
    attempt(sample, "--model", "log", "--export", "card")
    attempt(train, *RUN.split(), "--out_dir", "again", "--resume", "--max_steps", 4)
    assert Path("again").exists()


@given(change=damage())
def test_damaged_checkpoint(copies, change):
    copies()
    path = Path("model.pt")
    path.write_bytes(change(path.read_bytes()))
    read_checkpoint()


@given(change=replacements([*WRONG, *TENSORS]))
def test_checkpoint_with_wrong_values(copies, change):
    copies()
    torch.save(change(torch.load("model.pt", weights_only=True)), "model.pt")
    read_checkpoint()


def read_shards() -> None:
    attempt(train, *RUN.split(), "--out_dir", "new", "--max_steps", 3)
    attempt(fineweb, "--verify", "--out_dir", "set")
    attempt(fineweb, "--files", TEXT, "--tokenizer", "byte", "--shard_size", 400, "--out_dir", "set")


@given(change=damage(), shard=st.integers(0, 2), with_manifest=st.booleans())
def test_damaged_shard(copies, change, shard, with_manifest):
    copies()
    path = sorted(Path("set").glob("*.npy"))[shard]
    path.write_bytes(change(path.read_bytes()))
    if not with_manifest:
        Path("set", "manifest.json").unlink()
    read_shards()


@given(
    dtype=st.sampled_from(["<u2", ">u2", "|O", "<f8", "|V1000000", "<U999999", "[('a', '<u2')]", "?"]),
    order=st.sampled_from(["True", "False", "None", "(" * 90 + ")" * 90]),
    shape=st.sampled_from(["()", "(400,)", f"({10**30},)", f"({2**62},)", "(-1,)", "(0,)", "(2, 200)", "4"]),
    version=st.sampled_from([1, 2, 3, 9]),
    length=st.none() | st.integers(0, 2**32 - 1),
)
def test_shard_with_a_wrong_header(copies, dtype, order, shape, version, length):
    copies()
    text = f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}}}".encode()
    width = 2 if version == 1 else 4
    length = len(text) if length is None else length % 256**width
    data = b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(width, "little") + text + bytes(800)
    path = sorted(Path("set").glob("*.npy"))[1]
    path.write_bytes(data)
    Path("set", "manifest.json").unlink()
    read_shards()


def change_json(path: Path, change: Callable[[object], object], is_deep: int) -> None:
    """Change a JSON file, or nest it deeply in a tenth of the cases."""
    path.write_text(deep if is_deep == 0 else json.dumps(change(json.loads(path.read_text()))))


@given(change=damage())
def test_damaged_manifest(copies, change):
    copies()
    path = Path("set", "manifest.json")
    path.write_bytes(change(path.read_bytes()))
    read_shards()


@given(change=replacements(WRONG), is_deep=st.integers(0, 9))
def test_manifest_with_wrong_values(copies, change, is_deep):
    copies()
    change_json(Path("set", "manifest.json"), change, is_deep)
    read_shards()


def read_log(monkeypatch) -> None:
    # A picture takes half a second: it is drawn without being written.
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"a picture"))
    attempt(plot, "log", "--references", "--against", "tokens")
    attempt(plot, "log", "--output", "report.html")
    shutil.copy("model.pt", "log/model_00003.pt")
    assert attempt(sample, "--model", "log", "--export", "card") is None
    assert attempt(train, *RUN.split(), "--resume", "--max_steps", 4) is None


@given(change=damage())
def test_damaged_log(copies, monkeypatch, change):
    copies()
    path = Path("log", "log.jsonl")
    path.write_bytes(change(path.read_bytes()))
    read_log(monkeypatch)


@given(changes=st.lists(replacements(WRONG), min_size=1, max_size=4), is_deep=st.integers(0, 9))
def test_log_with_wrong_values(copies, monkeypatch, changes, is_deep):
    copies()
    path = Path("log", "log.jsonl")
    lines = path.read_text().splitlines()
    for number, change in enumerate(changes):
        lines[-1 - number] = json.dumps(change(json.loads(lines[-1 - number])))
    path.write_text("\n".join([*lines, deep] if is_deep == 0 else lines))
    read_log(monkeypatch)


def read_items() -> None:
    for options in ((), ("--lm_eval",)):
        message = attempt(hellaswag, "--model", "hf", "--data", "items.jsonl", *options)
        check_names(message, "items.jsonl")


@given(change=damage())
def test_damaged_items(copies, change):
    copies()
    path = Path("items.jsonl")
    path.write_bytes(change(path.read_bytes()))
    read_items()


@given(change=replacements(WRONG), is_deep=st.integers(0, 9))
def test_items_with_wrong_values(copies, change, is_deep):
    copies()
    path = Path("items.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], deep if is_deep == 0 else json.dumps(change(json.loads(lines[1])))]))
    read_items()


def read_hugging_face() -> None:
    for message in (
        attempt(sample, "--model", "hf", *SAMPLE),
        attempt(train, *RUN.split(), "--init_from", "hf", "--out_dir", "new"),
    ):
        check_names(message, "hf")


@given(change=damage(), name=st.sampled_from(["config.json", "model.safetensors", "generation_config.json"]))
def test_damaged_hugging_face_folder(copies, change, name):
    copies()
    path = Path("hf", name)
    path.write_bytes(change(path.read_bytes()))
    read_hugging_face()


@given(change=replacements(WRONG), is_deep=st.integers(0, 9))
def test_hugging_face_config_with_wrong_values(copies, change, is_deep):
    copies()
    change_json(Path("hf", "config.json"), change, is_deep)
    read_hugging_face()
