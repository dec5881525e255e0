import base64
import hashlib
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    pipeline,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hellaswag
import sample
from corpus import tokenizer
from corpus.tokenizer import get_tokenizer
from diagnosis import published
from formats import hugging_face
from model import GPT, GPT2_VOCAB_SIZE, GPTConfig
from runtime.cli import run
from sample import generate


@pytest.fixture
def model(hf_folder):
    return GPT.from_pretrained(hf_folder)


PROMPT = torch.tensor([[5, 9, 200], [7, 7, 7]])
TEXT = "naïve 漢字 🙂 don't  stop\n\n\tx=1;  <|endoftext|> ’s"


@pytest.mark.parametrize("lengths", [(3, 3, 3), (3, 1, 2)])
def test_greedy_text_matches_plain_loop_and_transformers(model, hf_folder, lengths):
    prompts = torch.tensor([[5, 9, 200], [0, 0, 7], [0, 8, 1]])
    out = generate(model, prompts, 13, lengths=torch.tensor(lengths), temperature=0)
    for row, prompt, length in zip(out, prompts, lengths, strict=True):
        plain = prompt[None, 3 - length :]
        with torch.no_grad():
            for _ in range(13):
                plain = torch.cat((plain, model(plain)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        assert torch.equal(row[3 - length :], plain[0])
    theirs = GPT2LMHeadModel.from_pretrained(hf_folder)
    seen = (torch.arange(3) >= 3 - torch.tensor(lengths)[:, None]).long()
    options = {"do_sample": False, "max_new_tokens": 13, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(out, theirs.generate(prompts, attention_mask=seen, **options))


def test_long_text_continues_from_the_last_half_of_the_context(model):
    out = generate(model, PROMPT, 40, temperature=0)
    assert out.shape == (2, 43)
    text, window = PROMPT, PROMPT
    with torch.no_grad():
        for _ in range(40):
            if window.size(1) > 16:
                window = text[:, -8:]
            new = model(window)[0][:, -1].argmax(dim=-1, keepdim=True)
            text, window = torch.cat((text, new), dim=1), torch.cat((window, new), dim=1)
    assert torch.equal(out, text)
    assert generate(model, torch.randint(0, 320, (1, 99)), 2, temperature=0).shape == (1, 101)
    # Shorter rows are re-read with the longest one; these, below half a context, lose nothing.
    short = torch.zeros(9, 15, dtype=torch.long)
    short[0], short[1:, -1] = 1, torch.arange(100, 108)
    out = generate(model, short, 6, lengths=torch.tensor([15] + [1] * 8), temperature=0)
    assert torch.equal(out[1:, -7:], generate(model, short[1:, -1:], 6, temperature=0))


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}]
)
def test_samples_follow_the_distribution_of_transformers_processors(monkeypatch, options, block):
    """Chi-square over the 64 pairs of tokens that can follow, from 20,000 draws in one batch."""
    monkeypatch.setattr(sample, "BLOCK", block)
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=16)).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)
    processors = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    processors += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    processors += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    prompt, n = torch.tensor([[1, 4]]), 20_000
    with torch.no_grad():
        first = processors(prompt, model(prompt)[0][:, -1]).softmax(-1)[0]  # (8,)
        pairs = torch.cat((prompt.expand(8, -1), torch.arange(8)[:, None]), dim=1)
        second = processors(pairs, model(pairs)[0][:, -1]).softmax(-1)  # (8, 8)
    expected = n * (first[:, None] * second).flatten()
    generator = torch.Generator().manual_seed(0)
    drawn = generate(model, prompt, 2, num_samples=n, generator=generator, **options)[:, 2:]
    counts = torch.bincount(8 * drawn[:, 0] + drawn[:, 1], minlength=64)
    assert (counts[expected == 0] == 0).all()
    expected, counts = expected[expected > 5], counts[expected > 5]
    freedom = len(expected) - 1
    assert freedom >= 8
    # Mean and variance of the statistic are `freedom` and twice that: four standard deviations.
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_ids_of_all_blocks_are_drawn_as_often_as_they_should():
    probs = torch.full((1, 5026), 0.2 / 4000)
    probs[:, 0], probs[:, 4001:] = 0.8, 0
    drawn = sample._choose(probs.expand(10_000, -1), torch.Generator().manual_seed(0))
    others = drawn[drawn > 0]
    assert len(others) == pytest.approx(2000, abs=4 * 1600**0.5) and others.max() <= 4000
    quarters = torch.bincount((others - 1) // 1000, minlength=4)
    assert ((quarters - 500).abs() < 4 * 500**0.5).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_are_an_error_and_any_temperature_is_allowed(options):
    generator = torch.Generator().manual_seed(0)
    words = (options.get("top_k"), options.get("top_p"), generator)
    logits = torch.tensor([[1.0, 5.0, 3.0], [300.0, 100.0, 200.0]])
    assert sample._draw(logits, 1e-45, *words).tolist() == [1, 0]
    logits[1, 1] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        sample._draw(logits, 1.0, *words)


def test_every_threshold_gives_an_id_that_has_a_probability(monkeypatch):
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    monkeypatch.setattr(sample, "BLOCK", 2)
    for value, expected in ((0.0, 3), (1 - 2**-24, 1)):  # the least and the largest of torch.rand
        monkeypatch.setattr(torch, "rand", lambda *size, value=value, **_: torch.full(size, value))
        assert sample._choose(probs, None).tolist() == [expected]


def test_top_k_of_0_is_off(model):
    zero, none = (torch.Generator().manual_seed(0) for _ in range(2))
    assert torch.equal(
        generate(model, PROMPT, 9, generator=zero, top_k=0), generate(model, PROMPT, 9, generator=none)
    )
    assert sample.parse_args(["--top_k", "0"]).top_k == 0


def test_byte_order_mark_of_a_prompt_is_no_text():
    Path("prompt.txt").write_bytes(b"\xef\xbb\xbfOnce\r\n")
    assert sample.read_prompt("prompt.txt") == "Once"


def test_top_k_keeps_exactly_k_of_equal_logits():
    generator = torch.Generator().manual_seed(0)
    drawn = sample._draw(torch.zeros(2000, 8), 1.0, 3, None, generator)
    assert len(drawn.unique()) == 3


def test_ids_beyond_the_tokenizer_are_never_drawn(model):
    with torch.no_grad():
        model.transformer.wte.weight[257:] = 50 * model.transformer.wte.weight[:63]  # the likeliest by far
    free = generate(model, PROMPT, 12, generator=torch.Generator().manual_seed(0))
    bound = generate(model, PROMPT, 12, vocab_size=257, generator=torch.Generator().manual_seed(0))
    assert free.max() >= 257 > bound.max()
    assert generate(model, PROMPT, 12, temperature=0, vocab_size=257).max() < 257


def test_method_draws_no_ids_that_pad_gpt2s_vocabulary():
    torch.manual_seed(0)
    padded = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=2))
    with torch.no_grad():
        padded.transformer.wte.weight[50257:] *= 1e4  # half of the directions are the likeliest by far
    idx = torch.arange(16)[:, None]
    assert padded.generate(idx, 1, temperature=0).max() < 50257
    assert generate(padded, idx, 1, temperature=0).max() >= 50257


