"""Signs that a run is not what its user thinks it is. None of them needs a reference run.

Each is a function of a run's History that returns a line or None. They keep quiet when in doubt: a run that
is warned about for nothing teaches its user not to read warnings.
"""

import math
import statistics
from collections.abc import Callable

from diagnosis.history import AFTER, BEFORE, History, number

# The embeddings of a new GPT-2 have a standard deviation of 0.02. The output of the last normalization has
# a length of sqrt(n_embd), which raises the first loss over ln(vocab_size) by n_embd * 0.02 ** 2 / 2: 0.15
# for a width of 768, and 0.32 for GPT-2 XL. This is three times as much.
FIRST_LOSS = 1.0
# The published run loses 4.8 nats in its first 250 steps, the demo 3 in 100. Less than this in at least 100
# steps after warm-up is no learning.
FLAT, FLAT_STEPS = 0.1, 100
# A model that learns is above the entropy of single tokens only while its loss falls by nats.
PLATEAU, PLATEAU_STEPS, PLATEAU_SHARE = 0.05, 200, 0.2
# Validation losses, always of the same tokens, rise by about 0.01 by chance while the learning rate is high.
# The patience is that of --preset text.
WORSE, BETTER, PATIENCE = 0.05, 0.02, 5
# Both the norm and the loss of the steps after it have to leave their medians: a single odd batch has a large
# norm and a high loss, but does not raise the losses after it. Ten median absolute deviations are about seven
# standard deviations where losses are normally distributed.
SPIKE, RAISED = 10, 3
MIN_DEVIATION = 0.01  # nats; where losses are almost equal, rounding must not count as a spike
HOUR_S, SLOWER = 3600, 1.2
MUCH_SLOWER = 2.0  # as two threads are beside one busy process on two cores: 203 ms instead of 51 (LOG.md)
# Share of the most frequent id. Measured: bytes of Python 0.30; GPT-2's tokens of Python 0.42, because every
# space of an indentation is a token.
MOST_COMMON = 0.6
# Share of the upper half of GPT-2's ids, which are in the order in which they were merged. Measured: English
# 0.05, Python 0.04; single sentences in Russian 0.21, Chinese 0.23, Japanese 0.45. FineWeb is English.
UPPER_HALF, UPPER_HALF_OF_ANY_TEXT = 0.2, 0.6
FEWEST_TOKENS = 100_000  # for shares to mean something
# Share of the sampled passages of 64 tokens that occurred before. Measured: bytes of Python 0.03, FineWeb-Edu
# 0.0015; a text that is there twice has 0.5.
REPEATED = 0.3


def wrong_first_loss(history: History) -> str | None:
    first, vocab_size = history.first, number(history.options, "vocab_size")
    if not first or first["step"] > 0 or number(first, "loss") is None or not vocab_size:
        return None
    loss, uniform = first["loss"], math.log(vocab_size)
    if loss > uniform + FIRST_LOSS:
        source = history.options.get("init_from")
        what = f"do the shards have the token ids of {source}?" if source else "check the initialization"
        return f"the first loss is {loss:.2f}, worse than the {uniform:.2f} of guessing: {what}"
    if loss < uniform - FIRST_LOSS and not history.options.get("init_from"):
        return (
            f"the first loss of a new model is {loss:.2f}, not the {uniform:.2f} of guessing: "
            "does the model see the token that it predicts?"
        )
    return None


def has_learned(history: History) -> bool:
    """Return whether the training loss has fallen since the first step, as far as the log tells."""
    first, loss = number(history.first or {}, "loss"), history.intervals[-1].train_loss
    return first is None or loss is None or loss <= first - FLAT


