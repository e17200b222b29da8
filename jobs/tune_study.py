"""A sweep against the fixed base at equal compute, over seeds: `python -m jobs.tune_study CONFIG`.

For each seed the sweep runs once, and the base as often as the sweep has trials, with seeds of its own. From
both the best run is chosen by the sweep's objective; what counts is another figure of the chosen ones.
"""

import json
import statistics
import sys
from typing import Any

from pydantic import Field, model_validator

from cluster.connect import connected
from cluster.identity import current, use
from cluster.placement import ClusterView
from cluster.storage import RunStore
from counterpoint.section import Section
from jobs import tune
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.runs import CONFIG, open_run, write_results
from jobs.tune_confirm import compared, run_all
from jobs.tune_ledger import Ledger, ranked
from jobs.tune_room import room_for, run_pools
from jobs.tune_settings import TuneConfig
from jobs.tune_space import laid_over, resolved

Chosen = dict[str, Any]


class TuneStudyConfig(Section):
    """Compare a sweep's best with the best of as many runs of its base."""

    run: RunUri = "runs/digits/pbt_study"
    """URI of the study's storage; sweeps and runs lie below it."""
    resume: bool = False
    """Go on with the study that is there; without it a used `run` is refused."""
    sweep: dict[str, Any] = {}
    """The sweep, a configuration of jobs.tune; may extend a file."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds: of the sweep's draws and of its runs."""
    metric: str = "student_1_fd"
    """Headline figure that is compared, on data that did not choose."""

    @model_validator(mode="after")
    def _check(self) -> "TuneStudyConfig":
        config = self.of(self.seeds[0])
        if config.objective.metric == self.metric:
            raise ValueError(f"metric={self.metric} also chooses: name another figure, on held-out data")
        if config.trials < 2 or config.objective.seeds > 1:
            raise ValueError(
                f"sweep.trials={config.trials} and sweep.objective.seeds={config.objective.seeds}: a study "
                "compares the best of 2 or more trials of one seed each"
            )
        return self

    def of(self, seed: int) -> TuneConfig:
        """Return the sweep of a seed."""
        uri = f"{self.run.rstrip('/')}/sweep-{seed}"
        own = {"run": uri, "seed": seed, "resume": RunStore(uri).exists(CONFIG)}
        base = laid_over(self.sweep.get("base", {}), {"seed": seed})
        return TuneConfig.model_validate(self.sweep | own | {"base": base})


def main(config: TuneStudyConfig) -> dict[str, Any]:
    """Run sweeps and bases, and return the paired comparison of the chosen ones."""
    store = open_run(config.run, config, config.resume, in_process=False)
    mine = current()
    swept: list[Chosen] = []
    plain: list[Chosen] = []
    with connected(include_dashboard=True):
        for seed in config.seeds:
            sweep = config.of(seed)
            swept.append(best_of_sweep(sweep, config.metric))
            use(mine)
            plain.append(best_of_base(config, sweep, seed))
    values = {"best": [one["value"] for one in swept], "base": [one["value"] for one in plain]}
    found = compared(values, config.metric, config.of(config.seeds[0]).objective.mode)
    every = [value for one in plain for value in one["all"]]
    headline = {
        "metric": config.metric, "swept": values["best"], "best_of_base": values["base"],
        "mean_of_base": statistics.fmean(every), "difference": found["difference"],
        "verdict": found["verdict"], "steps_swept": sum(one["steps"] for one in swept),
        "steps_base": sum(one["steps"] for one in plain),
    }  # fmt: skip
    write_results(store, {"headline": headline, "swept": swept, "base": plain, "seeds": list(config.seeds)})
    sys.stderr.write(json.dumps(headline, indent=1) + "\n")
    return {"run": config.run, **headline}


def best_of_sweep(sweep: TuneConfig, metric: str) -> Chosen:
    """Run a sweep, unless it is done, and return what its best trial has of `metric`, and its steps."""
    store = RunStore(sweep.run)
    if not store.exists("results.json"):
        tune.main(sweep)
    records = Ledger(store).in_order()
    best = ranked(records, sweep.objective.mode)
    if not best:
        raise RuntimeError(f"no trial of the sweep {sweep.run} ended: see {sweep.run}/report.html")
    return {
        "value": float(best[0].headline[metric]), "trial": best[0].index, "chosen_by": best[0].value,
        "params": dict(best[0].params), "segments": [segment.step for segment in best[0].segments],
        "steps": sum(record.steps for record in records), "all": _all(records, metric),
    }  # fmt: skip


def best_of_base(config: TuneStudyConfig, sweep: TuneConfig, seed: int) -> Chosen:
    """Run the base as often as the sweep has trials, and return what the best run has, chosen alike."""
    base = resolved(sweep.job, sweep.base)
    pools = run_pools(sweep.job, base)
    order = tune.order_of(sweep, base, pools)
    root = f"{config.run.rstrip('/')}/base-{seed}"
    # Seeds of no other population.
    seeds = [1000 * (seed + 1) + member for member in range(sweep.trials)]
    # Nobody looks at these while they run.
    unseen = {"evaluation.every": 0} if getattr(base, "evaluation", None) else {}
    wanted: dict[tuple[str, int], dict[str, Any]] = {
        ("base", one): {
            "job": sweep.job, "base": sweep.base, "segments": [(0, {})], "run": f"{root}/seed-{one}",
            "changes": {**unseen, "seed": one},
        }
        for one in seeds
    }  # fmt: skip
    at_once = room_for(pools, 1, ClusterView.from_ray()).trials
    found = run_all(wanted, order["host_options"], max(1, min(at_once, sweep.concurrent or at_once)))
    sign = 1.0 if sweep.objective.mode == "min" else -1.0
    best = min(seeds, key=lambda one: sign * found["base", one][sweep.objective.metric])
    return {
        "value": float(found["base", best][config.metric]), "seed": best,
        "chosen_by": found["base", best][sweep.objective.metric], "steps": len(seeds) * order["total"],
        "all": [float(found["base", one][config.metric]) for one in seeds],
    }  # fmt: skip


def _all(records: Any, metric: str) -> list[float]:
    return [float(record.headline[metric]) for record in records if metric in record.headline]


if __name__ == "__main__":
    run_job(main, TuneStudyConfig)
