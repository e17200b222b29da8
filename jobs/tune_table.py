"""The trials of a sweep as rows: for the terminal, for files, and for the report."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.table import text_table
from jobs.tune_ledger import Params, TrialRecord, ranked

LONGEST = 32
ORDER = ("done", "running", "stopped", "failed")
COLUMNS = (
    "trial", "rank", "state", "value", "standard_error", "values", "reached", "progress", "steps", "seconds",
    "cpu_hours", "gpu_hours", "lives", "error",
)  # fmt: skip
SHOWN = ("state", "value", "+-", "reached", "steps", "seconds")


def best_first(records: Sequence[TrialRecord], mode: str) -> list[TrialRecord]:
    """Return all records: finished ones from the best, then running, stopped and failed ones by index.

    A finished trial whose value is not a finite number comes after those that have one.
    """
    first = finished(records, mode)
    ahead = {record.index for record in first}
    rest = [record for record in records if record.index not in ahead]
    return first + sorted(rest, key=lambda record: (ORDER.index(record.state), record.index))


def finished(records: Sequence[TrialRecord], mode: str) -> list[TrialRecord]:
    """Return the trials that ran to their end and have a finite value, from the best."""
    return ranked([r for r in records if r.value is not None and math.isfinite(r.value)], mode)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of values by seed; None for fewer than two or one not finite."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def current(record: TrialRecord) -> Params:
    """Return the values that a trial has now: the last ones where it was bred, else those it began with."""
    return record.segments[-1].params if record.segments else record.params


def rows(records: Sequence[TrialRecord], mode: str) -> list[dict[str, Any]]:
    """Return the trials as plain values, ordered by `best_first`; figures that are not finite are None."""
    found = []
    for rank, record in enumerate(best_first(records, mode), start=1):
        value = record.value if record.value is not None and math.isfinite(record.value) else None
        newest = record.last
        found.append(
            {
                "trial": record.index,
                "rank": rank if record.state == "done" and value is not None else None,
                "state": record.state,
                "value": value,
                "standard_error": standard_error(record.values),
                "values": [v if math.isfinite(v) else None for v in record.values],
                "params": dict(current(record)),
                "reached": newest.step if newest else None,
                "progress": newest.value if newest and math.isfinite(newest.value) else None,
                "steps": record.steps,
                "seconds": record.seconds,
                "cpu_hours": record.cpu_hours,
                "gpu_hours": record.gpu_hours,
                "lives": record.lives,
                "runs": list(record.runs),
                "error": last_line(record.error),
            }
        )
    return found


def table(records: Sequence[TrialRecord], mode: str) -> str:
    """Return the trials as aligned text, the best first; +- is the standard error over seeds."""
    keys = list(dict.fromkeys(key for record in records for key in record.params))
    taken = (*SHOWN, "name")
    names = {key: f"{name} (swept)" if name in taken else name for key, name in short_names(keys).items()}
    found: list[dict[str, Any]] = []
    for row in rows(records, mode):
        figures: dict[str, Any] = {
            names[key]: said(row["params"][key]) for key in keys if key in row["params"]
        }
        figures |= {
            "state": row["state"],
            "value": None if row["value"] is None else f"{row['value']:.4g}",
            "+-": None if row["standard_error"] is None else f"{row['standard_error']:.2g}",
            "reached": None if row["progress"] is None else f"{row['progress']:.4g} at {row['reached']}",
            "steps": row["steps"],
            "seconds": f"{row['seconds']:.0f}",
        }
        found.append({"name": f"trial {row['trial']}", "figures": figures})
    columns = [*SHOWN[:4], *names.values(), *SHOWN[4:]]
    return text_table([{**row["figures"], "name": row["name"]} for row in found], columns)


def csv_table(records: Sequence[TrialRecord], mode: str) -> str:
    """Return the trials as comma-separated values with a heading, one column a swept key."""
    keys = list(dict.fromkeys(key for record in records for key in record.params))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *keys])
    for row in rows(records, mode):
        line = [json.dumps(row[name]) if isinstance(row[name], list) else row[name] for name in COLUMNS]
        writer.writerow([*line, *(_cell(row["params"], key) for key in keys)])
    return buffer.getvalue()


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return for each dotted key its shortest end that no other key shares, of two parts at least."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1)]
        unique = (e for e in ends if not any(o != key and f".{o}".endswith(f".{e}") for o in keys))
        names[key] = next(unique, key)
    return names


def said(value: Any, longest: int = LONGEST) -> str:
    """Return a parameter's value in a few characters, as YAML writes it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def last_line(error: str) -> str:
    """Return the last line of a traceback that says anything."""
    return next((line.strip() for line in reversed(error.splitlines()) if line.strip()), "")


def _cell(params: Mapping[str, Any], key: str) -> Any:
    if key not in params:
        return ""
    value = params[key]
    return (
        value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)
    )
