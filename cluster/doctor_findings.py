"""What the self-test says: one line a finding, with its remedy."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["OK", "WARN", "FAIL"]
RANK: dict[Level, int] = {"OK": 0, "WARN": 1, "FAIL": 2}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    """FAIL: a run will break on it. WARN: it will run, slower or less safely. OK: nothing to do."""
    subject: str
    """What was looked at, such as "versions" or "storage"."""
    found: str
    """What was seen, with names and figures."""
    remedy: str = ""
    """What to do about it; empty for OK."""

    def __str__(self) -> str:
        line = f"{self.level:<4}  {self.subject:<13} {self.found}"
        return " ".join((f"{line} -> {self.remedy}" if self.remedy else line).splitlines())


def ok(subject: str, found: str) -> Finding:
    """Say that something is as it should be."""
    return Finding("OK", subject, found)


def warn(subject: str, found: str, remedy: str) -> Finding:
    """Say that something will cost speed or safety."""
    return Finding("WARN", subject, found, remedy)


def fail(subject: str, found: str, remedy: str) -> Finding:
    """Say that something will break a run."""
    return Finding("FAIL", subject, found, remedy)


def as_json(findings: Sequence[Finding], seconds: float, **more: Any) -> str:
    """The findings as one line of JSON: `healthy` (no FAIL), the counts, then each finding by its fields."""
    counts = {level: sum(one.level == level for one in findings) for level in RANK}
    document = {"healthy": not counts["FAIL"], "counts": counts, "seconds": round(seconds, 1), **more}
    return json.dumps({**document, "findings": [asdict(one) for one in findings]}, allow_nan=False)


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """Findings in their order, those that say the same of several nodes ("name: what") as one."""
    names: dict[tuple[Level, str, str, str], list[str]] = {}
    for one in findings:
        name, colon, rest = one.found.partition(": ")
        what = rest if colon else one.found
        names.setdefault((one.level, one.subject, what, one.remedy), []).append(name if colon else "")
    return [
        Finding(level, subject, f"{named(who)}: {what}" if who[0] else what, remedy)
        for (level, subject, what, remedy), who in names.items()
    ]


def grouped(values: dict[str, Any]) -> str:
    """Values by who has them, the most frequent first: "2.13.0 on a, b; 2.12.0 on c"."""
    holders: dict[Any, list[str]] = {}
    for name, value in values.items():
        holders.setdefault(value, []).append(name)
    ranked = sorted(holders.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{value} on {named(names)}" for value, names in ranked)


def named(names: Sequence[str], limit: int = 4) -> str:
    """Names in a row, the first few of many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def reason(error: BaseException) -> str:
    """An exception in one line: its type and the last line of its message, which is the cause in Ray's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
