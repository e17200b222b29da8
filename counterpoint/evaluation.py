"""Held-out evaluation of a generator: each image has its own seed, so any shard can be made anywhere."""

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from pydantic import Field
from torch import Tensor

from counterpoint.guidance import GuiderConfig, build_guider
from counterpoint.metrics.extractor import FeatureNetwork
from counterpoint.metrics.score import Scores
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.sampling import sample
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.unet import null_class


class EvaluationConfig(Section):
    """What is generated to be scored."""

    samples: int = Field(default=2000, ge=2)
    """Generated images per figure, spread evenly over the classes; compare figures of equal counts only."""
    batch_size: int = Field(default=250, ge=1)
    """Images generated at once."""
    seed: int = 1234
    """Seed of the images' noise; image i depends on it and on i alone."""
    guider: GuiderConfig = GuiderConfig()
    """Guidance; none by default."""
    unconditional: bool = False
    """Generate under the null class: the unconditional model, whose images have no class to be judged by."""


def generate(
    pipeline: ClassConditionalPipeline, indices: Sequence[int], steps: int, config: EvaluationConfig
) -> tuple[Tensor, Tensor]:
    """Generate the images numbered `indices`: [n,C,H,W] in [-1,1] on the CPU, and their labels [n].

    Image i has class i modulo the number of classes (the null class where `config.unconditional`) and noise
    from its own stream, so it does not depend on which other images are made with it beyond the rounding of
    batched arithmetic.
    """
    null = null_class(pipeline.unet)
    guider = build_guider(config.guider)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    labels = torch.tensor([null if config.unconditional else i % null for i in indices])
    for start in range(0, len(indices), config.batch_size):
        part = indices[start : start + config.batch_size]
        streams = [generator(config.seed, "evaluate", i) for i in part]
        own = labels[start : start + len(part)]
        made = pipeline(own, steps, generator=streams, output_type="pt", return_dict=False, guider=guider)
        images.append(made[0])
    return torch.cat(images), labels


def score_shard(
    pipeline: ClassConditionalPipeline,
    network: FeatureNetwork,
    steps: int,
    config: EvaluationConfig,
    shard: int = 0,
    shards: int = 1,
) -> Scores:
    """Generate and score shard number `shard` of `shards`; the shards' scores merge to the whole."""
    scores = Scores(network.extractor)
    indices = range(shard, config.samples, shards)
    if indices:
        images, labels = generate(pipeline, indices, steps, config)
        scores.update(images, None if config.unconditional else labels, network)
    return scores


@torch.no_grad()
def solver_errors(
    pipeline: ClassConditionalPipeline,
    reference: SchedulerMixin,
    reference_steps: int,
    steps: Sequence[int],
    samples: int,
    config: EvaluationConfig,
) -> dict[int, float]:
    """Return the root mean square distance of `samples` images in `steps` to those of a fine solution.

    Both start from the same noise, that of `generate`, under the same guidance, and neither is clamped. The
    fine solution is that of `reference` in `reference_steps`.
    """
    null, side = null_class(pipeline.unet), pipeline.unet.config.sample_size
    shape = (pipeline.unet.config.in_channels, side, side)
    streams = (generator(config.seed, "evaluate", i) for i in range(samples))
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(pipeline.device)
    labels = torch.tensor([null if config.unconditional else i % null for i in range(samples)])

    def solved(scheduler: SchedulerMixin, count: int) -> Tensor:
        guider = build_guider(config.guider)
        return sample(pipeline.unet, scheduler, noise, labels.to(noise.device), count, guider=guider)[0]

    fine = solved(reference, reference_steps)
    return {n: float((solved(pipeline.scheduler, n) - fine).square().mean().sqrt()) for n in steps}
