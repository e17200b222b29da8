"""Held-out evaluation of a generator: each image has its own seed, so any shard can be made anywhere."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from counterpoint.metrics.extractor import FeatureNetwork
from counterpoint.metrics.score import Scores
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.section import Section
from counterpoint.seeds import generator


class EvaluationConfig(Section):
    """What is generated to be scored."""

    samples: int = Field(default=2000, ge=2)
    """Generated images per figure, spread evenly over the classes; compare figures of equal counts only."""
    batch_size: int = Field(default=250, ge=1)
    """Images generated at once."""
    seed: int = 1234
    """Seed of the images' noise; image i depends on it and on i alone."""


def generate(
    pipeline: ClassConditionalPipeline, indices: Sequence[int], steps: int, config: EvaluationConfig
) -> tuple[Tensor, Tensor]:
    """Generate the images numbered `indices`: [n,C,H,W] in [-1,1] on the CPU, and their labels [n].

    Image i has class i modulo the number of classes and noise from its own stream, so it does not depend on
    which other images are made with it beyond the rounding of batched arithmetic.
    """
    classes = int(pipeline.unet.config.num_class_embeds) - 1
    pipeline.set_progress_bar_config(disable=True)
    images = []
    labels = torch.tensor([i % classes for i in indices])
    for start in range(0, len(indices), config.batch_size):
        part = indices[start : start + config.batch_size]
        streams = [generator(config.seed, "evaluate", i) for i in part]
        own = labels[start : start + len(part)]
        made = pipeline(own, steps, generator=streams, output_type="pt", return_dict=False)
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
        scores.update(images, labels, network)
    return scores
