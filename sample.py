"""Generate text with a checkpoint of train.py, a Hugging Face folder or one of OpenAI's models.

    python sample.py --model log --prompt "import "                      # the newest checkpoint of a run
    python sample.py --model gpt2 --prompt "Hello, I'm a language model," --num_samples 5
    python sample.py --model log --prompt_file story.txt --temperature 0 # greedy

Prints to standard output. The same seed gives the same text again on the same machine.
"""

import argparse
import sys
from pathlib import Path

import tiktoken
import torch

from model import GPT, choose_device
from tokenizer import get_tokenizer


@torch.no_grad()
def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Continue token ids (B, T) int64 by `max_new_tokens`; return (B, T + max_new_tokens) int64.

    Temperature 0 is greedy. `top_k` keeps the k likeliest ids, `top_p` the likeliest ids that together reach
    that probability (Holtzman et al. 2019, "nucleus"). Only ids below `vocab_size` are drawn: a padded
    vocabulary has more. Random numbers come from `generator`, which lives on the model's device.

    The model sees the last block_size tokens of the prompt. When the context is full, it is read anew from
    its last block_size // 2 tokens, so a long text costs two forward tokens for each new one.
    """
    if idx.size(1) == 0:
        raise ValueError("the prompt has no tokens: start from the end-of-text token")
    block_size = model.config.block_size
    was_training = model.training
    model.eval()
    cache, unread = model.new_cache(), idx[:, -block_size:]
    for _ in range(max_new_tokens):
        if cache[0].length + unread.size(1) > block_size:
            cache, unread = model.new_cache(), idx[:, -max(block_size // 2, 1) :]
        hidden = model.trunk(unread, cache)[:, -1]  # (B, n_embd)
        logits = model.lm_head(hidden)[:, :vocab_size].float()  # (B, vocab_size)
        unread = _draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
        idx = torch.cat((idx, unread), dim=1)
    model.train(was_training)
    return idx


def _draw(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Draw one id (B, 1) from each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ranked, order = probs.sort(dim=-1, descending=True)
        # An id stays when those before it have not reached top_p: the first one always does.
        ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, num_samples=1, generator=generator)


def tokenizer_for(model: GPT, name: str | None = None) -> tiktoken.Encoding:
    """The tokenizer of that name; None is the one that the model's checkpoint names, or gpt2.

    Raises ValueError when the model has fewer token ids.
    """
    name = name or (model.metadata.get("args") or {}).get("tokenizer", "gpt2")
    tokenizer = get_tokenizer(name)
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"tokenizer {name} has {tokenizer.n_vocab} ids, the model {model.config.vocab_size}: "
            "it was trained with another tokenizer"
        )
    return tokenizer


def complete(
    model: GPT,
    tokenizer_name: str | None,
    prompt: str,
    num_samples: int,
    max_new_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[str]:
    """Return the prompt with each of `num_samples` continuations, cut where the document ends.

    An empty prompt begins a new document. The tokenizer is that of `tokenizer_for`.
    """
    tokenizer = tokenizer_for(model, tokenizer_name)
    device = model.transformer.wte.weight.device
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    idx = torch.tensor([ids] * num_samples, device=device)  # (num_samples, T)
    out = generate(
        model,
        idx,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=tokenizer.n_vocab,
        generator=torch.Generator(device).manual_seed(seed),
    )
    texts = []
    for new in out[:, len(ids) :].tolist():
        end = new.index(tokenizer.eot_token) if tokenizer.eot_token in new else len(new)
        texts.append(prompt + tokenizer.decode(new[:end]))
    return texts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default="log", help="checkpoint, run folder, Hugging Face folder, or gpt2 … gpt2-xl")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of all arithmetic")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", default="", help="text to continue; empty starts a new document")
    add("--prompt_file", help="read the prompt from this UTF-8 file")
    add("--num_samples", type=int, default=3, help="number of texts")
    add("--max_new_tokens", type=int, default=300, help="tokens per text")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.8, help="0 is greedy, 1 samples the model's own distribution")
    add("--top_k", type=int, help="draw from the k likeliest tokens; None from all")
    add("--top_p", type=float, help="draw from the likeliest tokens up to this probability; None from all")
    add("--seed", type=int, default=1337, help="of the random numbers")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    problems = []
    if args.num_samples < 1:
        problems.append(f"--num_samples is {args.num_samples}: give at least 1")
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens is {args.max_new_tokens}: give at least 1")
    if args.temperature < 0:
        problems.append(f"--temperature is {args.temperature}: give 0 (greedy) or more")
    if args.top_k is not None and args.top_k < 1:
        problems.append(f"--top_k is {args.top_k}: give at least 1, or leave it out")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        problems.append(f"--top_p is {args.top_p}: give a share above 0 and up to 1, or leave it out")
    if args.prompt and args.prompt_file:
        problems.append("--prompt and --prompt_file exclude each other: give one")
    if problems:
        raise ValueError("; ".join(problems))
    if args.prompt_file and not Path(args.prompt_file).is_file():
        raise FileNotFoundError(f"no file {args.prompt_file}: check --prompt_file")
    prompt = Path(args.prompt_file).read_text(encoding="utf-8") if args.prompt_file else args.prompt
    device = choose_device(args.device)
    model = GPT.from_pretrained(args.model)
    model.to(device=device, dtype=getattr(torch, args.dtype))
    texts = complete(
        model,
        None,
        prompt,
        args.num_samples,
        args.max_new_tokens,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    print("\n\n---\n\n".join(texts))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"sample.py: error: {error}")
