"""Muon, an optimizer that learns more from each token than AdamW: orthogonal updates for weight matrices.

    groups = model.optimizer_groups(weight_decay=0.1)
    groups[2] |= {"optimizer": "muon", "momentum": 0.95}    # the other groups get AdamW
    optimizer = Muon(groups, lr=6e-4, fused=True)

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The update rule and its
constants are those of `torch.optim.Muon`. In addition, matrices that are stacked in one weight are treated
separately, matrices of the same shape are orthogonalized together, and the ranks share that work.
"""

import math
from collections import defaultdict

import torch

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at zero, Jordan et al. 2024


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Map the singular values of (n, rows, columns) matrices to between about 0.7 and 1.2.

    Computes in `dtype`. Fastest for matrices with no more rows than columns.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """Muon for the groups whose `optimizer` is "muon", AdamW for the others.

    Each weight in a group with `parts=n` is n matrices stacked along dimension 0. The update of a matrix has
    the spectral norm lr * sqrt(max(1, rows / columns)); weight decay is decoupled. Every rank needs the same
    gradients and gets the same weights, bit for bit. Products are computed in `dtype`. Use bf16 only where
    the hardware has it, because emulated it is thirty times as slow as fp32 (LOG.md).
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        **adamw,
    ):
        super().__init__(groups, **adamw)
        self.rank, self.world_size, self.dtype = rank, world_size, dtype

    @torch.no_grad()
    def step(self, closure=None):
        same_shape, hidden = defaultdict(list), []
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group.get("optimizer") != "muon" or not weights:
                continue
            gradients, momentum = [weight.grad for weight in weights], group["momentum"]
            for weight in weights:
                if not (state := self.state[weight]):
                    # AdamW loads the states of a checkpoint and expects a step in each of them.
                    state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(weight)}
            averages = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            nesterov = torch._foreach_lerp(gradients, averages, momentum)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            hidden += zip(weights, gradients, strict=True)
            for weight, update in zip(weights, nesterov, strict=True):
                rows, columns = len(weight) // group["parts"], weight.size(1)
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                for pair in zip(weight.split(rows), update.split(rows), strict=True):
                    part, update = (each.mT for each in pair) if rows > columns else pair
                    same_shape[part.shape].append((part, update, rate))
        for members in same_shape.values():
            parts, updates, rates = zip(*members, strict=True)
            ours = self._orthogonalize(updates)[: len(parts)]
            ours = ours * torch.tensor(rates, device=ours.device)[:, None, None]
            torch._foreach_sub_(parts, ours.unbind())
        for weight, _ in hidden:
            weight.grad = None  # AdamW skips it
        loss = super().step(closure)
        for weight, gradient in hidden:
            weight.grad = gradient
        return loss

    def _orthogonalize(self, updates: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Orthogonalize n matrices of one shape, a share on each rank. Returns at least n matrices."""
        share = math.ceil(len(updates) / self.world_size)
        mine = updates[self.rank * share :][:share]
        mine += (torch.zeros_like(updates[0]),) * (share - len(mine))
        ours = orthogonalize(torch.stack(mine), self.dtype)
        if self.world_size == 1:
            return ours
        gathered = ours.new_empty(self.world_size * share, *updates[0].shape)
        # As bytes, because gloo does not support bf16.
        torch.distributed.all_gather_into_tensor(gathered.view(torch.uint8), ours.view(torch.uint8))
        return gathered
