"""A study: arms of the same distillation over seeds, side by side on the cluster, and their table.

python -m jobs.ablate configs/digits/ablation.yaml
"""

import json
import logging
import math
import statistics
import sys
from typing import Any

import ray
import torch
from pydantic import Field
from scipy import stats

from cluster.connect import connected, thread_env
from cluster.progress import ProgressLine
from cluster.storage import RunStore
from cluster.waiting import first_of, get
from counterpoint.section import Section
from jobs import distill
from jobs.config import run_job
from jobs.config_source import merged
from jobs.overfit import overfit_gap
from jobs.run_names import RunUri
from jobs.runs import RESULTS, read_results
from jobs.settings import DistillConfig
from jobs.table import text_table

logger = logging.getLogger(__name__)

FIGURES = ("fd", "kid", "precision", "recall", "accuracy", "train_fd")
LONGEST_RUN = 6 * 3600.0


class Arm(Section):
    """One arm: what it changes in the study's distillation."""

    name: str
    """Name in the table."""
    says: str = ""
    """What the arm is, in a few words."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Changed sections, as in a distillation's YAML file."""


class AblateConfig(Section):
    """Arms over seeds: for each seed one warm-up, from which every arm starts."""

    run: RunUri = "runs/ablation"
    """URI below which the runs and the table are stored; finished runs found there are used again."""
    base: DistillConfig = DistillConfig()
    """The distillation that the arms change; its warm-up is shared by the arms of a seed. With `start` set,
    that run's student is the start of all seeds, and they differ in batches, noise and heads only."""
    arms: tuple[Arm, ...] = Field(default=(), min_length=1)
    """The arms; the first is what the others are compared with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; the arms of a seed share warm-up, pairs and batches."""
    at_once: int = Field(default=2, ge=1)
    """Runs at the same time, each on one CPU of the cluster."""
    figure: str = "fd"
    """Figure of the one-step student whose difference to the first arm is tested."""


def main(config: AblateConfig) -> dict[str, Any]:
    """Run what is missing, print and store the table, and return its headline."""
    with connected(num_cpus=None):
        starts = dict.fromkeys(config.seeds, config.base.start) if config.base.start else warm_up(config)
        jobs = {
            f"{arm.name}, seed {seed}": (arm_config(config, arm, seed, starts[seed]), True)
            for seed in config.seeds
            for arm in config.arms
        }
        done = run_all(jobs, config.at_once)
    table = [summary(config, arm, done) for arm in config.arms]
    store = RunStore(config.run)
    columns = (
        "fd",
        "recall",
        "precision",
        "accuracy",
        "train_fd",
        "overfit_gap",
        "difference",
        "interval",
        "verdict",
    )
    text = text_table(table, columns)
    store.write_text("ablation.json", json.dumps({"table": table, "runs": done}, indent=1))
    store.write_text("ablation.txt", text + "\n")
    sys.stderr.write(text + "\n")
    return {"run": config.run, "arms": {row["name"]: row["figures"] for row in table}}


def warm_up(config: AblateConfig) -> dict[int, str]:
    """Run the seeds' warm-ups and return their URIs."""
    warm = {seed: warmup_config(config, seed) for seed in config.seeds}
    run_all({f"warm-up, seed {seed}": (part, False) for seed, part in warm.items()}, config.at_once)
    return {seed: part.run for seed, part in warm.items()}


def warmup_config(config: AblateConfig, seed: int) -> DistillConfig:
    """Return the run that ends with the warm-up of a seed."""
    alone = config.base.adversarial.model_copy(update={"steps": 0, "heads_alone": 0})
    return _here(config.base, f"{config.run}/warmup-{seed}", seed, adversarial=alone)


