"""What became of each request of a load, and the figures of all of them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times are seconds since the load's zero, when the warm-up ended."""

    number: int
    """Position in the load's order of requests."""
    due_s: float
    """When it was to be sent, whether or not the client or an earlier answer held it up."""
    sent_s: float
    """When its first try was sent."""
    ended_s: float
    """When its last try had been read to the end, or was given up."""
    failed: str = ""
    """Why it was not answered with a success, such as `timeout` or `503 unavailable`; empty if it was."""
    wrong: str = ""
    """What was wrong with a success; empty for what was asked for."""
    first_failed: str = ""
    """Why its first try failed; `failed` where there was one try alone."""
    tries: int = 1
    """How often the client sent it."""
    version: str = ""
    """Of the model that answered."""
    replica: str = ""
    """Which replica answered, where the server says so."""
    retries: int = 0
    """How often the server sent it to another replica."""
    batch_size: float | None = None
    """Mean rows of the batches it was in, where the server says so."""
    queued_ms: float | None = None
    """Milliseconds it waited in the server."""
    compute_ms: float | None = None
    """Milliseconds its batches took."""

    @property
    def right(self) -> bool:
        """Whether it was answered with what was asked for."""
        return not self.failed and not self.wrong

    @property
    def latency_s(self) -> float:
        """Seconds from when it was due, so that a stalled server's whole stall shows (no coordinated
        omission: G. Tene, "How NOT to Measure Latency", 2013)."""
        return self.ended_s - self.due_s


def figures(outcomes: Iterable[Outcome], seconds: float, goodput_ms: float) -> dict[str, Any]:
    """Return the figures of the requests that were due in [0, seconds); earlier ones are only counted.

    `rps` are right answers that came in [0, seconds), a second; latencies are those of right answers;
    `goodput` is the share of all requests, lost ones included, with a right answer within `goodput_ms`.
    `mean_batch`, `queued_ms` and `compute_ms` are means over requests. Figures of nothing are None.
    """
    everything = list(outcomes)
    counted = [one for one in everything if 0 <= one.due_s < seconds]
    right = [one for one in counted if one.right]
    came = sum(one.right and 0 <= one.ended_s < seconds for one in everything)
    in_time = sum(one.latency_s <= goodput_ms / 1e3 for one in right)
    return {
        "requests": len(counted),
        "completed": len(right),
        "failed": sum(bool(one.failed) for one in counted),
        "failures": tally(one.failed for one in counted),
        "wrong": sum(bool(one.wrong) for one in counted),
        "wrongs": tally(one.wrong for one in counted),
        "client_retries": sum(one.tries - 1 for one in counted),
        "first_try_failures": tally(one.first_failed for one in counted),
        "server_retries": sum(one.retries for one in counted),
        "warmup_requests": sum(one.due_s < 0 for one in everything),
        "rps": round(came / seconds, 3),
        **latencies(right),
        "goodput": round(in_time / len(counted), 4) if counted else None,
        "late_p99_ms": _percentile([1e3 * (one.sent_s - one.due_s) for one in counted], 99),
        **{name: _mean(right, name) for name in ("queued_ms", "compute_ms")},
        "mean_batch": _mean(right, "batch_size"),
        "versions": versions(counted),
    }


def latencies(outcomes: Iterable[Outcome]) -> dict[str, float | None]:
    """Return p50_ms, p95_ms, p99_ms (interpolated, as numpy does) and max_ms, counted from the due times."""
    spent = [1e3 * one.latency_s for one in outcomes]
    told: dict[str, float | None] = {f"p{q}_ms": _percentile(spent, q) for q in PERCENTILES}
    return told | {"max_ms": round(max(spent), 2) if spent else None}


def timeline(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return for each second in which requests were due: how many, failed, wrong, p50_ms and max_ms."""
    seconds: dict[int, list[Outcome]] = {}
    for one in outcomes:
        seconds.setdefault(int(one.due_s // 1), []).append(one)
    lines = []
    for second, ones in sorted(seconds.items()):
        shown = latencies(one for one in ones if one.right)
        lines.append(
            {
                "second": second,
                "due": len(ones),
                "failed": sum(bool(one.failed) for one in ones),
                "wrong": sum(bool(one.wrong) for one in ones),
                "p50_ms": shown["p50_ms"],
                "max_ms": shown["max_ms"],
            }
        )
    return lines


def versions(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float]]:
    """Return for each version, in the order of first answers: how many, and the first and last one's time."""
    told: dict[str, dict[str, float]] = {}
    for one in sorted(outcomes, key=lambda one: one.ended_s):
        if one.failed or not one.version:
            continue
        entry = told.setdefault(one.version, {"answers": 0, "first_s": round(one.ended_s, 3)})
        entry["answers"] += 1
        entry["last_s"] = round(one.ended_s, 3)
    return told


def tally(reasons: Iterable[str]) -> dict[str, int]:
    """Return how often each reason that is not empty occurs, the most frequent first."""
    return dict(Counter(reason for reason in reasons if reason).most_common())


class Record:
    """The outcomes of a load, kept in memory and, where a path is given, in a file of JSON lines too."""

    def __init__(self, path: Path | None, zero: float) -> None:
        """Begin a record whose times count from `zero`, seconds of `time.monotonic()`."""
        self.zero = zero
        self.outcomes: list[Outcome] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8") if path else None
        self._write({"zero": zero})
        if self._file:
            self._file.flush()

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        self.outcomes.append(outcome)
        self._write(asdict(outcome))

    def close(self) -> None:
        """End the file."""
        if self._file:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")


def read_zero(path: Path) -> float | None:
    """Return the zero of a record that may still be written, in seconds of this machine's
    `time.monotonic()`; None while there is none."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return float(json.loads(first)["zero"]) if first.endswith("\n") else None


def read_outcomes(path: Path) -> list[Outcome]:
    """Return the outcomes of a finished record, in the order in which they ended."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [Outcome(**json.loads(line)) for line in lines]


def spread(name: str, values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Return the median of a figure's rounds as `name`, and their least and largest as `spread_<name>`."""
    middle = round(float(np.median(values)), digits)
    return {name: middle, f"spread_{name}": [round(min(values), digits), round(max(values), digits)]}


def _percentile(values: Sequence[float], q: float) -> float | None:
    return round(float(np.percentile(values, q)), 2) if values else None


def _mean(outcomes: Sequence[Outcome], name: str) -> float | None:
    values = [value for value in (getattr(one, name) for one in outcomes) if value is not None]
    return round(float(np.mean(values)), 2) if values else None
