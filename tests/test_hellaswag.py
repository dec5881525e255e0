import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import hellaswag
from corpus.tokenizer import get_tokenizer
from diagnosis import published
from model import GPT, GPTConfig

ITEMS = REPOSITORY / "corpus" / "hellaswag_demo.jsonl"
BYTE = get_tokenizer("byte")


def make_model(block_size=128, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=320, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():  # weights so large that endings differ clearly
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def reference(model, items):
    """The slow plain way: each ending alone, all positions through the head. Sums and means of nats."""
    sums, means = [], []
    with torch.no_grad():
        for item in items:
            for ending in item["endings"]:
                context, ending = BYTE.encode_ordinary(item["ctx"]), BYTE.encode_ordinary(" " + ending)
                row = (context + ending)[-model.config.block_size :]
                mask = ([0] * len(context) + [1] * len(ending))[-model.config.block_size :]
                logprobs = model(torch.tensor([row]))[0][0].log_softmax(dim=-1)
                losses = [-logprobs[t - 1, row[t]].item() for t in range(1, len(row)) if mask[t]]
                sums.append(sum(losses))
                means.append(sum(losses) / len(losses))
    return torch.tensor(sums).view(-1, 4), torch.tensor(means).view(-1, 4)


@pytest.mark.parametrize("block_size", [128, 60, 12])  # all fit, contexts are cut, endings too
def test_scores_match_the_slow_plain_loop(block_size):
    model, items = make_model(block_size), hellaswag.load_items(ITEMS)
    sums, means = reference(model, items)
    result = hellaswag.evaluate(model, hellaswag.render(items, BYTE))
    losses = torch.tensor([item["losses"] for item in result["items"]])
    torch.testing.assert_close(losses, sums, atol=1e-4, rtol=1e-5)
    assert [item["pred"] for item in result["items"]] == sums.argmin(dim=1).tolist()
    assert [item["pred_norm"] for item in result["items"]] == means.argmin(dim=1).tolist()
    labels = torch.tensor([item["label"] for item in items])
    assert result["acc"] == pytest.approx((sums.argmin(dim=1) == labels).float().mean().item())
    assert result["acc_norm"] == pytest.approx((means.argmin(dim=1) == labels).float().mean().item())
    assert result["n"] == len(items) >= 40
    if block_size > 12:  # at 12, all endings are cut to one length, so both rules agree
        assert (sums.argmin(dim=1) != means.argmin(dim=1)).any()


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_scores_do_not_depend_on_the_batch(batch_tokens):
    model, examples = make_model(), hellaswag.render(hellaswag.load_items(ITEMS), BYTE)
    result = hellaswag.evaluate(model, examples, batch_tokens=batch_tokens)
    usual = hellaswag.evaluate(model, examples)
    for item, other in zip(result["items"], usual["items"], strict=True):
        assert item["losses"] == pytest.approx(other["losses"], abs=1e-4)
        assert all(item[name] == other[name] for name in ("ind", "pred", "pred_norm"))


RANKS_SCRIPT = """
import json, torch, hellaswag, test_hellaswag as t
torch.distributed.init_process_group("gloo")
examples = hellaswag.render(hellaswag.load_items(t.ITEMS), t.BYTE)
result = hellaswag.evaluate(t.make_model(), examples, batch_tokens=500)
json.dump(result, open(f"rank{torch.distributed.get_rank()}.json", "w"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(os.name == "nt", reason="ranks are forked")
def test_scores_do_not_depend_on_the_number_of_ranks(two_ranks, one_thread):
    Path("ranks.py").write_text(RANKS_SCRIPT)
    two_ranks("ranks.py")
    examples = hellaswag.render(hellaswag.load_items(ITEMS), BYTE)
    alone = hellaswag.evaluate(make_model(), examples, batch_tokens=500)
    for rank in (0, 1):
        result = json.loads(Path(f"rank{rank}.json").read_text())
        assert {**result, "seconds": None} == {**alone, "seconds": None}


@pytest.fixture
def one_thread():
    """Each rank has one thread: sums in another order would differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_context_and_ending_are_rendered_as_documented():
    item = {
        "ind": 5,
        "activity_label": "Personal Care",
        "ctx": "[header] How to wash [title] Use soap. you",
        "ctx_a": "[header] How to wash [title] Use soap.",
        "ctx_b": "you",
        "label": 1,
        "endings": ["rinse.", "scrub [substeps] well.", "x", "y"],
    }
    (plain,), (harness,) = (f([item], BYTE) for f in (hellaswag.render, hellaswag.render_lm_eval))
    assert BYTE.decode(plain.context) == item["ctx"]
    assert [BYTE.decode(ending) for ending in plain.endings] == [" " + ending for ending in item["endings"]]
    assert BYTE.decode(harness.context) == "Personal Care: How to wash. Use soap. You"
    assert BYTE.decode(harness.endings[1]) == " scrub well."
    assert harness.lengths == [6, 11, 1, 1]


def test_lm_eval_style_divides_by_characters():
    model, items = make_model(), hellaswag.load_items(ITEMS)[:9]
    result = hellaswag.evaluate(model, hellaswag.render_lm_eval(items, BYTE))
    texts = [{**i, "ctx": f"{i['activity_label']}: {i['ctx']}"} for i in items]
    sums, _ = reference(model, texts)
    characters = torch.tensor([[len(ending) for ending in item["endings"]] for item in items])
    assert [item["pred"] for item in result["items"]] == sums.argmin(dim=1).tolist()
    assert [item["pred_norm"] for item in result["items"]] == (sums / characters).argmin(dim=1).tolist()


@pytest.mark.needs("lm_eval")
def test_lm_evaluation_harness_agrees_item_for_item(tmp_path):
    """Opt-in: `pip install lm-eval`, with GPT-2's vocabulary cached."""
    try:
        gpt2 = get_tokenizer("gpt2")
    except OSError as error:
        pytest.skip(str(error))
    ours, theirs = compare_with_harness(ITEMS, make_gpt2_vocabulary_model(), gpt2, tmp_path)
    assert ours == theirs


def make_gpt2_vocabulary_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=64))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5)
    return model