def arm_config(config: AblateConfig, arm: Arm, seed: int, start: str) -> DistillConfig:
    """Return the run of an arm from a seed's warm-up."""
    changed = DistillConfig.model_validate(merged(config.base.model_dump(), arm.changes))
    slug = "".join(c if c.isalnum() else "-" for c in arm.name)
    warmed = changed.warmup.model_copy(update={"steps": 0})
    return _here(changed, f"{config.run}/{slug}-{seed}", seed, start=start, warmup=warmed)


def _here(config: DistillConfig, run: str, seed: int, **changes: Any) -> DistillConfig:
    """Return `config` as a run of one process with one thread, as many of them go side by side."""
    alone = {
        "run": run,
        "seed": seed,
        "resume": RunStore(run).exists("config.yaml"),
        "trainer": config.trainer.model_copy(update={"workers": 0, "threads": 1}),
        "critics": config.critics.model_copy(update={"actors": 0}),
        "evaluation": config.evaluation.model_copy(update={"workers": 0}),
    }
    return config.model_copy(update=alone | changes)


def one(config: DistillConfig, judged: bool) -> dict[str, Any]:
    """Run one distillation in this process, unless it has finished, and return its figures at one step."""
    torch.set_num_threads(1)
    store = RunStore(config.run)
    if not store.exists(RESULTS):
        distill.main(config)
    line = next(row for row in read_results(store)["rows"] if row["name"] == "student, 1 step")
    figures = {name: line[name] for name in FIGURES}
    if judged and config.adversarial.uses_panel:
        figures["overfit_gap"] = overfit_gap(config)
    return figures


def run_all(jobs: dict[str, tuple[DistillConfig, bool]], at_once: int) -> dict[str, dict[str, Any]]:
    """Run jobs as Ray tasks, `at_once` at a time, and return their figures by name."""
    task = ray.remote(one).options(num_cpus=1, max_retries=2, runtime_env={"env_vars": thread_env(1)})
    waiting = list(jobs)
    running: dict[Any, str] = {}
    done: dict[str, dict[str, Any]] = {}
    with ProgressLine(len(jobs), "runs", unit="runs") as line:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                running[task.remote(*jobs[name])] = name
            finished, _ = first_of(list(running), timeout=LONGEST_RUN, what="a run of the study")
            for ref in finished:
                name = running.pop(ref)
                done[name] = get(ref, timeout=60.0, what=name)
                logger.info("%s: fd %.3f, recall %.3f", name, done[name]["fd"], done[name]["recall"])
                line.update(len(done))
    return done


def summary(config: AblateConfig, arm: Arm, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return an arm's line: mean and spread over seeds, and its paired difference to the first arm."""
    runs = [done[f"{arm.name}, seed {seed}"] for seed in config.seeds]
    base = [done[f"{config.arms[0].name}, seed {seed}"] for seed in config.seeds]
    line: dict[str, Any] = {"name": arm.name, "says": arm.says, "figures": {}}
    for figure in (*FIGURES, "overfit_gap"):
        values = [run[figure] for run in runs if run.get(figure) is not None]
        if values:
            line["figures"][figure] = {"mean": statistics.fmean(values), "seeds": values}
            line[figure] = f"{statistics.fmean(values):.3f}" + spread(values)
    if arm is not config.arms[0]:
        differences = [a[config.figure] - b[config.figure] for a, b in zip(runs, base, strict=True)]
        line |= paired(differences)
    return line


def spread(values: list[float]) -> str:
    """Return the standard deviation over seeds, in words for a table."""
    return f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def paired(differences: list[float]) -> dict[str, Any]:
    """Return mean paired difference, its 95 % interval (Student's t) and what that says; lower is better."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return {"difference": f"{mean:+.3f}", "verdict": "one seed says nothing"}
    half = (
        stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    )
    verdict = "lower" if mean + half < 0 else "higher" if mean - half > 0 else "no difference shown"
    return {
        "difference": f"{mean:+.3f}",
        "interval": f"[{mean - half:+.3f}, {mean + half:+.3f}]",
        "verdict": verdict,
    }


if __name__ == "__main__":
    run_job(main, AblateConfig)
