"""Sweep over any job's configuration: `python -m jobs.tune configs/digits/sweep.yaml`."""

import logging
import os
import sys
import time
from typing import Any

from cluster.connect import connected, thread_env
from cluster.identity import current, use
from cluster.placement import ClusterView
from jobs.config import dump_config, run_job
from jobs.rollout_policies import train_missing
from jobs.run_names import STORAGE
from jobs.runs import open_run, write_results
from jobs.tune_check import check_sweep, total_steps
from jobs.tune_confirm import Lineage, confirm
from jobs.tune_learned import learned
from jobs.tune_ledger import Ledger, TrialRecord, ranked
from jobs.tune_report import write_tune_report
from jobs.tune_room import TRIAL_CPUS, check_fits, process_options, room_for, run_pools
from jobs.tune_search import check_pbt
from jobs.tune_settings import PbtConfig, TuneConfig
from jobs.tune_space import cells, laid_over, resolved, settled
from jobs.tune_sweep import sweep
from jobs.tune_table import csv_table, table

logger = logging.getLogger(__name__)

BEST = "best.yaml"
FREE = {"run", "resume", "trials", "concurrent", "confirm", "estimate", "max_failures"}
"""Keys that a resumed sweep may change: they do not change what a trial computes."""


def main(config: TuneConfig) -> dict[str, Any]:
    """Try what is left to try, keep the best as a runnable configuration, and write table and report."""
    begun = time.monotonic()
    base = resolved(config.job, config.base)
    space = settled(config.space, config.job, config.base)
    trials = config.trials or max(1, len(cells(space)))
    config = config.model_copy(update={"trials": trials})
    if isinstance(config.scheduler, PbtConfig):
        check_pbt(config.space, config.job, config.base)
    check_sweep(config, base)
    store = open_run(config.run, config, config.resume, in_process=False, free=FREE)
    ledger = Ledger(store)
    pools = run_pools(config.job, base)
    order = order_of(config, base, pools)
    with connected(include_dashboard=True):
        if config.job == "rollout":
            # Once, before trials that all play the same policies; training has a run of its own.
            mine = current()
            train_missing(base)  # type: ignore[arg-type]
            use(mine)
        room = room_for(pools, config.objective.seeds if order["side_by_side"] else 1, ClusterView.from_ray())
        check_fits(room, pools)
        at_once = min(room.trials, config.concurrent or room.trials, max(1, trials))
        logger.info("%d trials fit at once: %s; running %d at a time", room.trials, room.why, at_once)
        swept = time.monotonic()
        finished = sweep(config, ledger, space, order, at_once)
        swept = time.monotonic() - swept
        results = concluded(config, ledger, order, finished, at_once)
    results |= {"seconds": round(time.monotonic() - begun, 1), "sweep_seconds": round(swept, 1)}
    results["room"] = {"trials": room.trials, "why": room.why, "at_once": at_once}
    if finished:
        write_results(store, results)
    records, mode = ledger.in_order(), config.objective.mode
    store.write_text("trials.csv", csv_table(records, mode))
    sys.stderr.write(table(records, mode) + "\n")
    headline = results["headline"] if finished else {"go_on_with": "resume=true", **results["headline"]}
    return {"run": config.run, **headline, "report": write_tune_report(store)}


def order_of(config: TuneConfig, base: Any, pools: Any) -> dict[str, Any]:
    """Return what every trial is told, as plain values."""
    pbt, total = isinstance(config.scheduler, PbtConfig), total_steps(base)
    side_by_side = config.scheduler.kind != "none"
    seeds = config.objective.seeds if side_by_side else 1
    # Relative paths mean in every process what they mean here.
    env = thread_env(1) | {STORAGE: os.environ.get(STORAGE) or os.getcwd()}
    kept = {"trainer.keep_checkpoints": -(-total // base.trainer.checkpoint_every) + 1} if pbt else {}
    return {
        "run": config.run, "job": config.job, "base": config.base, "changes": kept,
        "seeds": config.objective.seeds, "seed": base.seed, "side_by_side": side_by_side,
        "progress": config.objective.progress, "every": config.objective.every,
        "metric": config.objective.metric, "mode": config.objective.mode, "total": total, "pbt": pbt,
        "trial_cpus": TRIAL_CPUS,
        "cpus": TRIAL_CPUS + seeds * sum(pool.cpus * pool.count for pool in pools),
        "gpus": seeds * sum(pool.gpus * pool.count for pool in pools),
        "host_options": {**process_options(pools), "runtime_env": {"env_vars": env}},
    }  # fmt: skip


def concluded(
    config: TuneConfig, ledger: Ledger, order: dict[str, Any], finished: bool, at_once: int
) -> dict[str, Any]:
    """Store the best trial's configuration, compare it with the base, and return the sweep's results."""
    records = ledger.in_order()
    headline: dict[str, Any] = {
        "trials": len(records),
        **{state: sum(r.state == state for r in records) for state in ("done", "stopped", "failed")},
        "steps": sum(record.steps for record in records),
        "steps_without_stopping": len(records) * order["seeds"] * order["total"],
        "cpu_hours": sum(record.cpu_hours for record in records),
        "gpu_hours": sum(record.gpu_hours for record in records),
    }
    results: dict[str, Any] = {"headline": headline, "trials": [record.to_json() for record in records]}
    best = ranked(records, config.objective.mode)
    if not best:
        return results
    lineage = lineage_of(best[0])
    ledger.store.write_text(BEST, best_config(config, lineage))
    headline |= {
        "best_trial": best[0].index, f"best_{config.objective.metric}": best[0].value,
        "best_config": f"{config.run.rstrip('/')}/{BEST}",
    }  # fmt: skip
    if finished and config.confirm.seeds:
        metric = config.confirm.metric or config.objective.metric
        arms: dict[str, Lineage] = {"best": lineage, "base": [(0, {})]}
        mode = config.objective.mode
        results["confirm"] = confirm(order, arms, config.confirm, metric, mode, at_once)
        headline |= {"confirmed": results["confirm"]["verdict"]}
    return results


def lineage_of(record: TrialRecord) -> list[tuple[int, dict[str, Any]]]:
    """Return a trial's parameters by the step from which they held."""
    if not record.segments:
        return [(0, dict(record.params))]
    return [(segment.step, dict(segment.params)) for segment in record.segments]


def best_config(config: TuneConfig, lineage: list[tuple[int, dict[str, Any]]]) -> str:
    """Return the best trial's configuration as YAML that its job runs."""
    uri = f"{config.run.rstrip('/')}/best"
    data = laid_over(learned(config.job, config.base, lineage), {"run": uri, "resume": False})
    return dump_config(resolved(config.job, data))


if __name__ == "__main__":
    run_job(main, TuneConfig)
