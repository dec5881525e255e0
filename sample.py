"""Generate text from a checkpoint, a Hugging Face folder or one of OpenAI's models, and export models.

    python sample.py --model log --prompt "import "                      # the newest checkpoint of a run
    python sample.py --model gpt2 --prompt "Hello, I'm a language model," --num_samples 5
    python sample.py --model log --prompt_file story.txt --temperature 0 # greedy; - is standard input
    python sample.py --model log --interactive                           # ask for prompts until Ctrl-D
    python sample.py --model log --export my-gpt2                        # a folder for the Hugging Face tools

Prints to standard output and streams the first text. The same seed gives the same text on
the same machine.
"""

import argparse
import codecs
import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import tiktoken
import torch
from torch.nn import functional as F
from tqdm import tqdm

from corpus.tokenizer import encode, tokenizer_for
from formats.checkpoint import describe_pretrained
from formats.hugging_face import export
from model import GPT, KVCache
from runtime.cli import SEED, Parser, Range, check_options, command_line, run, user_path, visible, watching
from runtime.files import check_new_folder
from runtime.hardware import can_compile, choose_device, masked_attention

SEPARATOR = "\n\n---\n\n"  # between texts
NOT_FINITE = "the model's logits are not finite: its weights are damaged or diverged"
BLOCK = 256  # about the square root of GPT-2's vocabulary: both sums are short


def _logits(model: GPT, idx: torch.Tensor, *where) -> torch.Tensor:
    """Return the logits (B, vocab_size) after ids (B, T); `where` holds the other inputs of `GPT.trunk`."""
    return model.lm_head(model.trunk(idx, *where)[:, -1])


@functools.cache
def _compiled_logits() -> Callable:
    # One graph for each batch size. After eight of them PyTorch warns, and decodes others in eager mode.
    return torch.compile(_logits, mode="reduce-overhead", dynamic=False)


# Caches of each model for compiled decoding that no text is using now, by shape, dtype and device.
_unused_caches: weakref.WeakKeyDictionary[GPT, dict[tuple, list]] = weakref.WeakKeyDictionary()


def _unused(model: GPT, cache: list[KVCache]) -> list[list[KVCache]]:
    k = cache[0].k
    return _unused_caches.setdefault(model, {}).setdefault((k.shape, k.dtype, k.device), [])


def _static_cache(model: GPT, cache: list[KVCache]) -> list[KVCache]:
    """Move a cache to memory that is not in use. CUDA graphs are recorded for its addresses."""
    unused = _unused(model, cache)
    static = unused.pop() if unused else cache
    for old, new in zip(static, cache, strict=True):
        for mine, theirs in ((old.k, new.k), (old.v, new.v)):
            mine.copy_(theirs)
            torch._dynamo.mark_static_address(mine, guard=False)
    return static