def test_row_that_has_stopped_repeats_stop_and_others_continue(model):
    free = generate(model, PROMPT, 12, temperature=0)[:, 3:]
    stop = int(next(token for token in free[0] if token not in free[1]))
    at = free[0].tolist().index(stop)
    out = generate(model, PROMPT, 12, temperature=0, stop=stop)[:, 3:]
    assert out[0].tolist() == free[0, : at + 1].tolist() + [stop] * (11 - at)
    assert torch.equal(out[1], free[1])
    assert len(list(sample.stream(model, PROMPT[:1], 12, temperature=0, stop=stop))) == at + 1
    assert generate(model, PROMPT[:1], 12, temperature=0, stop=stop).shape == (1, 15)


def test_packed_weights_give_the_same_logits_and_are_removed(model):
    reference = model(PROMPT)[0]
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        with torch.no_grad(), model.to(dtype).packed_weights():
            torch.testing.assert_close(model(PROMPT)[0].float(), reference, atol=tolerance, rtol=tolerance)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: entries.keys() for name, entries in before.items()
    }


@pytest.fixture
def graphs(monkeypatch):
    """Compile without inductor, whose C++ takes long; return a function that counts the graphs."""

    def compile(function, mode, dynamic):
        return compiler(function, backend="aot_eager", dynamic=dynamic)

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    sample._compiled_logits.cache_clear()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sample._compiled_logits.cache_clear()


