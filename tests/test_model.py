"""The network against Hugging Face's, its cache, counts and optimizer groups."""

import math

import pytest
import torch
from conftest import tiny_gpt
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

from model import GPT, GPTConfig


def test_gpt2_has_its_published_number_of_parameters():
    with torch.device("meta"):
        exact, padded = GPT(GPTConfig(vocab_size=50257)), GPT(GPTConfig())
    assert exact.num_params() == 124_439_808
    assert padded.num_params() == 124_475_904
    assert len(list(padded.parameters())) == 148
    assert padded.lm_head.weight is padded.transformer.wte.weight


def test_initialization_matches_gpt2():
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


def test_logits_and_loss_match_transformers(hf_folder):
    ours, theirs = GPT.from_pretrained(hf_folder).eval(), GPT2LMHeadModel.from_pretrained(hf_folder).eval()
    idx = torch.randint(0, 320, (3, 16))
    with torch.no_grad():
        logits, loss = ours(idx[:, :-1], idx[:, 1:])
        expected = theirs(idx, labels=idx)
    torch.testing.assert_close(logits, expected.logits[:, :-1], atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


@pytest.mark.parametrize("pieces", [(16,), (1,) * 16, (5, 1, 7, 3)])
def test_cached_passes_match_one_pass(pieces):
    model, idx = tiny_gpt(), torch.randint(0, 320, (3, 16))
    cache, slots = model.new_cache(max_length=16), torch.arange(16)
    with torch.no_grad(), model.packed_weights():
        parts = [
            model.trunk(part, at, (torch.arange(int(at[-1]) + 1) <= at[:, None])[None, None], cache, at)
            for part, at in zip(idx.split(pieces, dim=1), slots.split(pieces), strict=True)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.trunk(idx), atol=1e-5, rtol=0)


def test_context_longer_than_block_size_is_rejected():
    model = tiny_gpt()
    with pytest.raises(ValueError, match="17 tokens .* context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_only_matrices_and_embeddings_decay():
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


def test_flops_match_the_count_of_torch():
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=3, n_head=2, n_embd=128))
    idx = torch.randint(0, 512, (2, 64))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(idx, idx)[1].backward()
    assert model.flops_per_token() * idx.numel() == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_bytes_counts_what_a_block_saves(recompute):
    def saved(n_layer: int) -> int:
        model = GPT(GPTConfig(16, 64, n_layer, 2, 32))
        model.recompute = recompute
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
            return tensor

        idx = torch.zeros(8, 16, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert math.isfinite(model(idx, idx)[1].item())
        return sum(sizes.values()), model.training_bytes(8, 16, torch.float32) - 16 * model.num_params()

    (one, formula_one), (three, formula_three) = saved(1), saved(3)
    # LayerNorm's mean and deviation and the softmax normalizer are small beside the rest.
    assert three - one == pytest.approx(formula_three - formula_one, rel=0.05)
