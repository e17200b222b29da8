"""The report of a sweep: one page, complete in itself: what was tried, what was best, what it cost.

It reads what the sweep has left in its store, finished or not; the trials' own reports are linked to.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.placement import Pool
from cluster.storage import RunStore
from counterpoint.section import Section
from jobs.report_page import facts, render_page, versions
from jobs.tune_charts import importance_chart, marginals, parallel_coordinates
from jobs.tune_check import total_steps
from jobs.tune_cost import Estimate, Saving, cost, estimate, saving
from jobs.tune_curves import learning_curves, lineage_charts, takeovers
from jobs.tune_learned import value_of
from jobs.tune_ledger import TrialRecord
from jobs.tune_record import SweepRecord, finite, read_sweep
from jobs.tune_room import TRIAL_CPUS, run_pools
from jobs.tune_search import importance
from jobs.tune_settings import PricedClusterConfig, TuneConfig
from jobs.tune_space import laid_over, resolved
from jobs.tune_table import best_first, current, last_line, said
from jobs.tune_words import (
    command,
    confirm_rows,
    estimate_words,
    figure,
    hours,
    states,
    summary,
    title,
    wall,
    with_error,
)

REPORT = "report.html"
TEMPLATE = "tune.html.jinja"
MOST_FAILURES, MOST_LETTERS, MOST_KEYS = 50, 20_000, 12


def write_tune_report(store: RunStore) -> str:
    """Write `report.html` into the sweep's store and return where a person finds it.

    Parts of the sweep that are not there yet are left out. Raises ValueError when the store holds no sweep.
    """
    store.write_text(REPORT, render(read_sweep(store)))
    return store.location(REPORT)


def render(sweep: SweepRecord) -> str:
    """Return the page: no scripts, every picture inside; links lead to reports in the same storage only."""
    saved = saving(sweep.trials, lengths(sweep))
    curves = learning_curves(sweep)
    failed = [record for record in sweep.trials if record.state == "failed"]
    confirm = sweep.results.get("confirm")
    return render_page(
        TEMPLATE,
        {
            "title": title(sweep),
            "summary": summary(sweep, saved),
            "tiles": _tiles(sweep, saved),
            "best": _best(sweep),
            "command": command(sweep),
            "columns": list(sweep.names.items())[:MOST_KEYS],
            "more_columns": max(0, len(sweep.names) - MOST_KEYS),
            "rows": [_row(sweep, record) for record in best_first(sweep.trials, sweep.mode)],
            "metric": sweep.metric,
            "progress": sweep.progress,
            "tried": [chart for chart in (parallel_coordinates(sweep), curves) if chart],
            "importance": importance_chart(sweep, _importance(sweep)),
            "marginals": marginals(sweep),
            "lineage": lineage_charts(sweep),
            "takeovers": takeovers(sweep.trials),
            "schedule": _schedule(sweep),
            "confirm": confirm_rows(sweep),
            "confirmed": confirm if isinstance(confirm, Mapping) else {},
            "cost": _cost(sweep, saved),
            "failures": [_failure(record) for record in failed[:MOST_FAILURES]],
            "more_failures": max(0, len(failed) - MOST_FAILURES),
            "facts": facts(sweep.uri, sweep.environment) | ({"Time": wall(sweep)} if wall(sweep) else {}),
            "versions": versions(sweep.environment),
            "config": sweep.config_text,
        },
    )


def _tiles(sweep: SweepRecord, saved: Saving | None) -> list[tuple[str, str, str]]:
    """Return (name, figure, remark) of the figures that are shown large."""
    tiles, spent = [], cost(sweep.trials)
    if sweep.best is not None:
        tiles.append((sweep.metric, with_error(sweep.best), f"best, trial {sweep.best.index}"))
    found = states(sweep.trials)
    remark = ", ".join(f"{number} {state}" for state, number in found.items())
    tiles.append(("trials", str(len(sweep.trials)), remark))
    if saved is not None and "stopped" in found:
        tiles.append(("steps saved", f"{100 * saved.share:.0f} %", "against all to the end"))
    tiles.append(("CPU hours", hours(spent.cpu_hours), "reserved"))
    if spent.gpu_hours:
        tiles.append(("GPU hours", hours(spent.gpu_hours), "reserved"))
    return tiles


def _best(sweep: SweepRecord) -> list[tuple[str, str, str]]:
    """Return (key, the best trial's value, the base's) of each key that the best trial sets."""
    if sweep.best is None:
        return []
    job = _resolved(sweep.checked, {})
    base = {} if job is None else job.model_dump(mode="json")
    return [(key, said(value, 80), _known(base, key)) for key, value in current(sweep.best).items()]


def _resolved(config: TuneConfig | None, params: Mapping[str, Any]) -> Section | None:
    """Return the job's configuration with these values; None where it does not hold any more."""
    try:
        return resolved(config.job, laid_over(config.base, params)) if config else None
    except (ValueError, OSError):
        return None