def test_compiled_decoding_matches_eager_with_one_graph_for_all_lengths(graphs):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=300, vocab_size=64, n_layer=2, n_head=2, n_embd=32)).eval()
    idx = torch.randint(64, (2, 3))
    for new in (20, 310):  # 310 fill the context, which starts again from its half
        options = {"lengths": torch.tensor([3, 2]), "temperature": 0, "num_samples": 2}
        compiled = generate(model, idx, new, compiled=True, **options)
        assert torch.equal(compiled, generate(model, idx, new, **options))
    assert graphs() == 1


@torch._dynamo.config.patch(recompile_limit=2)
def test_compiled_decoding_goes_on_after_more_batch_sizes_than_torch_compiles(graphs, model):
    for num_samples in range(1, 5):
        options = {"temperature": 0, "num_samples": num_samples}
        compiled = generate(model, PROMPT[:1], 4, compiled=True, **options)
        assert torch.equal(compiled, generate(model, PROMPT[:1], 4, **options))
    assert graphs() == torch._dynamo.config.recompile_limit


def test_compiled_texts_use_the_same_memory_unless_they_are_made_at_the_same_time(graphs, model):
    texts = [sample.stream(model, PROMPT[i : i + 1], 6, temperature=0, compiled=True) for i in (0, 1)]
    together = list(zip(*texts, strict=True))
    kept = [cache for caches in sample._unused_caches[model].values() for cache in caches]
    for i in (0, 1):
        alone = list(sample.stream(model, PROMPT[i : i + 1], 6, temperature=0, compiled=True))
        assert alone == [pair[i] for pair in together]
        assert alone == list(sample.stream(model, PROMPT[i : i + 1], 6, temperature=0))
    assert len(kept) == 2  # one for each of the two that ran at the same time
    assert kept == [cache for caches in sample._unused_caches[model].values() for cache in caches]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_decoding_with_cuda_graphs_matches_eager(hf_folder, dtype):
    """At a context that takes several tiles of the kernels; bf16 may choose otherwise between equals."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=512, vocab_size=320, n_layer=2, n_head=2, n_embd=128))
    model.to("cuda", dtype).eval()
    options = {"lengths": torch.tensor([3, 2]), "temperature": 0, "num_samples": 2}
    for _ in range(2):  # recorded, then replayed
        compiled = generate(model, PROMPT.cuda(), 200, compiled=True, **options)
        eager = generate(model, PROMPT.cuda(), 200, **options)
        with torch.no_grad():
            logits = model(compiled[:, :-1])[0][..., :320].float()
        chosen = logits.gather(2, compiled[:, 1:, None])[..., 0]
        tolerance = 1e-3 if dtype == torch.float32 else 0.1
        assert (logits.amax(dim=2) - chosen)[:2, 2:].max() < tolerance  # rows of the prompt without padding
        if dtype == torch.float32:
            assert torch.equal(compiled, eager)


def test_same_seed_gives_same_text_and_training_mode_is_kept(model):
    def texts(seed):
        random = torch.Generator().manual_seed(seed)
        options = {"num_samples": 2, "top_k": 50, "generator": random}
        return sample.complete(model, get_tokenizer("byte"), ["ab", ""], 12, **options)

    model.train()
    first = texts(1)
    assert first == texts(1) != texts(2)
    assert len(set(first)) == 4 and [text[:2] == "ab" for text in first] == [True, True, False, False]
    assert model.training


@pytest.mark.parametrize(
    "size, metadata, expected",
    [
        (256, {}, None),
        (257, {}, "byte"),
        (384, {}, "byte"),
        (385, {}, None),
        (50256, {}, None),
        (50257, {}, "gpt2"),
        (50304, {}, "gpt2"),
        (50305, {}, None),
        (52000, {}, None),
        (52000, {"args": {"tokenizer": "gpt2"}}, "gpt2"),  # --vocab_size 52000
        (257, {"args": {"tokenizer": "gpt2"}}, None),
        (50304, {"args": {"tokenizer": "byte"}}, "byte"),
        (50304, {"args": {"tokenizer": "german.json"}}, None),
        (50257, {"tokenizer": "vocab.json"}, None),
        (50257, {"tokenizer": "gpt2"}, "gpt2"),
        (52000, {"tokenizer": "gpt2"}, None),
    ],
)
def test_tokenizer_is_one_of_the_two_or_the_model_is_refused(size, metadata, expected):
    assert tokenizer.SIZES == {"gpt2": GPT2_VOCAB_SIZE, "byte": get_tokenizer("byte").n_vocab}
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=size), metadata=metadata)
    if expected:
        assert tokenizer.name_for(model) == expected
    else:
        with pytest.raises(ValueError, match=f"^the model has {size:,} token ids.* use the Hugging Face"):
            tokenizer.name_for(model)


def test_bytes_are_held_back_until_they_form_a_character(model, monkeypatch):
    data = "é漢".encode() + b"\xff" + "🙂".encode()[:3]  # the last one never ends
    rows = [[byte, 256] for byte in data] + [[256, 256]] * 2
    monkeypatch.setattr(sample, "stream", lambda *args, **options: map(torch.tensor, rows))
    pieces = []
    texts = sample.complete(model, get_tokenizer("byte"), ["a"], 9, num_samples=2, on_text=pieces.append)
    assert texts == ["aé漢\ufffd\ufffd", "a"] and "".join(pieces) == texts[0]
    assert pieces[:6] == ["a", "", "é", "", "", "漢"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run sample.py on a tiny model with options and stdin; return its output, and its error or None."""
    torch.manual_seed(0)
    tiny = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    torch.save({"model": tiny.state_dict(), "config": vars(tiny.config)}, "tiny.pt")

    def call(options, stdin=""):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *options])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        try:
            run(sample.main, sample.parse_args)
        except SystemExit as error:
            return capsys.readouterr().out, error.code
        return capsys.readouterr().out, None

    return call


