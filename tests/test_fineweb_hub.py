"""fineweb.py against a faulty Hub, through the real client library."""

import hashlib
import http.server
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import conftest
import huggingface_hub
import numpy as np
import pytest
from conftest import token_stream, wait_until

pyarrow = pytest.importorskip("pyarrow")  # a machine for the GPU tests may lack it
pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.skipif(
    not hasattr(huggingface_hub, "set_client_factory"), reason="the huggingface_hub of transformers 4"
)
REVISION, CONVERTED = "a" * 40, "b" * 40  # the second one is that of the branch refs/convert/parquet
TEXTS = [[f"document {row} of file {number}" for row in range(300)] for number in range(3)]
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: "data/*"}]
- config_name: small
  data_files: [{split: train, path: "sample/*"}]
---
"""
# Waits are printed, not slept. With the client's chunks of 10 MB there would be nothing to resume.
CLIENT = """
import os, sys, time
assert "huggingface_hub" not in sys.modules
for name in [name for name in os.environ if name.startswith("HF_") and name not in sys.argv[1].split(",")]:
    del os.environ[name]
del sys.argv[1]
time.sleep = lambda seconds: print("wait", seconds)
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100
import fineweb
fineweb.run(fineweb.main, fineweb.parse_args)
"""


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    return file.getvalue()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as the client asks for; `server.faults` maps parts of requests to faults."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, data: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def describe(self, path: str) -> dict:
        data = {**self.server.files, **self.server.converted}[path]
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        return {**entry, "lfs": lfs} if path.endswith((".parquet", ".bin")) else entry

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = urllib.parse.parse_qs(body).get("paths") or json.loads(body)["paths"]
        self.reply(200, json.dumps([self.describe(path) for path in paths]).encode())

    def do_GET(self):
        files, path = self.server.files, urllib.parse.unquote(self.path.split("?")[0])
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, path, headers))
        self.server.before_get(path)
        for (command, part), faults in self.server.faults.items():
            if command == self.command and part in path and faults:
                fault = faults.pop(0) if len(faults) > 1 or faults[0] != "always" else 503
                if isinstance(fault, int):
                    return self.reply(fault, **({"Retry_After": 7} if fault == 429 else {}))
                break
        else:
            fault = None
        name = path.split("/", 6)[-1]
        if "/refs/convert/parquet" in path or CONVERTED in path:
            files = self.server.converted
        if path.startswith("/api/datasets/org/name/tree/"):
            prefix = path.partition(REVISION)[2].strip("/")
            entries = [self.describe(file) for file in files if file.startswith(prefix)]
            if not prefix and "recursive=true" not in self.path.lower():
                folders = {file.split("/")[0] for file in files if "/" in file}
                entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0"} for folder in folders]
            self.reply(200, json.dumps(entries).encode())
        elif re.match(r"/api/datasets/org/name(/revision/[\w/]+)?$", path):
            sha = REVISION if files is self.server.files else CONVERTED
            siblings = [{"rfilename": file} for file in files]
            self.reply(200, json.dumps({"id": "org/name", "sha": sha, "siblings": siblings}).encode())
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in files:
            data = files[name]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": REVISION}
            if fault == "altered":
                data = data[:100] + b"?" + data[101:]
            start = int(re.match(r"bytes=(\d+)", self.headers.get("Range", "bytes=0"))[1])
            if start:
                headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if fault == "cut":
                self.send_response(200)
                for header, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(header.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
            else:
                self.reply(206 if start else 200, data[start:], **headers)
        else:
            self.reply(404, b"{}", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {f"sample/{number}.parquet": parquet(texts) for number, texts in enumerate(TEXTS)}
    server.files |= {"data/0.parquet": parquet(["not asked for"]), "README.md": CARD.encode()}
    server.faults, server.seen, server.converted, server.before_get = {}, [], {}, lambda path: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def begin(hub, *options: str, **environment: str) -> multiprocessing.Process:
    """Fork the client, which has not imported huggingface_hub yet: it reads its environment then."""
    environment = {
        **{"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": "home", "HF_TOKEN": "hf_secret"},
        **{"HF_HUB_DISABLE_XET": "1"},
        **environment,
    }
    arguments = [",".join(environment), "--dataset", "org/name", "--name", "small", "--tokenizer", "byte"]
    arguments += ["--shard_size", "9000", "--out_dir", "out", "--workers", "1", *options]
    Path("client.py").write_text(CLIENT)
    Path("printed").unlink(missing_ok=True)
    return conftest.begin(" ".join(arguments), "printed", "errors", environment, script="client.py")


def prepare(hub, *options: str, **environment: str) -> subprocess.CompletedProcess:
    process = begin(hub, *options, **environment)
    process.join(120)
    streams = (Path(name).read_text() for name in ("printed", "errors"))
    return subprocess.CompletedProcess([], process.exitcode, *streams)


def token_file(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.astype(np.uint16).tobytes()


def test_temporary_hub_errors_are_retried(hub):
    hub.faults = {
        ("GET", "/tree/"): [429, 503],
        ("HEAD", "sample/0"): [502],
        ("GET", "sample/0"): [500, "cut"],
        ("GET", "sample/1"): [429, "altered"],
        ("HEAD", "sample/2"): [504],
        ("GET", "sample/2"): ["cut", 503],
    }
    result = prepare(hub)
    assert result.returncode == 0, result.stderr
    assert not any(hub.faults.values())
    stream = [token for texts in TEXTS for text in texts for token in (256, *text.encode())]
    assert token_stream("out") == stream
    assert "trying again in 7 s" in result.stdout and "wait 7.0" in result.stdout  # Retry-After
    ranges = [headers["range"] for _, path, headers in hub.seen if "sample/0" in path and "range" in headers]
    assert any(int(re.search(r"\d+", each)[0]) > 100 for each in ranges)  # the cut one was continued
    tokens = {headers.get("authorization") for _, path, headers in hub.seen if "sample" in path}
    assert tokens == {"Bearer hf_secret"}
    assert {path.suffix for path in Path("out").iterdir()} == {".npy", ".json"}  # no copies of the inputs


def test_permanent_error_is_one_line_and_a_rerun_resumes(hub):
    hub.faults = {("GET", "sample/2"): ["always"]}
    result = prepare(hub)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    message = r"error: cannot download sample/2.parquet \(.*503.*; to continue: python .*--out_dir out"
    assert re.search(message, result.stderr)
    assert [path.name for path in Path("out").glob("*.npy")] == ["edufineweb_val_000000.npy"]
    assert [path.name for path in Path("out/downloads/sample").iterdir()] == ["1.parquet"]  # 0 is safe
    hub.faults, hub.seen[:] = {}, []
    hub.files["sample/3.parquet"] = parquet(["new on the Hub since"])
    result = prepare(hub, "--keep_downloads")
    assert result.returncode == 0, result.stderr
    stream = [token for texts in TEXTS for text in texts for token in (256, *text.encode())]
    assert token_stream("out") == stream
    fetched = {path for command, path, _ in hub.seen if command == "GET" and "sample" in path}
    assert len(fetched) == 1 and fetched.pop().endswith("sample/2.parquet")
    assert {path.name for path in Path("out/downloads/sample").iterdir()} == {"1.parquet", "2.parquet"}


def test_offline_and_unknown_name_print_one_line(hub):
    result = prepare(hub, HF_HUB_OFFLINE="1")
    assert result.returncode == 1 and "HF_HUB_OFFLINE, or use --files" in result.stderr.splitlines()[-1]
    assert hub.seen == [] and not Path("out").exists()
    result = prepare(hub, "--name", "none")
    assert result.returncode == 1 and "small" in result.stderr.splitlines()[-1]


def test_token_files_of_the_hub_need_no_tokenizer_and_continue(hub):
    for name, size in (("val_000000", 500), ("train_000001", 900), ("train_000002", 700)):
        hub.files[f"fineweb_{name}.bin"] = token_file(np.arange(size))
    hub.faults = {("GET", "train_000002"): ["always"]}
    options = ("--tokenizer", "gpt2", "--shard_size", "100000000")
    offline = {"TIKTOKEN_CACHE_DIR": "empty", "ALL_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    result = prepare(hub, *options, **offline)
    assert result.returncode == 1 and "cannot download fineweb_train_000002.bin" in result.stderr
    assert sorted(path.name for path in Path("out").glob("*.npy")) == [
        "fineweb_train_000001.npy",
        "fineweb_val_000000.npy",
    ]
    hub.faults, hub.seen[:] = {}, []
    result = prepare(hub, *options, **offline)
    assert result.returncode == 0, result.stderr
    assert np.load("out/fineweb_train_000002.npy").tolist() == list(range(700))
    assert {path for _, path, _ in hub.seen if ".bin" in path} == {
        f"/datasets/org/name/resolve/{REVISION}/fineweb_train_000002.bin"
    }
    assert not Path("out/downloads").exists() and not Path("empty").exists()


@pytest.mark.parametrize("kind, behind", [("bin", 4), ("parquet", 5)])
def test_four_files_are_downloaded_at_once_and_earlier_ones_are_deleted_before(hub, kind, behind):
    """Before file i is asked for, file i - `behind` is a shard and has been deleted: a shard of documents is
    written when the next file has begun, that of a token file before."""
    names = [f"sample/{number}_{'train' if number else 'val'}.{kind}" for number in range(8)]
    tokens = [np.array([256, *f"file {number}, ".encode() * 50]) for number in range(8)]
    texts = [[bytes(each[1:].tolist()).decode()] for each in tokens]
    make = {"bin": lambda i: token_file(tokens[i]), "parquet": lambda i: parquet(texts[i])}
    hub.files = {name: data for name, data in hub.files.items() if "sample" not in name}
    hub.files |= {name: make[kind](number) for number, name in enumerate(names)}
    together, problems, asked = threading.Event(), [], set()

    def before_get(path):
        number = next((number for number, name in enumerate(names) if path.endswith(name)), None)
        if number is None:
            return
        if number not in asked and number >= behind:
            shards = len(list(Path("out").glob("*.npy")))
            if shards <= number - behind or Path("out/downloads", names[number - behind]).exists():
                problems.append(f"{names[number]} is asked for after {shards} shards")
        asked.add(number)
        if asked >= {0, 1, 2, 3}:
            together.set()
        if not together.wait(20):  # also of a client that repeats its request
            problems.append(f"only {asked} are asked for at once")
            together.set()

    hub.before_get = before_get
    options = ("--tokenizer", "gpt2") if kind == "bin" else ("--shard_size", str(len(tokens[0])))
    result = prepare(hub, *options)
    assert result.returncode == 0, result.stderr
    assert asked == set(range(8)) and problems == []
    assert token_stream("out") == np.concatenate(tokens).tolist()
    assert not Path("out/downloads").exists()


def test_ctrl_c_does_not_wait_for_downloads(hub):
    held, end = [], threading.Event()

    def before_get(path):
        if "sample/" in path and hub.seen[-1][0] == "GET":
            held.append(path)
            end.wait(120)

    hub.before_get = before_get
    process = begin(hub)
    wait_until(lambda: len(held) == 3)
    os.kill(process.pid, signal.SIGINT)
    process.join(90)
    end.set()
    assert process.exitcode == 130 and Path("errors").read_text() == ""


def test_dataset_in_another_format_is_read_from_the_hubs_parquet_files(hub):
    card = "---\nconfigs:\n- config_name: small\n  data_files: [{split: train, path: 'sample/*'}]\n---\n"
    hub.files = {"sample/0.csv": b"text\nnot this", "README.md": card.encode()}
    hub.converted = {
        "small/train/0000.parquet": parquet(["from", "the branch " * 20]),
        "small/test/0000.parquet": parquet(["a test"]),
        "other/train/0000.parquet": parquet(["another configuration"]),
    }
    result = prepare(hub)
    assert result.returncode == 0, result.stderr
    stream = [token for text in ("from", "the branch " * 20) for token in (256, *text.encode())]
    assert sorted(token_stream("out")) == sorted(stream)
    assert CONVERTED in Path("out/manifest.json").read_text()
    hub.converted = {}
    result = prepare(hub, "--out_dir", "none")
    message = "the Hub has no parquet files of org/name (small): download it and use --files"
    assert result.returncode == 1 and message in result.stderr


def test_offline_set_is_made_from_the_cache(hub):
    script = "from huggingface_hub import snapshot_download as get; get('org/name', repo_type='dataset')"
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": "home"}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, check=True)
    hub.seen.clear()
    result = prepare(hub, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert token_stream("out") == [t for texts in TEXTS for text in texts for t in (256, *text.encode())]
    assert hub.seen == []
