"""What comes from the Hub, from a stand-in on this machine through the real client library: files, HellaSwag,
the vocabulary of GPT-2."""

import errno
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import tiktoken
from conftest import TINY_GPT, tiny_gpt
from test_hellaswag import BYTE, ITEMS, write_parquet
from test_tokenizer import GPT2_PATTERN, odd_texts, trained
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hellaswag
from corpus import inputs, tokenizer
from corpus import shards as shards_module
from model import GPT
from runtime import hub

pytestmark = pytest.mark.skipif(
    not hasattr(huggingface_hub, "set_client_factory"), reason="the huggingface_hub of transformers 4"
)
WEIGHTS = b"some weights"
PARQUET = "/datasets/Rowan/hellaswag/resolve/main/data/validation-00000-of-00001.parquet"
CONVERTED = "/datasets/Rowan/hellaswag/resolve/refs%2Fconvert%2Fparquet/default/validation/0000.parquet"
VOCABULARY = "/openai-community/gpt2/resolve/main/vocab.json"
ABOUT = dict(what="get it", advice="do this")


class StandIn(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, after the faults in `server.faults`: a status, one with headers, or "hang" until
    the test ends."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        server.seen.append((self.command, self.path))
        # The client library's first request in a process is about something else.
        faults = [] if self.path == "/api/agent-harnesses" else server.faults.get(self.command, [])
        fault = faults[0] if faults[1:] == ["always"] else faults.pop(0) if faults else None
        if fault == "hang":
            server.ended.wait()
            self.close_connection = True
        elif fault or self.path not in server.files:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.reply(status or 404, b"", **headers if fault else {"X-Error-Code": "EntryNotFound"})
        else:
            data = server.files[self.path]
            self.reply(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', **{"X-Repo-Commit": "a" * 40})

    def reply(self, status, data, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass

    def date_time_string(self, timestamp=None):
        return "Wed, 21 Oct 2015 07:28:00 GMT"

    do_HEAD = do_POST = do_GET


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A Hub on this machine, with a cache of its own for the client. Waits are noted, not slept."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.files, server.faults, server.seen, server.ended = {}, {}, [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    urls = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.waits = []
    monkeypatch.setattr(hub.time, "sleep", server.waits.append)

    def stop():
        server.ended.set()
        server.shutdown()
        server.server_close()

    server.stop = stop
    yield server
    stop()


def test_file_is_downloaded_once_and_then_needs_no_network(stand_in):
    stand_in.files["/gpt2/resolve/main/x.bin"] = WEIGHTS
    stand_in.faults = {"HEAD": [503, 502]}
    path = hub.fetch("gpt2", "x.bin", **ABOUT)
    assert path.read_bytes() == WEIGHTS
    assert stand_in.waits == [1, 2]
    stand_in.stop()
    assert hub.fetch("gpt2", "x.bin", **ABOUT) == path


@pytest.mark.parametrize("command", ["HEAD", "GET"])
@pytest.mark.parametrize(
    "status, headers, seconds",
    [
        (429, {"Retry-After": "7"}, 7),
        (503, {"Retry-After": "7"}, 7),
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:20 GMT"}, 20),  # by the server's clock
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:20:00 GMT"}, 1),
        (429, {"ratelimit": '"resolvers";r=0;t=12'}, 12),
        (429, {"ratelimit": '"resolvers";r=9;t=12', "Retry-After": "5"}, 5),
        (429, {"Retry-After": "later"}, 1),
    ],
)
def test_wait_that_the_hub_asks_for_is_respected_and_said(
    stand_in, capsys, command, status, headers, seconds
):
    stand_in.files["/gpt2/resolve/main/x.bin"] = WEIGHTS
    stand_in.faults = {command: [(status, headers)]}
    assert hub.fetch("gpt2", "x.bin", **ABOUT).read_bytes() == WEIGHTS
    assert stand_in.waits == [seconds]
    line = rf"^cannot get it \(.*{status}.*\): trying again in (\d+) s"
    said = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert said == ([str(seconds)] if seconds > 1 else [])


@pytest.mark.parametrize("command", ["HEAD", "GET"])
def test_wait_of_an_hour_is_named_and_not_waited_for(stand_in, command):
    stand_in.files["/gpt2/resolve/main/x.bin"] = WEIGHTS
    stand_in.faults = {command: [(429, {"Retry-After": "3600"}), "always"]}
    with pytest.raises(ConnectionError, match=r"429 .*; the Hub asks to wait 3,600 s\): do this$"):
        hub.fetch("gpt2", "x.bin", **ABOUT)
    assert stand_in.waits == []


@pytest.mark.parametrize(
    "status, reason, kind",
    [
        (400, "Bad request", FileNotFoundError),
        (401, "401", FileNotFoundError),
        (403, "403 Forbidden", FileNotFoundError),
        (404, "404", FileNotFoundError),
        (503, "503", ConnectionError),
    ],
)
def test_refusal_ends_at_once_and_an_outage_after_some_tries(stand_in, status, reason, kind):
    stand_in.faults = {"HEAD": [status, "always"]}
    with pytest.raises(kind, match=rf"^cannot get it \(.*{reason}.*\): do this$") as caught:
        hub.fetch("gpt2", "x.bin", **ABOUT)
    assert "\n" not in str(caught.value) and sum(stand_in.waits) < hub.PATIENCE_S
    assert len(stand_in.waits) == (4 if status == 503 else 0)


def test_outage_and_refusal_are_told_apart_in_errors_of_missing_files(stand_in, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", huggingface_hub.constants.ENDPOINT)
    stand_in.faults = {"HEAD": [503] * 4}  # the client library asks twice
    with pytest.raises(FileNotFoundError, match=r"^cannot list it \(.*404.*\): do this$"):
        hub.retrying(lambda: datasets.load_dataset_builder("org/name"), "list it", "do this", 60)
    assert stand_in.waits == [1, 2]  # for the outage; the refusal after it ends the tries


def test_set_of_shards_outlasts_an_outage_of_minutes_and_says_each_wait(stand_in, capsys):
    stand_in.faults = {"GET": [503, "always"]}
    with pytest.raises(ConnectionError, match=r"^cannot list org/name \(.*503.*--files; to continue: "):
        inputs.hub_inputs("org/name", None)
    waits = stand_in.waits
    assert 600 < sum(waits) < 1000 and waits == sorted(waits) and max(waits) == 60
    assert capsys.readouterr().out.count("trying again in") == len([wait for wait in waits if wait > 3])


def test_download_that_fails_after_hours_is_tried_again(stand_in, monkeypatch):
    clock, results = [0.0], [ConnectionError("reset"), "file"]

    def call():
        clock[0] += 9999
        if isinstance(result := results.pop(0), Exception):
            raise result
        return result

    monkeypatch.setattr(hub.time, "monotonic", lambda: clock[0])
    assert hub.retrying(call, "get it", "do this", 60) == "file"


def test_cache_that_cannot_be_written_is_one_line_that_names_the_variable(stand_in, monkeypatch):
    stand_in.files["/gpt2/resolve/main/x.bin"] = WEIGHTS
    Path("file").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(Path("file/cache").absolute()))
    with pytest.raises(OSError, match=r"^cannot get it \(.*file/cache.*\): set HF_HOME to .*") as caught:
        hub.fetch("gpt2", "x.bin", **ABOUT)
    assert "\n" not in str(caught.value) and stand_in.waits == []


def test_full_disk_is_no_outage(stand_in):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="cannot get it: No space left on device") as caught:
        hub.retrying(fail, "get it", "do this", 60)
    assert caught.value.errno == errno.ENOSPC and stand_in.waits == []


def test_dataset_in_a_folder_needs_neither_the_hub_nor_its_cache(stand_in, monkeypatch):
    Path("file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("file/cache").absolute())
    for name, suffix in (("lines", "jsonl"), ("texts", "txt"), ("script", "py"), ("empty", "bin.xz")):
        Path(name).mkdir()
        Path(name, f"{name}.{suffix}").write_text('{"text": "a"}\n')
    Path("lines/README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: lines.jsonl\n---\n"
    )
    for name, config, file in (("lines", "small", "lines.jsonl"), ("./texts", None, "texts.txt")):
        (found,) = inputs.hub_inputs(name, config)
        assert Path(found.path).samefile(Path(name, file)) and found.repo is None
    for name in ("script", "empty"):
        with pytest.raises(ValueError, match=f"^cannot read {name} as a dataset .*: name its .*--files"):
            inputs.hub_inputs(name, None)
    with pytest.raises(ValueError, match="Available: .*small"):
        inputs.hub_inputs("lines", "large")
    with pytest.raises(ValueError, match="is a file: use --files"):
        inputs.hub_inputs("texts/texts.txt", None)
    assert stand_in.seen == stand_in.waits == []


@pytest.mark.parametrize(
    "configs, name, chosen",
    [
        (["default", "small"], None, "default"),
        (["small"], None, "small"),
        (["large", "small"], "small", "small"),
        (["large", "small"], None, "choose --name from large, small"),
        (["large"], "small", "no parquet files of org/name .small."),
    ],
)
def test_dataset_with_a_script_is_read_from_the_hubs_parquet_files(stand_in, configs, name, chosen):
    about, paths = "/api/datasets/org/name", [f"{config}/train/0000.parquet" for config in configs]
    converted = f"{about}/revision/refs%2Fconvert%2Fparquet"
    for where, names in ((about, ["name.py", "data.tar"]), (converted, [*paths, "small/test/0000.parquet"])):
        siblings = [{"rfilename": name} for name in names]
        stand_in.files[where] = json.dumps({"id": "org/name", "sha": "b" * 40, "siblings": siblings}).encode()
    infos = [{"type": "file", "path": path, "size": 9, "oid": "0"} for path in paths]
    stand_in.files[f"{about}/paths-info/{'b' * 40}"] = json.dumps(infos).encode()
    if chosen in configs:
        expected = inputs.Input(f"{chosen}/train/0000.parquet", 9, None, "org/name", "b" * 40)
        assert inputs.hub_inputs("org/name", name) == [expected]
    else:
        with pytest.raises(ValueError, match=chosen):
            inputs.hub_inputs("org/name", name)


@pytest.mark.parametrize("command, reason", [("HEAD", "timed out"), ("GET", "nothing arrived for 0.1 s")])
def test_hub_that_does_not_answer_is_given_up(stand_in, monkeypatch, command, reason):
    for name, seconds in (("ANSWER_S", 0.1), ("PATIENCE_S", 2), ("STALLED_S", 0.1)):
        monkeypatch.setattr(hub, name, seconds)
    stand_in.files["/gpt2/resolve/main/x.bin"] = WEIGHTS
    stand_in.faults = {command: ["hang", "always"]}
    with pytest.raises(ConnectionError, match=rf"^cannot get it \(.*{reason}\): do this$"):
        hub.fetch("gpt2", "x.bin", **ABOUT)


def test_offline_switch_refuses_at_once_what_is_not_cached(stand_in, monkeypatch):
    stand_in.files["/gpt2/resolve/main/x.bin"] = WEIGHTS
    hub.fetch("gpt2", "x.bin", **ABOUT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    stand_in.seen.clear()
    assert hub.fetch("gpt2", "x.bin", **ABOUT).read_bytes() == WEIGHTS
    with pytest.raises(FileNotFoundError, match="cannot get it .*offline mode.*: do this"):
        hub.fetch("gpt2", "y.bin", **ABOUT)
    assert stand_in.seen == stand_in.waits == []


@pytest.fixture
def items(stand_in):
    """The items of tests/, on the Hub as a parquet file that only the branch of converted files has."""
    items = hellaswag.load_items(ITEMS)
    write_parquet(items, "items.parquet")
    stand_in.files[CONVERTED] = Path("items.parquet").read_bytes()
    return items


def test_hellaswag_is_downloaded_once_and_kept_as_jsonl(stand_in, items):
    assert hellaswag.download() == Path("hellaswag_val.jsonl")
    assert [path for command, path in stand_in.seen if command == "HEAD"][:2] == [PARQUET, CONVERTED]
    kept = hellaswag.load_items("hellaswag_val.jsonl")
    assert hellaswag.identify(kept) == hellaswag.identify(items)
    chosen = [hellaswag.evaluate(tiny_gpt(), hellaswag.render(each, BYTE))["items"] for each in (kept, items)]
    assert chosen[0] == chosen[1]
    stand_in.stop()
    hellaswag.download()
    Path("mine.jsonl").write_text("what people already have")
    assert hellaswag.download("mine.jsonl").read_text() == "what people already have"


def test_several_runs_may_download_hellaswag_at_once(stand_in, items):
    downloads = [hub.started(hellaswag.download) for _ in range(6)]
    for download in downloads:
        found = hellaswag.load_items(download.result(timeout=60))
        assert hellaswag.identify(found) == hellaswag.identify(items)
    assert [path.name for path in Path().glob("hellaswag_val*")] == ["hellaswag_val.jsonl"]


def test_training_scores_what_it_downloads_and_then_needs_no_network(stand_in, items, run_train, capsys):
    options = "--hellaswag_every 6"
    first = run_train(options)["hellaswag"]
    printed = capsys.readouterr().out
    stand_in.stop()
    again = run_train(options)["hellaswag"]
    told = run_train(f"{options} --hellaswag_data items.parquet")["hellaswag"]
    assert len(first) == 2 and first[0]["fingerprint"] == hellaswag.identify(items)["fingerprint"]
    assert f"of {len(items)} demo items" in printed
    for each in (first, again, told):
        assert [{**r, "seconds": 0} for r in each] == [{**r, "seconds": 0} for r in first]


def test_run_without_hellaswag_ends_before_its_model_and_a_dry_run_goes_on(
    stand_in, run_train, capsys, monkeypatch
):
    stand_in.faults = {"HEAD": [503, "always"]}
    monkeypatch.setattr("training.dry_run.STEPS_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module.Shards, "__init__", lambda *_: pytest.fail("a shard was opened"))
        patch.setattr(GPT, "__init__", lambda *_: pytest.fail("a model was made"))
        with pytest.raises(ValueError, match="cannot download HellaSwag .*503") as caught:
            run_train("--hellaswag_every 3")
    (line,) = str(caught.value).splitlines()
    for way_out in ("--hellaswag_every 0", "--hellaswag_data", "HF_ENDPOINT"):
        assert way_out in line
    run_train("--hellaswag_every 3 --dry_run")
    printed = capsys.readouterr().out
    assert f"{line}\nthe dry run goes on without HellaSwag" in printed
    assert "validations" in printed and " HellaSwag  " not in printed


@pytest.fixture
def vocabulary(stand_in, monkeypatch):
    """A small vocabulary on the Hub instead of GPT-2's, and an address of OpenAI that does not answer."""
    ranks = trained(Path(hub.__file__).read_text() * 9, 300)
    letters = bytes_to_unicode()
    spelled = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    stand_in.files[VOCABULARY] = json.dumps(spelled | {"<|endoftext|>": len(ranks)}, indent=1).encode()
    lines = tokenizer.tiktoken_file(ranks)
    monkeypatch.setattr(tokenizer, "RANKS_SHA256", hashlib.sha256(lines).hexdigest())
    monkeypatch.setattr(tokenizer, "OPENAI_S", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in.ended.wait())
    tokenizer.gpt2_from_hub.cache_clear()
    yield ranks
    tokenizer.gpt2_from_hub.cache_clear()


def test_vocabulary_comes_from_the_hub_if_openai_does_not_answer(stand_in, vocabulary):
    special = {"<|endoftext|>": len(vocabulary)}
    expected = tiktoken.Encoding("", pat_str=GPT2_PATTERN, mergeable_ranks=vocabulary, special_tokens=special)
    found = tokenizer.get_tokenizer("gpt2")
    assert (found.name, found.n_vocab, found.eot_token) == ("gpt2", len(vocabulary) + 1, len(vocabulary))
    texts = odd_texts(300)
    assert found.encode_ordinary_batch(texts) == expected.encode_ordinary_batch(texts)


def test_another_vocabulary_is_refused(stand_in, vocabulary):
    altered = json.loads(stand_in.files[VOCABULARY])
    altered["a"], altered["b"] = altered["b"], altered["a"]
    stand_in.files[VOCABULARY] = json.dumps(altered).encode()
    with pytest.raises(ValueError, match="vocab.json is .*not OpenAI's vocabulary .*hash.*delete it"):
        tokenizer.get_tokenizer("gpt2")


def test_vocabulary_that_neither_source_has_is_one_line(stand_in, vocabulary, monkeypatch):
    stand_in.faults = {"HEAD": [503, "always"]}
    expected = r"^cannot download GPT-2's vocabulary, .*TimeoutError.*503.*TIKTOKEN_CACHE_DIR.*HF_ENDPOINT"
    with pytest.raises(ConnectionError, match=expected) as caught:
        tokenizer.get_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


def test_slow_answer_of_openai_counts_if_the_hub_fails(monkeypatch):
    answered = threading.Event()

    def fail(reason):
        answered.set()
        threading.Event().wait(0.2)  # the other thread gets its result
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: answered.wait(9) and "encoding")
    monkeypatch.setattr(tokenizer, "OPENAI_S", 0.01)
    monkeypatch.setattr(tokenizer, "gpt2_from_hub", fail)
    assert tokenizer.get_tokenizer("gpt2") == "encoding"


def test_weights_come_from_one_revision_of_the_hub(stand_in, hf_folder, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        stand_in.files[f"/gpt2/resolve/main/{name}"] = (hf_folder / name).read_bytes()
    model = GPT.from_pretrained("gpt2")
    assert model.config == TINY_GPT
    stand_in.stop()
    assert GPT.from_pretrained("gpt2").config == TINY_GPT
    # The client library's first request in a process may be about something else.
    commands = [command for command, path in stand_in.seen if path.startswith("/gpt2/")]
    assert not re.search("GET.*GET.*GET", " ".join(commands))


def test_weights_that_cannot_be_downloaded_can_be_copied_into_a_folder(hf_folder, monkeypatch):
    def offline(repo, path, *, what, advice):
        raise ConnectionError(f"cannot {what}: {advice}")

    monkeypatch.setattr(hub, "fetch", offline)
    with pytest.raises(ConnectionError, match="download gpt2: connect .*, or copy .*, not gpt2$") as error:
        GPT.from_pretrained("gpt2")
    files = re.search("copy (.*) and (.*) into a folder", str(error.value)).groups()
    Path("copied").mkdir()
    for name in files:
        Path("copied", name).write_bytes((hf_folder / name).read_bytes())
    weights, copied = (GPT.from_pretrained(folder).state_dict() for folder in (hf_folder, "copied"))
    assert all(weights[name].equal(copied[name]) for name in weights)
