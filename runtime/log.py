"""log.jsonl, the records of a run, read."""

import contextlib
import json
from pathlib import Path

# The numbers of a record that are drawn, by its kind, and those that it may lack or that were not finite.
NEEDED = {"train": ("dt_ms", "tokens_per_s"), "hellaswag": ("acc", "acc_norm", "n")}
OPTIONAL = ("loss", "lr", "norm")
LARGEST = 1e15  # no run has larger numbers, and matplotlib cannot draw all that are


def read_records(path: Path) -> list[dict]:
    """Return the JSON objects of a .jsonl file, without lines that are damaged or still being written."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def read_log(source: str | Path) -> dict[str, list[dict]]:
    """Return the records of a run folder or log.jsonl by kind. Raises FileNotFoundError if there is none.

    Lines that are no records are left out: one may be half written, others damaged.
    """
    path = Path(source)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no log at {path}: use a folder that train.py wrote")
    by_kind: dict[str, list[dict]] = {}
    for record in filter(is_record, read_records(path)):
        by_kind.setdefault(record["kind"], []).append(record)
    return by_kind


def is_number(value: object, kinds: type = int | float) -> bool:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < LARGEST


def curves_of(log: dict[str, list[dict]]) -> dict[str, str]:
    """Return the number to draw of each kind of evaluation, as the run says, or as older ones had them."""
    curves = {"val": "loss", "hellaswag": "acc_norm"}
    for record in log.get("run", []):
        if isinstance(said := record.get("curves"), dict):
            curves |= {kind: name for kind, name in said.items() if isinstance(name, str)}
    return curves


def is_record(record: dict) -> bool:
    """Return whether a JSON object is a record of a run, with numbers where one is drawn."""
    kind = record.get("kind")
    return (
        isinstance(kind, str)
        and is_number(record.get("step"), int)
        and all(is_number(record.get(name)) for name in NEEDED.get(kind, ()))
        and all(record.get(name) is None or is_number(record[name]) for name in OPTIONAL)
    )
