import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import token_stream

import fineweb
from corpus import documents
from corpus import inputs as corpus_inputs
from corpus import shards as shards_module
from runtime.distributed import Distributed
from runtime.files import locked_folder
from train import DataLoaderLite

pyarrow = pytest.importorskip("pyarrow")  # a machine for the GPU tests may lack it
pytest.importorskip("pyarrow.parquet")
TEXTS = ["first", "", "a second text\nof two lines", None, "<|endoftext|>", "naïve 漢字 🙂", "tail " * 40]
EOT = 256
ALONE = Distributed(0, 1, torch.device("cpu"))


def expected_tokens(texts=TEXTS):
    """The stream that the usual single-process script writes, in plain Python."""
    return [token for text in texts if text for token in (EOT, *text.encode())]


def cli(*argv):
    fineweb.main(fineweb.parse_args([str(arg) for arg in argv]))


def load_shards(folder):
    return {
        path.name: np.load(path)
        for path in sorted(Path(folder).glob("*.npy"), key=lambda path: path.stem[-6:])
    }


@pytest.fixture
def files(tmp_path):
    """TEXTS over one file of every format, in order."""
    (tmp_path / "1.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    (tmp_path / "2.txt").write_text(TEXTS[2])
    with gzip.open(tmp_path / "3.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS[3:5])
    table = pyarrow.table({"id": [1, 2], "text": TEXTS[5:]})
    pyarrow.parquet.write_table(table, tmp_path / "4.parquet", row_group_size=1)
    return [str(tmp_path / "[1-3].*"), str(tmp_path / "4.parquet")]


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_hold_the_token_stream_cut_at_shard_size(files, workers, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_CHUNK", 2)
    cli(
        "--files", *files, "--tokenizer", "byte", "--shard_size", 50, "--workers", workers, "--out_dir", "out"
    )
    stream, shards = expected_tokens(), load_shards("out")
    assert list(shards) == [
        f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy" for i in range(-(-len(stream) // 50))
    ]
    for i, tokens in enumerate(shards.values()):
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == stream[50 * i : 50 * (i + 1)]

    manifest = json.loads(Path("out/manifest.json").read_text())
    assert [shard["tokens"] for shard in manifest["shards"]] == [len(tokens) for tokens in shards.values()]
    assert sum(shard["documents"] for shard in manifest["shards"]) == 5
    assert manifest["skipped_documents"] == 2
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["eot_token"]) == ("byte", 257, 256)
    assert manifest["complete"] is True
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256(Path("out", shard["name"]).read_bytes()).hexdigest()


def test_set_of_one_shard_is_split_and_its_last_tenth_is_val():
    Path("input.txt").write_text("x" * 999)
    cli("--files", "input.txt", "--tokenizer", "byte", "--out_dir", "out")
    shards = load_shards("out")
    assert shards["edufineweb_train_000001.npy"].tolist() == [EOT] + [ord("x")] * 899
    assert shards["edufineweb_val_000000.npy"].tolist() == [ord("x")] * 100


def last_tenths(parts):
    """The validation and training tokens of files with these tokens, in plain Python."""
    cuts = [int(0.9 * len(part)) for part in parts]
    val = [token for part, cut in zip(parts, cuts, strict=True) for token in part[cut:]]
    return val, [token for part, cut in zip(parts, cuts, strict=True) for token in part[:cut]]


def test_validation_is_the_last_tenth_of_each_file_for_any_number_of_workers(files, capsys, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_CHUNK", 1)
    for name, text in (("empty.txt", ""), ("tiny.txt", "x"), ("long.txt", "a b " * 300)):
        Path(name).write_text(text)
    arguments = ("--files", *files, "empty.txt", "tiny.txt", "long.txt", "--tokenizer", "byte", "--out_dir")
    for workers in (1, 3):
        cli(*arguments, f"out{workers}", "--workers", workers)
    assert contents("out1") == contents("out3")
    texts = [TEXTS[:2], TEXTS[2:3], TEXTS[3:5], TEXTS[5:], ["x"], ["a b " * 300]]
    val, train = last_tenths([expected_tokens(part) for part in texts])
    shards = load_shards("out1")
    assert shards["edufineweb_val_000000.npy"].tolist() == val
    assert shards["edufineweb_train_000001.npy"].tolist() == train
    manifest = json.loads(Path("out1/manifest.json").read_text())
    assert sum(shard["documents"] for shard in manifest["shards"]) == 7
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")]
    names = [*(str(Path(files[1]).with_name(name)) for name in ("1.jsonl", "2.txt", "3.jsonl.gz")), files[1]]
    assert said == 2 * [f"validation is the last tenth of each file: {', '.join(names)}, tiny.txt and 1 more"]


def test_set_of_several_files_is_repaired_and_split_again_when_its_limit_is_raised(files):
    arguments = ("--files", *files, "--tokenizer", "byte", "--out_dir")
    cli(*arguments, "whole")
    for limit in (["--max_tokens", 50], []):
        cli(*arguments, "out", *limit)
    assert contents("out") == contents("whole")
    for shard in Path("out").glob("*.npy"):
        shard.unlink()
    cli(*arguments, "out")
    assert contents("out") == contents("whole")


def test_set_of_several_files_from_an_older_version_keeps_the_last_tenth_of_all(files):
    """Those sets say nothing about it in their manifest."""
    arguments = ("--files", *files, "--tokenizer", "byte", "--out_dir", "out")
    cli(*arguments, "--max_tokens", 100)
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest.pop("splits_each_file") is True
    stream = expected_tokens()
    for record, tokens in zip(manifest["shards"], (stream[90:100], stream[:90]), strict=True):
        np.save(Path("out", record["name"]), np.array(tokens, dtype=np.uint16))
        digest = hashlib.sha256(Path("out", record["name"]).read_bytes()).hexdigest()
        record |= {"tokens": len(tokens), "documents": tokens.count(EOT), "sha256": digest}
    Path("out/manifest.json").write_text(json.dumps(manifest, indent=2))
    before = {name: tokens.tolist() for name, tokens in load_shards("out").items()}
    for name in before:
        Path("out", name).unlink()
        cli(*arguments, "--max_tokens", 100)
        assert {name: tokens.tolist() for name, tokens in load_shards("out").items()} == before
    cli(*arguments)  # without the limit
    cut = int(0.9 * len(stream))
    assert [tokens.tolist() for tokens in load_shards("out").values()] == [stream[cut:], stream[:cut]]


def overlapping_documents(parts):
    """The texts of which one copy is validated on a byte that another copy trains on, in plain Python.

    Those of fewer than 32 tokens, with end-of-text, are left out.
    """
    seen = {}
    for texts in parts:
        places = [(text, place) for text in texts for place in range(len(text) + 1)]  # with end-of-text
        for number, (text, place) in enumerate(places):
            is_val = number >= int(0.9 * len(places))
            seen.setdefault(text, {}).setdefault(place, set()).add(is_val)
    found = {text for text, places in seen.items() if any(len(splits) == 2 for splits in places.values())}
    return {text for text in found if len(text) >= 31}


def test_repeated_documents_in_training_and_validation_are_counted(capsys):
    rng = np.random.default_rng(0)
    counts = set()
    for number in range(20):
        kinds = [f"text {kind} {'z' * int(rng.integers(20, 44))}" for kind in range(25)]
        parts = [[str(rng.choice(kinds)) for _ in range(rng.integers(1, 12))] for _ in range(3)]
        for name, texts in zip("abc", parts, strict=True):
            Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        cli("--files", "a.jsonl", "b.jsonl", "c.jsonl", "--tokenizer", "byte", "--out_dir", f"out{number}")
        warning = "warning: ([0-9]+) document.* is in (.).jsonl and begins with '(.*)':"
        said = re.findall(warning, capsys.readouterr().out)
        expected = overlapping_documents(parts)
        assert len(said) == bool(expected)
        for count, name, beginning in said:
            assert int(count) == len(expected)
            texts = expected & {*parts["abc".index(name)]}
            assert beginning and any(text.startswith(beginning) for text in texts)
        counts.add(len(expected))
    assert {0, 1, 2} <= counts


def test_max_tokens_limits_the_set(files):
    cli("--files", *files, "--tokenizer", "byte", "--shard_size", 20, "--max_tokens", 50, "--out_dir", "out")
    assert token_stream("out") == expected_tokens()[:50]


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("size", [7, 20, 50, 1000])
def test_limited_set_continues_with_a_higher_limit_as_if_made_in_one_go(files, size, monkeypatch):
    options = ["--files", *files, "--tokenizer", "byte", "--shard_size", size]
    monkeypatch.setattr(documents, "DOCUMENTS_PER_CHUNK", 2)  # a limit may fall on any document
    total = len(expected_tokens())
    limits = [[], ["--max_tokens", total], ["--max_tokens", total - 13]]
    for number, limit in enumerate(limits):
        cli(*options, *limit, "--out_dir", f"whole{number}")
    for first in (13, 20, 40, total - 25):
        for number, limit in enumerate(limits):
            for step in (["--max_tokens", first], ["--max_tokens", first + 7], limit):
                cli(*options, *step, "--out_dir", f"out{first}_{number}")
            assert contents(f"out{first}_{number}") == contents(f"whole{number}")


def test_lower_limit_than_that_of_a_set_is_refused(files):
    options = ["--files", *files, "--tokenizer", "byte", "--shard_size", 20, "--out_dir", "out"]
    cli(*options, "--max_tokens", 50)
    before = contents("out")
    with pytest.raises(ValueError, match="^out already holds shards with max_tokens 50, not 40: use another"):
        cli(*options, "--max_tokens", 40)
    assert contents("out") == before


def test_dataset_is_resolved_by_the_datasets_library(tmp_path):
    (tmp_path / "dataset").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one", "two"] * 20}), tmp_path / "dataset" / "train.parquet"
    )
    cli(
        "--dataset",
        "./dataset",
        "--name",
        "default",
        "--tokenizer",
        "byte",
        "--shard_size",
        60,
        "--out_dir",
        "out",
    )
    assert token_stream("out") == expected_tokens(["one", "two"] * 20)


def test_standard_library_documents_are_python_and_reproducible():
    fetcher = corpus_inputs.Fetcher(corpus_inputs.stdlib_inputs(), Path("unused"), keep=False)
    chunks = documents.read_chunks(fetcher, documents.Format(), (0, 0))
    texts = [text for chunk in chunks for text in chunk.read().to_pylist()]
    assert corpus_inputs.stdlib_inputs() == fetcher.inputs and len(texts) == len(fetcher.inputs)
    assert sum(map(len, texts)) > 5e6
    assert any("def dataclass(" in document for document in texts)
    assert not any("class TestCase_of_test_package" in d or "import test.support" in d for d in texts)


def modified(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("*.npy")}


@pytest.mark.parametrize("shard_size", [50, 80, 1000])  # 80: val is cut; 1000: one shard, cut in two
def test_verify_names_bad_shards_and_same_command_repairs_only_those(files, capsys, shard_size):
    arguments = ("--files", *files, "--tokenizer", "byte", "--shard_size", shard_size, "--out_dir", "out")
    with pytest.raises(ValueError, match="no finished set in out"):
        cli("--out_dir", "out", "--verify")
    cli(*arguments)
    whole, before = {path.name: path.read_bytes() for path in Path("out").iterdir()}, modified("out")
    cli(*arguments)
    cli("--out_dir", "out", "--verify")
    assert f"all {len(before)} shards in out are intact" in capsys.readouterr().out
    assert modified("out") == before
    for name in before:
        data = bytearray(whole[name])
        data[-1] ^= 1
        Path("out", name).write_bytes(data)
        with pytest.raises(ValueError, match=f"^{name} is missing or damaged: [^\n]*$"):
            cli("--out_dir", "out", "--verify")
        untouched = {each: time for each, time in modified("out").items() if each != name}
        cli(*arguments)
        assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == whole
        assert untouched.items() <= modified("out").items()
    Path("out", name).unlink()
    cli(*arguments)
    assert Path("out", name).read_bytes() == whole[name]


@pytest.mark.parametrize("shard_size", [30, 80])  # 80: val is cut
def test_any_sequence_of_interruptions_gives_the_same_files(files, monkeypatch, shard_size):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_CHUNK", 2)
    arguments = ("--files", *files, "--tokenizer", "byte", "--shard_size", shard_size, "--out_dir")
    cli(*arguments, "whole", "--workers", 1)
    whole = {path.name: path.read_bytes() for path in Path("whole").iterdir()}

    replace, lives = os.replace, 0

    class Killed(BaseException):
        pass

    def dies(*paths):  # the first time before a file gets its name, the second time after it
        if lives % 2:
            replace(*paths)
        raise Killed

    while not (done := Path("killed/manifest.json").exists() and
               json.loads(Path("killed/manifest.json").read_text())["complete"]):  # fmt: skip
        # Each run dies while writing a file: a shard, or the manifest that names it.
        budget = iter([replace] * (1 + lives % 5) + [dies])
        monkeypatch.setattr(os, "replace", lambda *paths: next(budget)(*paths))  # noqa: B023
        try:
            cli(*arguments, "killed", "--workers", 1 + lives % 3)
        except Killed:
            lives += 1
        assert lives < 100
    assert done and lives > 3
    assert {path.name: path.read_bytes() for path in Path("killed").iterdir()} == whole


@pytest.mark.parametrize("shard_size", [30, 1000])  # 1000: one shard, cut into train and val
def test_first_shard_that_is_not_in_the_manifest_yet_is_accepted(files, monkeypatch, shard_size):
    arguments = ("--files", *files, "--tokenizer", "byte", "--shard_size", shard_size, "--workers", 1)
    cli(*arguments, "--out_dir", "whole")
    replace = os.replace

    def dies(source, target):
        if Path("out/edufineweb_val_000000.npy").exists():
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        cli(*arguments, "--out_dir", "out")
    assert list(load_shards("out")) == ["edufineweb_val_000000.npy"]
    monkeypatch.setattr(os, "replace", replace)
    cli(*arguments, "--out_dir", "out")
    out, whole = ({path.name: path.read_bytes() for path in Path(f).iterdir()} for f in ("out", "whole"))
    assert out == whole
    if shard_size == 30:  # --no-resume also deletes the shard that is not in the manifest yet
        manifest = json.loads(Path("out/manifest.json").read_text())
        last = manifest["shards"].pop()
        Path("out/manifest.json").write_text(json.dumps({**manifest, "complete": False}))
        cli(*arguments, "--shard_size", 200, "--no-resume", "--out_dir", "out")
        assert last["name"] not in load_shards("out")


def test_killed_command_leaves_no_process_and_can_continue(tmp_path):
    Path("text.jsonl").write_text((json.dumps({"text": "word " * 500}) + "\n") * 4000)
    options = ["--files", "text.jsonl", "--tokenizer", "byte", "--shard_size", "1e6", "--out_dir"]
    command = [sys.executable, fineweb.__file__, *options, "killed", "--workers", "2"]
    life = subprocess.Popen(command, stdout=subprocess.PIPE)
    while not Path("killed/edufineweb_train_000002.npy").exists():
        assert life.poll() is None
    life.kill()
    life.communicate(timeout=30)  # returns when no process holds the pipe any more
    assert 2 < len(load_shards("killed")) < 11
    subprocess.run(command, check=True)
    cli(*options, "whole", "--workers", 1)
    killed, whole = ({p.name: p.read_bytes() for p in Path(f).iterdir()} for f in ("killed", "whole"))
    assert killed == whole


def test_continuing_repeats_only_the_shard_in_progress(files, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_CHUNK", 1)
    arguments = ("--files", *files, "--tokenizer", "byte", "--shard_size", 30, "--workers", 1)
    arguments += ("--out_dir", "out")
    cli(*arguments)
    manifest = json.loads(Path("out/manifest.json").read_text())
    last = manifest["shards"].pop()
    Path("out", last["name"]).unlink()
    Path("out/manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    read, encode = [], fineweb.encode_chunk
    monkeypatch.setattr(fineweb, "encode_chunk", lambda *chunk: read.append(chunk[0]) or encode(*chunk))
    cli(*arguments)
    assert [(chunk.input, chunk.row) for chunk in read] == [(3, 1)]  # the last document
    with pytest.raises(ValueError, match="holds shards with shard_size 30, not 31: use another --out_dir"):
        cli(*arguments, "--shard_size", 31)
    cli(*arguments, "--shard_size", 1000, "--no-resume")
    assert len(load_shards("out")) == 2
    cli(*arguments, "--no-resume")
    with pytest.raises(ValueError, match=r"holds shards with files 1.jsonl \d+, not 2.txt 26: use"):
        cli(*arguments, "--files", files[0].replace("[1-3]", "[2-3]"), files[1])


@pytest.mark.parametrize("tokens, val", [(115, 11), (199, 19), (480, 48), (500, 100), (501, 100)])
def test_validation_is_at_most_a_fifth_of_a_small_set(tokens, val):
    Path("input.txt").write_text("".join(chr(ord("a") + i % 26) for i in range(tokens - 1)))
    arguments = ("--files", "input.txt", "--tokenizer", "byte", "--shard_size", 100, "--out_dir", "out")
    cli(*arguments)
    shards = load_shards("out")
    assert len(shards["edufineweb_val_000000.npy"]) == val
    assert max(map(len, shards.values())) <= 100
    assert token_stream("out") == expected_tokens([Path("input.txt").read_text()])
    loader = DataLoaderLite("out", "train", batch_size=1, block_size=8, vocab_size=257, dist=ALONE)
    assert loader.windows == sum((len(shard) - 1) // 8 for name, shard in shards.items() if "train" in name)


def test_set_of_before_is_verified_repaired_and_continued(files, monkeypatch):
    """Sets made before small ones were cut differently: validation may be more than a fifth of them."""
    monkeypatch.setattr(fineweb, "MOST_VALIDATION", 1)
    arguments = ("--files", *files, "--tokenizer", "byte", "--shard_size", 80, "--out_dir", "out")
    cli(*arguments)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    monkeypatch.undo()
    monkeypatch.chdir(Path(files[0]).parent)
    cli("--verify", "--out_dir", "out")
    for name in ("edufineweb_val_000000.npy", "edufineweb_train_000003.npy"):
        Path("out", name).unlink()
        cli(*arguments)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.parametrize("trouble", ["damaged", "missing"])
def test_first_shard_that_was_damaged_before_validation_is_cut_is_made_again(monkeypatch, trouble):
    Path("input.txt").write_text("".join(chr(97 + i % 26) for i in range(399)))
    arguments = ("--files", "input.txt", "--tokenizer", "byte", "--shard_size", 150, "--out_dir")
    cli(*arguments, "whole")
    write = fineweb.ShardSet.write

    def dies(self, number, tokens, sha256=None):
        if number == 2:
            raise KeyboardInterrupt
        return write(self, number, tokens, sha256)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb.ShardSet, "write", dies)
        cli(*arguments, "out")
    first = Path("out/edufineweb_val_000000.npy")
    data = bytearray(first.read_bytes())
    data[-5] ^= 1
    first.write_bytes(data) if trouble == "damaged" else first.unlink()
    cli(*arguments, "out")
    out, whole = ({path.name: path.read_bytes() for path in Path(f).iterdir()} for f in ("out", "whole"))
    assert out == whole


def test_repair_replaces_nothing_when_the_inputs_have_changed(monkeypatch):
    Path("input.txt").write_text("x" * 500)
    arguments = ("--files", "input.txt", "--tokenizer", "byte", "--shard_size", 60, "--out_dir", "out")
    cli(*arguments)
    shard = Path("out/edufineweb_train_000003.npy")
    np.save(shard, np.load(shard)[:-1])
    damaged = shard.read_bytes()
    Path("input.txt").write_text("y" * 500)  # of the same size
    manifest = json.loads(Path("out/manifest.json").read_text())
    with pytest.raises(ValueError, match="input.txt has changed since shards were made of it: --no-resume"):
        cli(*arguments)
    del manifest["contents"]  # as in sets of older versions
    Path("out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="inputs of edufineweb_train_000003.npy have changed: --no-resume"):
        cli(*arguments)
    assert shard.read_bytes() == damaged


def test_folder_that_holds_anything_else_is_refused_and_left_as_it_is():
    for i in range(6):
        Path(f"{i}.txt").write_text(str(i) * (40 + i))
    common = ("--tokenizer", "byte", "--workers", 1, "--out_dir", "out")
    shared = ("--files", "[0-5].txt", "--shard_size", 40, "--task_count", 3, "--task_index")
    tasks = [(*shared, i) for i in range(3)]
    cases = {
        "task_count 1, not 3": (tasks[0], (("--files", "[0-5].txt", "--shard_size", 40),)),
        "task_count 3, not 2": ((*tasks[1][:-3], 2, "--task_index", 1), (tasks[0],)),
        "files ": ((*tasks[1][:1], "[0-4].txt", *tasks[1][2:]), (tasks[0],)),
        "shard_size 40, not 41": ((*tasks[1][:3], 41, *tasks[1][4:]), (tasks[0],)),
        "max_tokens None, not 50": ((*tasks[1], "--max_tokens", 50), (tasks[0],)),
        "holds edufineweb_train_000900.npy, which no manifest": (tasks[1], (tasks[0],)),
    }
    for message, (refused, before) in cases.items():
        shutil.rmtree("out", ignore_errors=True)
        for arguments in before:
            cli(*arguments, *common)
        if "000900" in message:
            np.save("out/edufineweb_train_000900.npy", np.zeros(9, dtype=np.uint16))
        contents = {path.name: path.read_bytes() for path in Path("out").iterdir()}
        for extra in ((), ("--no-resume",)):
            refusal = "already holds shards with|which no manifest describes"
            with pytest.raises(ValueError, match=refusal) as caught:
                cli(*common, *refused, *extra)
            assert message in str(caught.value)
        assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == contents


def test_tasks_that_do_not_belong_together_are_not_merged():
    for i in range(4):
        Path(f"{i}.txt").write_text(str(i) * 50)
    options = ("--tokenizer", "byte", "--shard_size", 40, "--task_count", 2, "--task_index")
    cli("--files", "[0-1].txt", *options, 0, "--out_dir", "a")
    cli("--files", "[2-3].txt", *options, 1, "--out_dir", "b")
    shutil.copytree("a", "both")
    shutil.copytree("b", "both", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="tasks in both differ: files 0.txt 50, not 2.txt 50"):
        shards_module.read_manifest(Path("both"))
    cli("--files", "[0-1].txt", *options, 1, "--out_dir", "a")
    assert len(shards_module.read_manifest(Path("a"))["shards"]) == 4
    shutil.copy("a/manifest_0000_of_0002.json", "a/manifest_0001_of_0002.json")
    with pytest.raises(ValueError, match="are incomplete"):  # one task twice
        shards_module.read_manifest(Path("a"))


def test_next_input_is_downloaded_only_when_it_may_be_needed(monkeypatch):
    table = pyarrow.table({"text": ["x" * 99] * 1000})
    downloaded, never = [], threading.Event()

    def download(source, folder):
        downloaded.append(source.path)
        if source.path == "2":
            never.wait(60)
        folder.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, folder / f"{source.path}.parquet", row_group_size=250)
        return folder / f"{source.path}.parquet"

    monkeypatch.setattr(corpus_inputs, "download", download)
    # By its size, input 1 seems to hold fewer tokens than it does, so that input 2 seems to be needed.
    sizes = (1000, 400, 1000, 1000)
    inputs = [corpus_inputs.Input(str(i), size, None, "repo", "main") for i, size in enumerate(sizes)]
    for max_tokens, expected in ((20_000, ["0"]), (80_000, ["0"]), (180_000, ["0", "1", "2"])):
        downloaded.clear()
        recipe = fineweb.Recipe({"text_column": "text"}, "byte", 7_000, max_tokens)
        Path(f"out{max_tokens}").mkdir()
        fineweb.prepare(inputs, f"out{max_tokens}", recipe, workers=4)  # never waits for input 2
        assert sorted(downloaded) == expected
        assert not list(Path(f"out{max_tokens}").glob("downloads/*.parquet"))
    never.set()


def test_failed_download_that_was_not_needed_is_no_error(monkeypatch):
    def download(source, folder):
        if source.path == "1":
            raise ConnectionError
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0.txt").write_text("text " * 50)
        return folder / "0.txt"

    monkeypatch.setattr(corpus_inputs, "download", download)
    inputs = [corpus_inputs.Input(str(i), 250, None, "repo", "main") for i in range(2)]
    fetcher = corpus_inputs.Fetcher(inputs, Path("downloads"), keep=False)
    fetcher.prefetch(0, 2)
    assert fetcher.path(0).exists() and fetcher.pending[1].exception()
    fetcher.release(2)
    assert not Path("downloads/0.txt").exists()


def test_disk_for_downloads_is_counted():
    def expected(files, keep=False, **limits):
        return fineweb.expected_downloads(files, fineweb.Recipe({}, **limits), keep)

    size, where = 2_000_000, (None, "repo", "main")
    hub = [corpus_inputs.Input(f"{i}.parquet", size, *where) for i in range(10)]
    assert expected(hub, keep=True) == 10 * size
    assert expected(hub) == (corpus_inputs.AHEAD + 2) * size
    assert expected(hub, max_tokens=1_000_000) == 2 * size  # a file has about 800,000
    assert expected([corpus_inputs.Input("0.parquet", size)]) == 0


def test_each_task_deletes_only_its_own_downloads(monkeypatch):
    def download(source, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{source.path}.txt").write_text("text " * 50)
        return folder / f"{source.path}.txt"

    monkeypatch.setattr(corpus_inputs, "download", download)
    inputs = [corpus_inputs.Input(str(i), 1000, None, "repo", "main") for i in range(2)]
    other = download(inputs[1], Path("out/downloads_0001_of_0002"))  # which that task is reading
    fineweb.prepare(inputs, "out", fineweb.Recipe({"text_column": "text"}, "byte", 100, task_count=2))
    assert other.exists() and not Path("out/downloads_0000_of_0002").exists()


def test_tasks_share_the_inputs_and_their_manifests_are_merged(tmp_path):
    for i in range(5):
        Path(f"{i}.txt").write_text(str(i) * 50)
    for task in (2, 0, 1):
        with pytest.raises(ValueError, match="are incomplete"):
            Path("out").mkdir(exist_ok=True)
            Path("out/manifest_9999_of_0003.json").write_text('{"complete": false, "shards": []}')
            shards_module.read_manifest(Path("out"))
        Path("out/manifest_9999_of_0003.json").unlink()
        cli(
            *("--files", "[0-4].txt", "--tokenizer", "byte", "--shard_size", 40, "--workers", 1),
            *("--task_index", task, "--task_count", 3, "--out_dir", "out"),
        )
    shards = load_shards("out")
    # Task t writes shards t, t + 3, …; 102 tokens of two documents are three shards, 51 of one are two.
    trains = [f"edufineweb_train_{i:06d}.npy" for i in (1, 2, 3, 4, 5, 6, 7)]
    assert sorted(shards) == [*trains, "edufineweb_val_000000.npy"]
    for task in range(3):
        mine = np.concatenate([tokens for name, tokens in shards.items() if int(name[-10:-4]) % 3 == task])
        assert mine.tolist() == expected_tokens([str(i) * 50 for i in range(task, 5, 3)])
    merged = shards_module.read_manifest(Path("out"))
    assert {shard["name"] for shard in merged["shards"]} == set(shards) and merged["tokenizer"] == "byte"
    Path("out/manifest_0001_of_0003.json").unlink()
    with pytest.raises(ValueError, match="are incomplete"):
        shards_module.read_manifest(Path("out"))
    with pytest.raises(ValueError, match="fewer inputs than tasks: lower --task_count 9"):
        cli("--files", "[0-4].txt", "--tokenizer", "byte", "--task_index", 8, "--task_count", 9)
    with pytest.raises(ValueError, match="--task_index is 3: use 0 to 2"):
        fineweb.parse_args(["--task_index", "3", "--task_count", "3"])


def test_full_disk_keeps_whole_shards_and_says_what_is_missing(files, monkeypatch, capsys):
    arguments = ("--files", *files, "--tokenizer", "byte", "--shard_size", 30, "--out_dir", "out")
    write, written = fineweb.write_atomically, []

    def fails(path, save):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        write(path, save)

    monkeypatch.setattr(fineweb, "write_atomically", fails)
    with pytest.raises(OSError) as caught:
        cli(*arguments)
    message = r"cannot write to out \(No space left on device\): it takes [\d.]+ MB, and [\d,.]+ MB are free"
    assert re.match(message, str(caught.value)) and "to continue: python " in str(caught.value)
    assert len(load_shards("out")) == 2
    assert re.match(r"writing about [\d.]+kB to out, where [\d.]+[MGT]B are free\n", capsys.readouterr().out)
    monkeypatch.setattr(fineweb, "write_atomically", write)
    cli(*arguments)
    cli(*arguments[:-1], "whole")
    out, whole = ({p.name: p.read_bytes() for p in Path(f).iterdir()} for f in ("out", "whole"))
    assert out == whole
    Path("file").write_text("a file, not a folder")
    for folder in ("file", "file/folder"):
        with pytest.raises(OSError, match="Not a directory: .*file"):
            cli(*arguments[:-1], folder)


def test_disk_that_is_too_small_is_announced(files, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: usage._replace(free=10))
    cli("--files", *files, "--tokenizer", "byte", "--out_dir", "out", "--max_tokens", 40)
    assert "warning: writing about 80.0B to out, where 10.0B are free" in capsys.readouterr().out
    inputs = [corpus_inputs.Input("a.parquet", 28_000_000_000), corpus_inputs.Input("b_train.bin", 1000)]
    assert fineweb.expected_bytes(inputs[:1], "gpt2", None) == pytest.approx(20e9, rel=0.2)  # FineWeb-Edu
    assert fineweb.expected_bytes(inputs, "gpt2", 100) == 200
    assert fineweb.expected_bytes(inputs[1:], "gpt2", None) == 1000


def token_file(path, ids, magic=20240520, version=1, tokens=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if tokens is None else tokens
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(header.tobytes() + np.asarray(ids, dtype=np.uint16).tobytes())


@pytest.fixture
def no_vocabulary(monkeypatch):
    """Token files are GPT-2's, whose vocabulary must not be needed."""

    def fails(name):
        raise AssertionError("a tokenizer was asked for")

    monkeypatch.setattr(fineweb, "get_tokenizer", fails)
    monkeypatch.setattr(fineweb, "BatchTokenizer", fails)


TOKENS = {
    f"bins/fineweb_{name}.bin": [50256, *range(number * 100, number * 100 + size), 50256, 7]
    for number, (name, size) in enumerate([("train_000001", 40), ("train_000002", 30), ("val_000000", 20)])
}


def test_token_files_become_shards_under_their_own_names(no_vocabulary, capsys):
    for path, ids in TOKENS.items():
        token_file(path, ids)
    cli("--files", "bins/*.bin", "--out_dir", "out")
    shards = load_shards("out")
    for path, ids in TOKENS.items():
        assert shards[f"{Path(path).stem}.npy"].tolist() == ids
    manifest = shards_module.read_manifest(Path("out"))
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["eot_token"]) == ("gpt2", 50257, 50256)
    assert [shard["documents"] for shard in manifest["shards"]] == [2, 2, 2]
    said = capsys.readouterr().out
    assert "train: 76 tokens in 2 shard(s), 4 documents" in said
    assert said.endswith("or:    python train.py --preset finetune --data_dir out\n")
    sizes = {"batch_size": 1, "block_size": 8, "vocab_size": 50304}
    loader = DataLoaderLite("out", "val", dist=Distributed(0, 1, torch.device("cpu")), **sizes)
    assert loader.next_batches()[0][0].tolist()[0] == TOKENS["bins/fineweb_val_000000.bin"][:8]
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    Path("out/fineweb_train_000002.npy").write_bytes(b"damaged")
    cli("--files", "bins/*.bin", "--out_dir", "out")
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    cli("--out_dir", "out", "--verify")


def test_limited_set_of_token_files_has_whole_files_and_validation(no_vocabulary):
    for path, ids in TOKENS.items():
        token_file(path, ids)
    cli("--files", "bins/*.bin", "--out_dir", "out", "--max_tokens", 24)
    assert sorted(load_shards("out")) == ["fineweb_train_000001.npy", "fineweb_val_000000.npy"]


def test_limited_set_of_token_files_continues_with_a_higher_limit(no_vocabulary):
    for path, ids in TOKENS.items():
        token_file(path, ids)
    cli("--files", "bins/*.bin", "--out_dir", "whole")
    for limit in (["--max_tokens", 24], ["--max_tokens", 60], []):
        cli("--files", "bins/*.bin", "--out_dir", "out", *limit)
    assert contents("out") == contents("whole")


def test_interrupted_set_of_token_files_continues_after_its_last_shard(no_vocabulary, monkeypatch):
    for path, ids in TOKENS.items():
        token_file(path, ids)
    cli("--files", "bins/*.bin", "--out_dir", "whole")
    read, seen = fineweb.TokenShardSet.tokens_of, []

    def dies(shards, number):
        seen.append(number)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(shards, number)

    monkeypatch.setattr(fineweb.TokenShardSet, "tokens_of", dies)
    with pytest.raises(KeyboardInterrupt):
        cli("--files", "bins/*.bin", "--out_dir", "out")
    cli("--files", "bins/*.bin", "--out_dir", "out")
    assert seen == [0, 1, 2, 2]
    out, whole = ({p.name: p.read_bytes() for p in Path(f).iterdir()} for f in ("out", "whole"))
    assert out == whole


def test_bad_token_files_are_named_and_nothing_is_written(no_vocabulary):
    good = "bins/a_val.bin"
    token_file(good, [1, 2, 3])
    cases = [
        (dict(magic=20240519), "b_train.bin is not a token file of llm.c, version 1"),
        (dict(version=2), "b_train.bin is not a token file of llm.c, version 1"),
        (dict(tokens=4), "b_train.bin has 1030 bytes, which do not fit its 4 tokens: copy it again"),
        (dict(tokens=2), "do not fit its 2 tokens"),
        (dict(tokens=-1), "do not fit its -1 tokens"),
        (dict(ids=[1, 50257]), "b_train.bin holds token id 50257: it was not made with GPT-2's tokenizer"),
    ]
    for changes, message in cases:
        token_file("bins/b_train.bin", **{"ids": [1, 2, 3], **changes})
        with pytest.raises(ValueError, match=message) as caught:
            cli("--files", "bins/*.bin", "--out_dir", "out")
        assert "\n" not in str(caught.value)
        assert list(load_shards("out")) == (["a_val.npy"] if "ids" in changes else [])  # the others at once
        shutil.rmtree("out")
    Path("bins/b_train.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="b_train.bin is not a token file"):
        cli("--files", "bins/*.bin", "--out_dir", "out")
    token_file("bins/b_train.bin", [1, 2])
    Path("text.txt").write_text("text")
    with pytest.raises(ValueError, match=".bin files hold tokens, the others documents: make two sets"):
        cli("--files", "bins/*.bin", "text.txt", "--out_dir", "mixed")
    with pytest.raises(ValueError, match="hold GPT-2's tokens: leave out --tokenizer byte"):
        cli("--files", "bins/*.bin", "--tokenizer", "byte", "--out_dir", "mixed")
    token_file("bins/other.bin", [1, 2])
    with pytest.raises(ValueError, match="other.bin needs either val or train in its name"):
        cli("--files", "bins/*.bin", "--out_dir", "mixed")
    token_file("more/a_val.bin", [1, 2])
    with pytest.raises(ValueError, match="two token files are named a_val.bin: rename one"):
        cli("--files", "bins/?_*.bin", "more/*.bin", "--out_dir", "mixed")
    assert not Path("mixed").exists()


def test_odd_documents_are_tokenized_or_counted_as_skipped(tmp_path):
    odd = ["x" * 1_000_000, "\ud800 half a pair", "<|endoftext|>", "one\r\ntwo\rthree\n", "\0", "\ufeff"]
    rows = [*odd, "", None]
    Path("odd.jsonl").write_text("\r\n".join(json.dumps({"text": text}) for text in rows))
    cli("--files", "odd.jsonl", "--tokenizer", "byte", "--shard_size", 900_000, "--out_dir", "out")
    fixed = [text.replace("\ud800", "\ufffd") for text in odd]
    assert token_stream("out") == expected_tokens(fixed)
    assert json.loads(Path("out/manifest.json").read_text())["skipped_documents"] == 2


ARROW_TYPES = [
    *(pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()),
    *(pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
]


def test_text_of_any_arrow_type_is_text():
    for i, kind in enumerate(ARROW_TYPES):
        column = pyarrow.chunked_array([pyarrow.array(TEXTS[:3]), pyarrow.array(TEXTS[3:])])
        table = pyarrow.table({"id": range(len(TEXTS)), "text": column.cast(pyarrow.binary()).cast(kind)})
        pyarrow.parquet.write_table(table, f"{i}.parquet", row_group_size=4)
        assert pyarrow.parquet.read_schema(f"{i}.parquet").field("text").type == kind
        cli("--files", f"{i}.parquet", "--tokenizer", "byte", "--out_dir", f"out{i}", "--shard_size", 100)
        assert token_stream(f"out{i}") == expected_tokens()
        assert json.loads(Path(f"out{i}/manifest.json").read_text())["skipped_documents"] == 2


def test_mostly_empty_documents_are_a_warning_at_the_end(capsys):
    rows = [{"text": text, "body": "x"} for text in ["some", *[None] * 5]]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli("--files", "a.jsonl", "--tokenizer", "byte", "--out_dir", "my shards")
    assert capsys.readouterr().out.endswith(
        'next:  python train.py --preset text --data_dir "my shards"\n'
        "warning: 5 of 6 documents are empty or null: is --text_column text the right one?\n"
    )


def test_large_text_is_read_in_parts_and_continued_within(monkeypatch):
    text = "words, 123 and naïve 漢字 🙂\n" * 40 + "ACGT" * 100
    Path("a.txt").write_text("\ufeff" + text)  # a byte order mark
    monkeypatch.setattr(documents, "BLOCK_BYTES", 101)
    arguments = ("--files", "a.txt", "--tokenizer", "byte", "--shard_size", 300, "--out_dir")
    write = fineweb.ShardSet.write

    def dies(self, number, tokens, sha256=None):
        if number == 3:
            raise KeyboardInterrupt
        return write(self, number, tokens, sha256)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb.ShardSet, "write", dies)
        cli(*arguments, "out")
    assert json.loads(Path("out/manifest.json").read_text())["shards"][-1]["next"][1] > 0
    cli(*arguments, "out")
    assert token_stream("out") == expected_tokens([text])
    monkeypatch.setattr(documents, "MOST_UNCUT", 300)
    with pytest.raises(documents.UncutError, match="400 characters without a token boundary"):
        list(documents.parts_of(iter(["ACGT" * 100, "more"]), None, is_bytes=False))
    Path("b.txt").write_bytes(b"x" * 250 + b"\xff")
    with pytest.raises(ValueError, match=r"b.txt is not UTF-8 \(byte 250: invalid start byte\): convert it"):
        cli("--files", "b.txt", "--tokenizer", "byte", "--out_dir", "bad")


def test_separators_end_documents_and_are_no_text(capsys):
    Path("a.txt").write_text("one<|endoftext|>two\n<|endoftext|>\n")
    Path("b.txt").write_text("three")
    arguments = ("--files", "a.txt", "b.txt", "--tokenizer", "byte", "--shard_size", 1, "--out_dir")
    cli(*arguments, "whole")
    assert "a.txt holds <|endoftext|> as text: --separator '<|endoftext|>' ends" in capsys.readouterr().out
    cli(*arguments, "parts", "--separator", "<|endoftext|>")
    assert "as text" not in capsys.readouterr().out
    assert token_stream("parts") == expected_tokens(["one", "two\n", "three"])
    with pytest.raises(ValueError, match="source|separator"):
        cli(*arguments, "parts")  # other documents
    Path("c.txt").write_text("one\n\n\ntwo\n\n\n\nthree")
    arguments = ("--files", "c.txt", "--tokenizer", "byte", "--shard_size", 1, "--out_dir")
    cli(*arguments, "lines", "--separator", r"\n\n\n")
    assert token_stream("lines") == expected_tokens(["one", "two", "\nthree"])
    Path("d.py").write_text("x = 1\n\n\ny = 2\n")
    cli(*arguments[:2], "d.py", *arguments[2:], "code", "--separator", r"\n\n\n")
    assert token_stream("code") == expected_tokens(["one", "two", "\nthree", "x = 1\n\n\ny = 2\n"])
    with pytest.raises(ValueError, match="--separator is for .txt files, of which there are none"):
        cli("--files", __file__, "--tokenizer", "byte", "--out_dir", "none", "--separator", "x")


def test_files_are_found_once_and_by_their_names(capsys):
    Path("folder.txt").mkdir()
    for name in ("a.txt", "a[1].txt", "folder.txt/b.txt"):
        Path(name).write_text(name)
    Path("link.txt").symlink_to("a.txt")
    found = corpus_inputs.local_inputs(["a[1].txt", "*.txt", "./a.txt", "**/*.txt"])
    assert [each.path for each in found] == ["a[1].txt", "a.txt", "folder.txt/b.txt"]
    assert "skipping 1 folder(s) that match '*.txt'" in capsys.readouterr().out


def test_folder_means_the_files_in_it_and_says_so(capsys):
    folder = Path("texts [old]")
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden").write_text("")
    for name in ("c.txt", "b.jsonl", "a.txt", "d.py", "notes.md", "tokens.bin", "deeper/e.txt"):
        (folder / name).write_text(name)
    assert [each.path for each in corpus_inputs.local_inputs([str(folder)])] == [
        f"{folder}/{name}" for name in ("a.txt", "b.jsonl", "c.txt", "d.py")
    ]
    said = "texts [old] is a folder: reading 4 files in it: a.txt, b.jsonl, c.txt, …; skipping deeper, "
    said += "notes.md, tokens.bin\n"
    assert capsys.readouterr().out == said
    for path in folder.glob("*.*"):
        if path.suffix not in (".bin", ".md"):
            path.unlink()
    assert [each.path for each in corpus_inputs.local_inputs([str(folder)])] == [f"{folder}/tokens.bin"]


def test_input_that_was_edited_ends_the_command_and_one_that_was_touched_does_not(monkeypatch):
    Path("a.txt").write_text("first " * 50)
    Path("b.jsonl").write_text(json.dumps({"text": "second " * 50}) + "\n")
    arguments = ("--files", "a.txt", "b.jsonl", "--tokenizer", "byte", "--shard_size", 90, "--out_dir", "out")
    write = fineweb.ShardSet.write

    def dies(self, number, tokens, sha256=None):
        if number == 5:
            raise KeyboardInterrupt
        return write(self, number, tokens, sha256)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb.ShardSet, "write", dies)
        cli(*arguments)
    for name, times in (("a.txt", 3), ("b.jsonl", 7)):  # begun and finished
        text, before = Path(name).read_text(), Path("out/manifest.json").read_bytes()
        Path(name).write_text(text.replace("s", "z"))
        os.utime(name, ns=(0, times))
        with pytest.raises(ValueError, match=f"{name} has changed since shards were made of it: --no-resume"):
            cli(*arguments)
        assert Path("out/manifest.json").read_bytes() == before
        Path(name).write_text(text)
        os.utime(name, ns=(0, times))
        cli(*arguments)
        assert token_stream("out") == expected_tokens(["first " * 50, "second " * 50])
    Path("b.jsonl").write_text(text.replace("s", "z"))
    cli(*arguments, "--no-resume")
    assert token_stream("out") == expected_tokens(["first " * 50, "zecond " * 50])


def test_damaged_contents_in_a_manifest_are_one_line(files):
    arguments = ("--files", *files, "--tokenizer", "byte", "--out_dir", "out")
    cli(*arguments)
    manifest = json.loads(Path("out/manifest.json").read_text())
    for contents in ([{}], [5], {"size": 1}, [{**manifest["contents"][0], "size": "1"}]):
        Path("out/manifest.json").write_text(json.dumps({**manifest, "contents": contents}))
        with pytest.raises(ValueError, match="manifest.json is damaged or not a manifest of shards"):
            cli(*arguments)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_byte_order_marks_and_blank_lines_are_skipped(name):
    data = b"\xef\xbb\xbf\n" + json.dumps({"text": "one"}).encode() + b"\r\n \n" + b'{"text": "two"}\n\n'
    Path(name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    cli("--files", name, "--tokenizer", "byte", "--out_dir", "out", "--shard_size", 1)
    assert token_stream("out") == expected_tokens(["one", "two"])


def test_bad_input_names_a_fix_and_leaves_nothing_behind(files, tmp_path):
    cases = [
        (("--files", "no/such/*.txt"), FileNotFoundError, "no file matches 'no/such/"),
        (("--files", "a.csv"), ValueError, r"cannot read a.csv: supported formats are .txt, .*, .parquet"),
        (("--files", "broken.jsonl"), ValueError, "broken.jsonl, line 2 .* not a JSON object .* fix"),
        (("--files", "latin.txt"), ValueError, "latin.txt is not UTF-8"),
        (
            ("--files", str(tmp_path / "4.parquet"), "--text_column", "body"),
            ValueError,
            r"one of \['text'\]",
        ),
        (("--files", "cut.parquet"), ValueError, "cut.parquet: "),
        (("--files", "cut.jsonl.gz"), ValueError, "cut.jsonl.gz is damaged .*: copy or download it again"),
        (("--files", "damaged.jsonl.gz"), ValueError, "damaged.jsonl.gz.*Error -3"),
        (("--files", "deep.jsonl"), ValueError, "deep.jsonl, line 1 is damaged or not a JSON object"),
        (("--files", "number.jsonl"), ValueError, "number.jsonl, line 3: 'text' is of type int, not text"),
        (("--files", "other.jsonl"), ValueError, "other.jsonl, line 1 is not a JSON object"),
        (
            ("--files", str(tmp_path / "4.parquet"), "--text_column", "id"),
            ValueError,
            r"4.parquet: column 'id' holds int64, not text: set --text_column to one of \['text'\]",
        ),
        (("--files", "bytes.parquet"), ValueError, "bytes.parquet, row 3: the text is not UTF-8"),
        (("--files", "empty"), FileNotFoundError, r"no file matches 'empty': .* 'FOLDER/\*\*/\*.txt'"),
        (("--files", "tiny.txt"), ValueError, "too few for a val and a train shard"),
    ]
    Path("a.csv").write_text("x")
    Path("empty").mkdir()
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("cut.parquet").write_bytes((tmp_path / "4.parquet").read_bytes()[:-9])
    Path("cut.jsonl.gz").write_bytes((tmp_path / "3.jsonl.gz").read_bytes()[:-9])
    damaged = bytearray((tmp_path / "3.jsonl.gz").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    Path("damaged.jsonl.gz").write_bytes(damaged)
    Path("tiny.txt").write_text("")
    Path("deep.jsonl").write_text('{"text": ' + "[" * 100_000)
    Path("number.jsonl").write_text('{"text": "fine"}\n{"text": null}\n{"text": 5}\n')
    Path("other.jsonl").write_text('["text"]\n')
    column = pyarrow.array([b"fine", None, b"\xff", b"fine"])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "bytes.parquet", row_group_size=2)
    for argv, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            cli(*argv, "--tokenizer", "byte", "--out_dir", "out")
        assert "\n" not in str(caught.value)
        assert load_shards("out") == {}

    cli("--files", *files, "--tokenizer", "byte", "--out_dir", "out")
    with pytest.raises(ValueError, match="shard_size 100000000, not 50: use another --out_dir"):
        cli("--files", *files, "--tokenizer", "byte", "--shard_size", 50, "--out_dir", "out")
    Path("out/manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest describes"):
        cli("--files", *files, "--tokenizer", "byte", "--out_dir", "out")


def test_folder_in_use_is_refused_and_other_tasks_are_not(files):
    arguments = ("--files", *files, "--tokenizer", "byte", "--out_dir", "out", "--shard_size", 30)
    with locked_folder(Path("out"), ".lock"):
        with pytest.raises(ValueError, match="out is in use by process .*: wait until it has ended, or use"):
            cli(*arguments)
    with locked_folder(Path("out"), ".lock_0000_of_0002"):
        with pytest.raises(ValueError, match="out is in use by process"):
            cli(*arguments, "--task_count", 2, "--task_index", 0)
        cli(*arguments, "--task_count", 2, "--task_index", 1)
    cli(*arguments, "--task_count", 2, "--task_index", 0)
    assert len(load_shards("out")) > 2 and not list(Path("out").glob(".lock*"))


@pytest.fixture
def three_shards():
    Path("set").mkdir()
    for i, split in enumerate(("val", "train", "train")):
        np.save(f"set/edufineweb_{split}_{i:06d}.npy", np.arange(1000 * i, 1000 * i + 500, dtype=np.uint16))
    return sorted(Path("set").glob("*train*"))


def test_network_drive_that_comes_back_costs_only_time(three_shards, monkeypatch):
    said, waited = [], []
    shards = shards_module.Shards("set", "train", said.append)
    assert shards.lengths == [500, 500]
    expected = np.load(three_shards[1])[10:20]
    three_shards[1].rename("away.npy")
    assert np.array_equal(shards.read(1, 10, 20), expected)  # it is still open
    shards.files.cache_clear()

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            Path("away.npy").rename(three_shards[1])

    monkeypatch.setattr(shards_module.time, "sleep", sleep)
    assert np.array_equal(shards.read(1, 10, 20), expected)
    assert waited == list(shards_module.RETRY_S[:3]) and len(said) == 3
    assert all(f"cannot read {three_shards[1]} ([Errno 2] No such file" in each for each in said)
    three_shards[0].unlink()
    with pytest.raises(FileNotFoundError):  # after the last try
        shards.read(0, 0, 10)
    assert waited[3:] == list(shards_module.RETRY_S)


def test_shard_that_is_cut_short_while_it_is_read_is_an_error_and_not_a_crash(three_shards):
    shards = shards_module.Shards("set", "train")
    assert shards.read(0, 400, 500)[-1] == 1499
    os.truncate(three_shards[0], 600)
    assert np.array_equal(shards.read(0, 0, 100), np.arange(1000, 1100))
    with pytest.raises(ValueError, match="train_000001.npy was cut short while it was in use: make it again"):
        shards.read(0, 400, 500)


def test_shards_that_change_are_named_once(three_shards):
    said = []
    shards = shards_module.Shards("set", "train", said.append)
    shards.warn_of_changes()
    assert said == []
    np.save(three_shards[0], np.zeros(600, dtype=np.uint16))
    three_shards[1].unlink()
    shards.warn_of_changes()
    shards.warn_of_changes()
    assert said == [
        f"warning: {three_shards[0]} has changed since the run began",
        f"warning: {three_shards[1]} has vanished since the run began",
    ]


def test_set_whose_folder_is_replaced_does_not_write_into_the_other_one(files, monkeypatch):
    arguments = ("--files", *files, "--tokenizer", "byte", "--out_dir", "out", "--shard_size", 30)
    write, written = fineweb.ShardSet.write, []

    def write_and_replace(shards, *words):
        written.append(write(shards, *words))
        if len(written) == 2:
            Path("out").rename("moved")
            Path("out").mkdir()
        return written[-1]

    monkeypatch.setattr(fineweb.ShardSet, "write", write_and_replace)
    with pytest.raises(ValueError, match="out was deleted, moved or replaced: repeat the command"):
        cli(*arguments)
    assert list(Path("out").iterdir()) == [] and len(load_shards("moved")) == 2