@torch.no_grad()
def stream(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    lengths: torch.Tensor | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
    compiled: bool = False,
) -> Iterator[torch.Tensor]:
    """Continue the prompts `idx` (B, T) int64 and yield the new ids (B * num_samples,) of each step.

    Shorter prompts are padded on the left, and `lengths` (B,) gives the number of ids of each. Every prompt
    is processed once and continued `num_samples` times, in consecutive rows.

    Temperature 0 is greedy. `top_k` keeps the k likeliest ids (0: all), and `top_p` the most likely ids whose
    probabilities add up to p (nucleus sampling, Holtzman et al. 2019). Only ids below `vocab_size` are drawn,
    because a padded vocabulary has more. A row that has drawn `stop` repeats it, and generation ends when all
    rows have. Random numbers come from `generator`, which has to be on the model's device.

    The model sees the last block_size tokens of a prompt. When the longest row fills the context, all rows
    are processed again from their last block_size // 2 tokens: a new token of a long text costs a forward
    pass over two.

    `compiled` decodes with torch.compile and CUDA graphs: slow to start, then faster per token.
    """
    B, T = idx.shape
    lengths = torch.full((B,), T) if lengths is None else lengths
    if not 1 <= lengths.min() <= lengths.max() <= T:
        raise ValueError(
            f"prompts have {lengths.min()} to {lengths.max()} tokens in rows of {T}: each needs at least "
            "one, for example end-of-text"
        )
    block_size, device = model.config.block_size, idx.device
    filled = min(T, block_size)  # slots of the cache
    max_length = block_size if compiled else min(block_size, filled + max_new_tokens)
    cache, static = model.new_cache(max_length), None
    starts = (filled - lengths.to(device)).clamp(min=0)  # (B,): the slots before are padding

    def read(idx: torch.Tensor, first: int) -> torch.Tensor:
        """Return the logits (B, vocab_size) after ids (B, T), which go to the slots from `first` on."""
        end = first + idx.size(1)
        slots = torch.arange(first, end, device=device)
        # CUDA graphs need fixed shapes: all of the cache is visible, and the mask hides what is still empty.
        keys = torch.arange(max_length if compiled and first else end, device=device)
        mask = (keys <= slots[:, None]) & (keys >= starts[:, None, None])  # (B, T, keys)
        mask |= keys == slots[:, None]  # padding sees itself: a softmax over nothing is not defined
        positions = (slots - starts[:, None]).clamp(min=0)  # (B, T)
        run = _compiled_logits() if compiled and first else _logits
        with masked_attention():
            return run(model, idx, positions, mask[:, None], cache, slots)[:, :vocab_size].float()

    was_training = model.training
    model.eval()
    try:
        with contextlib.nullcontext() if compiled else model.packed_weights():
            logits = read(idx[:, -filled:], 0)
            if not logits.isfinite().all():
                raise ValueError(NOT_FINITE)
            for layer in cache:
                layer.repeat(num_samples)
            if compiled:
                cache = static = _static_cache(model, cache)
            idx, starts, logits = (each.repeat_interleave(num_samples, 0) for each in (idx, starts, logits))
            ended = torch.zeros(len(idx), dtype=torch.bool, device=device)
            for left in reversed(range(max_new_tokens)):
                new = _draw(logits, temperature, top_k, top_p, generator)  # (B * num_samples,)
                if stop is not None:
                    new = new.masked_fill(ended, stop)
                    ended |= new == stop
                yield new
                if left == 0 or (stop is not None and ended.all()):
                    return
                idx = torch.cat((idx, new[:, None]), dim=1)
                if filled < block_size:
                    logits = read(new[:, None], filled)
                    filled += 1
                else:
                    kept = max(block_size // 2, 1)
                    starts = (starts - (filled + 1 - kept)).clamp(min=0)
                    logits, filled = read(idx[:, -kept:], 0), kept
    finally:
        model.train(was_training)
        if static:
            _unused(model, static).append(static)


def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    **options,
) -> torch.Tensor:
    """Continue prompts (B, T) int64 and return (B * num_samples, T + max_new_tokens) int64.

    The options are those of `stream`. After a row's `stop`, every id is `stop`.
    """
    new = list(stream(model, idx, max_new_tokens, num_samples=num_samples, **options))
    new += [new[-1]] * (max_new_tokens - len(new))
    return torch.cat((idx.repeat_interleave(num_samples, 0), torch.stack(new, dim=1)), dim=1)