def test_texts_do_without_a_compiler_on_cpus(command, monkeypatch):
    def fails(*_, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    options = ["--model", "tiny.pt", "--max_new_tokens", "4"]
    assert command([*options, "--compile"]) == command(options)


def test_command_tells_which_checkpoint_it_took_and_of_a_better_one(run_train, capsys):
    run_train("--max_steps 3")
    newest = torch.load("log/model_00003.pt", weights_only=True)
    torch.save({**newest, "best_step": 2, "best_val_loss": newest["val_loss"] - 1}, "log/model_00003.pt")
    loss = newest["val_loss"]
    torch.save({**newest, "args": None}, "other.pt")  # of a repository that stores no options
    sample.main(sample.parse_args(["--model", "other.pt", "--device", "cpu", "--max_new_tokens", "2"]))
    assert f"other.pt: step 3, validation loss {loss:.4f}" in capsys.readouterr().err.splitlines()
    expected = [f"log: step 3, validation loss {loss:.4f} on up to 160 tokens"]
    expected += [f"log: at step 2 it was {loss - 1:.4f}; log/model_best.pt is that one"]
    for options, lines in {("--model", "log"): 2, ("--model", "log/model_00003.pt"): 1}.items():
        capsys.readouterr()
        sample.main(sample.parse_args([*options, "--device", "cpu", "--max_new_tokens", "2"]))
        said = capsys.readouterr().err.splitlines()
        assert said == [line.replace("log:", f"{options[1]}:") for line in expected[:lines]]


def test_heads_that_a_checkpoint_does_not_say_are_assumed_aloud_or_given(capsys):
    torch.manual_seed(0)
    tiny = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=4, n_embd=128))
    torch.save(tiny.state_dict(), "bare.pt")
    short = ["--max_new_tokens", "2", "--device", "cpu"]
    scored = ["--data", str(hellaswag.DEMO_ITEMS), "--limit", "1", "--device", "cpu"]
    for script, options in ((sample, short), (hellaswag, scored)):
        for heads, lines in ((None, 1), (4, 0)):
            words = ["--model", "bare.pt", *options, *([] if heads is None else ["--n_head", str(heads)])]
            script.main(script.parse_args(words))
            said = capsys.readouterr().err.splitlines()
            line = "bare.pt has no n_head: assuming 2 heads of 64; --n_head sets it"
            assert said.count(line) == lines and sum("bare.pt" in each for each in said) == lines


