"""Images a second of a pipeline that is called directly, at several batch sizes: what no server can exceed.

    python -m jobs.bench_direct run=runs/digits/student

`jobs.bench serve` runs it in a process of its own, with as many threads as a replica has.
"""

import itertools
import time
from typing import Any

import torch
from pydantic import Field

from cluster.storage import RunStore
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.unet import null_class
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.runs import load_pipeline


class DirectBenchConfig(Section):
    """What is called, how, for how long."""

    run: RunUri = "runs/demo/student"
    """URI of a run with a saved pipeline."""
    batches: tuple[int, ...] = Field(default=(1, 4, 16, 32, 64), min_length=1)
    """Images of a call."""
    steps: tuple[int, ...] = Field(default=(4,), min_length=1)
    """Numbers of steps that calls take turns in."""
    guidance_scale: float = 1.0
    """Guidance."""
    seconds: float = Field(default=3.0, gt=0.0)
    """Seconds of each batch size, after one call for each number of steps that is not counted."""
    threads: int = Field(default=1, ge=1)
    """Threads of the maths."""


def main(config: DirectBenchConfig) -> dict[str, Any]:
    """Return `best` (images a second at the best batch size), `best_batch` and each `images_per_second`."""
    torch.set_num_threads(config.threads)
    pipeline = load_pipeline(RunStore(config.run))
    pipeline.set_progress_bar_config(disable=True)
    speeds = {batch: speed(pipeline, batch, config) for batch in config.batches}
    best = max(speeds, key=lambda batch: speeds[batch])
    rounded = {batch: round(value, 2) for batch, value in speeds.items()}
    return {"best": rounded[best], "best_batch": best, "images_per_second": rounded}


def speed(pipeline: ClassConditionalPipeline, batch: int, config: DirectBenchConfig) -> float:
    """Return images a second, from seeds to pixels in memory; no picture is encoded.

    Every number of steps is called equally often, so that calls of many steps are not cut short.
    """
    classes = null_class(pipeline.unet)
    numbers = itertools.count()

    def round_of_calls() -> None:
        for steps in config.steps:
            number = next(numbers)
            labels = [(number + i) % classes for i in range(batch)]
            streams = [generator(number, "sample", label, i) for i, label in enumerate(labels)]
            pipeline(labels, steps, config.guidance_scale, streams, output_type="np")

    round_of_calls()
    begun, made = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < config.seconds:
        round_of_calls()
        made += batch * len(config.steps)
    return made / spent


if __name__ == "__main__":
    run_job(main, DirectBenchConfig)
