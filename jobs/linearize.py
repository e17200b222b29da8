"""Make a diffusion transformer linear (LiT): `python -m jobs.train configs/digits/lit.yaml`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from actors.evaluation import EvaluationRecipe
from actors.feature_space import stored_feature_network
from actors.linear_student import LinearStudentRecipe
from actors.training import TrainerConfig
from actors.worker import LoopSpec
from cluster.storage import RunStore, save_image
from counterpoint.data import load_data
from counterpoint.diffusion import build_noise_scheduler
from counterpoint.evaluation import generate
from counterpoint.grids import class_grid
from counterpoint.linear_student import LinearStudentConfig
from counterpoint.optimization import load_weights
from counterpoint.sampling import build_sampler
from counterpoint.section import Section
from jobs.batch_sizes import check_batch_sizes
from jobs.config import run_job
from jobs.launch import launch, stopped
from jobs.report import write_report
from jobs.run_names import RunUri
from jobs.runs import final_weights, open_run, read_config, read_results, save_pipeline, write_results
from jobs.scoring import floor_row, references, rows, score_on_stage, timed
from jobs.settings import EvaluatorsConfig, TrainConfig

GRID_ROW = 10


class LinearizeConfig(Section):
    """Convert a diffusion transformer with softmax attention into one with linear attention."""

    learner: Literal["linear"] = "linear"
    """What is trained: linear (this), or diffusion or policy, which have configurations of their own."""
    run: RunUri = "runs/digits/lit"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    teacher: RunUri = "runs/digits/dit"
    """URI of a finished run of jobs.train with a `dit` section; its data, noise schedule, sampler and feature
    space are used."""
    resume: bool = False
    """Go on with the run that is there; without it a used `run` is refused."""
    seed: int = 0
    """Seed of everything random in the run."""
    student: LinearStudentConfig = LinearStudentConfig()
    """The conversion and its training."""
    steps: tuple[int, ...] = Field(default=(25,), min_length=1)
    """Numbers of steps at which the student is scored."""
    evaluation: EvaluatorsConfig = EvaluatorsConfig(every=0)
    """Scoring."""
    trainer: TrainerConfig = TrainerConfig()
    """Workers, checkpoints and failures."""

    @model_validator(mode="after")
    def _check(self) -> "LinearizeConfig":
        check_batch_sizes({"student.batch_size": self.student.batch_size}, self.trainer)
        return self


def main(config: LinearizeConfig) -> dict[str, Any]:
    """Convert, train, save the pipeline, score, and return the headline figures, such as `fd_25`."""
    source = RunStore(config.teacher)
    teacher: TrainConfig = read_config(source, TrainConfig)
    read_results(source)  # raises unless it has finished
    recipe = LinearStudentRecipe(
        config.teacher, teacher.data, teacher.noise, config.student, config.seed, config.trainer.accumulate
    )
    recipe.conversion()  # what it refuses, it refuses before there is a run
    store = open_run(config.run, config, config.resume, in_process=config.trainer.workers == 0)
    seconds: dict[str, float] = {}
    spec = LoopSpec(config.run, recipe, config.trainer.checkpoint_every, config.trainer.keep_checkpoints)
    with launch("linear student", config.trainer) as run:
        with timed(seconds, "train"):
            result = run(lambda _: spec)
        if not result.finished:
            return stopped(config.run, result)
        return finish(config, teacher, recipe, store, seconds)


def finish(
    config: LinearizeConfig,
    teacher: TrainConfig,
    recipe: LinearStudentRecipe,
    store: RunStore,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Save, score and draw what has been trained."""
    data = load_data(teacher.data)
    made = recipe.conversion()
    load_weights(made.student, final_weights(store))
    sampler = build_sampler(teacher.sampler, build_noise_scheduler(teacher.noise))
    pipeline = save_pipeline(store, made.student.eval(), sampler)
    network = stored_feature_network(RunStore(config.teacher), teacher.features, teacher.seed)
    real = references(data, network)
    with timed(seconds, "score"):
        scoring = EvaluationRecipe(
            config.run, teacher.features, sampler, config.steps, config.evaluation, config.teacher
        )
        tables = score_on_stage(scoring, None, real, config.evaluation, config.trainer)
    table = [floor_row(data, network, config.evaluation, real), *rows("student", tables, config.steps)]
    last = max(config.steps)
    images, labels = generate(pipeline, range(GRID_ROW * data.train.num_classes), last, config.evaluation)
    save_image(store, f"grids/student-{last}-steps.png", class_grid(images, labels, GRID_ROW))
    save_image(store, "grids/real.png", class_grid(data.test.images, data.test.labels, GRID_ROW))
    headline = {"floor_fd": table[0]["fd"]}
    for n, line in zip(config.steps, table[1:], strict=True):
        headline |= {f"{figure}_{n}": line[figure] for figure in ("fd", "accuracy")}
    conversion = {"copied": made.copied, "fresh": made.fresh}
    write_results(store, {"headline": headline, "rows": table, "conversion": conversion, "seconds": seconds})
    report = write_report(store)
    return headline | {"run": config.run, "seconds": round(sum(seconds.values()), 1), "report": report}


if __name__ == "__main__":
    run_job(main, LinearizeConfig)
