"""What --eval_only does: measure what the loop of train.py measures, and write nothing."""

import json
import math

import numpy as np

from diagnosis.published import unit_of
from runtime.distributed import together


def report(run, evaluations: list) -> None:
    """Print the results of the evaluations that are enabled, and all of them as a line of JSON.

    Every rank has to call this.
    """
    results, say = {}, run.dist.say
    for evaluation in evaluations:
        if not getattr(run.args, f"{evaluation.kind}_every"):
            continue
        record = evaluation.call(run, evaluation.size(run))
        if evaluation.kind == "val":
            tokens, size = count_bytes(run)
            bits = record["loss"] * tokens / size / math.log(2)
            results |= {"val_loss": record["loss"], "val_tokens": tokens, "bits_per_byte": bits}
            say(f"validation   {record['loss']:.4f} {unit_of(run.args.tokenizer)}, {bits:.4f} bits per byte")
            say(f"             on {tokens:,} tokens, {size:,} bytes, of {run.args.data_dir}")
            continue
        say(evaluation.line(record))
        if evaluation.kind == "sample":
            results["samples"] = record["texts"]
        else:
            results[evaluation.kind] = record
    say(json.dumps(results))


def count_bytes(run) -> tuple[int, int]:
    """Return how many tokens a validation predicts and the bytes of their text; end-of-text has none.

    Ends the command if the shards cannot be read. The main rank reads them, and every rank has to call this.
    """
    loader, tokenizer = run.val_data, run.tokenizer
    lengths = np.zeros(loader.vocab_size, dtype=np.int64)
    for token in set(range(tokenizer.n_vocab)) - {tokenizer.eot_token}:
        lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    windows, size = range(loader.windows_for(run.args.val_tokens)), 0
    loader.pending.exception()  # waits: it reads the same files
    with together(run.dist):
        if run.dist.is_main:
            size = sum(int(lengths[loader.read(i)[1:]].sum()) for i in windows)
    (size,) = run.dist.sum(size)
    return len(windows) * loader.block_size, int(size)
