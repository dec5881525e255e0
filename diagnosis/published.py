"""What others have published for GPT-2 (124M), and which runs it may stand beside."""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from diagnosis.history import History, Interval, number
from diagnosis.signs import another_tokenizer, equal_shards
from runtime.log import is_number

# Published for 124M weights, by the data that they were trained and measured on, and by the kind of
# evaluation: losses on one set say nothing about the other. FineWeb-Edu: build-nanogpt's log, and OpenAI's
# GPT-2 as measured there (play.ipynb). FineWeb: the loss at which modded-nanogpt's runs end, and llm.c's
# discussion 481. HellaSwag is acc_norm.
REFERENCES = {
    "fineweb-edu": {
        "val": {"build-nanogpt": 3.05, "GPT-2": 3.2924},
        "hellaswag": {"GPT-2": 0.2955, "build-nanogpt": 0.304, "GPT-3": 0.337},
    },
    "fineweb": {
        "val": {"modded-nanogpt": 3.28},
        "hellaswag": {"GPT-2": 0.2955, "llm.c": 0.299, "GPT-3": 0.337},
    },
}
HELLASWAG = "HellaSwag items"
CHANCE = 0.25  # of finding the right one of HellaSwag's four endings
# What `hellaswag.identify` says of the 10,042 items on which all published scores were measured (LOG.md,
# 2026-11-28), and of corpus/hellaswag_demo.jsonl.
PUBLISHED_ITEMS, PUBLISHED_FINGERPRINT, DEMO_FINGERPRINT = 10042, "148f8efb84d40214", "84b1e3d9c40b4516"
NAMES = {"fineweb": "FineWeb", "fineweb-edu": "FineWeb-Edu"}
# Validation losses of llm.c's run on FineWeb, every EVERY steps from step 0 on, over the first 10,485,760
# tokens of the validation shard. Source: modded-nanogpt, records/track_1_short/2024-10-13_llmc/main.log.
EVERY = 250
LOSSES = (
    11.0092, 6.1710, 5.3743, 4.7097, 4.3170, 4.1296, 4.0060, 3.9189, 3.8585, 3.8237,
    3.7652, 3.7334, 3.6973, 3.6745, 3.6543, 3.6339, 3.6176, 3.6005, 3.5797, 3.5673,
    3.5535, 3.5404, 3.5298, 3.5182, 3.5069, 3.4992, 3.4912, 3.4810, 3.4726, 3.4650,
    3.4566, 3.4513, 3.4431, 3.4376, 3.4289, 3.4224, 3.4159, 3.4097, 3.4026, 3.3978,
    3.3924, 3.3865, 3.3809, 3.3751, 3.3706, 3.3647, 3.3615, 3.3551, 3.3509, 3.3462,
    3.3408, 3.3357, 3.3305, 3.3267, 3.3226, 3.3193, 3.3149, 3.3112, 3.3073, 3.3038,
    3.3003, 3.2969, 3.2939, 3.2914, 3.2882, 3.2863, 3.2841, 3.2821, 3.2803, 3.2785,
    3.2770, 3.2758, 3.2746, 3.2738, 3.2732, 3.2727, 3.2724, 3.2722, 3.2722,
)  # fmt: skip
SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
STEP_TOKENS, STEPS, WARMUP_STEPS, LEARNING_RATE = 524288, 19560, 700, 6e-4
# FineWeb-Edu is easier, by about as much as the published runs differ at their ends.
EASIER = {"fineweb": 0.0, "fineweb-edu": LOSSES[-1] - REFERENCES["fineweb-edu"]["val"]["build-nanogpt"]}
# Published repetitions of the run ended at 3.2722, 3.28 and 3.29: this is five times as much. An estimated
# curve may itself be wrong by half of that.
LIMITS = {"fineweb": 0.10, "fineweb-edu": 0.15}
# Until twice the warm-up, the published loss falls by 0.1 within 40 to 200 steps: another length of the
# warm-up would look like a distance.
SETTLED = 2
# While the rate is high, the loss stays above what it becomes as soon as the rate falls (Hägele et al. 2024,
# "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"). This is a share of the peak:
# the published cosine has lost a quarter of it a third into the run.
HIGHER_RATE = 0.25
# The losses of windows of 1,024 tokens differ by about 0.5, so the mean of 1,000 is uncertain by 0.016.
FEWEST_VAL_TOKENS = 1_000_000
# At equal tokens, half the batch size and twice as many steps are at least as good. Larger batches are worse
# early on, and smaller ones need other rates.
STEP_TOKENS_ALLOWED = STEP_TOKENS // 2, STEP_TOKENS
# The norms of the published run are 0.24 to 0.30 from step 2,500 on, so that --grad_clip 1 clips none. With
# fp16, GradScaler tries a larger scale every 2,000 steps, which costs a step: this is ten times as many.
CLIPPED, SKIPPED = 0.1, 1 / 200
UNEXPLAINED = "Neither options nor shards nor steps explain it: what has changed in the code?"


