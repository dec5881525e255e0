import argparse
import math
import os
import pathlib
import pickle

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from model import GPT, GPTConfig, load_checkpoint

TINY = GPTConfig(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=32)


def tiny_gpt(seed=0):
    torch.manual_seed(seed)
    model = GPT(TINY)
    with torch.no_grad():  # biases and gains off their trivial start, so that a lost one shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_gpt2_has_its_published_number_of_parameters():
    with torch.device("meta"):
        exact, padded = GPT(GPTConfig(vocab_size=50257)), GPT(GPTConfig())
    assert exact.num_params() == 124_439_808
    assert padded.num_params() == 124_475_904
    assert len(list(padded.parameters())) == 148
    assert padded.lm_head.weight is padded.transformer.wte.weight


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=512, n_layer=6, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
    idx = torch.randint(0, 512, (4, 32))
    _, loss = model(idx, torch.randint(0, 512, (4, 32)))
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_logits_and_loss_are_those_of_transformers(hf_folder):
    ours, theirs = GPT.from_pretrained(hf_folder).eval(), GPT2LMHeadModel.from_pretrained(hf_folder).eval()
    idx = torch.randint(0, 320, (3, 16))
    with torch.no_grad():
        logits, loss = ours(idx[:, :-1], idx[:, 1:])
        expected = theirs(idx, labels=idx)
    torch.testing.assert_close(logits, expected.logits[:, :-1], atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_save_pretrained_trims_the_padding_and_round_trips(tmp_path):
    ours = tiny_gpt()
    ours.save_pretrained(tmp_path / "hf", vocab_size=257)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert (theirs.config.resid_pdrop, theirs.config.embd_pdrop, theirs.config.attn_pdrop) == (0, 0, 0)
    idx = torch.randint(0, 257, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx)[0][..., :257], atol=1e-4, rtol=0)
    assert theirs.config.eos_token_id == 256
    back = GPT.from_pretrained(tmp_path / "hf").state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(back[name], weight[:257] if "wte" in name or "lm_head" in name else weight), name
    with pytest.raises(ValueError, match="not empty"):
        ours.save_pretrained(tmp_path / "hf")


def test_gpt2_padding_is_trimmed_by_default(tmp_path):
    GPT(GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").transformer.wte.weight.shape == (50257, 4)


@pytest.mark.parametrize("pieces", [(16,), (1,) * 16, (5, 1, 7, 3)])
def test_cache_gives_what_one_pass_gives(pieces):
    model, idx = tiny_gpt(), torch.randint(0, 320, (3, 16))
    cache, slots = model.new_cache(max_length=16), torch.arange(16)
    with torch.no_grad(), model.packed_weights():
        parts = [
            model.trunk(part, at, (torch.arange(int(at[-1]) + 1) <= at[:, None])[None, None], cache, at)
            for part, at in zip(idx.split(pieces, dim=1), slots.split(pieces), strict=True)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.trunk(idx), atol=1e-5, rtol=0)


def test_context_longer_than_block_size_is_refused():
    model = tiny_gpt()
    with pytest.raises(ValueError, match="17 tokens .* context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_decay_is_for_matrices_and_embeddings_only():
    model = tiny_gpt()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in model.optimizer_groups(0.1)}
    members = {name: [names[p] for p in group["params"]] for name, group in groups.items()}
    assert sorted(sum(members.values(), [])) == sorted(names.values())
    plain = {n for n in names.values() if n.endswith("bias") or ".ln_" in n}
    assert set(members["gains and biases"]) == plain
    assert members["embeddings"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(name.endswith("attn.c_attn.weight") for name in members["c_attn"])
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {"embeddings": 0.1, "c_attn": 0.1, "matrices": 0.1, "gains and biases": 0.0}


def test_flops_are_those_that_torch_counts():
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=3, n_head=2, n_embd=128))
    idx = torch.randint(0, 512, (2, 64))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(idx, idx)[1].backward()
    assert model.flops_per_token() * idx.numel() == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_bad_sources_are_one_line(tmp_path, hf_folder):
    with pytest.raises(FileNotFoundError, match="no model at lgo: give a checkpoint"):
        GPT.from_pretrained("lgo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in"):
        GPT.from_pretrained(tmp_path / "empty")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text.pt is cut short or no checkpoint"):
        GPT.from_pretrained(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is no GPT-2: it has no transformer.wte.weight"):
        GPT.from_pretrained(tmp_path / "other.pt")
    weights = hf_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(FileNotFoundError, match="cannot load .*hf .*check folder"):
        GPT.from_pretrained(hf_folder)
    tensors = {k: v for k, v in load_tensors(whole).items() if k != "transformer.h.1.mlp.c_fc.bias"}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks transformer.h.1.mlp.c_fc.bias: it is not a whole GPT-2"):
        GPT.from_pretrained(hf_folder)
    weights.write_bytes(whole)
    config = hf_folder / "config.json"
    config.write_text(config.read_text().replace('"gelu_new"', '"relu"'))
    with pytest.raises(ValueError, match="activation_function is relu"):
        GPT.from_pretrained(hf_folder)


class Settings:
    """The config object of another repository, of whose class nothing is known when it is read."""


def foreign_checkpoints(model):
    """The same model as the usual repositories save it."""
    state, sizes = model.state_dict(), vars(model.config)
    settings = Settings()
    vars(settings).update(sizes)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    transposed = {
        name: w.t() if w.dim() == 2 and (".c_" in name) else w
        for name, w in state.items()
        if name != "lm_head.weight"
    }
    compiled = {f"_orig_mod.{name}": w for name, w in (state | masks).items()}
    return {
        "config object, validation loss": {"model": state, "config": settings, "step": 7, "val_loss": 3.5},
        "compiled, model_args, training settings": {
            "model": compiled,
            "model_args": {**sizes, "bias": True},
            "config": {"dataset": "openwebtext", "batch_size": 12},
            "iter_num": 7,
            "best_val_loss": torch.tensor(3.5),
        },
        "DDP around compile": {
            "model": {f"module.{name}": w for name, w in compiled.items()},
            "args": argparse.Namespace(n_head=2, out=pathlib.PurePosixPath("log")),
        },
        "wrapped module": {"state_dict": {f"model.{name}": w for name, w in state.items()}, "hparams": sizes},
        "bare state dict in OpenAI's layout": transposed,
        "half precision": {"model": {name: w.bfloat16() for name, w in state.items()}, "config": sizes},
    }


@pytest.mark.parametrize("kind", foreign_checkpoints(tiny_gpt()))
def test_checkpoints_of_other_repositories_are_read(kind, tmp_path):
    torch.manual_seed(0)
    config = TINY if "bare" not in kind else GPTConfig(**{**vars(TINY), "n_embd": 128})  # heads 64 wide
    model, idx = GPT(config).eval(), torch.randint(0, 320, (2, 16))
    torch.save(foreign_checkpoints(model)[kind], tmp_path / "foreign.pt")
    read = GPT.from_pretrained(tmp_path / "foreign.pt").eval()
    assert read.config == config
    tolerance = 0.05 if kind == "half precision" else 0
    with torch.no_grad():
        torch.testing.assert_close(read(idx)[0], model(idx)[0], atol=tolerance, rtol=0)
    if kind.startswith("config object"):
        assert read.metadata == {"step": 7, "val_loss": 3.5, "args": None}


def test_a_model_without_biases_has_biases_of_zero(tmp_path):
    model = tiny_gpt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(not name.endswith(".bias"))
    state = {name: w for name, w in model.state_dict().items() if not name.endswith(".bias")}
    torch.save({"model": state, "model_args": {"n_head": 2, "bias": False}}, tmp_path / "foreign.pt")
    read = GPT.from_pretrained(tmp_path / "foreign.pt")
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in read.state_dict().items())
    torch.save({"model": {**state, "transformer.ln_f.bias": torch.ones(32)}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="is no GPT-2 .*Missing key.*c_attn.bias"):
        GPT.from_pretrained(tmp_path / "foreign.pt")


def attack(name):
    os.mkdir(name)


class Attack:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("attacked",)


def test_a_file_never_runs_code_and_a_head_of_its_own_is_refused(tmp_path):
    model = tiny_gpt()
    weights = {"model": model.state_dict(), "n_head": 2}
    torch.save({**weights, "config": Attack(attack)}, tmp_path / "inert.pt")
    torch.save({**weights, "config": Attack(os.mkdir)}, tmp_path / "blocked.pt")
    torch.save(Attack(attack), tmp_path / "object.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Attack(attack)))
    assert GPT.from_pretrained(tmp_path / "inert.pt").config == TINY
    for name, message in (
        ("blocked.pt", "mkdir.* is blocked"),
        ("object.pt", "no checkpoint: it holds a"),
        ("pickle.pt", "no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            GPT.from_pretrained(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not pathlib.Path("attacked").exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes())
    assert pathlib.Path("attacked").exists()  # what it would have done
    untied = {**model.state_dict(), "lm_head.weight": torch.zeros(320, 32)}
    torch.save({"model": untied, "config": vars(TINY)}, tmp_path / "untied.pt")
    with pytest.raises(ValueError, match="lm_head is not tied"):
        GPT.from_pretrained(tmp_path / "untied.pt")


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    for step in (9, 10, 100):
        torch.save(
            {"model": tiny_gpt().state_dict(), "config": vars(TINY), "step": step},
            tmp_path / f"model_{step}.pt",
        )
    newest = tmp_path / "model_100.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"model_100.pt is cut short"):
        assert load_checkpoint(tmp_path)["step"] == 10
    assert "\n" not in str(pytest.raises(ValueError, load_checkpoint, newest).value)