def flat_loss(history: History) -> str | None:
    last = history.intervals[-1] if history.intervals else None
    if not last or last.step < history.warmup_steps + FLAT_STEPS or has_learned(history):
        return None
    if history.first["step"] or history.options.get("init_from"):
        return None
    first, rate = history.first["loss"], f"--learning_rate {history.options.get('learning_rate')}"
    course = f"since the start: {first:.2f} at step 0, {last.train_loss:.2f} before step {last.step:,}"
    if last.train_loss < first + FLAT:
        question = f"Do gradients reach the weights, and is {rate} large enough?"
        return f"the training loss has not fallen {course}. {question}"
    if history.options.get("optimizer") == "muon":
        rate += f" or --muon_lr {history.options.get('muon_lr')}"
    return f"the training loss has risen {course}. Lower {rate}"


def only_frequencies(history: History) -> str | None:
    entropy, last = number(history.data, "unigram_entropy"), history.intervals[-1:]
    if not entropy or not last or not has_learned(history):
        return None
    (last,) = last
    start = min(last.step - PLATEAU_STEPS, int((1 - PLATEAU_SHARE) * last.step))
    part = [each for each in history.intervals if each.step >= start]
    losses = [loss for each in part for loss in (each.val_loss, each.train_loss) if loss is not None]
    if start < history.warmup_steps or len(part) < 3 or len(losses) < 2 * len(part):
        return None
    if min(losses) < entropy or part[0].val_loss - last.val_loss > PLATEAU:
        return None
    return (
        f"validation loss {last.val_loss:.2f} at step {last.step:,} is not below the {entropy:.2f} of "
        "knowing nothing but how frequent each token is, and no longer falls: the context is not used. Check "
        f"attention and positions, or try another --learning_rate than {history.options.get('learning_rate')}"
    )


def spike(history: History) -> str | None:
    steps = [step for step in history.recent if number(step, "norm") and number(step, "loss")]
    for i in range(BEFORE, len(steps) - AFTER):
        before = steps[i - BEFORE : i]
        step, after = steps[i], steps[i + 1 : i + 1 + AFTER]
        if step["step"] < history.warmup_steps + BEFORE:
            continue
        norm = statistics.median(each["norm"] for each in before)
        if step["norm"] <= SPIKE * norm:
            continue
        loss = statistics.median(each["loss"] for each in before)
        deviation = statistics.median(abs(each["loss"] - loss) for each in before)
        limit = loss + SPIKE * max(deviation, MIN_DEVIATION)
        if sum(each["loss"] > limit for each in after) >= RAISED:
            highest = max(each["loss"] for each in after)
            return (
                f"spike at step {step['step']:,}: gradient norm {step['norm']:.1f} after {norm:.2f}, loss up "
                f"to {highest:.2f} after {loss:.2f}. If it does not come down, resume an earlier checkpoint "
                "with a lower --learning_rate"
            )
    return None


def overfitting(history: History) -> str | None:
    found = [each for each in history.intervals if each.val_loss is not None]
    if not found:
        return None
    best = min(found, key=lambda each: each.val_loss)
    later = found[found.index(best) + 1 :]
    if len(later) < PATIENCE or statistics.fmean(x.val_loss for x in later[-3:]) < best.val_loss + WORSE:
        return None
    before, last = best.train_loss or later[0].train_loss, later[-1]
    if before is None or last.train_loss is None or before - last.train_loss < BETTER:
        return None
    remedies = ["more text", *([] if history.options.get("dropout") else ["--dropout 0.1"]), "fewer steps"]
    return (
        f"overfitting since step {best.step:,}: validation loss {last.val_loss:.3f} after "
        f"{best.val_loss:.3f}, while the training loss fell from {before:.3f} to {last.train_loss:.3f}. Try "
        f"{', '.join(remedies)} or --early_stop; model_best.pt is from step {best.step:,}"
    )


