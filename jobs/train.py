"""Train a model: `python -m jobs.train configs/digits/teacher.yaml`.

The configuration's `learner` says what: a diffusion teacher (here) or a policy (`jobs.train_policy`).
"""

import sys
from typing import Any

from actors.evaluation import EvaluationRecipe
from actors.feature_space import make_feature_network
from actors.trainers import TeacherRecipe
from actors.worker import LoopSpec
from cluster.storage import RunStore, save_image
from counterpoint.data import load_data
from counterpoint.diffusion import build_noise_scheduler
from counterpoint.evaluation import generate
from counterpoint.grids import class_grid
from counterpoint.optimization import load_weights
from counterpoint.sampling import build_sampler
from counterpoint.seeds import seed_of
from counterpoint.unet import build_unet
from jobs import train_policy
from jobs.config import choice, run_job
from jobs.launch import launch, stopped
from jobs.report import write_report
from jobs.runs import final_weights, open_run, save_pipeline, write_results
from jobs.scoring import floor_row, references, rows, score_on_stage, timed
from jobs.settings import TrainConfig
from jobs.stage import Cast

GRID_ROW = 10


def main(config: TrainConfig) -> dict[str, Any]:
    """Train, save the pipeline and the feature space, score, and return the headline figures."""
    store = open_run(config.run, config, config.resume, in_process=config.trainer.workers == 0)
    seconds: dict[str, float] = {}

    def spec(_: Cast) -> LoopSpec:
        recipe = TeacherRecipe(
            config.data, config.unet, config.noise, config.teacher, config.seed, config.trainer.accumulate
        )
        return LoopSpec(config.run, recipe, config.trainer.checkpoint_every, config.trainer.keep_checkpoints)

    with launch("teacher", config.trainer) as run:
        with timed(seconds, "train"):
            result = run(spec)
        if not result.finished:
            return stopped(config.run, result)
        return finish(config, store, seconds)


def finish(config: TrainConfig, store: RunStore, seconds: dict[str, float]) -> dict[str, Any]:
    """Save, score and draw what has been trained."""
    data = load_data(config.data)
    channels, side, _ = data.train.image_shape
    unet = build_unet(config.unet, channels, side, data.train.num_classes, seed_of(config.seed, "unet"))
    load_weights(unet, final_weights(store))
    sampler = build_sampler(config.sampler, build_noise_scheduler(config.noise))
    pipeline = save_pipeline(store, unet.eval(), sampler)
    with timed(seconds, "features"):
        network = make_feature_network(store, config.features, data, config.seed)
        real = references(data, network)
    with timed(seconds, "score"):
        recipe = EvaluationRecipe(config.run, config.features, sampler, config.steps, config.evaluation)
        tables = score_on_stage(recipe, None, real, config.evaluation, config.trainer)
    table = [floor_row(data, network, config.evaluation, real), *rows("teacher", tables, config.steps)]
    last = max(config.steps)
    images, labels = generate(pipeline, range(GRID_ROW * data.train.num_classes), last, config.evaluation)
    save_image(store, f"grids/teacher-{last}-steps.png", class_grid(images, labels, GRID_ROW))
    save_image(store, "grids/real.png", class_grid(data.test.images, data.test.labels, GRID_ROW))
    headline = {"floor_fd": table[0]["fd"]}
    headline |= {f"teacher_{n}_fd": line["fd"] for n, line in zip(config.steps, table[1:], strict=True)}
    write_results(store, {"headline": headline, "rows": table, "seconds": seconds})
    report = write_report(store)
    return headline | {"run": config.run, "seconds": round(sum(seconds.values()), 1), "report": report}


if __name__ == "__main__":
    learners: dict[str, Any] = {
        "diffusion": (main, TrainConfig),
        "policy": (train_policy.main, train_policy.PolicyTrainConfig),
    }
    run_job(*choice(sys.argv[1:], "learner", learners))