def test_prompts_come_from_options_files_and_standard_input(command):
    short = ["--model", "tiny.pt", "--max_new_tokens", "5", "--temperature", "0"]
    Path("prompt.txt").write_text("import \n")
    text, error = command([*short, "--prompt", "import "])
    assert error is None and text.startswith("import ") and text.endswith("\n")
    assert command([*short, "--prompt_file", "prompt.txt"])[0] == text
    assert command([*short, "--prompt_file", "-"], "import \n")[0] == text
    both = command([*short, "--prompt", "import ", "b", "--num_samples", "2"])[0]
    assert both[:-1].split(sample.SEPARATOR)[:2] == [text[:-1]] * 2
    assert [each[0] for each in both[:-1].split(sample.SEPARATOR)[2:]] == ["b", "b"]
    assert command([*short, "--interactive"], "import \n\nimport ")[0].count(text) == 2


def test_special_tokens_are_neither_read_from_a_prompt_nor_shown(command, monkeypatch):
    seen = []

    def drawn(model, idx, *args, **options):
        seen.append(idx.tolist())
        return map(torch.tensor, [[ord("x")], [256]])

    monkeypatch.setattr(sample, "stream", drawn)
    text = "say <|endoftext|> now"
    Path("prompt.txt").write_text(text)
    for options in (["--prompt", text], ["--prompt_file", "prompt.txt"]):
        assert command(["--model", "tiny.pt", *options]) == (text + "x\n", None)
    assert seen == [[list(text.encode())]] * 2


def test_interrupt_ends_the_text_but_not_the_session(command, monkeypatch):
    def interrupted(model, tokenizer, prompts, *args, on_text, **options):
        on_text(prompts[0])
        if prompts == ["one"]:
            raise KeyboardInterrupt
        return prompts

    monkeypatch.setattr(sample, "complete", interrupted)
    assert command(["--model", "tiny.pt", "--interactive"], "one\ntwo\n") == ("one\ntwo\n", None)


def test_the_newest_checkpoint_of_a_run_is_sampled(run_train, command):
    run_train()
    assert command(["--prompt", "import ", "--max_new_tokens", "30"])[0].startswith("import ")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--model nowhere", "no model at nowhere"),
        ("--num_samples 0 --temperature -1 --top_p 2 --top_k -1 --max_new_tokens 0", "--num_samples is 0: "),
        ("--device cuda:99", "device cuda:99 is not available"),
        ("--prompt a --prompt_file b", "are mutually exclusive"),
        ("--prompt_file none.txt", "cannot read none.txt"),
        ("--prompt_file latin.txt", "latin.txt is not UTF-8"),
        ("--model tiny.pt --export .", ". exists and is not empty"),
    ],
)
def test_each_problem_is_one_error_line(command, options, message):
    Path("latin.txt").write_bytes(b"caf\xe9")
    _, error = command(options.split())
    assert message in error and error.count("\n") == (4 if "top_p" in options else 0)


