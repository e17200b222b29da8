"""Distil a teacher into a one-step student: `python -m jobs.distill configs/digits/distill.yaml`."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from actors.evaluation import EvaluationPool, EvaluationRecipe
from actors.feature_space import stored_feature_network
from actors.recipe import PanelRecipe, build_pieces, load_unet
from actors.trainers import StudentRecipe
from actors.worker import LoopSpec
from cluster.checkpoints import latest_checkpoint
from cluster.storage import RunStore, save_image
from counterpoint.alarms import Watcher
from counterpoint.critics.panel import group_name
from counterpoint.critics.pool import Pool
from counterpoint.data import Split, load_data
from counterpoint.diffusion import check_distillable
from counterpoint.evaluation import generate
from counterpoint.grids import class_grid
from counterpoint.metrics.extractor import FeatureNetwork
from counterpoint.metrics.score import Reference
from counterpoint.optimization import load_weights
from counterpoint.scheduler import TimestepShiftScheduler
from jobs.config import run_job
from jobs.launch import launch, stopped
from jobs.report import write_report
from jobs.runs import final_weights, open_run, read_config, read_results, save_pipeline, write_results
from jobs.scoring import references, rows, score_on_stage, timed
from jobs.settings import DistillConfig, TrainConfig
from jobs.stage import Cast, cast, check_digests

GRID_ROW = 10
FEWEST_UPDATES = 50
"""Updates per life below which heads are replaced before they have learned (measured on small images)."""


@dataclass(frozen=True)
class Score:
    """All that stands around a distillation: what it starts from and what it is measured with."""

    config: DistillConfig
    store: RunStore
    teacher: TrainConfig
    teacher_results: dict[str, Any]
    data: Split
    network: FeatureNetwork
    real: dict[str, Reference]
    panel: PanelRecipe

    @property
    def scheduler(self) -> TimestepShiftScheduler:
        """A new sampler of the student."""
        return TimestepShiftScheduler(
            **self.teacher.noise.diffusion_options(), timestep_shift=self.config.student.timestep_shift
        )

    def evaluation(self, steps: tuple[int, ...]) -> EvaluationRecipe:
        """What evaluation workers need to score snapshots of the student."""
        return EvaluationRecipe(
            self.config.teacher, self.teacher.features, self.scheduler, steps, self.config.evaluation,
            scored=self.config.run,
        )  # fmt: skip


def main(config: DistillConfig) -> dict[str, Any]:
    """Distil, save the student, score it, write the report, and return the headline figures."""
    work = prepare(config)
    pool, _, _ = build_pieces(work.panel, torch.device("cpu"))
    seconds: dict[str, float] = {}
    panel = work.panel if config.adversarial.uses_panel else None
    snapshots = work.evaluation(config.steps) if config.evaluation.every else None

    def stage() -> AbstractContextManager[Cast]:
        return cast(panel, config.critics, snapshots, config.evaluation, config.trainer, config.run)

    with launch("student", config.trainer, stage, pool.size if panel else 0) as run:
        with timed(seconds, "distill"):
            result = run(lambda made: loop_spec(work, made))
        if not result.finished:
            return stopped(config.run, result)
        with timed(seconds, "score"):
            table = finish(work)
    return conclude(work, table, pool if panel else None, seconds)


def prepare(config: DistillConfig) -> Score:
    """Open the run and read what the teacher's run stored."""
    source = RunStore(config.teacher)
    teacher: TrainConfig = read_config(source, TrainConfig)
    check_distillable(teacher.noise, config.teacher)
    results = read_results(source)
    in_process = config.trainer.workers == 0
    store = open_run(config.run, config, config.resume, in_process)
    data = load_data(teacher.data)
    network = stored_feature_network(source, teacher.features, teacher.seed)
    panel = PanelRecipe(
        config.teacher, config.critics.plain(), teacher.noise, config.seed,
        total_steps=config.adversarial.panel_steps,
    )  # fmt: skip
    return Score(config, store, teacher, results, data, network, references(data, network), panel)


