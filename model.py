"""GPT-2 in PyTorch: the network, its key/value cache, optimizer groups, and FLOP and memory counts.

    model = GPT(GPTConfig())                     # random weights, 124,475,904 parameters
    model = GPT.from_pretrained("gpt2")          # OpenAI's weights, from the Hugging Face Hub
    model = GPT.from_pretrained("log")           # the newest checkpoint of a run
    logits, _ = model(idx)                       # (B, T) token ids to (B, T, vocab_size)
    _, loss = model(idx, targets)                # nats per token
    idx = model.generate(idx, 100, top_k=50)     # (B, T + 100)

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners":
pre-LayerNorm, tanh GELU, learned positions, biases everywhere, embedding and head tied. Weights convert to
and from `transformers.GPT2LMHeadModel` without loss. The loss of a freshly initialized model is close to
ln(vocab_size): 10.8 for GPT-2.
"""

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

GPT2_VOCAB_SIZE = 50257
PADDED_VOCAB_SIZE = 50304  # the next multiple of 128, for even tiles; the extra ids are never targets


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = PADDED_VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be at least 0 and below 1")


class KVCache:
    """The keys and values of one attention layer, in memory allocated once for `max_length` tokens.

    The first `write` fixes batch size and device. On CPUs the cache is always fp32, in which attention for
    a single query is up to seven times as fast as in bf16 (LOG.md).
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.k: torch.Tensor | None = None

    def write(
        self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, visible: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, n_head, T, head_dim) keys and values to `slots` (T,) and return views of the first
        `visible` slots."""
        if self.k is None:
            B, n_head, _, head_dim = k.shape
            dtype = torch.float32 if k.device.type == "cpu" else k.dtype
            # Zeros, because masked positions still have to be finite.
            self.k = k.new_zeros(B, n_head, self.max_length, head_dim, dtype=dtype)
            self.v = torch.zeros_like(self.k)
        self.k.index_copy_(2, slots, k.to(self.k.dtype))
        self.v.index_copy_(2, slots, v.to(self.v.dtype))
        return self.k[:, :, :visible], self.v[:, :, :visible]

    def repeat(self, times: int) -> None:
        """Repeat each row of the batch `times` times, to continue one prompt in several ways."""
        self.k, self.v = (each.repeat_interleave(times, dim=0) for each in (self.k, self.v))


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in fp32, on every device and under autocast, and keeps its input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head_dim)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache:
            k, v = cache.write(k, v, slots, mask.size(-1))
            q = q.to(k.dtype)
        dropout_p, is_causal = self.dropout if self.training else 0.0, mask is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *attention_inputs) -> torch.Tensor:
        """`attention_inputs` are the optional inputs of `CausalSelfAttention`."""
        x = x + self.attn(self.ln_1(x), *attention_inputs)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """The summed cross-entropy of the logits `hidden @ weight.T`, without the logits of all tokens in memory.

    `hidden` is (N, C), `weight` (V, C), and `targets` (N,) int64, where -100 is ignored. A few tokens at a
    time go through the head, in `dtype`. The gradients follow from their logits at once, so with `needs_grad`
    the forward pass sums them up in fp32, and no product is computed twice. They are gradients of the sum:
    softmax minus one-hot, divided by the number of tokens, would underflow in fp16.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> torch.Tensor:
        rows = head_rows(hidden.device, len(hidden), torch.compiler.is_compiling())
        loss, grad_weight, parts = torch.zeros((), device=hidden.device), None, []
        if needs_grad:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                loss_part, *grads = chunk_loss(hidden[part].to(dtype), w, targets[part, None], needs_grad)
                loss = loss + loss_part  # in place, torch 2.11 compiles this to gradients of zero
                if needs_grad:
                    parts.append(grads[0])
                    grad_weight += grads[1]
                del grads  # before the gradients of the next part need as much memory
        ctx.save_for_backward(torch.cat(parts) if needs_grad else None, grad_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = grad_hidden.to(ctx.hidden_dtype) * grad
        return grad_hidden, grad_weight.mul_(grad).to(ctx.weight_dtype), None, None, None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of autocast on the device of `x` or, without autocast, that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def head_rows(device: torch.device, tokens: int, compiled: bool) -> int:
    """Return how many of `tokens` go through the head at a time.

    With fewer, adding up the gradient of the weight takes more of the time (LOG.md); with more, the logits
    take more memory. A compiled graph has the head's kernels once for each of at most 8 parts: Inductor sums
    up to 8 gradients of the weight in one kernel, and with more, it keeps the logits of all parts.
    """
    if compiled:
        return max(2048, math.ceil(tokens / 8))
    return 512 if device.type == "cpu" else 2048


def chunk_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, ...]:
    """Return the summed loss of hidden states (n, C) and targets (n, 1) and, if needed, its gradients."""
    log_probs = F.linear(hidden, weight).log_softmax(dim=1, dtype=torch.float32)  # (n, V)
    counted = targets != -100
    if torch.compiler.is_compiling():  # one pass over (n, V): what gathers or scatters would need others
        is_target = torch.arange(len(weight), device=targets.device) == targets
        loss = -log_probs.where(is_target, 0.0).sum(dim=1).sum()
        if not needs_grad:
            return (loss,)
        error = ((log_probs.exp() - is_target.float()) * counted).to(hidden.dtype)  # softmax minus one-hot
        return loss, error @ weight, error.t() @ hidden
    ids = targets.clamp(min=0)
    loss = -log_probs.gather(1, ids).masked_fill(~counted, 0.0).sum()
    if not needs_grad:
        return (loss,)
    error = log_probs.exp_().scatter_add_(1, ids, -torch.ones_like(ids, dtype=torch.float32))
    error = error.to(hidden.dtype)
    return loss, (error @ weight) * counted, error.t() @ (hidden * counted)


class GPT(nn.Module):
    """The language model.

    `metadata` holds what the checkpoint stored besides tensors (step, val_loss, args). With `recompute`, the
    backward pass recomputes the activations of each block: a third more arithmetic, and activation memory for
    only one block (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.metadata: dict = {}
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # GPT-2, section 2.3: residual projections are scaled by depth; each block adds two of them.
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def trunk(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: list[KVCache] | None = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run everything except the head: token ids (B, T) to final hidden states (B, T, n_embd).

        By default each row is one text from left to right. Any other layout needs `positions` (B, T) and a
        bool `mask` (B, 1, T, keys) that is True for visible keys. With a `cache` from `new_cache`, the new
        keys are first written to its `slots` (T,), and the mask applies to the first `keys` slots. Raises
        ValueError for more than block_size tokens without positions.
        """
        if positions is None:
            T = idx.size(1)
            if T > self.config.block_size:
                raise ValueError(
                    f"{T} tokens are more than the model's context of {self.config.block_size}: "
                    "shorten the input or train with a larger --block_size"
                )
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        x = x.to(compute_dtype(x))  # the residual stream: half the bytes of fp32 under autocast
        recompute = self.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.transformer.h):
            inputs = (x, mask, cache[i] if cache else None, slots)
            x = recomputed(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.transformer.ln_f(x)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean"
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return logits (B, T, vocab_size) and None or, given `targets` (B, T), None and the loss.

        The loss is the cross-entropy in nats, of which `reduction` takes the mean or the sum. Targets of -100
        are ignored.
        """
        hidden, weight = self.trunk(idx), self.lm_head.weight
        if targets is None:
            return self.lm_head(hidden), None
        targets, dtype = targets.flatten(), compute_dtype(weight)
        loss = HeadLoss.apply(hidden.flatten(0, 1), weight, targets, dtype, torch.is_grad_enabled())
        return None, loss if reduction == "sum" else loss / (targets != -100).sum()

    def new_cache(self, max_length: int) -> list[KVCache]:
        """Return an empty key/value cache for up to `max_length` tokens, one entry per layer."""
        return [KVCache(max_length) for _ in self.transformer.h]

    @contextmanager
    def packed_weights(self) -> Iterator[None]:
        """Speed up generation on x86 CPUs: in this context, `nn.Linear` uses packed copies of the weights.

        A product with few rows is limited by memory bandwidth, of which `F.linear` reaches a third in fp32
        and half in bf16 (LOG.md). Weights in oneDNN's layout, with the operator that torch.compile uses, more
        than double that. Gradients are not supported, and changes to the weights are not seen. On other
        devices this does nothing.
        """
        weight = self.lm_head.weight
        is_x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
        linears = []
        if weight.device.type == "cpu" and is_x86:  # builds without oneDNN lack the operators
            fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and weight.dtype == torch.bfloat16
            if fast or weight.dtype == torch.float32:
                linears = [each for each in self.modules() if isinstance(each, nn.Linear)]
        try:
            for linear in linears:
                # The layout for 8 rows is also the fastest one for a single row (LOG.md).
                packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)
                linear.forward = partial(_packed_linear, weight=packed, bias=linear.bias)
            yield
        finally:
            for linear in linears:
                del linear.forward

    def num_params(self) -> int:
        """Return the number of weights; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, T: int | None = None) -> int:
        """Return the FLOPs to train on one token in a window of T (default block_size), forward and backward.

        6 per weight in a matrix product, plus 12 * n_layer * n_embd * T for attention, counted as if it were
        not causal. Published MFU figures follow this convention: Chowdhery et al. 2022 (PaLM), appendix B.
        """
        weights = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * (T or self.config.block_size)

    def training_bytes(self, batch_size: int, T: int, dtype: torch.dtype, compiled: bool = False) -> int:
        """Return the peak memory in bytes of a training step, eager or compiled by Inductor.

        Each weight takes 16 bytes in fp32: the weight, its gradient and AdamW's two moments. Autocast adds a
        copy of a = 2 bytes. A block keeps for each token 16 * n_embd values of a bytes if compiled; in eager
        mode 14, and two fp32 inputs of LayerNorm. With `recompute` it keeps only its input. The peak is
        reached in the head, which holds the fp32 gradient of its weight, two or three times the logits of a
        few tokens, and the last hidden states with their gradient. With `recompute`, it may be reached in a
        backward pass instead, where one block has all its activations and gradients. Attention is assumed to
        store no scores, which holds except for bf16 on CPUs and for MPS.
        """
        P, V, C, L = self.num_params(), self.config.vocab_size, self.config.n_embd, self.config.n_layer
        a, half, tokens = dtype.itemsize, dtype != torch.float32, batch_size * T
        rows = min(tokens, head_rows(self.lm_head.weight.device, tokens, compiled))
        if compiled:
            block, copies = 16 * a * C, a * P * half * (not self.recompute)
            # Inductor sums the parts' gradients of the weight last. Until then, it keeps them.
            head = 2 * a * rows * V + (math.ceil(tokens / rows) - 1) * a * V * C + 2 * a * tokens * C
        else:
            block, copies = (8 + 14 * a) * C, a * P * half
            head = max((8 + a * half) * rows * V, (4 + a * half) * rows * V + a * V * C)
            head += (4 + a) * tokens * C
        fixed, head = 16 * P + copies, head + 4 * V * C
        if not self.recompute:
            return fixed + tokens * block * L + head
        return fixed + tokens * a * C * L + max(head, 4 * V * C + tokens * (block + (4 + 12 * a) * C))

    def optimizer_groups(self, weight_decay: float) -> list[dict]:
        """Return named parameter groups: matrices and embeddings decay, biases and LayerNorm gains do not.

        Each weight in a group with `parts=n` is n matrices stacked along dimension 0: c_attn stacks those of
        queries, keys and values.
        """
        groups = [
            {"name": "embeddings", "params": [], "weight_decay": weight_decay},
            {"name": "positions", "params": [], "weight_decay": weight_decay},
            {"name": "c_attn", "params": [], "weight_decay": weight_decay, "parts": 3},
            {"name": "matrices", "params": [], "weight_decay": weight_decay, "parts": 1},
            {"name": "gains and biases", "params": [], "weight_decay": 0.0},
        ]
        embeddings, positions, stacked, matrices, others = (group["params"] for group in groups)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                others.append(parameter)
            elif ".h." not in name:
                (positions if name.endswith("wpe.weight") else embeddings).append(parameter)
            else:
                (stacked if name.endswith("c_attn.weight") else matrices).append(parameter)
        return groups

    @classmethod
    def from_pretrained(
        cls, source: str | Path | dict, dropout: float = 0.0, n_head: int | None = None
    ) -> "GPT":
        """Load a checkpoint file, the newest checkpoint of a run folder, a Hugging Face folder or a Hub name.

        `source` may also be a checkpoint that has been loaded. Checkpoints of other GPT-2 repositories work
        too (`formats.checkpoint`). Some do not say their number of heads, so `n_head` sets it; the `notes` in
        `metadata` say what was assumed. No code from a file is executed. Raises FileNotFoundError if the
        source does not exist, and ValueError if it does not hold a complete GPT-2.
        """
        from formats.checkpoint import read_pretrained
        from runtime.files import parsing

        config, state, metadata = read_pretrained(source, n_head)
        name = "the checkpoint" if isinstance(source, dict) else source
        with parsing(name, "a GPT-2", "use another model"):
            model = cls(GPTConfig(**{**config, "dropout": dropout}))
            model.load_state_dict(state)
        model.metadata = metadata
        return model

    def save_pretrained(self, folder: str | Path, vocab_size: int | None = None) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

        Only the first `vocab_size` token ids are kept, by default `unpadded_vocab_size`; the last of them is
        end-of-text. Raises ValueError if the folder exists and is not empty, and for a model that
        transformers' GPT-2 cannot express.
        """
        from formats.hugging_face import write_hugging_face

        config = self.config
        if vocab_size is None:
            vocab_size = self.unpadded_vocab_size
        if not 1 <= vocab_size <= config.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}, but the model has {config.vocab_size} token ids")
        write_hugging_face(folder, asdict(config), self.state_dict(), vocab_size)

    @property
    def unpadded_vocab_size(self) -> int:
        """The number of ids without those that pad GPT-2's 50,257 to 50,304. Others count as a whole."""
        size = self.config.vocab_size
        return GPT2_VOCAB_SIZE if size == PADDED_VOCAB_SIZE else size

    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        **options,
    ) -> torch.Tensor:
        """Continue prompts (B, T) int64 and return (B, T + max_new_tokens) int64.

        `options` are those of `sample.stream`, which says what they mean.
        """
        from sample import generate

        options = {"vocab_size": self.unpadded_vocab_size, **options}
        return generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k, **options)


def _packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
