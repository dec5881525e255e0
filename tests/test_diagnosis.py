"""What a run says about itself, on synthetic logs on both sides of each threshold."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import plot
import train
from diagnosis import history, published
from diagnosis.watch import Watch
from training import records
from training.facts import repeated

CLASSIC = {
    **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    **{"tokenizer": "gpt2", "data_dir": "fineweb10B", "total_batch_size": 524288, "val_tokens": 10485760},
    **{
        "optimizer": "adamw",
        "schedule": "cosine",
        "learning_rate": 6e-4,
        "warmup_steps": 700,
        "dropout": 0.0,
    },
    **{"max_steps": 19560, "grad_clip": 1.0, "init_from": None, "overfit_batch": False},
}
ENGLISH = {
    **{
        "dataset": "fineweb",
        "equal_shards": [],
        "tokens": 1 << 20,
        "unigram_entropy": 7.35,
        "largest": 50256,
    },
    **{
        "upper_half": 0.05,
        "end_of_text": 0.001,
        "most_common": 11,
        "most_common_share": 0.045,
        "repeated": 0.0,
    },
}
# llm.c's log at four of the steps, as in its file.
KNOWN = {250: 6.1710, 1000: 4.3170, 1750: 3.9189, 19500: 3.2722}
CONSUMED = [step * 524288 for step in range(published.STEPS + 1)]


def run_record(step=0, data=(), **options):
    args = CLASSIC | options
    planned = args["max_steps"] * args["total_batch_size"]
    about = {"args": args, "data": ENGLISH | dict(data), "planned_tokens": planned}
    return {"step": step, "kind": "run", **about}


def log_of(val, train=None, steps=2000, every=250, run=None, **values):
    """Return the records of a run whose losses are functions of the step; so may be other numbers."""
    run = run or run_record()
    step_tokens, noise = run["args"]["total_batch_size"], random.Random(0)
    records = [run]
    for step in range(steps + 1):
        if step % every == 0:
            tokens = step * step_tokens
            records.append({"step": step, "kind": "val", "loss": val(step), "tokens": tokens})
        height = published.classic_height(step * step_tokens)
        record = {
            "loss": (train or val)(step) + noise.gauss(0, 0.03),
            "lr": run["args"]["learning_rate"] * height,
        }
        record |= {
            "norm": 0.3,
            "dt_ms": 1000.0,
            "tokens_per_s": float(step_tokens),
            "waited_ms": 1.0,
            "skipped": 0,
        }
        record |= {name: value(step) if callable(value) else value for name, value in values.items()}
        records.append({"step": step, "kind": "train", **record})
    return records


def said(records):
    """Return the warnings of a run by their signs, each with the step at which it was said."""
    watch, found = Watch(), {}
    for record in records:
        for sign, line in watch.feed(record):
            assert sign not in found
            found[sign] = (record["step"], line)
    return found


def curve(step):
    steps = np.arange(len(published.LOSSES)) * 250
    return float(np.interp(step, steps, published.LOSSES))


def above(step, distance, since=1500):
    return curve(step) + distance * (step >= since)


def write(records, folder="log"):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curve_is_that_of_the_published_run():
    comparison = published.Comparison("fineweb")
    assert len(published.LOSSES) == 79
    for step, loss in KNOWN.items():
        assert comparison.expected(step * 524288) == pytest.approx(loss, abs=1e-9)
    assert comparison.expected(125 * 524288) == pytest.approx((11.0092 + 6.1710) / 2)
    assert comparison.expected(1e12) == pytest.approx(3.2722)
    assert published.Comparison("fineweb-edu").expected(19500 * 524288) == pytest.approx(3.05)


def test_run_on_the_curve_says_nothing_but_that():
    records = log_of(curve, steps=4000)
    watch = Watch()
    assert not [line for record in records for line in watch.feed(record)]
    assert watch.lines() == ["validation loss within 0.01 of the published curve at step 4,000"]
    assert watch.distance() == pytest.approx(0)


def test_run_above_the_curve_is_warned_about_at_the_second_validation():
    found = said(log_of(lambda step: above(step, 0.30), run=run_record(learning_rate=6e-3)))
    step, line = found.pop("above_published")
    assert not found and step == 1750
    assert line.startswith(
        "validation loss 4.22 is 0.30 above the published curve at step 1,750, since step 1,500. "
        "--learning_rate is 0.006, in the published run 0.0006"
    )


@pytest.mark.parametrize(("dataset", "limit"), [("fineweb", 0.10), ("fineweb-edu", 0.15)])
def test_warning_begins_at_its_limit(dataset, limit):
    shift = published.EASIER[dataset]
    run = run_record(data={"dataset": dataset})
    for distance, warned in ((limit - 0.01, False), (limit + 0.01, True)):
        found = said(log_of(lambda step, d=distance: above(step, d) - shift, run=run))
        assert ("above_published" in found) == warned
    assert "the estimated curve" in str(found) or dataset == "fineweb"
    once = said(log_of(lambda step: above(step, 0.5) if step == 1500 else curve(step)))
    early = said(log_of(lambda step: above(step, 0.5, since=0), steps=1500))  # once after the warm-up
    assert not once and not early


def test_higher_rate_is_waited_for():
    """At a constant rate, the loss falls late."""
    late = dict(val=lambda step: above(step, 0.12, since=8000), steps=8500, run=run_record(schedule="wsd"))
    assert set(said(log_of(**late))) == {"above_published"}  # at the rates of the published run
    watch = Watch()
    assert not [line for record in log_of(**late, lr=6e-4) for line in watch.feed(record)]
    reason = "its learning rate has yet to fall"
    assert watch.lines() == [f"too early to say: {reason}; 0.12 above the published curve at step 8,500"]


def test_causes_are_those_that_the_log_shows():
    def line(run=None, **values):
        return said(log_of(lambda step: above(step, 0.2), run=run, **values))["above_published"][1]

    assert line().endswith(f"since step 1,500. {published.UNEXPLAINED}")
    half = run_record(
        dropout=0.1, init_from="other", total_batch_size=262144, data={"equal_shards": ["a", "b"]}
    )
    found = said(log_of(lambda step: above(step / 2, 0.2), steps=4000, run=half))["above_published"][1]
    for text in ("--total_batch_size is 262,144", "--dropout is 0.1", "--init_from is other", "a and b hold"):
        assert text in found
    assert "100% of the last steps were clipped" in line(norm=1.5)
    fp16 = run_record() | {"dtype": "float16"}
    skips = line(run=fp16, skipped=lambda step: step // 100)
    assert "17 steps were skipped, and --dtype float16 halves its scale" in skips
    assert line(run=fp16, skipped=lambda step: step // 1000).endswith(published.UNEXPLAINED)


@pytest.mark.parametrize(
    ("options", "data", "reason"),
    [
        ({}, {}, None),
        ({"total_batch_size": 262144}, {}, None),
        ({"n_layer": 2}, {}, "--n_layer is 2, not 12"),
        ({"tokenizer": "byte"}, {}, "its tokens are those of byte, not of gpt2"),
        (
            {},
            {"dataset": None},
            "fineweb10B is not known to be FineWeb or FineWeb-Edu: if it is, use --references fineweb or edu",
        ),
        ({"tokenizer": None}, {}, "its log does not say which tokenizer it has"),
        ({"total_batch_size": 65536}, {}, "a step has 65536 tokens, not 262144 to 524288"),
        (
            {"val_tokens": 65536},
            {},
            "--val_tokens is 65536: with fewer than 1,000,000 the loss is too uncertain",
        ),
    ],
)
def test_run_that_cannot_be_compared_says_why(options, data, reason):
    history = Watch.of_log({"run": [run_record(data=data, **options)]}).history
    assert published.compare(history).reason == reason
    assert (published.expectation(history, CONSUMED) is None) == (reason is not None)


HELLASWAG, DEMO = published.PUBLISHED_FINGERPRINT, published.DEMO_FINGERPRINT


@pytest.mark.parametrize(
    ("options", "data", "fingerprint", "asked", "stand"),
    [
        ({}, {}, HELLASWAG, None, {"curve", "val", "hellaswag"}),
        ({"n_layer": 24}, {}, HELLASWAG, "fineweb", {"val", "hellaswag"}),
        ({"n_layer": 24}, {}, DEMO, None, {"val"}),
        ({}, {}, "another", None, {"curve", "val"}),
        ({}, {}, None, None, {"curve", "val"}),  # an older log
        ({"tokenizer": "byte"}, {}, HELLASWAG, "fineweb", set()),
        ({}, {}, HELLASWAG, "fineweb-edu", {"hellaswag"}),
        ({}, {"dataset": None}, HELLASWAG, None, {"hellaswag"}),
        ({}, {"dataset": None}, HELLASWAG, "fineweb-edu", {"curve", "val", "hellaswag"}),
        ({}, {"dataset": []}, DEMO, None, set()),
    ],
)
def test_what_may_stand_beside_a_run(options, data, fingerprint, asked, stand):
    scores = {"step": 0, "kind": "hellaswag", "acc": 0.25, "acc_norm": 0.3, "n": 9}
    scores["fingerprint"] = fingerprint
    history = Watch.of_log({"run": [run_record(data=data, **options)], "hellaswag": [scores]}).history
    comparison = published.compare(history, asked)
    assert comparison.reasons.keys() == {"curve", "val", "hellaswag"} - stand
    for kind in ("val", "hellaswag"):
        assert bool(comparison.values(kind)) == (kind in stand)


@pytest.mark.parametrize(
    ("source", "folder", "dataset"),
    [
        ({"dataset": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT"}, "any", "fineweb-edu"),
        ({"dataset": "kjj0/fineweb10B-gpt2"}, "edu", "fineweb"),
        ({"dataset": "HuggingFaceFW/fineweb-2"}, "fineweb", None),
        ({"files": [["books.txt", 9]]}, "edu_fineweb10B", None),
        ({"files": [["fineweb_train_000001.bin", 9]]}, "any", "fineweb"),
        ({}, "edu_fineweb10B", "fineweb-edu"),
        ({}, "shakespeare", None),
    ],
)
def test_dataset_is_known_by_its_source(source, folder, dataset):
    assert published.dataset_of(source, folder) == dataset


def test_expectation_of_a_run():
    def line(**options):
        return published.expectation(Watch.of_log({"run": [run_record(**options)]}).history, CONSUMED)

    expected = "expect 6.17 at step 250, 4.32 at step 1,000, 3.55 at step 5,000, 3.27 at the end"
    assert line() == f"comparable with the published run: {expected}"
    assert "which it should not be above: 6.17" in line(optimizer="muon")
    history = Watch.of_log({"run": [run_record(data={"dataset": "fineweb-edu"})]}).history
    edu = published.expectation(history, CONSUMED)
    assert edu.endswith("3.05 at the end, estimated for FineWeb-Edu")


SMALL = {"n_layer": 2, "vocab_size": 320, "tokenizer": "byte", "max_steps": 2000, "warmup_steps": 50}


def small(val, data=(), options=(), **values):
    """Return what a run of bytes says, which cannot be compared with the published one."""
    run = run_record(data={"unigram_entropy": 3.1, "dataset": None} | dict(data), **(SMALL | dict(options)))
    return said(log_of(val, run=run, every=values.pop("every", 100), **values))


def falling(step, floor=1.5, speed=100):
    return floor + (math.log(320) - floor) * math.exp(-step / speed)


def test_run_that_learns_says_nothing():
    assert not small(falling)
    assert not small(falling, options={"max_steps": 100}, steps=100)
    assert not small(lambda step: 1.5, options={"init_from": "gpt2"})


def test_first_loss_of_a_new_model():
    for first, warned in ((5.77 + 1.1, True), (5.77 + 0.9, False), (5.77 - 0.9, False), (5.77 - 1.1, True)):
        found = small(lambda step, x=first: falling(step) if step else x)
        assert ("wrong_first_loss" in found) == warned
        assert not warned or found["wrong_first_loss"][0] == 0
    found = small(lambda step: 9.0 - step / 500, options={"init_from": "gpt2"})
    assert "do the shards have the token ids of gpt2?" in found["wrong_first_loss"][1]


def test_flat_loss():
    step, line = small(lambda step: 5.77)["flat_loss"]
    assert step == 200  # 100 steps after warm-up
    assert "has not fallen since the start: 5.8" in line and "large enough?" in line
    step, line = small(lambda step: 5.77 + step / 100)["flat_loss"]
    assert step == 200 and "has risen since the start: 5.8" in line and "Lower --learning_rate" in line
    assert not small(lambda step: 5.77 - 0.2 * (step > 0), steps=200)
    assert not small(lambda step: 5.77, steps=149)


def test_plateau_at_the_frequencies_of_tokens():
    plateau = {True: lambda step: falling(step, 3.12, 30), False: lambda step: falling(step, 3.05, 30)}
    for is_above, losses in plateau.items():
        found = small(losses)
        assert set(found) == ({"only_frequencies"} if is_above else set())
    assert not small(lambda step: falling(step, 1.5, 3000))  # slow, but it falls


def test_overfitting_needs_five_worse_validations():
    def worse(step, by):
        return falling(step) + by * max(step - 800, 0) / 500

    found = small(lambda step: worse(step, 0.15), train=lambda step: falling(step) - step / 4000)
    step, line = found.pop("overfitting")
    assert not found and step == 1300
    assert line.startswith("overfitting since step 800: validation loss 1.6") and "--dropout 0.1" in line
    train = {"train": lambda step: falling(step) - step / 4000}
    assert not small(lambda step: worse(step, 0.15), **train, steps=1200)
    assert not small(lambda step: worse(step, 0.015), **train)
    assert not small(lambda step: worse(step, 0.15))  # the training loss rises as well: not overfitting


def test_spike():
    def loss(step, height=2.0):
        return falling(step) + (height if 700 < step < 740 else 0)

    def norm(step, height=11):
        return 0.3 * (height if step == 700 else 1)

    spike = small(falling, train=loss, norm=norm)["spike"]
    assert spike[0] == 800 and spike[1].startswith(
        "spike at step 700: gradient norm 3.3 after 0.30, loss up to 3."
    )
    assert not small(falling, train=loss, norm=lambda step: norm(step, 9))
    assert not small(falling, train=lambda step: loss(step, 0.1), norm=norm)
    assert not small(
        falling, train=lambda step: falling(step) + 2 * (step == 700), norm=norm
    )  # one odd batch
    # The steps after it belong to the next validation.
    assert small(falling, train=lambda s: loss(s + 1), norm=lambda s: norm(s + 1))["spike"][0] == 800


def test_drift_of_the_time_of_a_step():
    """Ten seconds a step: two hours are 720 steps."""

    def drift(change, waited=0.01, steps=1440):
        def speed(step):
            return 1000 * (1 - change * step / steps)

        values = {"dt_ms": lambda step: 1e7 / speed(step), "tokens_per_s": speed}
        values |= {"waited_ms": lambda step: waited * (1e7 / speed(step) - 1e4)}
        return small(falling, every=60, steps=steps, **values)

    assert not drift(0.2) and not drift(0.4, steps=540)
    step, line = drift(0.4)["slower"]
    assert step >= 720 and "in the first hour" in line and "It is not the data: look for heat" in line
    assert "copy fineweb10B to a local disk" in drift(0.4, waited=1.0)["slower"][1]


def crowded(dt_ms, idle=0.9, options=(), world_size=1, speed=None):
    """Return what a run says, with the step, whose steps take so many ms and which sees so many idle cores.

    Also returns how often it has measured them.
    """
    options = SMALL | {"threads": 2, "checkpoint_every": 800} | dict(options)
    run = run_record(data={"dataset": None}, **options) | {"world_size": world_size}
    measured, watch, found = [], Watch(), []
    watch.idle_cores = lambda: measured.append(idle) or idle
    speed = speed or (lambda step: 1e6 / dt_ms(step))
    for record in log_of(falling, steps=3000, every=100, run=run, dt_ms=dt_ms, tokens_per_s=speed):
        found += [(record["step"], line) for _, line in watch.feed(record)]
    return found, len(measured)


def test_steps_that_are_slow_beside_other_processes():
    def slow(step):  # the first minute has 900 fast steps and 70 slow ones, the second 296
        return 203.0 if step >= 900 else 51.0

    ((step, line),), measured = crowded(slow)
    assert measured == 1 and step == 1265 and line == (
        "steps take 203 ms instead of 51 since step 970: other processes use the machine; stop them, or "
        "stop this run and continue it with --resume --threads 1"
    )
    assert crowded(slow, options={"checkpoint_every": 0})[0][0][1].endswith("machine; stop them")
    assert crowded(slow, idle=0.3, options={"threads": 1})[0][0][1].endswith("machine; stop them")
    found, measured = crowded(slow, idle=1.8)
    assert not found and measured == 2  # not other processes: measured again after the next slow minute
    assert crowded(slow, options={"threads": None}) == crowded(slow, world_size=2) == ([], 0)  # a GPU; ranks
    assert crowded(lambda step: 100.0 if step >= 900 else 51.0) == ([], 0)
    assert crowded(lambda step: 5000.0 if step % 300 == 0 else 51.0) == ([], 0)  # single steps
    # Longer steps that take more tokens.
    assert crowded(slow, speed=lambda step: 2e4) == ([], 0)
    assert not small(falling, dt_ms=slow)  # without a measure, as in plot.py


def test_run_says_once_that_it_is_crowded(run_train, monkeypatch, capsys):
    monkeypatch.setattr(history, "MINUTE_S", 0.0)  # every step is a minute
    monkeypatch.setattr(records, "idle_cores", lambda: 0.0)
    step = train.train_step
    slow = {"dt_ms": 300.0, "tokens_per_s": 1.0}
    fast = {"dt_ms": 100.0, "tokens_per_s": 3.0}
    take = lambda run, number: step(run, number) | (slow if number >= 4 else fast)  # noqa: E731
    monkeypatch.setattr(train, "train_step", take)
    (warning,) = run_train()["warning"]
    assert warning["step"] == 4 and warning["sign"] == "slower"
    assert f"warning: {warning['text']}\n" in capsys.readouterr().out
    assert run_train("--resume --max_steps 9")["warning"] == [warning]


@pytest.mark.parametrize(
    ("sign", "wrong", "right", "text"),
    [
        ("another_tokenizer", {"upper_half": 0.50}, {"upper_half": 0.19}, "50% of its ids are above 25,128"),
        ("another_tokenizer", {"largest": 256}, {"largest": 257}, "use --tokenizer byte"),
        ("another_tokenizer", {"end_of_text": 0.0}, {"end_of_text": 0.0, "dataset": None}, "end-of-text"),
        ("one_id", {"most_common_share": 0.61}, {"most_common_share": 0.59}, "61% of the tokens"),
        ("repeated_text", {"repeated": 0.5}, {"repeated": 0.29}, "50% of the passages"),
        ("equal_shards", {"equal_shards": ["a", "b_val"]}, {"equal_shards": []}, "a and b_val hold the same"),
    ],
)
def test_shards_that_look_wrong(sign, wrong, right, text):
    """Said before the first step."""
    found = said([run_record(data=wrong)])
    assert list(found) == [sign] and text in found[sign][1]
    assert not said([run_record(data=right)])
    if sign != "equal_shards":
        assert not said([run_record(data={**wrong, "tokens": 99_999})])


def test_japanese_is_no_other_tokenizer():
    assert not said([run_record(data={"upper_half": 0.45, "dataset": None})])
    assert said([run_record(data={"upper_half": 0.45})])


def test_repeated_passages_are_found_wherever_they_begin():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50257, 60_000).astype(np.uint16)
    assert repeated(text) == 0
    assert repeated(np.concatenate([text, text[:13], text])) == pytest.approx(0.5, abs=0.01)
    assert repeated(text[:10]) == 0 and repeated(text[:0]) == 0


def test_hostile_and_old_logs_say_nothing():
    for args in (None, [], {}, {"vocab_size": "many", "n_layer": None}, CLASSIC | {"learning_rate": "x"}):
        for data in (None, 3, {"unigram_entropy": "x", "equal_shards": None, "dataset": 7}):
            records = log_of(falling, steps=300)
            records[0] |= {"args": args, "data": data}
            watch = Watch()
            for record in [{"step": 0, "kind": "val"}, {"step": 0, "kind": "warning"}, *records]:
                watch.feed(record)
            assert watch.lines() and watch.about(False)


def test_plot_says_the_same_as_the_run():
    records = log_of(lambda step: above(step, 0.30))
    write(records)
    live, replayed = said(records), Watch.of_log(plot.read_log("log"))
    assert replayed.said == {sign: line for sign, (_, line) in live.items()} != {}


def test_plot_draws_the_curve_and_says_the_verdict(monkeypatch, capsys):
    drawn = {}
    draw = Axes.plot
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)  # takes a second
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda axes, x, y, **style: (
            drawn.update({style["label"]: (x, y, style)}) or draw(axes, x, y, **style)
        ),
    )
    half = run_record(total_batch_size=262144)
    write(log_of(lambda step: above(step / 2, 0.30), steps=3500, run=half))
    plot.main(plot.parse_args(["log", "--references", "fineweb"]))
    x, y, style = drawn["published: llm.c on FineWeb"]
    assert x[:3] == [0, 500, 1000] and x[-1] == 3501 and style["ls"] == "-"
    assert y[:3] == list(published.LOSSES[:3])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("log: step 3,501 of 19,560, about 4.5 h left")
    assert out[1] == (
        "log: validation loss 4.22 is 0.30 above the published curve at step 3,500, since step 3,000. "
        "--total_batch_size is 262,144, in the published run 524,288"
    )
    assert out[2] == f"wrote {Path('log/loss.png')}"
    drawn.clear()
    plot.main(plot.parse_args(["log", "--references", "edu"]))
    reason = "curve and losses: it was trained on FineWeb: use --references fineweb"
    assert capsys.readouterr().out.splitlines()[-2] == f"log: not compared with the published {reason}"
    assert not [label for label in drawn if label.startswith("published")]
    write(log_of(curve, steps=500, run=run_record(data={"dataset": "fineweb-edu"})))
    plot.main(plot.parse_args(["log", "--references", "--against", "tokens"]))
    x, y, style = drawn["published: llm.c on FineWeb, estimated for FineWeb-Edu"]
    assert x == [0, 250 * 524288, 500 * 524288, 501 * 524288] and style["ls"] == "-."


def test_run_logs_its_distance_and_warns_once(run_train, monkeypatch, capsys):
    """A tiny run is made comparable with a curve that it cannot reach, and resumed."""
    monkeypatch.setattr(published, "SHAPE", {"n_layer": 2})
    monkeypatch.setattr(published, "why_not", lambda *args: {})
    monkeypatch.setattr(published, "LOSSES", [5.0, 1.0, 1.0])
    monkeypatch.setattr(published, "EVERY", 1)
    monkeypatch.setattr(published, "STEP_TOKENS", 64)
    monkeypatch.setattr(published, "WARMUP_STEPS", 1)
    monkeypatch.setattr(published, "HIGHER_RATE", 1)
    Path("shards").rename("fineweb")
    options = "--data_dir fineweb --val_every 2 --checkpoint_every 2 --val_tokens 160"
    by_kind = run_train(f"{options} --max_steps 8")
    out = capsys.readouterr().out
    (record,) = by_kind["warning"]
    assert record["sign"] == "above_published" and record["step"] == 6
    for each, expected in zip(by_kind["val"], (5.0, 1.0, 1.0, 1.0, 1.0), strict=True):
        assert each["above_published"] == pytest.approx(each["loss"] - expected)
    assert out.count("warning: validation loss") == 1 and out.count("verdict: ") == 1
    assert f"{by_kind['val'][1]['above_published']:.2f} above the published curve\n" in out
    again = run_train(f"{options} --max_steps 10 --resume")
    assert again["warning"] == by_kind["warning"]
    assert "warning: validation" not in capsys.readouterr().out


def test_run_logs_facts_about_its_shards(run_train, shards):
    for number in (3, 4):
        np.save(shards / f"edufineweb_train_00000{number}.npy", np.zeros(0, np.uint16))
    assert run_train()["run"][0]["data"]["equal_shards"] == []
    np.save(shards / "edufineweb_train_000003.npy", np.load(shards / "edufineweb_train_000002.npy"))
    facts = run_train()["run"][0]["data"]
    ids = np.load(shards / "edufineweb_train_000001.npy")
    counts = [np.count_nonzero(ids == each) / len(ids) for each in range(257)]
    assert facts["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in counts if p))
    assert facts["end_of_text"] == pytest.approx(counts[256])
    assert facts["upper_half"] == pytest.approx(sum(counts[128:]))
    assert facts["most_common_share"] == max(counts) == counts[facts["most_common"]]
    assert facts["equal_shards"] == ["edufineweb_train_000002.npy", "edufineweb_train_000003.npy"]
    assert facts["tokens"] == 1000 and facts["dataset"] is None
