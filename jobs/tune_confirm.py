"""Fresh runs, with seeds that chose nothing, of a sweep's best configuration beside the base's."""

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from scipy.stats import t as students_t

from cluster.progress import ProgressLine
from cluster.waiting import done, get
from jobs.tune_run import RunHost
from jobs.tune_settings import ConfirmConfig

logger = logging.getLogger(__name__)

ANSWER_S = 60.0
LEVEL = 0.95
Lineage = Sequence[tuple[int, Mapping[str, Any]]]


def confirm(
    order: Mapping[str, Any], arms: Mapping[str, Lineage], config: ConfirmConfig, metric: str, mode: str,
    at_once: int,
) -> dict[str, Any]:  # fmt: skip
    """Run both arms with every seed, as ordinary runs below `confirm/`, and compare them seed by seed.

    Args:
        order: what the sweep's trials are told; see `jobs.tune_trial.SweepTrial`.
        arms: parameters by step of "best" and "base".
        config: the seeds, and what else both arms have other than the trials had.
        metric: headline figure to compare.
        mode: "min" or "max".
        at_once: most runs at a time.

    Raises:
        RuntimeError: if a run fails; with its traceback.
    """
    root = f"{order['run'].rstrip('/')}/confirm"
    wanted = {
        (arm, seed): {
            "job": order["job"], "base": order["base"], "segments": [(s, dict(p)) for s, p in lineage],
            "run": f"{root}/{arm}-seed-{seed}",
            "changes": {**order["changes"], **config.of(place), "seed": seed},
        }
        for place, seed in enumerate(config.seeds)
        for arm, lineage in arms.items()
    }  # fmt: skip
    found = run_all(wanted, order["host_options"], max(1, at_once))
    values = {arm: [float(found[arm, seed][metric]) for seed in config.seeds] for arm in arms}
    return compared(values, metric, mode) | {"seeds": list(config.seeds)}


def compared(values: Mapping[str, Sequence[float]], metric: str, mode: str) -> dict[str, Any]:
    """Return both arms' values, the mean of the paired differences best - base and its interval.

    The interval is Student's over the pairs, at 95 %. A verdict other than "not shown" needs the whole
    interval on one side of 0.
    """
    pairs = list(zip(values["best"], values["base"], strict=True))
    differences = [best - base for best, base in pairs]
    mean, low, high = statistics.fmean(differences), float("nan"), float("nan")
    verdict = "not shown: one pair of runs has no spread"
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        half = float(students_t.ppf(0.5 + LEVEL / 2, len(differences) - 1)) * error
        low, high = mean - half, mean + half
        better = high < 0.0 if mode == "min" else low > 0.0
        worse = low > 0.0 if mode == "min" else high < 0.0
        verdict = "better than the base" if better else "worse than the base" if worse else "not shown"
    return {
        "metric": metric, "best": list(values["best"]), "base": list(values["base"]),
        "difference": {"mean": mean, "low": low, "high": high}, "verdict": verdict,
    }  # fmt: skip


def run_all(
    wanted: Mapping[tuple[str, int], Mapping[str, Any]], options: Mapping[str, Any], at_once: int
) -> dict[tuple[str, int], dict[str, Any]]:
    """Do runs, by arm and seed, in actors with `options`, some at a time; return their headlines.

    Raises RuntimeError with the traceback of the first that fails.
    """
    waiting = list(wanted)
    running: dict[tuple[str, int], tuple[Any, Any]] = {}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    line = ProgressLine(len(wanted), "runs", unit="runs")
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                key = waiting.pop(0)
                host: Any = ray.remote(RunHost).options(max_concurrency=4, **options).remote()
                running[key] = (host, host.run.remote(dict(wanted[key])))
            for key, (ended, answer) in list(running.items()):
                if done([answer])[0]:
                    found[key] = get(answer, ANSWER_S, f"the run {key[0]} of seed {key[1]}")
                    ray.kill(ended)
                    del running[key]
                    if "error" in found[key]:
                        raise RuntimeError(f"the run {wanted[key]['run']} failed:\n{found[key]['error']}")
            line.update(len(found))
            time.sleep(0.5)
    finally:
        for left, _ in running.values():
            ray.kill(left)
        line.close("")
    return found
