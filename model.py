"""GPT-2 in PyTorch: the network, its key/value cache, its optimizer groups and its weights on disk.

    model = GPT(GPTConfig())                     # random weights, 124,475,904 parameters
    model = GPT.from_pretrained("gpt2")          # OpenAI's weights, from the Hugging Face Hub
    model = GPT.from_pretrained("log")           # the newest checkpoint of a run

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners":
pre-LayerNorm, tanh GELU, learned positions, biases everywhere, embedding and head tied. Weights move to and
from `transformers.GPT2LMHeadModel` without loss. A freshly initialised model has a loss near ln(vocab_size):
10.8 for GPT-2.
"""

import math
import pickle
import platform
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_VOCAB_SIZE = 50257
PADDED_VOCAB_SIZE = 50304  # the next multiple of 128: matmuls tile evenly, the extra rows are never a target
# OpenAI's checkpoints store these four as (in, out), `nn.Linear` wants (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# What DDP, torch.compile and wrapping modules put before the names of tensors.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
# What a file that is cut short, altered or something else makes torch.load and zipfile raise.
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" takes cuda, mps or cpu, whichever comes first on this machine.

    Raises ValueError when this machine lacks the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name} cannot be used here ({reason}): give auto or cpu") from error


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
                f"n_embd {self.n_embd} does not divide by n_head {self.n_head}: change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be at least 0 and below 1")