def compare_with_harness(data, model, tokenizer, folder, limit=None):
    """Per item (acc, acc_norm) as ours and as lm-evaluation-harness has them, on an export of the model."""
    import lm_eval
    import lm_eval.tasks
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs
    from tiktoken.load import read_file_cached
    from transformers import AutoModelForCausalLM, GPT2Tokenizer

    items = hellaswag.load_items(data)[:limit]
    ours = hellaswag.evaluate(model, hellaswag.render_lm_eval(items, tokenizer))
    model.save_pretrained(folder / "exported")
    source = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (folder / theirs).write_bytes(read_file_cached(source + name))
    rows = [{"ctx_a": item["ctx"], "ctx_b": "", **item} for item in items]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config_file = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    config = yaml.load(config_file.read_text().replace("!function", ""), Loader=yaml.SafeLoader)
    config |= {"dataset_path": "json", "process_docs": process_docs, "training_split": None}
    config |= {"dataset_kwargs": {"data_files": {"validation": str(folder / "items.jsonl")}}}
    config.pop("tag", None)
    hf_tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported")
    lm = HFLM(exported, tokenizer=hf_tokenizer, device="cpu", batch_size=8)
    tasks = {"hellaswag": ConfigurableTask(config=config)}
    out = lm_eval.evaluate(lm, tasks, log_samples=True, bootstrap_iters=0)
    samples = sorted(out["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    theirs = [(bool(sample["acc"]), bool(sample["acc_norm"])) for sample in samples]
    return [(i["pred"] == i["label"], i["pred_norm"] == i["label"]) for i in ours["items"]], theirs


def test_evaluation_keeps_training_mode_and_random_state():
    model, examples = make_model(), hellaswag.render(hellaswag.load_items(ITEMS)[:4], BYTE)
    state = torch.get_rng_state()
    hellaswag.evaluate(model, examples)
    assert model.training and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"endings": ["a", "b", " ", "d"]}, "items.jsonl, line 2 is .*it needs four non-empty endings"),
        ({"endings": ["a", "b"]}, "line 2 .*it needs four non-empty endings"),
        ({"label": None}, "line 2 .*its label is None, not 0, 1, 2 or 3"),
        ({"ctx": ""}, "line 2 .*its ctx is empty"),
        ({"label": "4"}, "line 2 .*its label is '4', not 0, 1, 2 or 3"),
        ({"label": True}, "line 2 .*its label is True, not 0, 1, 2 or 3"),
        ({"label": ...}, "line 2 .*it has no label"),
        ("{cut", "line 2 .*is damaged or not a HellaSwag item"),
        ("[]", "line 2 .*it is not a JSON object"),
    ],
)
def test_bad_items_are_reported_with_their_line(change, message):
    good = ITEMS.read_text().splitlines()[0]
    if isinstance(change, dict):
        change = json.dumps({k: v for k, v in {**json.loads(good), **change}.items() if v is not ...})
    Path("items.jsonl").write_text(f"{good}\n{change}\n")
    with pytest.raises(ValueError, match=message) as caught:
        hellaswag.load_items("items.jsonl")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(": fix it or use another file")  # which nobody has downloaded


def write_parquet(items, path, **changes):
    """The layout of the Hub: labels are text, and no value is missing."""
    import pyarrow.parquet

    rows = [{"ctx_a": item["ctx"], "ctx_b": "", **item, "label": str(item["label"])} for item in items]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, **changes} for row in rows]), path)


def test_same_items_in_any_file_have_the_same_fingerprint_and_choices():
    items = hellaswag.load_items(ITEMS)
    lines = [json.dumps(dict(reversed(item.items())), ensure_ascii=False, indent=None) for item in items]
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + "\r\n\n".join(lines).encode() + b"\n \n")
    Path("a.jsonl.gz").write_bytes(gzip.compress(ITEMS.read_bytes()))
    write_parquet(items, "a.parquet")
    model, about = make_model(), hellaswag.identify(items)
    chosen = hellaswag.evaluate(model, hellaswag.render(items, BYTE))["items"]
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        loaded = hellaswag.load_items(name)
        assert hellaswag.identify(loaded) == about
        assert hellaswag.evaluate(model, hellaswag.render(loaded, BYTE))["items"] == chosen


def test_fingerprint_tells_contexts_endings_labels_and_order_apart(monkeypatch):
    items = hellaswag.load_items(ITEMS)
    other_label = [{**items[0], "label": (items[0]["label"] + 1) % 4}, *items[1:]]
    other_ending = [{**items[0], "endings": [*items[0]["endings"][:3], "x"]}, *items[1:]]
    other_context = [{**items[0], "ctx": items[0]["ctx"] + " "}, *items[1:]]
    versions = [items, other_label, other_ending, other_context, items[::-1], items[1:]]
    about = [hellaswag.identify(version) for version in versions]
    assert len({each["fingerprint"] for each in about}) == len(versions)
    assert "warning" not in about[0] and published.items_of(about[0]) == "demo items"
    assert all("these are not the 10,042 items of the published scores: 4" in a["warning"] for a in about[1:])
    monkeypatch.setattr(published, "PUBLISHED_FINGERPRINT", about[1]["fingerprint"])
    assert "warning" not in hellaswag.identify(other_label) and "warning" in hellaswag.identify(other_ending)


