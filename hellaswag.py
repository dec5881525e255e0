"""Score a language model on HellaSwag: which of four endings does it find most likely? (Zellers et al. 2019)

    python hellaswag.py --model gpt2                 # downloads the 10,042 validation items, 6 MB, once
    python hellaswag.py --model log --limit 200      # the newest checkpoint of a run
    python hellaswag.py --model log --lm_eval --output results.json

Prints accuracy and, with --output, writes it as JSON. There are two ways to score, and their results cannot
be compared with each other:

                              completion (ours, train.py's)    lm-evaluation-harness (--lm_eval)
                              acc        acc_norm              acc        acc_norm
    text before the ending    the context                      activity label: context, markup removed
    acc_norm divides by       tokens of the ending             characters of the ending
    GPT-2 (124M)              28.59 %    29.55 %               28.92 %    31.14 %
    GPT-2 XL (1.5B)           38.42 %    48.93 %               40.04 %    50.89 %
    GPT-3 (125M)                         33.7 %

Published values: build-nanogpt's hellaswag.py for GPT-2 in both ways, Brown et al. 2020, table H.1, for GPT-3
(zero-shot, its own rendering). Chance is 25 %. On 10,042 items the standard error is about 0.46 %.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch.nn import functional as F

from corpus.rows import rows_of
from corpus.tokenizer import tokenizer_for
from diagnosis.published import (
    PUBLISHED_FINGERPRINT,
    PUBLISHED_ITEMS,
    describe_scores,
    items_of,
    wrong_scores,
)
from formats.checkpoint import describe_pretrained
from model import GPT, head_rows
from runtime import hub
from runtime.cli import Parser, Range, check_options, run, user_path, watched
from runtime.distributed import Interrupted
from runtime.files import check_output, parsing, write_atomically, write_json
from runtime.hardware import choose_device, masked_attention

DATA = "hellaswag_val.jsonl"
DEMO_ITEMS = Path(__file__).parent / "corpus" / "hellaswag_demo.jsonl"  # written for this project
DOWNLOAD_AGAIN = "delete the file to download it again"
HUB_DATASET = "Rowan/hellaswag"
ADVICE = (
    "use --hellaswag_every 0, or pass a file to --hellaswag_data (hellaswag.py: --data), or set HF_ENDPOINT "
    "to a mirror"
)
PUBLISHED = {"completion": "GPT-2 28.59 / 29.55, GPT-2 XL 38.42 / 48.93, GPT-3 125M - / 33.7",
             "lm_eval": "GPT-2 28.92 / 31.14, GPT-2 XL 40.04 / 50.89"}  # fmt: skip


def download(path: str | Path = DATA) -> Path:
    """Return the file of the validation items; the first call writes it, from the Hub.

    Raises FileNotFoundError or ConnectionError, within a minute, if the Hub does not have or give it.
    """
    path = Path(path)
    if path.exists():
        return path
    fetch = partial(hub.fetch, HUB_DATASET, repo_type="dataset", what="download HellaSwag", advice=ADVICE)
    try:
        source = fetch("data/validation-00000-of-00001.parquet")
    except FileNotFoundError:  # the Hub converts every dataset itself
        source = fetch("default/validation/0000.parquet", revision="refs/convert/parquet")
    lines = [json.dumps(item) + "\n" for item in load_items(source, DOWNLOAD_AGAIN)]
    # Another run may be doing the same.
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    write_atomically(mine, lambda file: file.write("".join(lines).encode()))
    os.replace(mine, path)
    return path


def load_items(path: str | Path, advice: str = "fix it or use another file") -> list[dict]:
    """Read items (`ctx`, `label`, four `endings`) from a .jsonl, .jsonl.gz or .parquet file, or those of
    this project for "demo".

    A label may be a number or text, and becomes a number. Without an `ind`, items are numbered from 0. Raises
    FileNotFoundError, or ValueError naming the bad row, with `advice`.
    """
    path = DEMO_ITEMS if str(path) == "demo" else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no HellaSwag items at {path}: check it, or leave it out to download them")
    items, what = [], "a HellaSwag item"
    for where, item in rows_of(path, what, advice):
        with parsing(where, what, advice):
            items.append({"ind": len(items), **_check_item(item)})
    if not items:
        raise ValueError(f"{path} holds no items: {advice}")
    return items


def _check_item(item: dict) -> dict:
    if not isinstance(item, dict):
        raise ValueError("it is not a JSON object")
    missing = {"ctx", "label", "endings"} - item.keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    if any(not isinstance(item.get(name, ""), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        raise ValueError("its activity_label, ctx_a and ctx_b are not text")
    if str(item["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(f"its label is {item['label']!r}, not 0, 1, 2 or 3")
    if not isinstance(item["ctx"], str) or not item["ctx"].strip():
        raise ValueError("its ctx is empty")
    endings = item["endings"] if isinstance(item["endings"], list) else []
    if len(endings) != 4 or not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise ValueError("it needs four non-empty endings")
    return {**item, "label": int(item["label"])}


def identify(items: list[dict]) -> dict[str, str]:
    """Return the `fingerprint` of items: a hash of contexts, endings and labels in order, however stored.

    If these are neither the items of the published scores nor those of the demo, `warning` says so.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item["ctx"], item["endings"], item["label"]]).encode() + b"\n")
    fingerprint = digest.hexdigest()[:16]
    if items_of({"fingerprint": fingerprint}) != "other items":
        return {"fingerprint": fingerprint}
    how = f"{len(items):,} items" if len(items) != PUBLISHED_ITEMS else "as many, but other texts"
    return {
        "fingerprint": fingerprint,
        "warning": f"these are not the {PUBLISHED_ITEMS:,} items of the published scores: {how}, "
        f"fingerprint {fingerprint} instead of {PUBLISHED_FINGERPRINT}",
    }


