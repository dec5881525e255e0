"""What the records of a run have shown so far, kept small enough to be looked at with every validation."""

import statistics
from dataclasses import dataclass

from runtime.log import NEEDED, is_number

BEFORE, AFTER = 100, 10  # steps around a spike, see `signs.spike`
MINUTE_S = 60.0
# At the same step, the order in which the loop of train.py logs.
ORDER = {"run": 0, "val": 1, "hellaswag": 2, "warning": 3, "train": 4, "end": 5}


@dataclass
class Interval:
    """A validation, and what the training steps since the one before it were like.

    What no step has measured is None. `waited` is the share of the time that steps waited for data, and
    `clipped` the share of the steps whose gradient was clipped.
    """

    step: int
    tokens: float
    val_loss: float | None
    train_loss: float | None = None
    lr: float | None = None
    clipped: float = 0.0
    speed: float | None = None  # tokens per second
    waited: float | None = None
    seconds: float = 0.0


@dataclass
class Minute:
    """Training steps of at least MINUTE_S: the first one, and medians."""

    step: int
    dt_ms: float
    speed: float  # tokens per second


class History:
    """The records of a run. `run` and `scores`, of HellaSwag, are the newest of their kinds, `first` is the
    first step.

    `minutes` are those since the run was last started, and `minute` the steps after the last of them.
    `recent` are the steps since the last validation but one, and the BEFORE + AFTER before them. `tokens` is
    what all steps have taken. `resumed_at` is the number of intervals when the run was last started.
    """

    def __init__(self) -> None:
        self.run: dict = {}
        self.scores: dict = {}
        self.first: dict | None = None
        self.recent: list[dict] = []
        self.intervals: list[Interval] = []
        self.minutes: list[Minute] = []
        self.minute: list[dict] = []
        self.minute_ms = 0.0
        self.fresh, self.skipped, self.resumed_at, self.tokens = 0, 0, 0, 0.0

    @property
    def options(self) -> dict:
        return self.run["args"] if isinstance(self.run.get("args"), dict) else {}

    @property
    def data(self) -> dict:
        """What is known about the shards, see training/facts.py. Older logs do not have it."""
        return self.run["data"] if isinstance(self.run.get("data"), dict) else {}

    @property
    def warmup_steps(self) -> float:
        return number(self.options, "warmup_steps") or 0

    def add(self, record: dict) -> None:
        """Add the next record. Records of other kinds than run, train, hellaswag and val are ignored."""
        if record["kind"] == "run":
            self.run, self.resumed_at = record, len(self.intervals)
            self.minutes, self.minute, self.minute_ms = [], [], 0.0
            self.tokens = number(record, "tokens") or self.tokens  # a branch goes on where another run was
        elif record["kind"] == "train":
            self.first = self.first or record
            if self.fresh == 0:
                del self.recent[: -(BEFORE + AFTER)]
            self.recent.append(record)
            self._add_to_minute(record)
            self.fresh += 1
            self.tokens += record["tokens_per_s"] * record["dt_ms"] / 1000
            self.skipped = max(number(record, "skipped") or 0, self.skipped)
        elif record["kind"] == "hellaswag":
            self.scores = record
        elif record["kind"] == "val":
            self.intervals.append(self._interval(record))
            self.fresh = 0

    def _add_to_minute(self, step: dict) -> None:
        self.minute.append(step)
        self.minute_ms += step["dt_ms"]
        if self.minute_ms >= 1000 * MINUTE_S:
            medians = (statistics.median(each[name] for each in self.minute) for name in NEEDED["train"])
            self.minutes.append(Minute(self.minute[0]["step"], *medians))
            self.minute, self.minute_ms = [], 0.0

    def _interval(self, record: dict) -> Interval:
        tokens = number(record, "tokens")
        if tokens is None:  # in older logs
            tokens = record["step"] * (number(self.options, "total_batch_size") or 0)
        steps = self.recent[len(self.recent) - self.fresh :]
        seconds = sum(step["dt_ms"] for step in steps) / 1000
        found = Interval(record["step"], tokens, number(record, "loss"))
        if not steps:
            return found
        losses = [loss for step in steps if (loss := number(step, "loss")) is not None]
        norms = [norm for step in steps if (norm := number(step, "norm")) is not None]
        limit = number(self.options, "grad_clip")
        found.seconds, found.lr = seconds, number(steps[-1], "lr")
        found.train_loss = statistics.fmean(losses) if losses else None
        found.speed = statistics.median(step["tokens_per_s"] for step in steps)
        if limit and norms:
            found.clipped = sum(norm > limit for norm in norms) / len(norms)
        if seconds and all(number(step, "waited_ms") is not None for step in steps):
            found.waited = sum(step["waited_ms"] for step in steps) / 1000 / seconds
        return found


def number(record: dict, name: str) -> float | None:
    """Return a number of a record, or None if it lacks it or it was not finite."""
    return record[name] if is_number(record.get(name)) else None
