"""Follows a run by its records, and says what is wrong with it: once per kind, and only if it is.

    watch = Watch()
    for record in records:
        for sign, line in watch.feed(record): ...     # new warnings
    watch.lines()                                     # all in all

The loop of train.py feeds each record that it writes, and plot.py those that it reads: both say the same.
"""

import statistics
from collections.abc import Callable
from functools import partial

from diagnosis.history import ORDER, History, number
from diagnosis.published import Comparison, above_published, beside, compare, verdict
from diagnosis.signs import SIGNS, crowded, slower
from runtime.log import is_record

ALL_SIGNS = [above_published, *SIGNS]
NORMAL = "no sign that anything is wrong"


class Watch:
    """`said` has the line of each sign that has been seen, also by an earlier part of a resumed run.

    `idle_cores` measures, while a run is training, how many cores other processes leave to it.
    """

    def __init__(self, dataset: str | None = None):
        self.history, self.said, self.dataset = History(), {}, dataset
        self.idle_cores: Callable[[], float] | None = None

    @classmethod
    def of_log(cls, log: dict[str, list[dict]], dataset: str | None = None) -> "Watch":
        """Return a Watch that has seen a log, as `runtime.log.read_log` returns it."""
        watch, known = cls(dataset), [record for kind in ORDER for record in log.get(kind, [])]
        for record in sorted(known, key=lambda each: (each["step"], ORDER[each["kind"]])):
            watch.feed(record)
        return watch

    def feed(self, record: dict) -> list[tuple[str, str]]:
        """Take in the next record. Return the names and lines of signs that were not seen before it."""
        if not is_record(record) or record["kind"] not in ORDER or self.history.options.get("overfit_batch"):
            return []
        if record["kind"] == "warning":
            self.said.setdefault(str(record.get("sign")), str(record.get("text")))
            return []
        is_first, new = self.history.first is None, []
        self.history.add(record)
        # All signs are looked for with every validation, and one of them with every minute of steps.
        found = {}
        if record["kind"] == "train" and not self.history.minute and self.idle_cores:
            found = {slower.__name__: partial(crowded, idle_cores=self.idle_cores)}
        if record["kind"] in ("run", "val", "end") or is_first:
            found |= {sign.__name__: sign for sign in ALL_SIGNS}
        for name, sign in found.items():
            if name not in self.said and (line := sign(self.history)):
                self.said[name] = line
                new.append((name, line))
        return new

    @property
    def comparison(self) -> Comparison:
        return compare(self.history, self.dataset)

    def distance(self) -> float | None:
        """Return how far the last validation is above the published curve, if it can be compared."""
        return self.comparison.distance(self.history.intervals[-1]) if self.history.intervals else None

    def beside(self) -> str:
        """Return that distance in words."""
        return beside(self.comparison, self.distance())

    def about(self, has_ended: bool) -> str:
        """Return what the run is, and how far."""
        options, steps = self.history.options, number(self.history.options, "max_steps")
        recent, parts = self.history.recent, []
        done = recent[-1]["step"] + 1 if recent else 0
        if params := number(self.history.run, "params"):
            parts.append(f"{params:,} parameters on {options.get('data_dir')}")
        parts.append(f"step {done:,}" + (f" of {steps:,}" if steps else ""))
        if has_ended:
            parts.append("ended")
        elif recent and (planned := number(self.history.run, "planned_tokens")):
            speed = statistics.median(step["tokens_per_s"] for step in recent)
            minutes = max(planned - self.history.tokens, 0) / speed / 60
            left = f"{minutes / 60:.1f} h" if minutes > 120 else f"{minutes:.0f} min"
            parts.append(f"about {left} left without evaluations")
        return ", ".join(parts)

    def lines(self) -> list[str]:
        """Return whether the run is normal: how it compares with the published one, and what was said."""
        newest = verdict(self.history, self.comparison)
        said = [line for sign, line in self.said.items() if sign != above_published.__name__]
        if newest:
            return [newest, *said]
        return list(self.said.values()) or [NORMAL]