def dataset_of(source: dict, folder: str) -> str | None:
    """Return the key of NAMES that shards belong to, by the source in their manifest or else their folder."""
    files = source.get("files") or [[folder]]
    name = str(source.get("dataset") or files[0][0]).lower()
    if "fineweb" not in name or re.search(r"fineweb[-_]?2", name):  # FineWeb-2 has other languages
        return None
    return "fineweb-edu" if "edu" in name else "fineweb"


def unit_of(tokenizer: object) -> str:
    """Return the unit of losses. Those in different units do not compare."""
    return {"byte": "nats per byte", "gpt2": "nats per GPT-2 token"}.get(str(tokenizer), "nats per token")


def token_of(tokenizer: object) -> str:
    """Return what a model of these tokens predicts one by one."""
    return unit_of(tokenizer).removeprefix("nats per ")


def items_of(scores: dict) -> str:
    """Return what the items are called that a record of HellaSwag's scores is about."""
    found = scores.get("fingerprint")
    known = {DEMO_FINGERPRINT: "demo items", PUBLISHED_FINGERPRINT: HELLASWAG}
    return known.get(str(found), "other items" if found else "unknown items")


def name_of(kind: str, record: dict) -> str:
    """Return what an evaluation is called: scores of other items than HellaSwag's after those."""
    is_other = kind == "hellaswag" and items_of(record) != HELLASWAG
    return items_of(record) if is_other else kind


def with_error(record: dict, name: str) -> str:
    """Return a share in percent, with its standard error if the record has it."""
    error = record.get(f"{name}_stderr")
    if not is_number(error):
        return f"{record[name]:.2%}"
    digits = 2 if 0 < error < 0.01 else 1
    return f"{record[name]:.{digits}%} ± {error:.{digits}%}"


def describe_scores(scores: dict) -> str:
    """Return a record of HellaSwag's scores in words."""
    acc_norm, acc = (with_error(scores, name) for name in ("acc_norm", "acc"))
    return f"acc_norm {acc_norm}, acc {acc} of {scores['n']:,} {items_of(scores)}"


@dataclass(frozen=True)
class Comparison:
    """How a run compares with what is published for a key of NAMES.

    `reasons` says, for the published "curve" and for each kind of evaluation, why it does not.
    """

    dataset: str | None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        return self.reasons.get("curve")

    def values(self, kind: str) -> dict[str, float]:
        """Return the published values that may stand beside those of the run, by who has published them."""
        return {} if kind in self.reasons else REFERENCES[self.dataset or "fineweb-edu"].get(kind, {})

    def lines(self) -> list[str]:
        """Return what may not stand beside the run, and why."""
        names, lines = {"curve": "curve", "val": "losses", "hellaswag": "HellaSwag scores"}, []
        for reason in dict.fromkeys(self.reasons.values()):
            kinds = [names[kind] for kind, why in self.reasons.items() if why == reason]
            lines.append(f"not compared with the published {' and '.join(kinds)}: {reason}")
        return lines

    @property
    def limit(self) -> float:
        return LIMITS[self.dataset]

    @property
    def curve(self) -> str:
        return "the estimated curve" if EASIER[self.dataset] else "the published curve"

    @property
    def source(self) -> str:
        return "llm.c on FineWeb" + (", estimated for FineWeb-Edu" if EASIER[self.dataset] else "")

    def expected(self, tokens: float) -> float:
        """Return the published loss after this many tokens."""
        place = min(tokens / STEP_TOKENS / EVERY, len(LOSSES) - 1)
        i = min(int(place), len(LOSSES) - 2)
        return LOSSES[i] + (place - i) * (LOSSES[i + 1] - LOSSES[i]) - EASIER[self.dataset]

    def distance(self, interval: Interval) -> float | None:
        """Return how far a validation is above the published curve. It is negative below it."""
        if self.reason or interval.val_loss is None:
            return None
        return interval.val_loss - self.expected(interval.tokens)