@dataclass(frozen=True)
class Example:
    """A tokenized item. For `acc_norm`, an ending's loss is divided by its entry in `lengths` or, if that is
    None, by its number of scored tokens."""

    ind: int
    label: int
    context: list[int]
    endings: list[list[int]]
    lengths: list[int] | None = None


def render(items: list[dict], tokenizer: tiktoken.Encoding) -> list[Example]:
    """Tokenize items as the public GPT-2 reproductions do: the context and, with a leading space, the ending
    are tokenized separately."""
    return [
        Example(
            item["ind"],
            item["label"],
            tokenizer.encode_ordinary(item["ctx"]),
            [tokenizer.encode_ordinary(" " + ending) for ending in item["endings"]],
        )
        for item in items
    ]


def render_lm_eval(items: list[dict], tokenizer: tiktoken.Encoding) -> list[Example]:
    """Tokenize items as lm-evaluation-harness does (task `hellaswag`, version 1.0, zero-shot).

    WikiHow markup is removed, the activity label comes first, and an ending's tokens are those that it adds
    to the tokens of its context.
    """

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    examples = []
    for item in items:
        in_parts = {"ctx_a", "ctx_b"} <= item.keys()
        ctx = f"{item['ctx_a']} {item['ctx_b'].capitalize()}" if in_parts else item["ctx"]
        query = clean(f"{item['activity_label']}: {ctx}")
        # The harness moves trailing white space of the context to the ending.
        stem = query.rstrip()
        context = tokenizer.encode_ordinary(stem)
        endings = [clean(ending) for ending in item["endings"]]
        tokens = [tokenizer.encode_ordinary(f"{query} {ending}")[len(context) :] for ending in endings]
        examples.append(
            Example(item["ind"], item["label"], context, tokens, [len(ending) for ending in endings])
        )
    return examples


@dataclass(frozen=True)
class Benchmark:
    """Examples to score, and what `identify` says of the items in the file that they come from."""

    examples: list[Example]
    about: dict[str, str]


