"""What comes from the Hub, from a stand-in on this machine through the real client library: files, HellaSwag,
the vocabulary of GPT-2."""

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import huggingface_hub
import pytest
import tiktoken
from conftest import TINY_GPT, tiny_gpt
from test_hellaswag import BYTE, ITEMS, write_parquet
from test_tokenizer import GPT2_PATTERN, odd_texts, trained
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hellaswag
from corpus import shards as shards_module
from corpus import tokenizer
from model import GPT
from runtime import hub

WEIGHTS = b"some weights"
PARQUET = "/datasets/Rowan/hellaswag/resolve/main/data/validation-00000-of-00001.parquet"
CONVERTED = "/datasets/Rowan/hellaswag/resolve/refs%2Fconvert%2Fparquet/default/validation/0000.parquet"
VOCABULARY = "/openai-community/gpt2/resolve/main/vocab.json"
ABOUT = dict(what="get it", advice="do this")


class StandIn(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, after the faults in `server.faults`: a status, or "hang" until the test ends."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.seen.append((self.command, self.path))
        faults = server.faults.get(self.command, [])
        fault = faults[0] if faults[1:] == ["always"] else faults.pop(0) if faults else None
        if fault == "hang":
            server.ended.wait()
            self.close_connection = True
        elif fault or self.path not in server.files:
            missing = {"X-Error-Code": "EntryNotFound"} if not fault else {}
            self.reply(fault or 404, b"", **missing, **{"Retry-After": "7"} if fault == 429 else {})
        else:
            data = server.files[self.path]
            self.reply(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', **{"X-Repo-Commit": "a" * 40})

    def reply(self, status, data, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass

    do_HEAD = do_GET


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
    stand_in.faults = {"HEAD": [503, 429]}
    path = hub.fetch("gpt2", "x.bin", **ABOUT)
    assert path.read_bytes() == WEIGHTS
    assert stand_in.waits == [1, 7]  # Retry-After is respected
    stand_in.stop()
    assert hub.fetch("gpt2", "x.bin", **ABOUT) == path


@pytest.mark.parametrize(
    "status, kind", [(401, FileNotFoundError), (404, FileNotFoundError), (503, ConnectionError)]
)
def test_refusal_ends_at_once_and_an_outage_after_some_tries(stand_in, status, kind):
    stand_in.faults = {"HEAD": [status, "always"]}
    with pytest.raises(kind, match=rf"^cannot get it \(.*{status}.*\): do this$") as caught:
        hub.fetch("gpt2", "x.bin", **ABOUT)
    assert "\n" not in str(caught.value) and sum(stand_in.waits) < hub.PATIENCE_S
    assert len(stand_in.waits) == (4 if status == 503 else 0)


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
    assert first[0]["warning"] in printed and "not the 10,042 items" in first[0]["warning"]
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
