import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import fineweb

TEXTS = ["first", "", "a second text\nof two lines", None, "<|endoftext|>", "naïve 漢字 🙂", "tail " * 40]
EOT = 256


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
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": TEXTS[5:]}), tmp_path / "4.parquet")
    return [str(tmp_path / "[1-3].*"), str(tmp_path / "4.parquet")]


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_hold_the_stream_cut_at_shard_size(files, workers, monkeypatch):
    monkeypatch.setattr(fineweb, "DOCUMENTS_PER_CHUNK", 2)
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


def test_a_set_of_one_shard_is_cut_into_train_and_the_last_tenth_val():
    Path("input.txt").write_text("x" * 999)
    cli("--files", "input.txt", "--tokenizer", "byte", "--out_dir", "out")
    shards = load_shards("out")
    assert shards["edufineweb_train_000001.npy"].tolist() == [EOT] + [ord("x")] * 899
    assert shards["edufineweb_val_000000.npy"].tolist() == [ord("x")] * 100


def test_max_tokens_stops_there(files):
    cli("--files", *files, "--tokenizer", "byte", "--shard_size", 20, "--max_tokens", 50, "--out_dir", "out")
    assert np.concatenate(list(load_shards("out").values())).tolist() == expected_tokens()[:50]


def test_a_dataset_is_read_through_the_datasets_library(tmp_path):
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
    assert np.concatenate(list(load_shards("out").values())).tolist() == expected_tokens(["one", "two"] * 20)


def test_standard_library_documents_are_python_and_always_the_same():
    documents = list(fineweb.stdlib_documents())
    assert documents == list(fineweb.stdlib_documents())
    assert sum(map(len, documents)) > 5e6
    assert any("def dataclass(" in document for document in documents)
    assert not any("class TestCase_of_test_package" in d or "import test.support" in d for d in documents)


def test_a_finished_set_is_kept_and_an_interrupted_one_made_anew(files):
    arguments = ("--files", *files, "--tokenizer", "byte", "--shard_size", 50, "--out_dir", "out")
    cli(*arguments)
    before = load_shards("out")
    modified = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    cli(*arguments)
    assert modified == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}

    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest["complete"] = False
    Path("out/manifest.json").write_text(json.dumps(manifest))
    Path("out/edufineweb_val_000000.npy").write_bytes(b"cut")
    cli(*arguments)
    after = load_shards("out")
    assert all(np.array_equal(before[name], after[name]) for name in before | after)


def test_bad_input_names_the_mend_and_leaves_nothing(files, tmp_path):
    cases = [
        (("--files", "no/such/*.txt"), FileNotFoundError, "no file matches 'no/such/"),
        (("--files", "a.csv"), ValueError, r"a.csv: --files takes .txt, .jsonl, .jsonl.gz, .parquet"),
        (("--files", "broken.jsonl"), ValueError, "broken.jsonl: line 2 is no JSON object .* mend it"),
        (("--files", "latin.txt"), ValueError, "latin.txt is not UTF-8"),
        (
            ("--files", str(tmp_path / "4.parquet"), "--text_column", "body"),
            ValueError,
            r"one of \['id', 'text'\]",
        ),
        (("--files", "cut.parquet"), ValueError, "cut.parquet: "),
        (("--files", "cut.jsonl.gz"), ValueError, "cut.jsonl.gz: "),
        (("--files", "tiny.txt"), ValueError, "too few for a val and a train shard"),
    ]
    Path("a.csv").write_text("x")
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("cut.parquet").write_bytes((tmp_path / "4.parquet").read_bytes()[:-9])
    Path("cut.jsonl.gz").write_bytes((tmp_path / "3.jsonl.gz").read_bytes()[:-9])
    Path("tiny.txt").write_text("")
    for argv, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            cli(*argv, "--tokenizer", "byte", "--out_dir", "out")
        assert "\n" not in str(caught.value)
        assert load_shards("out") == {}

    cli("--files", *files, "--tokenizer", "byte", "--out_dir", "out")
    with pytest.raises(ValueError, match="shard_size 100000000, not 50: choose another --out_dir"):
        cli("--files", *files, "--tokenizer", "byte", "--shard_size", 50, "--out_dir", "out")
    Path("out/manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest describes"):
        cli("--files", *files, "--tokenizer", "byte", "--out_dir", "out")