def test_bad_row_of_a_parquet_file_is_named():
    items = hellaswag.load_items(ITEMS)
    write_parquet(items, "items.parquet", endings=["a", "b", None, "d"])
    with pytest.raises(ValueError, match="items.parquet, row 1 is .*it needs four non-empty endings"):
        hellaswag.load_items("items.parquet")
    Path("items.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="items.parquet is damaged or not a HellaSwag item"):
        hellaswag.load_items("items.parquet")
    Path("items.jsonl.gz").write_bytes(gzip.compress(ITEMS.read_bytes())[:900])
    with pytest.raises(ValueError, match=r"items.jsonl.gz is damaged or not a gzip file \(Compressed"):
        hellaswag.load_items("items.jsonl.gz")


def test_command_line_writes_the_result(run_train, capsys, monkeypatch):
    run_train("--block_size 64 --batch_size 1")
    Path("others.jsonl").write_text("".join(ITEMS.read_text().splitlines(keepends=True)[:7]))
    options = ["--data", "others.jsonl", "--lm_eval", "--output", "results.json"]
    hellaswag.main(hellaswag.parse_args(options))
    printed, errors = capsys.readouterr()
    assert "these are not the 10,042 items of the published scores: 7 items" in errors
    assert "published" not in printed
    result = json.loads(Path("results.json").read_text())
    for scores in (result, result["lm_eval"]):
        error = math.sqrt(scores["acc"] * (1 - scores["acc"]) / 6)
        assert f"acc {scores['acc']:.1%} ± {error:.1%} of 7 other items" in printed
        assert scores["warning"] in errors and scores["n"] == 7
        assert [item["ind"] for item in scores["items"]] == list(range(7))
    monkeypatch.setattr(published, "PUBLISHED_FINGERPRINT", result["fingerprint"])
    hellaswag.main(hellaswag.parse_args(options))
    assert "published" not in capsys.readouterr().out  # the model has bytes, not GPT-2's tokens
    monkeypatch.setattr(published, "wrong_tokens", lambda tokenizer: None)
    hellaswag.main(hellaswag.parse_args(options))
    printed = capsys.readouterr().out
    assert "of 7 HellaSwag items" in printed and "28.59 / 29.55" in printed and "28.92 / 31.14" in printed
    with pytest.raises(ValueError, match="--limit is 0: use at least 1"):
        hellaswag.parse_args(["--limit", "0"])


def test_own_items_need_three_keys_and_for_lm_eval_a_fourth(run_train):
    run_train("--block_size 64 --batch_size 1 --max_steps 3")
    items = [json.loads(line) for line in ITEMS.read_text().splitlines()[:5]]
    needed = [{name: item[name] for name in ("ctx", "endings", "label")} for item in items]
    scores = {}
    for name, rows in (("whole", items), ("needed", needed)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        hellaswag.main(hellaswag.parse_args(["--data", f"{name}.jsonl", "--output", f"{name}.json"]))
        scores[name] = json.loads(Path(f"{name}.json").read_text())["items"]
    assert scores["needed"] == scores["whole"]
    assert [item["ind"] for item in scores["needed"]] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="item 0 has no activity_label: add it, or leave out --lm_eval"):
        hellaswag.main(hellaswag.parse_args(["--data", "needed.jsonl", "--lm_eval", "--model", "nowhere"]))


def test_demo_items_are_those_of_the_project_in_every_command():
    assert hellaswag.load_items("demo") == hellaswag.load_items(ITEMS)
    with pytest.raises(FileNotFoundError, match="no HellaSwag items at own.jsonl: check it, or leave it out"):
        hellaswag.load_items("own.jsonl")


def test_only_the_downloaded_file_is_to_be_deleted_if_it_is_damaged(run_train):
    Path(hellaswag.DATA).write_text('{"ctx": ')
    message = f"{hellaswag.DATA}, line 1 .*: delete the file to download it again"
    with pytest.raises(ValueError, match=message):
        hellaswag.main(hellaswag.parse_args([]))
    with pytest.raises(ValueError, match=message):
        run_train("--hellaswag_every 3")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_an_error_and_no_answer(monkeypatch, broken):
    def score_batch(model, batch):
        places, losses = score(model, batch)
        losses[torch.tensor(places) == 4 * 3 + 2] = broken
        return places, losses

    score = hellaswag.score_batch
    monkeypatch.setattr(hellaswag, "score_batch", score_batch)
    examples = hellaswag.render(hellaswag.load_items(ITEMS)[:5], BYTE)
    with pytest.raises(ValueError, match=f"the loss of item {examples[3].ind} is not finite"):
        hellaswag.evaluate(make_model(), examples)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.02), (torch.bfloat16, 0.1)])
def test_gpu_scores_match_cpu(dtype, tolerance):
    """Nats per token: losses are sums over up to a hundred of them, and fp32 includes TF32."""
    model, examples = make_model(), hellaswag.render(hellaswag.load_items(ITEMS), BYTE)
    cpu = hellaswag.evaluate(model, examples)
    gpu = hellaswag.evaluate(model.to("cuda", dtype), examples)
    for example, item, other in zip(examples, cpu["items"], gpu["items"], strict=True):
        for ending, a, b in zip(example.endings, item["losses"], other["losses"], strict=True):
            assert a / len(ending) == pytest.approx(b / len(ending), abs=tolerance)