@dataclass(frozen=True)
class Sequence:
    """One row for the model: a context and the endings that share it, with their indices in the list of all
    losses."""

    context: list[int]
    endings: list[list[int]]
    places: list[int]

    def __len__(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def to_sequences(examples: list[Example], limit: int) -> list[Sequence]:
    """Put the endings of an example into one row; if one is too long, each gets a row of its own that keeps
    the last `limit` tokens."""
    sequences = []
    for i, example in enumerate(examples):
        places = [4 * i + k for k in range(4)]
        if len(example.context) + max(map(len, example.endings)) <= limit:
            sequences.append(Sequence(example.context, example.endings, places))
            continue
        for place, ending in zip(places, example.endings, strict=True):
            row = (example.context + ending)[-limit:]
            cut = max(len(row) - len(ending), 1)  # the first token of a row has nothing to predict it from
            sequences.append(Sequence(row[:cut], [row[cut:]], [place]))
    return sequences


def to_batches(sequences: list[Sequence], batch_tokens: int) -> Iterator[list[Sequence]]:
    """Group sequences of similar length into batches of up to `batch_tokens`, padding included.

    The longest come first: if memory runs out, it does so at the start.
    """
    batch: list[Sequence] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def score_batch(model: GPT, batch: list[Sequence]) -> tuple[list[int], torch.Tensor]:
    """Return, for each ending token in a batch, the index of its ending and its loss in nats.

    A row holds a context once, followed by the endings side by side. Each ending sees the context and itself,
    at the positions that it would have alone. Only positions that predict an ending token go through the
    head.
    """
    device = model.transformer.wte.weight.device
    T = -(-max(map(len, batch)) // 8) * 8  # masked attention kernels on GPUs need multiples of 8
    idx, positions, segments = (np.zeros((len(batch), T), dtype=np.int64) for _ in range(3))
    segments -= 1  # padding is a segment of its own, which no token sees
    places, sources, targets = [], [], []
    for b, sequence in enumerate(batch):
        n = len(sequence.context)
        idx[b, :n], positions[b, :n], segments[b, :n] = sequence.context, np.arange(n), 0
        end = n
        for k, (ending, place) in enumerate(zip(sequence.endings, sequence.places, strict=True), start=1):
            start, end = end, end + len(ending) - 1
            idx[b, start:end], positions[b, start:end] = ending[:-1], np.arange(n, n + len(ending) - 1)
            segments[b, start:end] = k
            places += [place] * len(ending)
            # The end of the context predicts the first token, and each ending token the next one.
            sources += [b * T + n - 1, *range(b * T + start, b * T + end)]
            targets += ending
    idx, positions, segments = (torch.from_numpy(array).to(device) for array in (idx, positions, segments))
    sources, targets = (torch.tensor(numbers, device=device) for numbers in (sources, targets))
    same = segments[:, None, :] == segments[:, :, None]  # (B, T, T), query before key
    mask = (same | (segments[:, None, :] == 0)).tril()[:, None]  # (B, 1, T, T)
    with masked_attention():
        hidden = model.trunk(idx, positions=positions, mask=mask).flatten(0, 1)
    hidden = hidden[sources]  # (ending tokens, n_embd)
    n = head_rows(device, len(hidden), compiled=False)
    losses = [
        F.cross_entropy(model.lm_head(rows).float(), wanted, reduction="none")
        for rows, wanted in zip(hidden.split(n), targets.split(n), strict=True)
    ]
    return places, torch.cat(losses)


@torch.no_grad()
def evaluate(
    model: GPT, examples: list[Example], *, batch_tokens: int | None = None, stop: object = False
) -> dict[str, float | int | list[dict]]:
    """Score all examples and return `acc`, `acc_norm`, their standard errors, `n` and `seconds`; and in
    `items`, for each example, the chosen endings (`pred`, `pred_norm`) and the four losses in nats.

    The HellaSwag validation set has 10,042 items; GPT-2 (124M) scores 28.59 % and 29.55 %. Under
    torch.distributed, every rank has to call this. Each scores its share of the batches and returns the whole
    result, which does not depend on the number of ranks. Raises ValueError if a loss is not finite, and
    Interrupted on every rank once `stop` is true on one of them.
    """
    start = time.perf_counter()
    dist = torch.distributed if torch.distributed.is_initialized() else None
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist else (0, 1)
    was_training = model.training
    model.eval()
    if batch_tokens is None:
        # On a CPU, matmuls are equally fast for few tokens, and small batches need less padding.
        batch_tokens = 512 if model.transformer.wte.weight.device.type == "cpu" else 16384
    # The harness keeps one more token, because the last one is predicted but not read.
    limit = model.config.block_size + (examples[0].lengths is not None)
    batches = list(to_batches(to_sequences(examples, limit), batch_tokens))[rank::world_size]
    sums, counts = np.zeros(4 * len(examples)), np.zeros(4 * len(examples))
    scored = [score_batch(model, batch) for batch in watched(batches, "scores", stop=stop)]
    for places, losses in scored:
        sums += np.bincount(places, weights=losses.cpu().numpy(), minlength=len(sums))
        counts += np.bincount(places, minlength=len(counts))
    model.train(was_training)
    if dist:
        total = torch.from_numpy(np.stack((sums, counts))).to(model.transformer.wte.weight.device)
        dist.all_reduce(total)
        sums, counts = total.cpu().numpy()
    if not counts.all():  # every ending has tokens, so a rank has not scored all of its batches
        raise Interrupted
    if not np.isfinite(sums).all():
        ind = examples[int(np.isfinite(sums).argmin()) // 4].ind
        raise ValueError(
            f"the loss of item {ind} is not finite: the weights have diverged, use an older "
            "checkpoint and a lower learning rate"
        )
    lengths = counts
    if examples[0].lengths is not None:
        lengths = np.concatenate([example.lengths for example in examples])
    losses = sums.reshape(-1, 4)
    chosen, chosen_norm = losses.argmin(axis=1), (losses / lengths.reshape(-1, 4)).argmin(axis=1)
    labels = np.array([example.label for example in examples])
    n, acc, acc_norm = len(labels), float((chosen == labels).mean()), float((chosen_norm == labels).mean())
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "acc_stderr": math.sqrt(acc * (1 - acc) / max(n - 1, 1)),
        "acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / max(n - 1, 1)),
        "n": n,
        "seconds": time.perf_counter() - start,
        "items": [
            {"ind": e.ind, "label": e.label, "pred": int(p), "pred_norm": int(q), "losses": each.tolist()}
            for e, p, q, each in zip(examples, chosen, chosen_norm, losses, strict=True)
        ],
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    model = "checkpoint, run folder, Hugging Face folder, or gpt2 … gpt2-xl"
    add("--model", type=user_path, default="log", help=model)
    items = ".jsonl, .jsonl.gz or .parquet, whose rows have ctx (the text before), endings (four texts) and "
    items += f"label (0 to 3, the right one); or demo: 44 items (default: {DATA}, downloaded if missing)"
    add("--data", type=user_path, help=items)
    add("--limit", type=Range(int, 1), help="score only the first N items (default: all)")
    add("--lm_eval", action="store_true", help="also score as lm-evaluation-harness does; doubles the time")
    add("--output", type=user_path, help="write the result to this .json file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="model dtype")
    batch_tokens = "tokens per forward pass (default: 512 on CPUs, else 16384)"
    add("--batch_tokens", type=Range(int, 1), help=batch_tokens)
    add("--n_head", type=Range(int, 1), help="attention heads, for a checkpoint that does not say it")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    if args.output:
        check_output(args.output)
    items = load_items(args.data) if args.data else load_items(download(), DOWNLOAD_AGAIN)
    for item in items if args.lm_eval else ():
        if "activity_label" not in item:
            raise ValueError(f"item {item['ind']} has no activity_label: add it, or leave out --lm_eval")
    about, items = identify(items), items[: args.limit]
    if "warning" in about:
        print(about["warning"], file=sys.stderr, flush=True)
    device = choose_device(args.device)
    model = GPT.from_pretrained(args.model, n_head=args.n_head)
    if line := describe_pretrained(args.model, model.metadata):
        print(line, file=sys.stderr, flush=True)
    tokenizer = tokenizer_for(model)
    model.to(device=device, dtype=getattr(torch, args.dtype))
    results = {}
    for style, renderer in (("completion", render), ("lm_eval", render_lm_eval))[: 1 + args.lm_eval]:
        result = evaluate(model, renderer(items, tokenizer), batch_tokens=args.batch_tokens)
        results[style] = result | about
        name = {"completion": "completion style", "lm_eval": "lm-evaluation-harness style"}[style]
        print(f"{name}: {describe_scores(results[style])} (± one standard error), {result['seconds']:.1f} s")
        if not wrong_scores(about, tokenizer.name):
            print(f"  published acc / acc_norm on all 10,042 items: {PUBLISHED[style]}")
    if args.output:
        output = results["completion"]
        if args.lm_eval:
            output["lm_eval"] = results["lm_eval"]
        write_json(args.output, output)


if __name__ == "__main__":
    run(main, parse_args, needs_output=False)
