import pytest
import torch

from model import GPT, GPTConfig
from muon import Muon, orthogonalize

SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32), (8, 8)]


def with_gradients(shapes, seed):
    """Weights with random gradients, the same ones for the same seed."""
    random = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(0.1 * torch.randn(shape, generator=random)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=random)
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_singular_values_change_and_approach_one(dtype):
    torch.manual_seed(0)
    matrices = torch.randn(5, 16, 48) * torch.tensor([1e-4, 1e-2, 1, 1e2, 1e4])[:, None, None]
    result = orthogonalize(matrices, dtype).float()
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.6 and singular.max() < 1.3
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (U @ Vh).flatten(1))
    assert cosine.min() > 0.98
    assert orthogonalize(torch.zeros(1, 4, 4), dtype).count_nonzero() == 0


def test_updates_match_torch_part_by_part():
    ours, theirs = with_gradients(SHAPES, 0), with_gradients(SHAPES, 0)
    stacked, others = ours[:1], ours[1:]
    parts = [torch.nn.Parameter(part) for part in theirs[0].detach().clone().chunk(3)]
    options = dict(lr=0.03, weight_decay=0.2)
    groups = [
        {"params": stacked, "parts": 3, "optimizer": "muon", "momentum": 0.9},
        {"params": others, "parts": 1, "optimizer": "muon", "momentum": 0.9},
    ]
    optimizer = Muon(groups, **options, fused=True)
    reference = torch.optim.Muon([*parts, *theirs[1:]], momentum=0.9, **options)
    for step in range(4):
        for each, other, again in zip(ours, theirs, with_gradients(SHAPES, step), strict=True):
            each.grad, other.grad = again.grad.clone(), again.grad.clone()
        for part, grad in zip(parts, theirs[0].grad.chunk(3), strict=True):
            part.grad = grad
        optimizer.step()
        reference.step()
    for each, other in zip(ours, [torch.cat(parts), *theirs[1:]], strict=True):
        torch.testing.assert_close(each, other, atol=1e-4, rtol=0)  # bf16 rounds batches in another order


def test_everything_but_block_matrices_gets_adamw():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=8))
    groups = model.optimizer_groups(weight_decay=0.1)
    for group in groups:
        group |= {"optimizer": "muon", "momentum": 0.95} if "parts" in group else {}
    optimizer = Muon(groups, lr=0.01, fused=True)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    reference = {name: torch.nn.Parameter(weight.clone()) for name, weight in before.items()}
    decayed = [w for name, w in reference.items() if w.dim() == 2]
    plain = [{"params": decayed, "weight_decay": 0.1}]
    plain += [{"params": [w for w in reference.values() if w.dim() < 2], "weight_decay": 0}]
    adamw = torch.optim.AdamW(plain, lr=0.01)
    for name, weight in model.named_parameters():
        weight.grad = torch.randn_like(weight)
        reference[name].grad = weight.grad.clone()
    optimizer.step()
    adamw.step()
    same = {n for n, w in model.named_parameters() if torch.allclose(w, reference[n], atol=1e-6)}
    muons = {n for n, w in before.items() if ".h." in n and w.dim() == 2}
    assert len(muons) == 8 and same == set(before) - muons
    assert not any(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_each_rank_computes_its_share(world_size, monkeypatch):
    updates = tuple(torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)))
    shares = []
    gather = lambda everything, mine: shares.append(mine.clone())  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    for rank in range(world_size):
        weights = [{"params": with_gradients([(4, 6)], 0), "momentum": 0.95}]
        Muon(weights, rank=rank, world_size=world_size)._orthogonalize(updates)
    gathered = torch.cat(shares).view(torch.bfloat16)
    torch.testing.assert_close(gathered[:5], orthogonalize(torch.stack(updates)), atol=0.01, rtol=0)
    assert {len(share) for share in shares} == {-(-5 // world_size)}
