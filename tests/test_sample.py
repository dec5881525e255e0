import re
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from transformers import GPT2LMHeadModel

import sample
from model import GPT, GPTConfig
from sample import generate


@pytest.fixture
def model(hf_folder):
    return GPT.from_pretrained(hf_folder)


PROMPT = torch.tensor([[5, 9, 200], [7, 7, 7]])


def test_greedy_is_that_of_a_plain_loop_and_of_transformers(model, hf_folder):
    out = generate(model, PROMPT, 13, temperature=0)
    plain = PROMPT
    with torch.no_grad():
        for _ in range(13):
            plain = torch.cat((plain, model(plain)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(out, plain)
    theirs = GPT2LMHeadModel.from_pretrained(hf_folder)
    options = {"do_sample": False, "max_new_tokens": 13, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(out, theirs.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options))


def test_a_long_text_goes_on_from_the_last_half_of_the_context(model):
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


def test_draws_follow_the_distribution_and_its_limits():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probs.log().expand(40_000, 4)

    def frequencies(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        draws = sample._draw(logits, **options, generator=torch.Generator().manual_seed(0))
        return (torch.bincount(draws.flatten(), minlength=4) / len(draws)).tolist()

    assert frequencies() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.01)
    squared = probs.square() / probs.square().sum()
    assert frequencies(temperature=0.5) == pytest.approx(squared.tolist(), abs=0.01)
    assert frequencies(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.01)
    assert frequencies(top_k=9) == frequencies()
    assert frequencies(top_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.01)
    assert frequencies(top_p=0.75) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.01)
    assert frequencies(temperature=0) == [1, 0, 0, 0]


def test_ids_beyond_the_tokenizer_are_never_drawn(model):
    with torch.no_grad():
        model.transformer.wte.weight[257:] = 50 * model.transformer.wte.weight[:63]  # the likeliest by far
    free = generate(model, PROMPT, 12, generator=torch.Generator().manual_seed(0))
    bound = generate(model, PROMPT, 12, vocab_size=257, generator=torch.Generator().manual_seed(0))
    assert free.max() >= 257 > bound.max()
    assert generate(model, PROMPT, 12, temperature=0, vocab_size=257).max() < 257


def test_same_seed_same_text_and_the_training_mode_stays(model):
    model.train()
    first, again, other = (
        sample.complete(model, "byte", "ab", 2, 12, seed=seed, top_k=50) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0] != first[1] and all(text.startswith("ab") for text in first)
    assert model.training
    small = GPT(GPTConfig(block_size=4, vocab_size=200, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="tokenizer byte has 257 ids, the model 200"):
        sample.complete(small, "byte", "ab", 1, 1, seed=1)


def test_command_line_reads_the_newest_checkpoint(run_train, capsys):
    run_train()
    capsys.readouterr()
    sample.main(sample.parse_args(["--prompt", "import ", "--num_samples", "2", "--max_new_tokens", "30"]))
    texts = capsys.readouterr().out.split("\n\n---\n\n")
    assert len(texts) == 2 and all(text.startswith("import ") for text in texts)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--model nowhere", "no model at nowhere"),
        ("--num_samples 0 --temperature -1 --top_p 2", "--num_samples is 0.*--temperature is -1.*--top_p"),
        ("--device cuda:99", "device cuda:99 cannot be used here"),
        ("--prompt a --prompt_file b", "exclude each other"),
        ("--prompt_file none.txt", "no file none.txt"),
    ],
)
def test_bad_input_is_one_line(options, message):
    command = [sys.executable, REPOSITORY / "sample.py", *options.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr)
