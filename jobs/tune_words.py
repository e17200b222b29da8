"""What a sweep found, in words: how it stands, the best trial, what early stopping saved, what it cost."""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.report_words import count, duration, number
from jobs.tune_cost import Estimate, Saving
from jobs.tune_ledger import TrialRecord
from jobs.tune_record import SweepRecord, finite
from jobs.tune_settings import PricedClusterConfig
from jobs.tune_table import standard_error

DASH = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
STATES = {
    "done": "ran to the end",
    "stopped": "stopped early",
    "failed": "failed",
    "running": "not ended yet",
}


def figure(value: Any) -> str:
    """Return a figure with about three digits; a dash for none, and for what is not finite."""
    return number(float(value)) if finite(value) else DASH


def hours(value: float) -> str:
    """Return a number of hours, small ones with enough digits to see them."""
    return f"{value:,.1f}" if value >= 10.0 else f"{value:.2g}"


def title(sweep: SweepRecord) -> str:
    """Return the headline of the page."""
    return f"A sweep of {sweep.job}, {_counted(len(sweep.trials), 'trial')}"


def summary(sweep: SweepRecord, saved: Saving | None) -> str:
    """Return a few sentences on what was tried and found."""
    if not sweep.trials:
        return "The sweep has begun no trial yet."
    return " ".join(
        part for part in (_made(sweep), _states(sweep), _best(sweep), _saved(sweep, saved)) if part
    )


def states(trials: Sequence[TrialRecord]) -> dict[str, int]:
    """Return how many trials are in which state, without those that none is in."""
    counted = Counter[str](record.state for record in trials)
    return {state: counted[state] for state in STATES if counted[state]}


def with_error(record: TrialRecord) -> str:
    """Return a trial's value with its standard error over seeds, as far as there are several."""
    return _between(record.value, record.values)


def command(sweep: SweepRecord) -> str:
    """Return the command that runs the best trial's configuration; "" as long as that is not written."""
    if not sweep.best_file:
        return ""
    return shlex.join(["python", "-m", f"jobs.{sweep.job}", sweep.best_file])


def estimate_words(found: Estimate | None, cluster: PricedClusterConfig, trials: int) -> tuple[str, str]:
    """Return what the sweep would cost on `cluster`, and in one sentence what that assumes."""
    machine = f"{cluster.cpus:g} CPUs" + (f" and {cluster.gpus:g} GPUs" if cluster.gpus else "")
    where = f"{_counted(cluster.nodes, 'machine')} of {machine}"
    if found is None:
        return f"On {where}: not known, as the job's configuration cannot be read any more.", ""
    if not found.slots:
        return f"On {where} not even one trial fits.", ""
    price = f", a price of {found.price:,.2f}" if cluster.price else ""
    text = (
        f"On {where}, {_counted(found.slots, 'trial')} at once: {hours(found.wall_hours)} hours from start "
        f"to end, {hours(found.machine_hours)} machine hours{price}."
    )
    assumed = (
        f"Assumes that each of the {_counted(trials, 'trial')} takes "
        f"{'as long as here' if cluster.speed == 1.0 else f'its seconds here over {cluster.speed:g}'}, steps "
        "repeated after losses included, that trials start in the order of their numbers as soon as one "
        "ends, each with all its actors, that machines hold nothing else, are paid from the first start to "
        "the last end, and that CPUs and GPUs alone limit how many fit."
    )
    return text, assumed


def confirm_rows(sweep: SweepRecord) -> list[dict[str, str]]:
    """Return the rows of the comparison of best and base on fresh seeds; none where there is none."""
    found = sweep.results.get("confirm")
    if not isinstance(found, Mapping):
        return []
    rows = []
    for name in ("best", "base"):
        values = [v for v in found.get(name) or () if finite(v)]
        mean = sum(values) / len(values) if values else None
        rows.append(
            {
                "name": name,
                "mean": _between(mean, values),
                "each": ", ".join(map(figure, found.get(name) or ())),
            }
        )
    between = found.get("difference")
    if isinstance(between, Mapping):
        interval = f"[{_signed(between.get('low'))}, {_signed(between.get('high'))}]"
        rows.append({"name": "best minus base", "mean": _signed(between.get("mean")), "each": interval})
    return rows


def _signed(value: Any) -> str:
    return f"{'+' if value >= 0 else '-'}{number(abs(value))}" if finite(value) else DASH


def _between(value: float | None, values: Sequence[float]) -> str:
    """Return a mean with the two leading digits of its standard error."""
    error = standard_error(values)
    if not error or value is None or not finite(value):
        return figure(value)
    digits = 1 - math.floor(math.log10(error))
    if not 0 <= digits <= 6:
        return f"{number(value)} {PLUS_MINUS} {number(error)}"
    return f"{value:,.{digits}f} {PLUS_MINUS} {error:.{digits}f}"


def _made(sweep: SweepRecord) -> str:
    kind = "Optuna's TPE" if sweep.section("searcher").get("kind") == "tpe" else "random draws"
    keys = _counted(len(sweep.names), "key")
    space = [entry for entry in sweep.section("space").values() if isinstance(entry, Mapping)]
    if space and all(entry.get("grid") for entry in space):
        kind = "a grid"
    chosen = f"{_counted(len(sweep.trials), 'trial').capitalize()} over {keys}, chosen by {kind}"
    with_scheduler = {"asha": ", with ASHA stopping the weaker ones", "pbt": ", bred by PBT"}
    return f"{chosen}{with_scheduler.get(sweep.scheduler, '')}."


def _states(sweep: SweepRecord) -> str:
    found = states(sweep.trials)
    if list(found) == ["done"]:
        return "All ran to the end."
    return f"{', '.join(f'{count(n)} {STATES[state]}' for state, n in found.items())}."


def _best(sweep: SweepRecord) -> str:
    best = sweep.best
    if best is None:
        return "None has a finished value yet." if sweep.trials else ""
    several = standard_error(best.values) is not None
    seeds = f" ({PLUS_MINUS} standard error over {len(best.values)} seeds)" if several else ""
    which = "least" if sweep.mode == "min" else "most"
    text = f"Trial {best.index} has the {which} {sweep.metric}, {with_error(best)}{seeds}"
    if len(sweep.ranked) > 1:
        text += f"; the next, trial {sweep.ranked[1].index}, has {with_error(sweep.ranked[1])}"
    return f"{text}."


def _saved(sweep: SweepRecord, saved: Saving | None) -> str:
    if saved is None or "stopped" not in states(sweep.trials):
        return ""
    return (
        f"Stopping early took {count(saved.taken)} training steps instead of {count(saved.to_the_end)}, "
        f"{100 * saved.share:.0f} % less."
    )


def wall(sweep: SweepRecord) -> str:
    """Return how long the sweep itself took, as its results say; "" where they do not."""
    seconds = sweep.results.get("seconds")
    if isinstance(seconds, Mapping):
        seconds = sum(value for value in seconds.values() if finite(value))
    return duration(float(seconds)) if seconds is not None and finite(seconds) else ""


def _counted(things: int, noun: str) -> str:
    return f"{things:,} {noun}{'' if things == 1 else 's'}"
