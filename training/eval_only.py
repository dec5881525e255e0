"""What --eval_only does: measure what the loop of train.py measures, and write nothing."""

import argparse
import json
import math
from collections.abc import Callable
from concurrent.futures import wait

import numpy as np
import tiktoken

from runtime.distributed import Problems


def report(
    args: argparse.Namespace,
    loader,
    examples: list,
    tokenizer: tiktoken.Encoding,
    *,
    evaluate: Callable[[int], float],
    score: Callable[[list], dict],
    write_samples: Callable[[int], list[str]],
) -> None:
    """Print validation loss, HellaSwag and samples, whichever are enabled, and all of them as a line of JSON.

    `loader` is the DataLoaderLite of the validation split. A collective.
    """
    results, say = {}, loader.dist.say
    if args.val_every:
        loss = evaluate(args.val_tokens)
        tokens, size = count_bytes(loader, args.val_tokens, tokenizer)
        results |= dict(val_loss=loss, val_tokens=tokens, bits_per_byte=loss * tokens / size / math.log(2))
        say(f"validation   {loss:.4f} nats per token, {results['bits_per_byte']:.4f} bits per byte")
        say(f"             on {tokens:,} tokens, {size:,} bytes, of {args.data_dir}")
    if args.hellaswag_every:
        scores = results["hellaswag"] = score(examples)
        del scores["items"]
        for name in ("acc_norm", "acc"):
            interval = f"{scores[name]:.2%} ± {scores[f'{name}_stderr']:.2%}"
            say(f"HellaSwag    {name} {interval} of {scores['n']:,} items")
    if args.sample_every:
        results["samples"] = write_samples(args.sample_tokens)
        for text in results["samples"]:
            say(f"sample       {text}\n")
    say(json.dumps(results))


def count_bytes(loader, val_tokens: int, tokenizer: tiktoken.Encoding) -> tuple[int, int]:
    """Return how many tokens a validation predicts and the bytes of their text; end-of-text has none.

    Ends the command if the shards cannot be read. A collective: the first rank reads them.
    """
    lengths = np.zeros(loader.vocab_size, dtype=np.int64)
    for token in set(range(tokenizer.n_vocab)) - {tokenizer.eot_token}:
        lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    windows, size = range(loader.windows_for(val_tokens)), 0
    problems = Problems(loader.dist)
    wait([loader.pending])  # it reads the same files
    if loader.dist.is_main:
        with problems.collect():
            size = sum(int(lengths[loader.read(i)[1:]].sum()) for i in windows)
    problems.raise_all()
    (size,) = loader.dist.sum(size)
    return len(windows) * loader.block_size, int(size)
