"""What is kept of a claim, beside it: the figures of every arm and seed, the verdict, and the command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.environment import describe_environment
from jobs.claim import RESULTS_SUFFIX, ClaimConfig
from jobs.claim_plan import Plan, Run
from jobs.claim_verdict import arm_summary, compared
from jobs.claim_work import Headline


def outcome(
    claim: ClaimConfig, plan: Plan, found: Mapping[str, Headline], command: str, at_once: int
) -> dict[str, Any]:
    """Return a claim's outcome on one set of images, as JSON has it.

    Raises ValueError, naming the figures that there are, if a headline lacks one that the claim names.
    """
    pairs = claim.pairs()
    seeds = sorted({seed for _, seed in plan.arms})
    metrics = list(dict.fromkeys([*(pair.metric for pair in pairs), *claim.figures]))
    values = {
        metric: {arm: [_figure(plan.arms[arm, seed], found, metric) for seed in seeds] for arm in claim.arms}
        for metric in metrics
    }
    return {
        "verdict": compared(pairs[0], values[pairs[0].metric])["verdict"],
        "pairs": [compared(pair, values[pair.metric]) for pair in pairs],
        "arms": {arm: {metric: arm_summary(values[metric][arm]) for metric in metrics} for arm in claim.arms},
        "seeds": seeds,
        "minutes": round(_makespan(plan.runs, found, at_once) / 60.0, 1),
        "at_once": at_once,
        "command": command,
        "environment": _versions(),
    }


def _figure(run: Run, found: Mapping[str, Headline], metric: str) -> float:
    value = found[run.uri].get(metric)
    if isinstance(value, int | float):
        return float(value)
    names = ", ".join(sorted(k for k, v in found[run.uri].items() if isinstance(v, int | float)))
    raise ValueError(f"metric={metric}: {run.name} ({run.job}) gave no number of that name; it gave {names}")


def _makespan(runs: Sequence[Run], found: Mapping[str, Headline], at_once: int) -> float:
    """Seconds that the runs take on idle cores, `at_once` at a time, each once what it needs is there."""
    free, ended = [0.0] * at_once, dict[str, float]()
    for run in runs:
        place = min(range(at_once), key=free.__getitem__)
        begun = max([free[place], *(ended[uri] for uri in run.needs)])
        ended[run.uri] = free[place] = begun + float(found[run.uri]["seconds"])
    return max(free)


def _versions() -> dict[str, Any]:
    kept = ("python", "versions", "commit", "uncommitted_changes")
    return {key: value for key, value in describe_environment().items() if key in kept}


def store_outcome(folder: Path, method: str, images: str, result: Mapping[str, Any]) -> Path:
    """Keep the outcome of a claim on one set of images beside its configuration; others stay."""
    path = folder / f"{method}{RESULTS_SUFFIX}"
    kept = read_outcomes(folder, method) | {images: dict(result)}
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(kept, indent=1) + "\n")
    aside.replace(path)
    return path


def read_outcomes(folder: Path, method: str) -> dict[str, Any]:
    """Return the kept outcomes of a claim by set of images; none if it was never run."""
    path = folder / f"{method}{RESULTS_SUFFIX}"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def shown_pair(pair: Mapping[str, Any]) -> str:
    """Return a paired difference with its intervals, in words."""
    text = f"{pair['arm']} - {pair['to']}: {_number(pair['difference'])}"
    if pair["interval"] is None:
        return f"{text} (one seed)"
    low, high = pair["interval"]
    t_low, t_high = pair["students_t"]
    return f"{text} [{_number(low)}, {_number(high)}], t [{_number(t_low)}, {_number(t_high)}]"


def shown_arm(summary: Mapping[str, Any]) -> str:
    """Return mean and standard error of an arm."""
    error = summary["standard_error"]
    return _number(summary["mean"], sign="") + ("" if error is None else f" +- {_number(error, sign='')}")


def _number(value: float, sign: str = "+") -> str:
    return format(value, f"{sign}.3g" if abs(value) < 100 else f"{sign}.0f")
