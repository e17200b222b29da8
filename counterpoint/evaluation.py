"""Held-out evaluation of a generator: each image has its own seed, so any shard can be made anywhere."""

from collections.abc import Sequence
from typing import Any

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
def solutions(
    network: Any, scheduler: SchedulerMixin, steps: int, samples: int, config: EvaluationConfig
) -> Tensor:
    """Return the first `samples` images of `generate` as the sampler leaves them, float32 [samples,C,H,W].

    They have the same noise and guidance, and are not clamped: what two samplers give may be compared.
    """
    null, side, device = null_class(network), network.config.sample_size, network.device
    shape = (network.config.in_channels, side, side)
    streams = (generator(config.seed, "evaluate", i) for i in range(samples))
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)
    labels = torch.tensor([null if config.unconditional else i % null for i in range(samples)], device=device)
    guider = build_guider(config.guider)
    return sample(network, scheduler, noise, labels, steps, guider=guider)[0].float().cpu()


def distance(found: Tensor, exact: Tensor) -> float:
    """Return the root mean square difference of images [B,C,H,W], over all their values."""
    return float((found - exact).square().mean().sqrt())