def compare(history: History, asked: str | None = None) -> Comparison:
    """Return how a run compares. `asked` is what its user says that it was trained on, if they do."""
    known = history.data.get("dataset")
    known = known if isinstance(known, str) and known in NAMES else None
    return Comparison(known or asked, why_not(history, known, asked))


def why_not(history: History, known: str | None, asked: str | None) -> dict[str, str]:
    """Return which published values may not stand beside those of a run, and why: the one place that decides.

    Losses compare for the same tokens, data and windows, the curve also for the same network and batches.
    """
    tokenizer = history.options.get("tokenizer")
    losses = wrong_tokens(tokenizer) or wrong_data(history, known, asked)
    reasons = {
        "curve": losses or wrong_validation(history) or wrong_shape(history) or wrong_batches(history),
        "val": losses or wrong_validation(history),
        "hellaswag": wrong_scores(history.scores, tokenizer) if history.scores else None,
    }
    return {kind: reason for kind, reason in reasons.items() if reason}


def wrong_tokens(tokenizer: object) -> str | None:
    if tokenizer is None:
        return "its log does not say which tokenizer it has"
    return None if tokenizer == "gpt2" else f"its tokens are those of {tokenizer}, not of gpt2"


def wrong_data(history: History, known: str | None, asked: str | None) -> str | None:
    if known and asked and asked != known:
        return f"it was trained on {NAMES[known]}: use --references {known}"
    if not known and not asked:
        what = f"{history.options.get('data_dir')} is not known to be FineWeb or FineWeb-Edu"
        return f"{what}: if it is, use --references fineweb or edu"
    return None


def wrong_scores(scores: dict, tokenizer: object) -> str | None:
    """Return why published scores may not stand beside these: acc_norm depends on the tokens, too."""
    if (items := items_of(scores)) != HELLASWAG:
        return f"it was scored on {items}, not on the {PUBLISHED_ITEMS:,} of HellaSwag"
    return wrong_tokens(tokenizer)


def wrong_validation(history: History) -> str | None:
    block_size, val_tokens = (number(history.options, name) for name in ("block_size", "val_tokens"))
    if block_size != SHAPE["block_size"]:
        return f"--block_size is {block_size}, not {SHAPE['block_size']}"
    if val_tokens is None or val_tokens < FEWEST_VAL_TOKENS:
        return (
            f"--val_tokens is {val_tokens}: with fewer than {FEWEST_VAL_TOKENS:,} the loss is too uncertain"
        )
    return None


def wrong_shape(history: History) -> str | None:
    for name, size in SHAPE.items():
        if (found := history.options.get(name)) != size:
            return f"--{name} is {found}, not {size}"
    return None


def wrong_batches(history: History) -> str | None:
    (least, most), step_tokens = STEP_TOKENS_ALLOWED, number(history.options, "total_batch_size")
    if step_tokens is None or not least <= step_tokens <= most:
        return f"a step has {step_tokens} tokens, not {least} to {most}"
    return None


def classic_height(tokens: float) -> float:
    """Return the published run's learning rate as a share of its peak."""
    step = tokens / STEP_TOKENS
    if step < WARMUP_STEPS:
        return step / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * min((step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS), 1)))


def too_early(history: History, interval: Interval) -> str | None:
    """Return why a validation cannot be judged yet, or None if it can."""
    peak, step_tokens = (number(history.options, name) for name in ("learning_rate", "total_batch_size"))
    settled = SETTLED * max(history.warmup_steps, math.ceil(WARMUP_STEPS * STEP_TOKENS / step_tokens))
    if interval.step < settled:
        return f"the loss compares from step {settled:,} on, after warm-up"
    if peak and interval.lr and interval.lr / peak > classic_height(interval.tokens) + HIGHER_RATE:
        return "its learning rate has yet to fall"
    return None


def judged(history: History, comparison: Comparison) -> list[tuple[Interval, float]]:
    """Return the validations that can be judged, with their distances."""
    if comparison.reason:
        return []
    found = [(each, comparison.distance(each)) for each in history.intervals]
    return [(each, d) for each, d in found if d is not None and not too_early(history, each)]