def _known(base: Mapping[str, Any], key: str) -> str:
    try:
        return said(value_of(base, key), 80)
    except (KeyError, IndexError, ValueError, TypeError):  # the base has a number where the trial a schedule
        return ""


def _row(sweep: SweepRecord, record: TrialRecord) -> dict[str, Any]:
    newest, params = record.last, current(record)
    reached = f"{figure(newest.value)} at {newest.step:,}" if newest and record.state != "done" else ""
    return {
        "index": record.index,
        "state": record.state,
        "best": record is sweep.best,
        "value": with_error(record) if record.state == "done" else "",
        "reached": reached,
        "params": [said(params[key]) if key in params else "" for key in list(sweep.names)[:MOST_KEYS]],
        "steps": record.steps,
        "seconds": record.seconds,
        "lives": record.lives,
        "links": sweep.links.get(record.index, ()),
    }


def _importance(sweep: SweepRecord) -> dict[str, float]:
    config = sweep.checked
    if config is None or not sweep.ranked:
        return {}
    shares = importance(config.space, sweep.trials, config.objective.mode, config.seed)
    return {key: share for key, share in shares.items() if finite(share)}


def _schedule(sweep: SweepRecord) -> list[dict[str, Any]]:
    """Return the segments of the best member's weights: from which step, whose weights, which values."""
    best = sweep.best
    if best is None or not best.segments:
        return []
    keys = list(sweep.names)[:MOST_KEYS]
    return [
        {
            "step": segment.step,
            "source": segment.source,
            "params": [said(segment.params[key]) if key in segment.params else "" for key in keys],
        }
        for segment in best.segments
    ]


def _cost(sweep: SweepRecord, saved: Saving | None) -> dict[str, Any]:
    """Return what was reserved, steps taken, and what all would cost on the cluster of the configuration."""
    spent = cost(sweep.trials)
    rows = [
        ("CPU hours reserved", hours(spent.cpu_hours)),
        ("GPU hours reserved", hours(spent.gpu_hours)),
        ("hours of all trials, end to end", hours(spent.trial_hours)),
    ]
    if wall(sweep):
        rows.append(("wall time of the sweep", wall(sweep)))
    if saved is not None:
        rows.append(("training steps taken", f"{saved.taken:,}"))
    if saved is not None and "stopped" in states(sweep.trials):
        rows.append(("steps with every trial run to its end", f"{saved.to_the_end:,}"))
        rows.append(("saved", f"{100 * saved.share:.1f} %"))
    room = sweep.results.get("room")
    if isinstance(room, Mapping) and room.get("why"):
        rows.append(("trials at once here", f"{room.get('trials')}: {room['why']}"))
    measured = [record for record in sweep.trials if record.seconds > 0.0]
    config = sweep.checked
    cluster = config.estimate if config else PricedClusterConfig()
    words = estimate_words(_estimate(sweep, measured), cluster, len(measured)) if measured else ("", "")
    return {"rows": rows, "estimate": words[0], "assumed": words[1]}


def _estimate(sweep: SweepRecord, measured: list[TrialRecord]) -> Estimate | None:
    config = sweep.checked
    pools = trial_pools(config, (sweep.best or measured[0]).params) if config else None
    return None if config is None or pools is None else estimate(measured, pools, config.estimate)


def lengths(sweep: SweepRecord) -> dict[int, int]:
    """Return by trial the training steps that all its runs take to their end, as far as that is known."""
    config, found = sweep.checked, {}
    for record in sweep.trials if config else ():
        job = _resolved(config, record.params)
        if config and job is not None:
            found[record.index] = config.objective.seeds * total_steps(job)
    return found


def trial_pools(config: TuneConfig, params: Mapping[str, Any]) -> list[Pool] | None:
    """Return all actors of a trial with these values; None where its configuration does not hold any more.

    Memory and labels are left aside: the machines of an estimate have neither.
    """
    job = _resolved(config, params)
    if job is None:
        return None
    one = run_pools(config.job, job)
    together = config.objective.seeds if config.scheduler.kind != "none" else 1
    runs = [replace(pool, count=pool.count * together, memory=0, labels={}) for pool in one]
    return [Pool("trial", 1, TRIAL_CPUS), *runs]


def _failure(record: TrialRecord) -> dict[str, Any]:
    whole = record.error
    cut = len(whole) > MOST_LETTERS
    return {
        "index": record.index,
        "last": last_line(whole) or "no traceback was kept",
        "error": f"...\n{whole[-MOST_LETTERS:]}" if cut else whole,
    }