def slower(history: History) -> str | None:
    # The first interval of a session includes compilation.
    found = [each for each in history.intervals[history.resumed_at + 1 :] if each.speed]
    ends, total = [], 0.0
    for each in found:
        total += each.seconds
        ends.append(total)
    if not found:
        return None
    early = [x for x, end in zip(found, ends, strict=True) if end - x.seconds < HOUR_S]
    late = [x for x, end in zip(found, ends, strict=True) if end > total - HOUR_S]
    was, now = (statistics.median(x.speed for x in part) for part in (early, late))
    if early[-1].step >= late[0].step or was <= SLOWER * now:  # not two hours yet, or not slower
        return None
    line = f"steps have become slower: {was:,.0f} tokens/s in the first hour, {now:,.0f} in the last one"
    if any(x.waited is None for x in (*early, *late)):
        return line
    waited_was, waited = (statistics.median(x.waited for x in part) for part in (early, late))
    # Of the time that a token takes longer, the part that is spent waiting for data.
    if waited / now - waited_was / was > (1 / now - 1 / was) / 2:
        data_dir = history.options.get("data_dir")
        return f"{line}. They wait for data {waited:.0%} of the time: copy {data_dir} to a local disk"
    return f"{line}. It is not the data: look for heat (nvidia-smi -q -d PERFORMANCE) or other processes"


def crowded(history: History, idle_cores: Callable[[], float]) -> str | None:
    """Return why the minute of steps that has just ended took so long, if other processes use the cores.

    `idle_cores` measures how many are left for this process, and is asked only after a slow minute. This is
    `slower` for those who sit before the machine, and takes its place.
    """
    threads, minutes = number(history.options, "threads"), history.minutes
    if not threads or len(minutes) < 2 or history.run.get("world_size") != 1:
        return None
    last, was = minutes[-1], statistics.median(each.speed for each in minutes[:-1])
    if was <= MUCH_SLOWER * last.speed or (idle := round(idle_cores())) >= threads:
        return None
    before_ms, remedy = last.dt_ms * last.speed / was, "stop them"
    if threads > 1 and history.options.get("checkpoint_every"):
        remedy += f", or stop this run and continue it with --resume --threads {max(idle, 1)}"
    return (
        f"steps take {last.dt_ms:,.0f} ms instead of {before_ms:,.0f} since step {last.step:,}: other "
        f"processes use the machine; {remedy}"
    )


def equal_shards(history: History) -> str | None:
    shards = history.data.get("equal_shards")
    if not shards:
        return None
    what = "so validation measures memory" if any("val" in name for name in shards) else "and repeat"
    return f"{shards[0]} and {shards[1]} hold the same tokens, {what}: make the shards again"


def repeated_text(history: History) -> str | None:
    share = number(history.data, "repeated") or 0.0
    if share < REPEATED or (number(history.data, "tokens") or 0) < FEWEST_TOKENS:
        return None
    what = f"{share:.0%} of the passages in the first training shard repeat earlier ones"
    return f"{what}: was a file listed twice?"


def one_id(history: History) -> str | None:
    share, tokens = number(history.data, "most_common_share") or 0.0, number(history.data, "tokens") or 0
    if tokens < FEWEST_TOKENS or share < MOST_COMMON:
        return None
    most_common = number(history.data, "most_common")
    return f"{share:.0%} of the tokens in the first training shard are id {most_common}: is it padding?"


def another_tokenizer(history: History) -> str | None:
    tokens, upper, largest = (number(history.data, name) for name in ("tokens", "upper_half", "largest"))
    if history.options.get("tokenizer") != "gpt2" or tokens is None or tokens < FEWEST_TOKENS:
        return None
    is_english, line = history.data.get("dataset") is not None, "the first training shard looks like another "
    if largest is not None and largest <= 256:
        return f"{line}tokenizer's: no id is above {largest}, as in bytes: use --tokenizer byte"
    if upper is not None and upper > (UPPER_HALF if is_english else UPPER_HALF_OF_ANY_TEXT):
        return f"{line}tokenizer's: {upper:.0%} of its ids are above 25,128, in English 5%"
    # Documents of FineWeb have about 1,000 tokens.
    if is_english and number(history.data, "end_of_text") == 0:
        return f"{line}tokenizer's: none of {tokens:,} ids is end-of-text (50256)"
    return None


SIGNS = [
    equal_shards,
    another_tokenizer,
    one_id,
    repeated_text,
    wrong_first_loss,
    flat_loss,
    only_frequencies,
    spike,
    overfitting,
    slower,
]
DATA_SIGNS = SIGNS[:4]