def _draw(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Draw one id from each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # any temperature may divide them
    if not top_k and top_p is None:
        return _choose((logits / temperature).softmax(dim=-1), generator)
    k = logits.size(-1)
    kept = logits.topk(min(top_k, k) if top_k else k)  # exactly k, also among equals; largest first
    probs = (kept.values / temperature).softmax(dim=-1)
    if top_p is not None:
        # An id is kept if those before it add up to less than top_p, so the first one always is.
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    return kept.indices.gather(-1, _choose(probs, generator)[:, None])[:, 0]


def _choose(probs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw one index from each row (B, N) of probabilities, which need not be normalized.

    `torch.multinomial` draws a random number for each of the N. Two suffice here: one for a block of
    indices and one within it. In a single cumulative sum over N, rounding would swallow far more of the
    unlikely ones. Raises ValueError if a row is not finite.
    """
    blocks = F.pad(probs, (0, -probs.size(-1) % BLOCK)).unflatten(-1, (-1, BLOCK))
    thresholds = 1 - torch.rand(len(probs), 2, device=probs.device, generator=generator)  # in (0, 1]

    def invert(weights: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Return the first index (B, 1) up to which weights (B, M) add up to a share: one with a weight."""
        sums = weights.cumsum(dim=-1)
        if not sums[:, -1].isfinite().all():
            raise ValueError(NOT_FINITE)
        return torch.searchsorted(sums, threshold * sums[:, -1:]).clamp(max=weights.size(-1) - 1)

    block = invert(blocks.sum(dim=-1), thresholds[:, :1])
    within = blocks.take_along_dim(block[..., None], dim=1)[:, 0]
    return (block * BLOCK + invert(within, thresholds[:, 1:]))[:, 0]


def complete(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    prompts: list[str],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    on_text: Callable[[str], object] = lambda text: None,
    **options,
) -> list[str]:
    """Return each prompt with each of its `num_samples` continuations, up to the end of the document.

    An empty prompt starts a new document. `on_text` receives the first text piece by piece while it is
    generated; bytes are held back until they form a character. The other options are those of `stream`.
    """
    rows = [encode(tokenizer, prompt).tolist() or [tokenizer.eot_token] for prompt in prompts]
    T, device = max(map(len, rows)), model.transformer.wte.weight.device
    idx = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)
    lengths, stop = torch.tensor([len(row) for row in rows]), tokenizer.eot_token
    options |= {"lengths": lengths, "num_samples": num_samples, "vocab_size": tokenizer.n_vocab, "stop": stop}
    texts = [prompt for prompt in prompts for _ in range(num_samples)]
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in texts]

    def add(row: int, data: bytes, final: bool = False) -> None:
        piece = decoders[row].decode(data, final)
        texts[row] += piece
        if row == 0:
            on_text(piece)

    on_text(texts[0])
    for new in stream(model, idx, max_new_tokens, **options):
        for row, token in enumerate(new.tolist()):
            add(row, b"" if token == stop else tokenizer.decode_single_token_bytes(token))
    for row in range(len(texts)):
        add(row, b"", final=True)
    return texts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    at_least_1 = Range(int, 1)
    add = parser.add_argument_group("model").add_argument
    model = "checkpoint, run folder, Hugging Face folder, or gpt2 … gpt2-xl"
    add("--model", type=user_path, default="log", help=model)
    add("--export", type=user_path, metavar="DIR", help="write a Hugging Face folder instead of text")
    add("--n_head", type=at_least_1, help="attention heads, for a checkpoint that does not say it")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", nargs="+", default=[""], help="texts to continue; an empty one starts a new document")
    prompt = "file with the prompt (-: standard input); its final newline is dropped"
    add("--prompt_file", type=user_path, help=prompt)
    add("--interactive", action="store_true", help="read prompts, one per line, until the input ends")
    add("--num_samples", type=at_least_1, default=1, help="continuations of each prompt")
    add("--max_new_tokens", type=at_least_1, default=300, help="maximum tokens per text")
    add = parser.add_argument_group("sampling").add_argument
    temperature = Range(float, 0)
    add("--temperature", type=temperature, default=0.8, help="0: greedy; 1: the model's own distribution")
    add("--top_k", type=Range(int, 0), default=0, help="draw from the k most likely tokens (0: all)")
    top_p = Range(float, above=0, most=1)
    add("--top_p", type=top_p, help="draw from the most likely tokens up to this probability (default: all)")
    add("--seed", type=SEED, default=1337, help="seed of the random numbers")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="model dtype")
    add("--compile", action="store_true", help="CUDA graphs on GPUs: slow to start, fast for long texts")
    args = parser.parse_args(argv)
    sources = (args.prompt != [""]) + bool(args.prompt_file) + args.interactive
    conflict = "--prompt, --prompt_file and --interactive are mutually exclusive: use one of them"
    check_options(parser, args, [conflict] if sources > 1 else [])
    return args


def read_prompt(file: str) -> str:
    """Return the text of a file, or of standard input for "-", without byte order mark and final newline.

    Raises FileNotFoundError if it cannot be read, and ValueError if it is not text.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): convert it with iconv") from error
    except OSError as error:
        raise FileNotFoundError(f"cannot read {file} ({error.strerror}): check --prompt_file") from error


def main(args: argparse.Namespace) -> None:
    if args.export:
        check_new_folder(Path(args.export))
    prompts = [read_prompt(args.prompt_file)] if args.prompt_file else args.prompt
    device = choose_device(args.device)
    model = GPT.from_pretrained(args.model, n_head=args.n_head)
    if line := describe_pretrained(args.model, model.metadata):
        print(line, file=sys.stderr, flush=True)
    if args.export:
        with watching(f"writing {args.export}"):
            export(model, args.model, args.export)
        print(f"wrote {args.export}: {command_line('sample.py', '--model', args.export)}")
        return
    tokenizer = tokenizer_for(model)
    model.to(device=device, dtype=getattr(torch, args.dtype))
    generator = torch.Generator(device).manual_seed(args.seed)
    warn = functools.partial(tqdm.write, file=sys.stderr)
    compiled = args.compile and can_compile(device, warn, "leave out --compile")
    if compiled:
        warn("the first text waits until its code is compiled")

    def say(text: str) -> None:
        print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)

    def answer(prompts: list[str]) -> None:
        # On a terminal, the first text shows itself.
        with contextlib.nullcontext() if sys.stdout.isatty() else watching("writing texts"):
            first, *others = complete(
                model,
                tokenizer,
                prompts,
                args.max_new_tokens,
                num_samples=args.num_samples,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                generator=generator,
                compiled=compiled,
                on_text=say,
            )
        say("".join(SEPARATOR + text for text in others) + "\n")

    if not args.interactive:
        return answer(prompts)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit and recall lines; Windows has this built in
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        try:
            answer([prompt])
        except KeyboardInterrupt:  # ends this text, not the program
            print()


if __name__ == "__main__":
    run(main, parse_args)
