"""Score a finished run on held-out images: `python -m jobs.evaluate run=runs/demo/student steps=[1,2,4]`."""

import contextlib
import hashlib
import json
import sys
from typing import Any

import safetensors.torch
import torch
import yaml
from pydantic import Field

from actors.evaluation import EvaluationRecipe
from actors.feature_space import stored_feature_network
from actors.training import TrainerConfig
from cluster.connect import connected
from cluster.storage import RunStore
from counterpoint.data import load_data
from counterpoint.diffusion import build_noise_scheduler
from counterpoint.evaluation import distance, solutions
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.sampling import SamplerConfig, build_sampler, default_sampler
from counterpoint.section import Section
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.runs import load_pipeline, read_config, with_sampler
from jobs.scoring import floor_row, references, rows, score_on_stage
from jobs.settings import EvaluatorsConfig, TrainConfig
from jobs.table import text_table


class EvaluateConfig(Section):
    """Score the saved pipeline of a run, each evaluation worker a shard."""

    run: RunUri = "runs/demo/student"
    """URI of a finished run of jobs.train or jobs.distill."""
    teacher: RunUri | None = None
    """URI of the teacher's run, which holds the feature space; the one that the run names unless given."""
    steps: tuple[int, ...] = Field(default=(1,), min_length=1)
    """Numbers of steps to score."""
    sampler: SamplerConfig | None = None
    """The sampler to score a teacher with; the one that was saved with the run unless given."""
    reference_steps: int = Field(default=0, ge=0)
    """Steps of DDIM, or of Euler's method for a flow, whose images are taken as the exact solution, to which
    those of the sampler have the root mean square distance `error_n`; 0 leaves that out."""
    reference_samples: int = Field(default=64, ge=1)
    """Images that this is measured on."""
    evaluation: EvaluatorsConfig = EvaluatorsConfig()
    """What is generated, by how many workers; workers=0 scores in this process, without Ray."""


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Return figures as `fd_1`, `kid_1`, `error_1` ... for each number of steps, beside the floor's.

    Those of the last number of steps are also there as `fd`, `kid` ...: for comparisons at equal cost.
    """
    uri = config.teacher or teacher_of(config.run)
    teacher: TrainConfig = read_config(RunStore(uri), TrainConfig)
    data = load_data(teacher.data)
    network = stored_feature_network(RunStore(uri), teacher.features, teacher.seed)
    pipeline = with_sampler(load_pipeline(RunStore(config.run)), config.sampler, teacher.noise)
    real = references(data, network)
    recipe = EvaluationRecipe(
        config.run, teacher.features, pipeline.scheduler, config.steps, config.evaluation, uri
    )
    with connected() if config.evaluation.workers else contextlib.nullcontext():
        tables = score_on_stage(recipe, None, real, config.evaluation, TrainerConfig())
    table = [floor_row(data, network, config.evaluation, real), *rows("run", tables, config.steps)]
    sys.stderr.write(text_table(table) + "\n")
    figures = {
        f"{key}_{n}": value for n in config.steps for key, value in tables["test"][f"steps_{n}"].items()
    }
    figures |= tables["test"][f"steps_{config.steps[-1]}"]
    if config.reference_steps:
        figures |= errors(config, pipeline, teacher)
    return {"run": config.run, "floor_fd": table[0]["fd"]} | figures


def errors(
    config: EvaluateConfig, pipeline: ClassConditionalPipeline, teacher: TrainConfig
) -> dict[str, float]:
    """Return `error_n` for each number of steps."""
    exact = exact_solution(config, pipeline, teacher)
    samples = config.reference_samples
    found = {
        n: solutions(pipeline.unet, pipeline.scheduler, n, samples, config.evaluation) for n in config.steps
    }
    return {f"error_{n}": distance(images, exact) for n, images in found.items()}


def exact_solution(
    config: EvaluateConfig, pipeline: ClassConditionalPipeline, teacher: TrainConfig
) -> torch.Tensor:
    """Return the images of the fine solution, which are kept with the run for whoever compares with them."""
    sampler = default_sampler(teacher.noise)
    if teacher.noise.process == "diffusion":
        sampler = SamplerConfig(options={"timestep_spacing": "trailing", "clip_sample": False})
    count, samples = config.reference_steps, config.reference_samples
    shared = config.evaluation.model_dump(include={"seed", "guider", "unconditional"})
    made = json.dumps([sampler.model_dump(), count, samples, shared], sort_keys=True)
    store, name = RunStore(config.run), hashlib.sha256(made.encode()).hexdigest()[:12]
    path = f"solutions/{name}.safetensors"
    if not store.exists(path):
        reference = build_sampler(sampler, build_noise_scheduler(teacher.noise))
        images = solutions(pipeline.unet, reference, count, samples, config.evaluation)
        store.write_bytes(path, safetensors.torch.save({"images": images.contiguous()}, {"made": made}))
    return safetensors.torch.load(store.read_bytes(path))["images"]


def teacher_of(uri: str) -> str:
    """Return the URI of the teacher that a run names, or its own if it is a teacher's run."""
    store = RunStore(uri)
    if not store.exists("config.yaml"):
        raise ValueError(f"run={uri} is not a run: it has no config.yaml")
    named = yaml.safe_load(store.read_text("config.yaml")).get("teacher")
    return named if isinstance(named, str) else uri


if __name__ == "__main__":
    run_job(main, EvaluateConfig)
