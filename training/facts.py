"""What a log should know about the shards, for the signs of `diagnosis`. Takes a tenth of a second.

`run` is the Run of train.py.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np

from corpus.shards import Shards, open_shard
from diagnosis.history import History
from diagnosis.published import dataset_of, expectation, token_of, unit_of
from diagnosis.signs import DATA_SIGNS
from training.overfit import ENOUGH

# Of so many, the entropy of the 30,000 of GPT-2's ids that occur comes out too low by about
# 30,000 / 2 / 2 ** 20 = 0.014 nats (Miller 1955, "Note on the Bias of Information Estimates").
MOST_TOKENS = 1 << 20
PASSAGE, EVERY = 64, 64  # tokens of a passage, and one in how many is looked at


def data_facts(run) -> dict:
    """Return what is known about the shards. Its numbers are about the beginning of a training shard.

    Raises OSError or ValueError if that cannot be read.
    """
    train, val = run.train_data.shards, run.val_data.shards
    first = train.lengths.index(max(train.lengths))  # one may be empty
    ids = open_shard(train.paths[first])[:MOST_TOKENS]  # opened again, because a thread reads from the other
    counts = np.bincount(ids, minlength=run.train_data.vocab_size)
    shares = counts[counts > 0] / len(ids)
    vocabulary, most_common = run.train_data.vocab_size, int(counts.argmax())
    return {
        "dataset": dataset_of(train.source, Path(run.args.data_dir).resolve().name),
        "equal_shards": equal_shards(val, train),
        "tokens": len(ids),
        "unigram_entropy": float(-(shares * np.log(shares)).sum()),
        "largest": int(ids.max()),
        "upper_half": float(counts[vocabulary // 2 :].sum() / len(ids)),
        "end_of_text": float(counts[vocabulary - 1] / len(ids)),
        "most_common": most_common,
        "most_common_share": float(counts[most_common] / len(ids)),
        "repeated": repeated(ids),
    }


def equal_shards(*splits: Shards) -> list[str]:
    """Return the names of the first two shards with the same tokens, or an empty list."""
    seen: dict[bytes, Path] = {}
    for shards in splits:
        for path, tokens, found in zip(shards.paths, shards.lengths, shards.fingerprints, strict=True):
            if tokens and found in seen:  # the last shard of a task may be empty
                return [seen[found].name, path.name]
            seen[found] = path
    return []


def repeated(ids: np.ndarray) -> float:
    """Return the share of passages that have occurred before, wherever they begin.

    Which passages are looked at depends on their tokens alone, so that both copies of a text are.
    """
    hashes, length = ids.astype(np.uint64), 1
    while length < PASSAGE and len(hashes) > length:
        # Of twice as many tokens, from those of their halves.
        hashes = hashes[:-length] * np.uint64(0x9E3779B97F4A7C15) + hashes[length:]
        hashes ^= hashes >> np.uint64(29)
        length *= 2
    sample = hashes[hashes % np.uint64(EVERY) == 0]
    return 1 - len(np.unique(sample)) / len(sample) if len(sample) else 0.0


def prospects(run, tokens_at: Callable, expected: str | None) -> list[tuple[str, str]]:
    """Return lines, each with a name: what the losses of a run mean and which are good.

    A dry run also says what is wrong with the data, of which random ones say nothing; the log of a run does
    that by itself. `tokens_at` is that of train.py, and `expected` is what it says about the preset.
    """
    args, token = run.args, token_of(run.args.tokenizer)
    scale = (
        f"in {unit_of(args.tokenizer)}, the lower the better: guessing has {math.log(args.vocab_size):.2f}"
    )
    if run.train_data.shards.source.get("random"):
        return [("loss", scale)]
    history = History()
    history.run = {"args": vars(args), "data": data_facts(run)}
    scale += f", knowing only how frequent each {token} is {history.data['unigram_entropy']:.2f}"
    taken = (tokens_at(step, args) for step in range(args.max_steps))
    consumed = np.fromiter(accumulate(taken, initial=0), np.int64, args.max_steps + 1)
    good = expectation(history, consumed) or expected
    if args.overfit_batch:
        good = f"a loss of one batch below {ENOUGH}"
    lines = [("loss", scale), ("expect", good)]
    lines += [("warning", sign(history)) for sign in DATA_SIGNS if args.dry_run]
    return [(name, line) for name, line in lines if line]