class KVCache:
    """Keys and values that one attention layer has seen, in memory reserved once for `max_length` tokens.

    The first `write` fixes batch size and device. On CPUs they are fp32: there attention of a single query is
    up to seven times as fast as in bf16 (LOG.md).
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.k: torch.Tensor | None = None

    def write(
        self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, visible: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put (B, n_head, T, head_dim) keys and values into `slots` (T,); return views of the first `visible`
        slots."""
        if self.k is None:
            B, n_head, _, head_dim = k.shape
            dtype = torch.float32 if k.device.type == "cpu" else k.dtype
            # Zeros, for what a mask hides still has to be finite.
            self.k = k.new_zeros(B, n_head, self.max_length, head_dim, dtype=dtype)
            self.v = torch.zeros_like(self.k)
        self.k.index_copy_(2, slots, k.to(self.k.dtype))
        self.v.index_copy_(2, slots, v.to(self.v.dtype))
        return self.k[:, :, :visible], self.v[:, :, :visible]

    def repeat(self, times: int) -> None:
        """Let each row be followed by copies of it, to go on from one prompt in several ways."""
        self.k, self.v = (each.repeat_interleave(times, dim=0) for each in (self.k, self.v))


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
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, slots)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model.

    `metadata` holds what its checkpoint said beside the tensors (step, val_loss, args). With `recompute` the
    backward pass computes each block's activations again: a third more work, and memory for one block only
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
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
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # GPT-2 section 2.3: residual projections shrink with depth, two of them add up in each block.
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
        """Run all but the head: token ids (B, T) to final hidden states (B, T, n_embd).

        Rows that are not one text from left to right bring their `positions` (B, T) and a bool `mask`
        (B, 1, T, keys) of keys to see. With a `cache` from `new_cache`, the keys are its first slots, and
        those of the ids are written to the `slots` (T,) before. Raises ValueError for more than block_size
        tokens without positions.
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
        again = self.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.transformer.h):
            inputs = (x, mask, cache[i] if cache else None, slots)
            x = recomputed(block, *inputs, use_reentrant=False) if again else block(*inputs)
        return self.transformer.ln_f(x)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits (B, T, vocab_size) and, given `targets` (B, T), the cross-entropy in nats per token.

        Targets of -100 do not count; `reduction` is that of `F.cross_entropy`.
        """
        logits = self.lm_head(self.trunk(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

    def new_cache(self, max_length: int) -> list[KVCache]:
        """An empty key/value cache for up to `max_length` tokens, one entry a layer."""
        return [KVCache(max_length) for _ in self.transformer.h]

    @contextmanager
    def packed_weights(self) -> Iterator[None]:
        """Inside, and without gradients, products with few rows run at the speed of memory on x86 CPUs.

        For them `F.linear` reaches a third of that in fp32 and half in bf16 (LOG.md). A copy of the weights
        in oneDNN's layout, and the operator that torch.compile would use, double it and more. Weights that
        change meanwhile are not seen. On other devices this does nothing.
        """
        weight = self.lm_head.weight
        supported = weight.dtype == torch.float32 or (
            weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        is_x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
        linears = [each for each in self.modules() if isinstance(each, nn.Linear)]
        if weight.device.type != "cpu" or not is_x86 or not supported:
            linears = []
        try:
            for linear in linears:
                # Packed for a few rows, which is the fastest layout for one row too.
                packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)
                linear.forward = partial(_packed_linear, weight=packed, bias=linear.bias)
            yield
        finally:
            for linear in linears:
                del linear.forward

    def num_params(self) -> int:
        """Number of weights; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, T: int | None = None) -> int:
        """FLOPs to train on one token in a window of T (default block_size), forward and backward.

        6 for each weight in a matrix product, and 12 * n_layer * n_embd * T for attention as if it were not
        causal: Chowdhery et al. 2022 (PaLM), appendix B, the convention that published MFU figures follow.
        """
        weights = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * (T or self.config.block_size)

    def training_bytes(self, batch_size: int, T: int, dtype: torch.dtype) -> int:
        """Memory of a training step at its peak, uncompiled: when the backward pass starts.

        A weight has 16 bytes in fp32: itself, its gradient, AdamW's two moments; and under autocast a = 2 for
        a copy. A token has in each block two fp32 inputs of LayerNorm and 14 n_embd of a, and in the head
        three times the logits in fp32: the softmax, its gradient and theirs. With `recompute` a block keeps
        its fp32 input only, one of them all, and of the copies only the head's is alive. Attention is to keep
        no scores, as it does but for bf16 on CPUs.
        """
        P, V, C, L = self.num_params(), self.config.vocab_size, self.config.n_embd, self.config.n_layer
        a = dtype.itemsize
        block, head = (8 + 14 * a) * C, 12 * V
        copies = 0 if dtype == torch.float32 else a * V * C if self.recompute else a * P
        blocks = 4 * C * L + block if self.recompute else block * L
        return 16 * P + copies + batch_size * T * (blocks + head)

    def optimizer_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups with a `name`: matrices and embeddings decay, biases and LayerNorm gains do not.

        Groups of matrices have `parts`, the number of them in one weight: c_attn stacks those for queries,
        keys and values by their rows.
        """
        groups = [
            {"name": "embeddings", "params": [], "weight_decay": weight_decay},
            {"name": "c_attn", "params": [], "weight_decay": weight_decay, "parts": 3},
            {"name": "matrices", "params": [], "weight_decay": weight_decay, "parts": 1},
            {"name": "gains and biases", "params": [], "weight_decay": 0.0},
        ]
        embeddings, stacked, matrices, others = (group["params"] for group in groups)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                others.append(parameter)
            elif ".h." not in name:
                embeddings.append(parameter)
            else:
                (stacked if name.endswith("c_attn.weight") else matrices).append(parameter)
        return groups

    @classmethod
    def from_pretrained(cls, source: str | Path, dropout: float = 0.0) -> "GPT":
        """Load a checkpoint file, a run folder's newest checkpoint, a Hugging Face folder, or a Hub name.

        The file may be another GPT-2 repository's: see `_read_checkpoint`. Nothing in a file is executed.
        Raises FileNotFoundError when there is no such thing and ValueError when it is not a whole GPT-2.
        """
        if str(source) in HUB_NAMES and not Path(source).exists() or (Path(source) / "config.json").exists():
            config, state, metadata = _read_hugging_face(str(source))
        else:
            config, state, metadata = _read_checkpoint(source)
        try:
            model = cls(GPTConfig(**config, dropout=dropout))
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{source} is no GPT-2 ({reason}): its tensors differ") from error
        model.metadata = metadata
        return model

    def save_pretrained(self, folder: str | Path, vocab_size: int | None = None) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

        Only the first `vocab_size` token ids are kept, the last of them being end-of-text. The default keeps
        all but the rows that pad GPT-2's 50,257 to 50,304. Raises ValueError when the folder exists and is
        not empty.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        config = self.config
        if vocab_size is None:
            vocab_size = GPT2_VOCAB_SIZE if config.vocab_size == PADDED_VOCAB_SIZE else config.vocab_size
        if not 1 <= vocab_size <= config.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}, but the model has {config.vocab_size} token ids")
        exported = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                bos_token_id=vocab_size - 1,
                eos_token_id=vocab_size - 1,
                pad_token_id=vocab_size - 1,
            )
        )
        state = _transpose(self.state_dict())
        for name in ("transformer.wte.weight", "lm_head.weight"):
            state[name] = state[name][:vocab_size]
        exported.load_state_dict(state)
        with whole_folder(folder) as partial:
            exported.save_pretrained(partial)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill that gets its name when it is whole.

    Raises ValueError when one of that name exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: remove it or name another folder")
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def _packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _transpose(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn our state dict into OpenAI's layout, or theirs into ours."""
    return {name: w.t().contiguous() if name.endswith(TRANSPOSED) else w for name, w in state.items()}


def _read_hugging_face(source: str) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Config, state dict and (empty) metadata of a Hugging Face folder or Hub name."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, GPT2LMHeadModel

    try:
        theirs = AutoConfig.from_pretrained(source)
        if theirs.model_type != "gpt2":
            raise ValueError(f"{source} holds a {theirs.model_type} model: only GPT-2 is supported")
        wanted = {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "n_inner": (None, 4 * theirs.n_embd),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "tie_word_embeddings": (True,),
            "layer_norm_epsilon": (1e-5,),
        }
        for name, allowed in wanted.items():
            if getattr(theirs, name) not in allowed:
                raise ValueError(f"{source}: {name} is {getattr(theirs, name)}, but GPT-2 has {allowed[0]}")
        hf_model, report = GPT2LMHeadModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"{source} lacks {sorted(report['missing_keys'])[0]}: it is not a whole GPT-2")
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"cannot load {source} ({reason}): check folder or network") from error
    config = {name: getattr(theirs, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return {**config, "block_size": theirs.n_positions}, _transpose(hf_model.state_dict()), {}


def _read_checkpoint(source: str | Path) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Config, state dict and metadata of a checkpoint: ours or another repository's.

    Names may have been prefixed by DDP, torch.compile or a wrapping module. The sizes are those of the
    tensors; `n_head` stands in a dict or an object beside them, or heads are 64 wide as in all of OpenAI's.
    Weights may be in OpenAI's layout, and where there are no biases they are zero. A model trained with exact
    GELU, like nanoGPT's, is run with the tanh that GPT-2 has. Raises ValueError for anything else.
    """
    checkpoint = load_checkpoint(source)
    values = [checkpoint, *checkpoint.values()]
    for state in (value for value in values if isinstance(value, dict)):
        state = {PREFIXES.sub("", str(name)): w for name, w in state.items() if isinstance(w, torch.Tensor)}
        if {"transformer.wte.weight", "transformer.wpe.weight"} <= state.keys():
            break
    else:
        raise ValueError(f"{source} is no GPT-2: it has no transformer.wte.weight and transformer.wpe.weight")
    # Older models keep their causal masks.
    state = {name: w for name, w in state.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    wte, wpe = state["transformer.wte.weight"], state["transformer.wpe.weight"]
    if not torch.equal(state.setdefault("lm_head.weight", wte), wte):
        raise ValueError(f"{source} is no GPT-2: its lm_head is not tied to its embedding")
    config = {"vocab_size": len(wte), "n_embd": wte[0].numel(), "block_size": len(wpe)}
    config["n_layer"] = sum(name.endswith(".ln_1.weight") for name in state)
    beside = [value if isinstance(value, dict) else getattr(value, "__dict__", {}) for value in values]
    n_heads = [each["n_head"] for each in beside if isinstance(each.get("n_head"), int)]
    config["n_head"] = n_heads[0] if n_heads else max(config["n_embd"] // 64, 1)
    if state.get("transformer.h.0.attn.c_attn.weight", wte).size(-1) == 3 * config["n_embd"]:
        state = _transpose(state)
    if not any(name.endswith(".bias") for name in state):
        layers = [name for name in state if re.search(r"\.(c|ln)_\w+\.weight$", name)]
        state |= {name.removesuffix("weight") + "bias": torch.zeros(len(state[name])) for name in layers}
    metadata = {name: checkpoint.get(name) for name in ("step", "val_loss", "args")}
    if not isinstance(metadata["args"], dict):
        metadata["args"] = None
    return config, state, metadata


def step_of(path: Path) -> int:
    """The step of model_00250.pt or model_best.pt; -1 where it cannot be told."""
    if path.stem != "model_best":
        number = path.stem.removeprefix("model_")
        return int(number) if number.isdecimal() else -1
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # damaged: the one who reads it whole will say so
        return -1


class _Inert:
    """Stands in for each class and function that a file names: takes what it is given and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint file, or the newest one in a run folder that loads whole, onto the CPU.

    Raises FileNotFoundError where there is none, ValueError where a named file is damaged or no checkpoint.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"no model at {source}: give a checkpoint file, a run folder, a Hugging Face folder, "
            f"or one of {', '.join(HUB_NAMES)}"
        )
    if source.is_dir():
        for path in sorted(source.glob("model_*.pt"), key=step_of, reverse=True):
            try:
                return load_checkpoint(path)
            except ValueError as error:
                warnings.warn(f"passing over a checkpoint: {error}", stacklevel=2)
        raise FileNotFoundError(f"no whole checkpoint in {source}: train one with `python train.py`")
    try:
        if zipfile.is_zipfile(source) and (broken := zipfile.ZipFile(source).testzip()):
            raise ValueError(f"{broken} fails its checksum")  # which torch.load does not look at
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        lines = str(error).splitlines() or ["it ends too early"]
        reason = next((line for line in lines if "Trying to" in line), lines[0].split(". ")[0])
        raise ValueError(f"{source} is cut short or no checkpoint ({reason}): use an older one") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint
