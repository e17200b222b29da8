"""Pictures from a finished run: `python -m jobs.sample run=runs/demo/student --steps 1 out=digits.png`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from cluster.storage import RunStore
from counterpoint.grids import class_grid
from counterpoint.guidance import GuiderConfig, build_guider
from counterpoint.sampling import SamplerConfig
from counterpoint.section import Section
from counterpoint.seeds import generator
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.runs import load_pipeline, read_config, with_sampler
from jobs.settings import TrainConfig


class SampleConfig(Section):
    """Generate images of given classes from the saved pipeline of a run."""

    run: RunUri = "runs/demo/student"
    """URI of a finished run of jobs.train or jobs.distill."""
    steps: int = Field(default=1, ge=1)
    """Steps of the sampler: 1 to 4 for a student, any number for a teacher."""
    classes: tuple[int, ...] = ()
    """Classes to generate; all of them unless given."""
    per_class: int = Field(default=10, ge=1)
    """Images of each class."""
    seed: int = 0
    """Seed; image k of a class depends on the seed, the class and k alone."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, 1 for none; for teachers, a student has no use for it."""
    sampler: SamplerConfig | None = None
    """A teacher's sampler; the one that was saved with the run unless given."""
    guider: GuiderConfig | None = None
    """Another guidance than `guidance_scale`'s."""
    out: str = "samples.png"
    """Where to write: a .png grid with one row a class, or a .npz: `images` [N,C,H,W] in [-1,1], `labels`."""


def main(config: SampleConfig) -> dict[str, Any]:
    """Generate, write, and return what was written where."""
    path = Path(config.out)
    if path.suffix not in (".png", ".npz"):
        raise ValueError(f"out={config.out} must end in .png or .npz")
    pipeline = load_pipeline(RunStore(config.run))
    if config.sampler is not None:
        teacher: TrainConfig = read_config(RunStore(config.run), TrainConfig)
        pipeline = with_sampler(pipeline, config.sampler, teacher.noise)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    classes = config.classes or tuple(range(int(pipeline.unet.config.num_class_embeds) - 1))
    labels = [label for label in classes for _ in range(config.per_class)]
    streams = [
        generator(config.seed, "sample", label, k) for label in classes for k in range(config.per_class)
    ]
    guider = build_guider(config.guider) if config.guider else None
    images = pipeline(
        labels,
        config.steps,
        config.guidance_scale,
        streams,
        output_type="pt",
        return_dict=False,
        guider=guider,
    )[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez_compressed(path, images=images.numpy(), labels=np.array(labels))
    else:
        class_grid(images, torch.tensor(labels), config.per_class).save(path)
    return {"out": str(path), "images": len(labels), "steps": config.steps, "seed": config.seed}


if __name__ == "__main__":
    run_job(main, SampleConfig)