def test_exported_run_works_in_transformers(run_train, command, tmp_path, monkeypatch):
    log = run_train(
        "--hellaswag_every 3 --hellaswag_data demo --sample_every 3 --sample_tokens 5 --sample_prompt=Hé😀"
    )
    started, *lines = Path("log/log.jsonl").read_text().splitlines()
    started = json.loads(started)
    started["curves"]["lambada"] = "rate"  # an evaluation that somebody has added to the recipe
    lines.append(json.dumps({"step": 6, "kind": "lambada", "rate": 0.25}))
    Path("log/log.jsonl").write_text("\n".join([json.dumps(started), *lines, ""]))
    assert command(["--model", "log", "--export", "exported"])[1] is None
    ours, theirs = GPT.from_pretrained("log").eval(), AutoModelForCausalLM.from_pretrained("exported").eval()
    idx = torch.randint(0, 257, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx)[0][..., :257], atol=1e-5, rtol=0)
    back = GPT.from_pretrained("exported")
    for name, weights in ours.state_dict().items():
        weights = weights[:257] if name in ("transformer.wte.weight", "lm_head.weight") else weights
        assert torch.equal(back.state_dict()[name], weights), name
    text = pipeline("text-generation", "exported")("ab", max_new_tokens=8, do_sample=False)[0]
    options = ["--model", "exported", "--prompt", "ab", "--max_new_tokens", "8", "--temperature", "0"]
    assert command(options)[0][:-1] == text["generated_text"]
    hf_tokenizer = AutoTokenizer.from_pretrained("exported")
    assert hf_tokenizer(TEXT.replace("<|endoftext|>", ""))["input_ids"] == list(
        TEXT.replace("<|endoftext|>", "").encode()
    )
    assert hf_tokenizer.eos_token_id == 256 and hf_tokenizer.model_max_length == 16
    card = Path("exported/README.md").read_text()
    best = min(record["loss"] for record in log["val"])
    for fact in (
        f"| validation loss | {log['val'][-1]['loss']:.4f} nats per byte, at step 6 |",
        f"| tokens seen | {64 * GPT.from_pretrained('log').metadata['step']} |",
        "| `--n_layer` | 2 |",
        "| `--dropout` | 0.0 |",
        f"| parameters | {back.num_params():,} |",
        "| checkpoint | step 6, the best validation loss until then |",
        "A GPT-2, trained from scratch.",
        "\n# exported\n",
        "| lambada | rate 0.25, at step 6 |",
    ):
        assert fact in card
    assert "items" not in card and "HellaSwag" not in card  # the demo's items are no HellaSwag
    assert "shards" not in card and "None" not in card and "--device" not in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # in the folder above the exported one
    made = {}
    exec(example.replace("pipeline(\"", "made = pipeline(\""), made)
    assert made["made"][0]["generated_text"].startswith("Hé😀")
    newest = torch.load("log/model_00006.pt", weights_only=True)
    torch.save({**newest, "step": 5}, "log/model_00005.pt")  # between two evaluations
    scores = log["hellaswag"][1]
    monkeypatch.setattr(published, "PUBLISHED_FINGERPRINT", scores["fingerprint"])
    assert command(["--model", "log/model_00005.pt", "--export", "between"])[1] is None
    card = Path("between/README.md").read_text()
    assert f"| training loss | {log['train'][4]['loss']:.4f} nats per byte, at step 4 |" in card
    errors = {name: (scores[name] * (1 - scores[name]) / 43) ** 0.5 for name in ("acc_norm", "acc")}
    acc_norm, acc = (f"{name} {scores[name]:.1%} ± {error:.1%}" for name, error in errors.items())
    assert f"{acc_norm}, {acc} of 44 HellaSwag items, at step 3 |" in card
    assert "nats per byte, at step 3 |" in card
    assert best == pytest.approx(GPT.from_pretrained("log/model_best.pt").metadata["val_loss"])
    assert log["sample"][-1]["texts"]
    run_train("--init_from exported", out_dir="tuned")
    assert command(["--model", "tuned", "--export", "tuned-gpt2"])[1] is None
    assert "A GPT-2, fine-tuned from another checkpoint." in Path("tuned-gpt2/README.md").read_text()
    assert command(["--model", "exported", "--export", "again"])[1] is None
    assert "A GPT-2. Use it" in Path("again/README.md").read_text()  # where it comes from is not known
    assert not Path("exported.tmp").exists()


