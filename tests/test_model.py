"""The network against Hugging Face's, its cache, counts and optimizer groups."""

import math
import weakref

import pytest
import torch
from conftest import tiny_gpt
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

import model as model_module
from formats.hugging_face import TRANSPOSED
from model import GPT, GPTConfig, HeadLoss, head_rows


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
    (logits, no_loss), (no_logits, loss) = ours(idx[:, :-1]), ours(idx[:, :-1], idx[:, 1:])
    assert no_loss is None and no_logits is None
    expected = theirs(idx, labels=idx)
    torch.testing.assert_close(logits, expected.logits[:, :-1], atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    loss.backward()
    expected.loss.backward()
    for name, parameter in theirs.named_parameters():
        grad = ours.get_parameter(name).grad
        grad = grad.t() if name.endswith(TRANSPOSED) else grad
        torch.testing.assert_close(grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def loss_and_grads(forward, model, idx, targets, dtype=torch.float32, reduction="mean"):
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = forward(model, idx, targets, reduction)
    loss.backward()
    return [loss.detach().double(), *(parameter.grad.double() for parameter in model.parameters())]


def full_logits(model, idx, targets, reduction):
    return F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), reduction=reduction)


def head_loss(model, idx, targets, reduction):
    return model(idx, targets, reduction)[1]


