"""What kills of replicas cost the requests that were under way: recovery times, and latencies in outages."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.load_figures import Outcome, latencies, tally

PERCENTILES = ("p50_ms", "p95_ms", "p99_ms", "max_ms")


@dataclass(frozen=True)
class Outage:
    """The time from a kill to the full strength after it, in seconds since the load's zero."""

    begin_s: float
    end_s: float
    """When full strength was shown; the next kill or the end of the load where it was not."""
    recovery_s: float | None
    """From the kill to the next moment at which full strength was shown, later kills included; None if it was
    not before the load's end."""

    def met(self, one: Outcome) -> bool:
        """Return whether any of the time between a request's due time and its end was in the outage."""
        return one.due_s < self.end_s and one.ended_s >= self.begin_s


def outages(outcomes: Sequence[Outcome], kills: Sequence[float], replicas: int, end_s: float) -> list[Outage]:
    """Return the outage of each kill, given in rising order, of a load that ended at `end_s`.

    Full strength is shown at the first moment by which requests sent after the kill, and before the next one,
    have been answered by so many different replicas. The dead one cannot be among them, since they were sent
    when it was dead; so the last of them is its successor, and requests do reach it.
    """
    limits = [*kills[1:], end_s]
    shown = [
        _full_strength([one for one in outcomes if kill <= one.sent_s < limit], replicas)
        for kill, limit in zip(kills, limits, strict=True)
    ]
    found = []
    for i, (kill, limit, moment) in enumerate(zip(kills, limits, shown, strict=True)):
        healed = next((later for later in shown[i:] if later is not None), None)
        end = limit if moment is None else min(moment, limit)
        found.append(Outage(kill, end, None if healed is None else healed - kill))
    return found


def rows_of(
    kills: Sequence[dict[str, Any]], found: Sequence[Outage], outcomes: Sequence[Outcome]
) -> list[dict[str, Any]]:
    """Return a row for each kill's outage, and one for all the time outside of outages."""
    outside = [one for one in outcomes if not any(outage.met(one) for outage in found)]
    rows = []
    for i, (kill, outage) in enumerate(zip(kills, found, strict=True), start=1):
        recovery = None if outage.recovery_s is None else round(outage.recovery_s, 2)
        ones = [one for one in outcomes if outage.met(one)]
        rows.append({"name": f"kill {i}"} | kill | {"recovery_s": recovery} | _counts(ones))
    return [*rows, {"name": "outside"} | _counts(outside)]


def headline(
    figures: dict[str, Any], kills: Sequence[Any], found: Sequence[Outage], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the load's `figures`, how soon the kills healed, and latencies outside of outages."""
    healed = [outage.recovery_s for outage in found if outage.recovery_s is not None]
    keys = ("requests", "failed", "failures", "wrong", "server_retries", "rps", "goodput", *PERCENTILES)
    return {
        **{key: figures[key] for key in keys},
        "kills": len(kills),
        "unrecovered": len(kills) - len(healed),
        "recovery_s_median": round(statistics.median(healed), 2) if healed else None,
        "recovery_s_max": round(max(healed), 2) if healed else None,
        **{f"outside_{name}": rows[-1][name] for name in ("requests", "failed", *PERCENTILES)},
    }


def swap_headline(
    figures: dict[str, Any], outcomes: Sequence[Outcome], version: str, begun_s: float, ended_s: float
) -> dict[str, Any]:
    """Return what became of a load during which `version` was promoted, from `begun_s` to `ended_s`.

    `swap_stale` counts answers of another version to requests sent after the promotion had been reported as
    done, of which there were `swap_sent_after`; a swap that was not seen at all has none of those. Seconds
    count from the promotion's begin.
    """
    answered = [one for one in outcomes if not one.failed]
    new = [one.ended_s - begun_s for one in answered if one.version == version]
    old = [one.ended_s - begun_s for one in answered if one.version != version]
    after = [one for one in answered if one.sent_s > ended_s]
    return {
        "swap_requests": figures["requests"],
        "swap_failed": figures["failed"],
        "swap_failures": figures["failures"],
        "swap_wrong": figures["wrong"],
        "swap_sent_after": len(after),
        "swap_stale": sum(one.version != version for one in after),
        "swap_versions": {name: told["answers"] for name, told in figures["versions"].items()},
        "swap_first_new_s": round(min(new), 2) if new else None,
        "swap_last_old_s": round(max(old), 2) if old else None,
        "swap_p99_ms": figures["p99_ms"],
    }


def _counts(ones: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "requests": len(ones),
        "failed": sum(bool(one.failed) for one in ones),
        "failures": tally(one.failed for one in ones),
        "wrong": sum(bool(one.wrong) for one in ones),
        **latencies(one for one in ones if one.right),
    }


def _full_strength(outcomes: Sequence[Outcome], replicas: int) -> float | None:
    """Return when the answers first came from so many different replicas."""
    seen: set[str] = set()
    for one in sorted(outcomes, key=lambda one: one.ended_s):
        if one.replica and not one.failed:
            seen.add(one.replica)
        if len(seen) >= replicas:
            return one.ended_s
    return None