def loop_spec(work: Score, made: Cast) -> LoopSpec:
    """Return what the trainer's workers run, with the cast that it talks to."""
    config = work.config
    if made.hosts and latest_checkpoint(work.store) is None:
        check_digests(made.hosts, work.panel)
    data = work.teacher.data.model_copy(update={"limit": config.real_limit or work.teacher.data.limit})
    recipe = StudentRecipe(
        work.panel, made.hosts, data, config.pairs, config.student, config.warmup, config.adversarial,
        config.seed, config.start, config.trainer.accumulate, config.critics.patience,
    )  # fmt: skip
    reference = work.real[config.evaluation.against]
    evaluation = EvaluationPool(made.evaluators, reference) if made.evaluators else None
    return LoopSpec(
        config.run, recipe, config.trainer.checkpoint_every, config.trainer.keep_checkpoints,
        config.evaluation.every, evaluation=evaluation, watch=lambda: Watcher(config.alarms),
    )  # fmt: skip


def finish(work: Score) -> list[dict[str, Any]]:
    """Save the student, score it, draw it, and return the table with the teacher's lines above its own."""
    config, store = work.config, work.store
    weights = final_weights(store)
    unet = load_unet(config.teacher)
    load_weights(unet, weights)
    pipeline = save_pipeline(store, unet.eval(), work.scheduler)
    tables = score_on_stage(
        work.evaluation(config.steps), weights, work.real, config.evaluation, config.trainer
    )
    for n in config.steps:
        shown = range(GRID_ROW * work.data.train.num_classes)
        images, labels = generate(pipeline, shown, n, config.evaluation)
        save_image(
            store, f"grids/student-{n}-step{'s' if n > 1 else ''}.png", class_grid(images, labels, GRID_ROW)
        )
    for name in RunStore(config.teacher).list("grids"):
        store.write_bytes(name, RunStore(config.teacher).read_bytes(name))
    return [*work.teacher_results["rows"], *rows("student", tables, config.steps)]


def conclude(
    work: Score, table: list[dict[str, Any]], pool: Pool | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """Write results and report, and return the headline."""
    config = work.config
    by_name = {line["name"]: line for line in table}
    headline = dict(work.teacher_results["headline"])
    for n in config.steps:
        line = by_name[f"student, {n} step{'s' if n > 1 else ''}"]
        headline |= {f"student_{n}_fd": line["fd"], f"student_{n}_train_fd": line["train_fd"]}
    if 1 in config.steps:
        headline["student_1_accuracy"] = by_name["student, 1 step"]["accuracy"]
        headline["student_1_recall"] = by_name["student, 1 step"]["recall"]
    results: dict[str, Any] = {"headline": headline, "rows": table, "seconds": seconds}
    if pool is not None:
        results["pool"] = describe_pool(pool)
    write_results(work.store, results)
    work.store.delete("snapshots")
    report = write_report(work.store)
    return headline | {"run": config.run, "seconds": round(sum(seconds.values()), 1), "report": report}


def describe_pool(pool: Pool) -> dict[str, Any]:
    """Return the pool's arithmetic for the report, with a warning where heads live too short a life."""
    updates = pool.config.updates_per_life(len(pool.slots))
    described: dict[str, Any] = {
        "heads": pool.size,
        "slots": len(pool.slots),
        "heads_per_slot": pool.config.heads_per_slot,
        "groups": [{"name": group_name(i), "timestep": t} for i, t in enumerate(pool.timesteps)],
        "updates_per_life": updates if updates != float("inf") else None,
    }
    if updates < FEWEST_UPDATES:
        described["warning"] = (
            f"a head gets {updates:.0f} updates before it is refreshed, fewer than the {FEWEST_UPDATES} "
            "that heads on small images need: lower critics.refresh_rate or raise critics.levels_per_step"
        )
    return described


if __name__ == "__main__":
    run_job(main, DistillConfig)
