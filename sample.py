"""Generate text with a checkpoint of train.py, a Hugging Face folder or one of OpenAI's models; export them.

    python sample.py --model log --prompt "import "                      # the newest checkpoint of a run
    python sample.py --model gpt2 --prompt "Hello, I'm a language model," --num_samples 5
    python sample.py --model log --prompt_file story.txt --temperature 0 # greedy; - is standard input
    python sample.py --model log --interactive                           # go on asking until Ctrl-D
    python sample.py --model log --export my-gpt2                        # a folder for the Hugging Face tools

Prints to standard output, the first text as it comes. The same seed gives the same text again on the same
machine.
"""

import argparse
import codecs
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tiktoken
import torch

from model import GPT, choose_device, whole_folder
from plot import read_log
from tokenizer import get_tokenizer, to_hugging_face

SEPARATOR = "\n\n---\n\n"  # between texts


def _logits(model: GPT, idx: torch.Tensor, *where) -> torch.Tensor:
    """The logits (B, vocab_size) that follow token ids (B, T); `where` is what `GPT.trunk` wants to know."""
    return model.lm_head(model.trunk(idx, *where)[:, -1])


@functools.cache
def _compiled_logits() -> Callable:
    return torch.compile(_logits, mode="reduce-overhead", fullgraph=True, dynamic=False)


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
    """Continue the prompts `idx` (B, T) int64 and yield the new ids (B * num_samples,), step by step.

    Shorter prompts stand at the right of their row, and `lengths` (B,) says how many ids each has. Every
    prompt is read once and continued `num_samples` times, in rows that follow each other.

    Temperature 0 is greedy. `top_k` keeps the k likeliest ids, `top_p` the likeliest ids that together reach
    that probability (Holtzman et al. 2019, "nucleus"). Only ids below `vocab_size` are drawn: a padded
    vocabulary has more. A row that has drawn `stop` repeats it, and all end when each has. Random numbers
    come from `generator`, which lives on the model's device.

    The model sees the last block_size tokens of a prompt. When the longest row fills the context, all are
    read anew from their last block_size // 2 tokens: a long text costs two forward tokens for each new one.

    `compiled` decodes with torch.compile and CUDA graphs: it takes a while at first, for many tokens later.
    """
    B, T = idx.shape
    lengths = torch.full((B,), T) if lengths is None else lengths
    if not 1 <= lengths.min() <= lengths.max() <= T:
        raise ValueError(
            f"prompts have {lengths.min()} to {lengths.max()} tokens in rows of {T}: give each at least one, "
            "say end-of-text"
        )
    block_size, device = model.config.block_size, idx.device
    filled = min(T, block_size)  # slots of the cache
    max_length = block_size if compiled else min(block_size, filled + max_new_tokens)
    # CUDA graphs want fixed shapes: a decoder is compiled for every so many keys, the rest of them hidden.
    granularity = 128 if compiled else 1
    cache = model.new_cache(max_length)
    starts = (filled - lengths.to(device)).clamp(min=0)  # (B,): slots before are padding

    def read(idx: torch.Tensor, first: int) -> torch.Tensor:
        """Logits (B, vocab_size) after ids (B, T) that go to the slots from the first."""
        end = first + idx.size(1)
        slots = torch.arange(first, end, device=device)
        keys = torch.arange(min(-(-end // granularity) * granularity, max_length), device=device)
        mask = (keys <= slots[:, None]) & (keys >= starts[:, None, None])  # (B, T, keys)
        mask |= keys == slots[:, None]  # padding sees itself: nothing is no distribution
        positions = (slots - starts[:, None]).clamp(min=0)  # (B, T)
        run = _compiled_logits() if compiled and first else _logits
        return run(model, idx, positions, mask[:, None], cache, slots)[:, :vocab_size].float()

    was_training = model.training
    model.eval()
    try:
        with contextlib.nullcontext() if compiled else model.packed_weights():
            logits = read(idx[:, -filled:], 0)
            for layer in cache:
                layer.repeat(num_samples)
                if compiled:
                    torch._dynamo.mark_static_address(layer.k, guard=False)
                    torch._dynamo.mark_static_address(layer.v, guard=False)
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


def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    **options,
) -> torch.Tensor:
    """Continue prompts (B, T) int64; return (B * num_samples, T + max_new_tokens) int64.

    The options are those of `stream`. What follows a row's `stop` is `stop`.
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
    return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]


def tokenizer_for(model: GPT) -> tiktoken.Encoding:
    """The tokenizer that the model's checkpoint names, or the one that fits.

    Raises ValueError when the model has fewer token ids.
    """
    byte = get_tokenizer("byte")
    if model.config.vocab_size == byte.n_vocab:
        return byte
    name = (model.metadata.get("args") or {}).get("tokenizer", "gpt2")
    tokenizer = get_tokenizer(name)
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"tokenizer {name} has {tokenizer.n_vocab} ids, the model {model.config.vocab_size}: "
            "it was trained with another tokenizer"
        )
    return tokenizer


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
    """Return each prompt with each of its `num_samples` continuations, cut where the document ends.

    An empty prompt begins a new document. `on_text` gets the first text piece by piece, as it comes; bytes
    wait until they are a whole character. The other options are those of `stream`.
    """
    rows = [tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token] for prompt in prompts]
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


def export(model: GPT, source: str | Path, folder: str | Path) -> None:
    """Write a model that was loaded from `source` as a Hugging Face folder with tokenizer and model card.

    Raises ValueError when the folder exists and is not empty.
    """
    tokenizer = tokenizer_for(model)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial, vocab_size=tokenizer.n_vocab)
        to_hugging_face(tokenizer, model.config.block_size).save_pretrained(partial)
        card = model_card(model, tokenizer.n_vocab, Path(source), Path(folder).name)
        (partial / "README.md").write_text(card, encoding="utf-8")


def model_card(model: GPT, vocab_size: int, source: Path, name: str) -> str:
    """What a run's checkpoint, and the log beside it, say about the model, in Markdown for the Hub.

    Of its token ids the first `vocab_size` are exported.
    """
    config, metadata = model.config, model.metadata
    step, args = metadata.get("step"), metadata.get("args") or {}
    parameters = model.num_params() - (config.vocab_size - vocab_size) * config.n_embd
    run = source if source.is_dir() else source.parent
    log = read_log(run) if step is not None and (run / "log.jsonl").exists() else {}
    facts = {"parameters": f"{parameters:,}", "context": f"{config.block_size:,} tokens"}
    if step is not None and "total_batch_size" in args:
        facts["trained for"] = f"{step:,} steps of {args['total_batch_size']:,} tokens"
        facts["tokens seen"] = f"{step * args['total_batch_size']:,}"
    if metadata.get("val_loss") is not None:
        facts["validation loss"] = f"{metadata['val_loss']:.4f} nats per token"
    trained = [record for record in log.get("train", []) if record["step"] < step]
    if trained:
        facts["training loss"] = f"{trained[-1]['loss']:.4f} nats per token, the last step"
    scored = [record for record in log.get("hellaswag", []) if record["step"] <= step]
    if scored:
        last = scored[-1]
        facts["HellaSwag"] = f"acc_norm {last['acc_norm']:.2%}, acc {last['acc']:.2%}, {last['n']:,} items"
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]", "---", ""),
        *(f"# {name}", "", "A GPT-2 trained from scratch, to be used as any other:", ""),
        *("```python", "from transformers import pipeline", ""),
        f'pipeline("text-generation", "{name}")("Hello, I\'m a language model,", max_new_tokens=50)',
        *("```", "", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts.items()), ""),
    ]
    if args:
        lines += ["The options of the run:", "", "| option | value |", "|---|---|"]
        lines += [f"| `--{option}` | {value} |" for option, value in args.items()]
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default="log", help="checkpoint, run folder, Hugging Face folder, or gpt2 … gpt2-xl")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of all arithmetic")
    add("--compile", action="store_true", help="CUDA graphs on GPUs: slow to begin, for long texts")
    add("--export", metavar="DIR", help="write a Hugging Face folder instead of text")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", nargs="+", default=[""], help="texts to continue; an empty one starts a new document")
    add("--prompt_file", help="file with the prompt, - is standard input; a newline at its end is dropped")
    add("--interactive", action="store_true", help="ask for prompts, a line each, until the input ends")
    add("--num_samples", type=int, default=1, help="continuations of each prompt")
    add("--max_new_tokens", type=int, default=300, help="tokens per text, unless its document ends before")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.8, help="0 is greedy, 1 samples the model's own distribution")
    add("--top_k", type=int, help="draw from the k likeliest tokens; None from all")
    add("--top_p", type=float, help="draw from the likeliest tokens up to this probability; None from all")
    add("--seed", type=int, default=1337, help="of the random numbers")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with the command line, a line for each problem."""
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
    if (args.prompt != [""]) + bool(args.prompt_file) + args.interactive > 1:
        problems.append("--prompt, --prompt_file and --interactive exclude each other: give one")
    return problems


def read_prompt(file: str) -> str:
    """The text of a file, "-" being standard input, without the newline that editors put at its end.

    Raises FileNotFoundError or ValueError for what is no text.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): convert it with iconv") from error
    except OSError as error:
        raise FileNotFoundError(f"cannot read {file} ({error.strerror}): check --prompt_file") from error


def main(args: argparse.Namespace) -> None:
    problems = check_args(args)
    if problems:
        raise ValueError("\n".join(problems))
    prompts = [read_prompt(args.prompt_file)] if args.prompt_file else args.prompt
    device = choose_device(args.device)
    model = GPT.from_pretrained(args.model)
    if args.export:
        export(model, args.model, args.export)
        print(f"wrote {args.export}: python sample.py --model {args.export}")
        return
    tokenizer = tokenizer_for(model)
    model.to(device=device, dtype=getattr(torch, args.dtype))
    generator = torch.Generator(device).manual_seed(args.seed)

    def say(text: str) -> None:
        print(text, end="", flush=True)

    def answer(prompts: list[str]) -> None:
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
            compiled=args.compile,
            on_text=say,
        )
        print("".join(SEPARATOR + text for text in others), flush=True)

    if not args.interactive:
        return answer(prompts)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit and recall lines; Windows does so itself
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        try:
            answer([prompt])
        except KeyboardInterrupt:  # enough of this text
            print()


def run() -> str | int | None:
    """Do what the command line says; return what went wrong, a line for each problem."""
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        return "\n".join(f"sample.py: error: {line}" for line in str(error).splitlines())
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(run())
