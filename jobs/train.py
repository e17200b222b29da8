"""Train a model: `python -m jobs.train configs/digits/teacher.yaml`.

The configuration's `learner` says what: a diffusion teacher (here), a linear student of one
(`jobs.linearize`) or a policy (`jobs.train_policy`).
"""

import sys
from contextlib import AbstractContextManager
from typing import Any

from actors.evaluation import EvaluationPool, EvaluationRecipe, LocalEvaluation
from actors.feature_space import make_feature_network
from actors.trainers import TeacherRecipe
from actors.worker import EVALUATIONS, LoopSpec
from cluster.metrics_log import read_metrics
from cluster.storage import RunStore, save_image
from counterpoint.data import load_data
from counterpoint.diffusion import build_noise_scheduler
from counterpoint.evaluation import generate
from counterpoint.grids import class_grid
from counterpoint.learning_curve import steps_to_reach
from counterpoint.optimization import load_weights
from counterpoint.sampling import build_sampler
from jobs import linearize, train_policy
from jobs.config import choice, run_job
from jobs.launch import launch, stopped
from jobs.report import write_report
from jobs.runs import final_weights, open_run, save_pipeline, write_results
from jobs.scoring import floor_row, references, rows, score_on_stage, timed
from jobs.settings import HostedCriticsConfig, TrainConfig
from jobs.stage import Cast, cast

GRID_ROW = 10


def main(config: TrainConfig) -> dict[str, Any]:
    """Train, save the pipeline and the feature space, score, and return the headline figures."""
    store = open_run(config.run, config, config.resume, in_process=config.trainer.workers == 0)
    seconds: dict[str, float] = {}

    snapshots = evaluation_recipe(config, teacher_recipe(config)) if config.evaluation.every else None
    if snapshots is not None:
        with timed(seconds, "features"):
            data = load_data(config.data)
            network = make_feature_network(store, config.features, data, config.seed)
            reference = references(data, network)[config.evaluation.against]

    def spec(made: Cast) -> LoopSpec:
        pool: EvaluationPool | LocalEvaluation | None = None
        if snapshots is not None:
            local = LocalEvaluation(snapshots, reference)
            pool = EvaluationPool(made.evaluators, reference) if made.evaluators else local
        return LoopSpec(
            config.run, teacher_recipe(config), config.trainer.checkpoint_every,
            config.trainer.keep_checkpoints, config.evaluation.every, evaluation=pool,
        )  # fmt: skip

    def stage() -> AbstractContextManager[Cast]:
        return cast(None, HostedCriticsConfig(), snapshots, config.evaluation, config.trainer, config.run)

    aside = snapshots is not None and config.evaluation.workers > 0
    with launch("teacher", config.trainer, stage if aside else None) as run:
        with timed(seconds, "train"):
            result = run(spec)
        if not result.finished:
            return stopped(config.run, result)
        return finish(config, store, seconds)


def teacher_recipe(config: TrainConfig) -> TeacherRecipe:
    """Return what workers make the trainer of."""
    return TeacherRecipe(
        config.data, config.network, config.noise, config.teacher, config.seed, config.trainer.accumulate
    )


def evaluation_recipe(config: TrainConfig, snapshots: TeacherRecipe | None = None) -> EvaluationRecipe:
    """Return what scores the saved pipeline, or `snapshots` of a training, in the run's feature space."""
    sampler = build_sampler(config.sampler, build_noise_scheduler(config.noise))
    return EvaluationRecipe(
        config.run, config.features, sampler, config.steps, config.evaluation,
        network=None if snapshots is None else snapshots.build,
    )  # fmt: skip


def finish(config: TrainConfig, store: RunStore, seconds: dict[str, float]) -> dict[str, Any]:
    """Save, score and draw what has been trained."""
    data = load_data(config.data)
    unet = teacher_recipe(config).build()
    load_weights(unet, final_weights(store))
    recipe = evaluation_recipe(config)
    pipeline = save_pipeline(store, unet.eval(), recipe.scheduler)
    with timed(seconds, "features"):
        network = make_feature_network(store, config.features, data, config.seed)
        real = references(data, network)
    with timed(seconds, "score"):
        tables = score_on_stage(recipe, None, real, config.evaluation, config.trainer)
    table = [floor_row(data, network, config.evaluation, real), *rows("teacher", tables, config.steps)]
    last = max(config.steps)
    images, labels = generate(pipeline, range(GRID_ROW * data.train.num_classes), last, config.evaluation)
    save_image(store, f"grids/teacher-{last}-steps.png", class_grid(images, labels, GRID_ROW))
    save_image(store, "grids/real.png", class_grid(data.test.images, data.test.labels, GRID_ROW))
    headline = {"floor_fd": table[0]["fd"]}
    headline |= {f"teacher_{n}_fd": line["fd"] for n, line in zip(config.steps, table[1:], strict=True)}
    headline |= {f"teacher_{last}_recall": table[1 + config.steps.index(last)]["recall"]}
    headline |= curve_figures(config, store)
    write_results(store, {"headline": headline, "rows": table, "seconds": seconds} | course(store))
    report = write_report(store)
    return headline | {"run": config.run, "seconds": round(sum(seconds.values()), 1), "report": report}


def curve_figures(config: TrainConfig, store: RunStore) -> dict[str, float]:
    """Return what is read off the learning curve, FD in the most sampling steps by training step.

    `fd_halfway` is of the first snapshot that half of the training has gone into.
    """
    key = f"steps_{max(config.steps)}"
    scored = [row for row in read_metrics(store, EVALUATIONS) if row.get(key, {}).get("fd") is not None]
    curve = [(row["step"], row[key]["fd"]) for row in scored]
    late = [fd for step, fd in curve if 2 * step >= config.teacher.steps]
    figures = {"fd_halfway": late[0]} if late else {}
    if config.target_fd is None or not curve:
        return figures
    unreached = curve[-1][0] + config.evaluation.every
    return figures | {"steps_to_target": steps_to_reach(curve, config.target_fd, unreached)}


def course(store: RunStore) -> dict[str, Any]:
    """Return what metrics say of the pairing of noise, its cost included, and of the curriculum, if any."""
    rows, found = read_metrics(store), {}
    paired = [row for row in rows if "pairing_seconds" in row]
    if paired:
        means = {
            name: sum(row[name] for row in paired) / len(paired) for name in ("noise_norm", "distance_drop")
        }
        spent, whole = (sum(row[name] for row in paired) for name in ("pairing_seconds", "seconds"))
        found["pairing"] = means | {"seconds_per_step": spent / len(paired), "share_of_step": spent / whole}
    if rows and "curriculum_stage" in rows[0]:
        stages = [row["curriculum_stage"] for row in rows]
        # The first row is of step 1.
        found["curriculum"] = {
            "stage_starts": {stage: rows[stages.index(stage)]["step"] for stage in sorted(set(stages))}
        }
    return found


if __name__ == "__main__":
    learners: dict[str, Any] = {
        "diffusion": (main, TrainConfig),
        "linear": (linearize.main, linearize.LinearizeConfig),
        "policy": (train_policy.main, train_policy.PolicyTrainConfig),
    }
    run_job(*choice(sys.argv[1:], "learner", learners))