def errors(ours, exact):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize("compiling", [False, True])
def test_gradients_of_the_loss_of_a_chunk_are_those_of_autograd(monkeypatch, compiling):
    """Whatever the loss is: a term that is added to it also needs its gradient."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (12, 1)).masked_fill(torch.arange(12)[:, None] % 5 == 0, -100)
    (loss,) = model_module.chunk_loss(hidden, weight, targets, needs_grad=False)
    expected = torch.autograd.grad(loss, (hidden, weight))
    with torch.no_grad():
        same, *gradients = model_module.chunk_loss(hidden, weight, targets, needs_grad=True)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(tuple(gradients), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 80, 1000])
def test_loss_and_gradients_match_full_logits_for_any_number_of_rows(monkeypatch, rows, compiling, reduction):
    monkeypatch.setattr(model_module, "head_rows", lambda *_: rows)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    model, idx, targets = tiny_gpt(), torch.randint(320, (5, 16)), torch.randint(320, (5, 16))
    targets[1, 3:9], targets[4] = -100, -100
    exact = loss_and_grads(full_logits, tiny_gpt().double(), idx, targets, reduction=reduction)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        full = loss_and_grads(full_logits, model, idx, targets, dtype, reduction)
        ours = loss_and_grads(head_loss, model, idx, targets, dtype, reduction)
        if dtype == torch.float32:
            assert max(errors(ours, full)) < 1e-5  # sums in another order
            continue
        # The rounding of single tensors is random.
        for error, usual in zip(errors(ours, exact), errors(full, exact), strict=True):
            assert error < 1.5 * usual + 1e-6
        assert sum(errors(ours, exact)) < 1.1 * sum(errors(full, exact)) + 1e-6


def test_gradients_of_many_tokens_do_not_underflow_in_fp16():
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=random, requires_grad=True) for n in (4096, 320))
    targets = torch.randint(320, (4096,), generator=random)
    F.cross_entropy(hidden @ weight.t(), targets).backward()
    exact, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    many = 1e6  # as if there were that many times more tokens
    loss = HeadLoss.apply(hidden, weight, targets, torch.float16, True)
    (loss / len(hidden) / many).backward()
    for ours, expected in zip((hidden.grad, weight.grad), exact, strict=True):
        assert ((many * ours - expected).norm() / expected.norm()).item() < 0.01


def test_few_tokens_go_through_the_head_at_a_time():
    cpu, cuda, tokens = torch.device("cpu"), torch.device("cuda"), 64 * 1024
    assert head_rows(cpu, tokens, compiled=False) < 1000 < head_rows(cuda, tokens, compiled=False) < 5000
    assert head_rows(cuda, 4096, compiled=True) < 4096
    for tokens in (16 * 1024, 64 * 1024, 256 * 1024, 300_001):  # one graph, whatever the batch
        assert math.ceil(tokens / head_rows(cuda, tokens, compiled=True)) == 8


# Layers, width, heads, sequences of 1,024 tokens, recompute, and the peak in GB that Inductor plans in bf16
# for an H100, with weights, gradients and AdamW's moments: `python bench.py compile`, torch 2.14.1.
COMPILED_GB = [
    (12, 768, 12, 64, False, 24.1),
    (12, 768, 12, 16, False, 8.11),
    (24, 1024, 16, 16, False, 20.53),
    (12, 768, 12, 32, True, 4.13),
    (24, 1024, 16, 32, True, 9.11),
]


@pytest.mark.parametrize("n_layer, n_embd, n_head, batch_size, recompute, gigabytes", COMPILED_GB)
def test_formula_of_memory_matches_what_inductor_plans(
    n_layer, n_embd, n_head, batch_size, recompute, gigabytes
):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    model.recompute = recompute
    formula = model.training_bytes(batch_size, 1024, torch.bfloat16, compiled=True)
    assert formula / 1e9 == pytest.approx(gigabytes, rel=0.08)


def test_head_keeps_no_product_of_an_earlier_part(monkeypatch):
    """Each is as large as the head's weight: 154 MB at GPT-2's size."""
    products, chunk_loss = [], model_module.chunk_loss

    def watched(*args):
        assert not any(product() is not None for product in products)
        result = chunk_loss(*args)
        products.append(weakref.ref(result[2]))
        return result

    monkeypatch.setattr(model_module, "chunk_loss", watched)
    monkeypatch.setattr(model_module, "head_rows", lambda *sizes: 8)
    idx = torch.randint(320, (2, 16))
    tiny_gpt()(idx, idx)[1].backward()
    assert len(products) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_stream_has_the_dtype_of_autocast_and_layer_norms_compute_in_fp32(monkeypatch, dtype):
    model, idx, computed = tiny_gpt(), torch.randint(320, (2, 16)), []
    layer_norm, block = F.layer_norm, model.transformer.h[0]

    def watched(x, shape, weight, bias, eps):
        computed.append({x.dtype, weight.dtype, bias.dtype})
        return layer_norm(x, shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", watched)
    streams = []
    for each in (*model.transformer.h, model.transformer.ln_f):
        each.register_forward_hook(lambda module, inputs, output: streams.extend((inputs[0], output)))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        model(idx, idx)[1].backward()
    assert [x.dtype for x in streams] == [dtype] * 6 and computed == [{torch.float32}] * 5
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    x = 1e3 + torch.randn(4, 32, generator=torch.Generator().manual_seed(0))  # bf16 has 8 bits
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        ours = block.ln_1(x.to(dtype))
    exact = layer_norm(x.to(dtype).double(), (32,), block.ln_1.weight.double(), block.ln_1.bias.double())
    torch.testing.assert_close(ours, exact.to(dtype), atol=1e-3, rtol=0.01)


@pytest.mark.parametrize("grad", [True, False])
def test_logits_of_all_tokens_are_never_in_memory(monkeypatch, grad):
    monkeypatch.setattr(model_module, "head_rows", lambda *_: 24)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else [result]:
                if isinstance(each, torch.Tensor):
                    self.largest = max(self.largest, each.untyped_storage().nbytes())
            return result

    model, idx = tiny_gpt().train(), torch.randint(320, (60, 16))
    with Sizes() as sizes, torch.set_grad_enabled(grad):
        loss = model(idx, idx)[1]
        if grad:
            loss.backward()
    assert 4 * 320 * 32 <= sizes.largest < 4 * 60 * 16 * 320 / 2


def test_second_backward_pass_is_an_error_not_a_wrong_gradient():
    model, idx = tiny_gpt(), torch.randint(320, (2, 16))
    loss = model(idx, idx)[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_loss_is_one_graph_with_the_same_gradients():
    model, idx = GPT(GPTConfig(16, 320, 1, 2, 32)), torch.randint(320, (2, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        eager, other = (
            loss_and_grads(lambda _, *args, each=each: each(*args)[1], model, idx, idx, dtype)
            for each in (model, compiled)
        )
        assert max(errors(other, eager)) < 1e-6


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
    assert members["embeddings"] == ["transformer.wte.weight"]
    assert members["positions"] == ["transformer.wpe.weight"]
    assert all(name.endswith("attn.c_attn.weight") for name in members["c_attn"])
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {**dict.fromkeys(groups, 0.1), "gains and biases": 0.0}


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