def test_exported_tokenizer_makes_the_same_tokens(tmp_path):
    """Uses GPT-2's pattern with a small vocabulary learned from the project's source."""
    from tiktoken._educational import bpe_train

    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    source = Path(tokenizer.__file__).read_text() + TEXT * 3
    ranks = bpe_train(data=source, vocab_size=400, pat_str=pattern, visualise=None)
    special = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    hugging_face.save_tokenizer(encoding, 64, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = Path(sample.__file__).read_text() + TEXT
    assert theirs(text)["input_ids"] == encoding.encode(text, allowed_special="all")
    assert theirs.decode(theirs(text)["input_ids"]) == text
    merges = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == 400 - 256
    names = (tmp_path / "hf" / name for name in ("vocab.json", "merges.txt"))
    older = GPT2Tokenizer(*map(str, names))
    assert older(text)["input_ids"] == theirs(text)["input_ids"]


def test_every_command_refuses_a_model_of_another_vocabulary(command, run_train):
    for size, folder in ((385, "large"), (257, "theirs")):
        GPT(GPTConfig(block_size=16, vocab_size=size, n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder)
    # 257 ids like the bytes, in another order.
    vocab = {letter: (i + 1) % 256 for i, letter in enumerate(bytes_to_unicode().values())}
    Path("theirs/vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": 256}))
    items = str(hellaswag.DEMO_ITEMS)
    for folder, message in (
        ("large", "^the model has 385 token ids: neither gpt2's 50,257 nor byte's 257, "),
        ("theirs", "^the model has 257 token ids of the tokenizer vocab.json: "),
    ):
        for call in (
            lambda folder=folder: sample.main(sample.parse_args(["--model", folder])),
            lambda folder=folder: sample.main(sample.parse_args(["--model", folder, "--export", "out"])),
            lambda folder=folder: hellaswag.main(hellaswag.parse_args(["--model", folder, "--data", items])),
            lambda folder=folder: run_train(f"--init_from {folder} --n_layer 1 --n_head 1 --n_embd 8"),
            lambda folder=folder: run_train(
                f"--init_from {folder} --n_layer 1 --n_head 1 --n_embd 8 --eval_only"
            ),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)
    assert not Path("out").exists() and not Path("log").exists()


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.json"])
def test_folder_says_which_vocabulary_it_has(command, monkeypatch, kept):
    """GPT-2's is stood in for by a small one, whose hash is that of its file for tiktoken."""
    command(["--model", "tiny.pt", "--export", "bytes"])
    ranks = {**{bytes([255 - i]): i for i in range(256)}, b" t": 256, b" th": 257}
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    monkeypatch.setattr(hugging_face, "RANKS_SHA256", hashlib.sha256(lines.encode()).hexdigest())
    pattern, special = r"\s?\S+|\s+", {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    hugging_face.save_tokenizer(encoding, 64, "small")
    for folder in ("bytes", "small"):
        for name in {"tokenizer.json", "vocab.json"} - {kept}:
            Path(folder, name).unlink()
    assert hugging_face.tokenizer_in(Path("bytes")) == "byte"
    assert hugging_face.tokenizer_in(Path("small")) == "gpt2"
    file = Path("small", kept)
    file.write_text(file.read_text().replace('"Ġth"', '"Ġto"'))
    assert hugging_face.tokenizer_in(Path("small")) == kept
    file.write_text('{"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}' if "er" in kept else '{"a": 0}')
    assert hugging_face.tokenizer_in(Path("small")) == kept
    file.unlink()
    assert hugging_face.tokenizer_in(Path("small")) is None
    assert GPT.from_pretrained("bytes").metadata == {"tokenizer": "byte"}


# What llama.cpp's converter reads from config.json: GPT2Model.set_gguf_parameters in conversion/gpt2.py
# (commit 5535795), and conversion/base.py to find that class.
LLAMA_CPP_KEYS = {"n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon", "architectures"}


def test_export_has_the_files_and_keys_of_openais_folder_for_everybody(command):
    before = os.umask(0o027)
    try:
        assert command(["--model", "tiny.pt", "--export", "exported"])[1] is None
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("exported").iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "README.md", "merges.txt"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert modes.keys() - {"special_tokens_map.json"} == wanted  # which transformers 4 also writes
    assert set(modes.values()) == {0o640}
    config = json.loads(Path("exported/config.json").read_text())
    assert config.keys() >= LLAMA_CPP_KEYS and config["n_ctx"] == config["n_positions"] == 16
    older = GPT2Tokenizer("exported/vocab.json", "exported/merges.txt")
    assert older(TEXT)["input_ids"] == AutoTokenizer.from_pretrained("exported")(TEXT)["input_ids"]
    assert json.loads(Path("exported/vocab.json").read_text(encoding="utf-8"))["<|endoftext|>"] == 256


def test_model_whose_weights_have_diverged_is_one_line(model):
    with torch.no_grad():
        model.transformer.wte.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite: its weights are damaged or diverged"):
        sample.generate(model, torch.zeros(1, 4, dtype=torch.int64), 3)


def test_model_that_transformers_cannot_express_is_not_exported(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Newer(GPTConfig):
        qk_norm: bool = False

    monkeypatch.setattr(hugging_face, "GPTConfig", Newer)
    sizes = dict(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8)
    GPT(Newer(**sizes)).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="GPT-2 in transformers has no qk_norm True: share the checkpoint"):
        GPT(Newer(**sizes, qk_norm=True)).save_pretrained(tmp_path / "normed")
    model = GPT(Newer(**sizes))
    model.transformer.h[0].attn.q_norm = torch.nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"no place for transformer.h.0.attn.q_norm.bias: share"):
        model.save_pretrained(tmp_path / "extended")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["plain"]