def since(history: History, comparison: Comparison) -> int | None:
    """Return the step since which a run is too far above the curve; twice in a row at least, or None."""
    found = judged(history, comparison)
    above = list(takewhile(lambda pair: pair[1] > comparison.limit, reversed(found)))
    is_newest = above and above[0][0] is history.intervals[-1]
    return above[-1][0].step if is_newest and len(above) >= 2 else None


def verdict(history: History, comparison: Comparison) -> str | None:
    """Return one line about the newest validation of a run that can be compared."""
    if comparison.reason or not history.intervals:
        return None
    last = history.intervals[-1]
    distance = comparison.distance(last)
    if distance is None:
        return f"no validation loss at step {last.step:,}"
    if reason := too_early(history, last):
        return f"too early to say: {reason}; {beside(comparison, distance)} at step {last.step:,}"
    where = f"validation loss {last.val_loss:.2f} is {beside(comparison, distance)} at step {last.step:,}"
    begun = since(history, comparison)
    if begun is not None:
        found = causes(history) or [UNEXPLAINED]
        return f"{where}, since step {begun:,}. {'; '.join(found)}"
    if abs(distance) <= comparison.limit / 2:
        within = max(math.ceil(100 * abs(distance)), 1) / 100
        return f"validation loss within {within:.2f} of {comparison.curve} at step {last.step:,}"
    return where


def beside(comparison: Comparison, distance: float) -> str:
    """Return where a validation is, in words."""
    return f"{abs(distance):.2f} {'above' if distance >= 0 else 'below'} {comparison.curve}"


def above_published(history: History) -> str | None:
    """The sign that needs a reference: the validation loss is too far above the published curve."""
    comparison = compare(history)
    return None if since(history, comparison) is None else verdict(history, comparison)


def causes(history: History) -> list[str]:
    """Return what could explain a loss that is too high, of what a log can show."""
    found, option, last = [], history.options.get, history.intervals[-1]
    rate = number(history.options, "learning_rate")
    if option("optimizer") == "adamw" and rate and not 2 / 3 <= rate / LEARNING_RATE <= 1.5:
        found.append(f"--learning_rate is {rate:g}, in the published run {LEARNING_RATE:g}")
    if option("total_batch_size") != STEP_TOKENS:
        found.append(
            f"--total_batch_size is {option('total_batch_size'):,}, in the published run {STEP_TOKENS:,}"
        )
    if last.step and history.skipped / last.step > SKIPPED:
        scale = (
            ", and --dtype float16 halves its scale each time"
            if history.run.get("dtype") == "float16"
            else ""
        )
        found.append(f"{history.skipped} steps were skipped{scale}")
    if last.clipped > CLIPPED:
        found.append(
            f"gradients of {last.clipped:.0%} of the last steps were clipped, in the published run none"
        )
    found += [line for sign in (another_tokenizer, equal_shards) if (line := sign(history))]
    if option("init_from"):
        found.append(f"--init_from is {option('init_from')}")
    if option("dropout"):
        found.append(f"--dropout is {option('dropout')}, in the published run 0")
    return found


def expectation(history: History, consumed: Sequence[int]) -> str | None:
    """Return what a run that can be compared should reach, or None.

    `consumed` are the tokens before each step, and in all.
    """
    comparison, steps = compare(history), len(consumed) - 1
    if comparison.reason:
        return None
    marks = [mark for mark in (250, 1000, 5000) if mark < steps]
    values = [f"{comparison.expected(consumed[mark]):.2f} at step {mark:,}" for mark in marks]
    values.append(f"{comparison.expected(consumed[-1]):.2f} at the end")
    estimated = ", estimated for FineWeb-Edu" if EASIER[comparison.dataset] else ""
    is_classic = history.options.get("optimizer") == "adamw" and history.options.get("schedule") == "cosine"
    if is_classic and consumed[-1] > 0.9 * STEPS * STEP_TOKENS:
        return f"comparable with the published run: expect {', '.join(values)}{estimated}"
    return f"comparable with the published run, which it should not be above: {', '.join(values)}{estimated}"


def curve_points(comparison: Comparison, tokens: float) -> list[tuple[float, float]]:
    """Return tokens and losses of the published curve up to this many tokens."""
    marks = [i * EVERY * STEP_TOKENS for i in range(len(LOSSES))]
    shown = marks[: bisect_right(marks, tokens)]
    if tokens < marks[-1]:
        shown.append(tokens)
    return [(mark, comparison.expected(mark)) for mark in shown]
