"""Held-out evaluation in shards."""

import pytest
import torch
from tiny import CLASSES, SIDE, digits, unet
from torch import Tensor

from counterpoint.evaluation import EvaluationConfig, generate, score_shard
from counterpoint.metrics.score import Reference, Scores
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.scheduler import TimestepShiftScheduler

CONFIG = EvaluationConfig(samples=40, batch_size=7)


class Pixels:
    """A feature network whose features are a few sums of pixels, and which reads classes off their mean."""

    extractor = "pixels"

    def features(self, images: Tensor) -> Tensor:
        return images.unflatten(2, (4, 2)).unflatten(4, (2, 4)).mean(dim=(3, 5)).flatten(1)

    def predict(self, images: Tensor) -> Tensor:
        level = (images.mean(dim=(1, 2, 3)) * 50).round().long() % CLASSES
        return torch.nn.functional.one_hot(level, CLASSES).float()


def pipeline() -> ClassConditionalPipeline:
    return ClassConditionalPipeline(unet().eval(), TimestepShiftScheduler())


def test_images_are_numbered() -> None:
    """Image i has its class and its noise, whoever makes it and with whatever else."""
    images, labels = generate(pipeline(), range(20), 2, CONFIG)
    assert images.shape == (20, 1, SIDE, SIDE)
    assert labels.tolist() == [i % CLASSES for i in range(20)]
    some, their_labels = generate(pipeline(), [17, 3, 11], 2, CONFIG)
    assert their_labels.tolist() == [7, 3, 1]
    torch.testing.assert_close(some, images[[17, 3, 11]], atol=1e-5, rtol=1e-5)
    other, _ = generate(pipeline(), range(3), 2, CONFIG.model_copy(update={"seed": 9}))
    assert not torch.allclose(other, images[:3], atol=1e-2)
    assert len(torch.unique(images.flatten(1), dim=0)) == 20


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_merge_to_the_whole(shards: int) -> None:
    network, reference = Pixels(), Reference.from_images(digits(60).images, Pixels())
    whole = score_shard(pipeline(), network, 1, CONFIG).compute(reference)
    merged = Scores(network.extractor)
    for shard in range(shards):
        merged = merged.merge(score_shard(pipeline(), network, 1, CONFIG, shard, shards))
    table = merged.compute(reference)
    assert table["samples"] == whole["samples"] == 40
    for name in ("fd", "recall", "precision", "accuracy"):
        assert table[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5)


def test_more_shards_than_images_leave_some_empty_handed() -> None:
    config = CONFIG.model_copy(update={"samples": 3})
    parts = [score_shard(pipeline(), Pixels(), 1, config, shard, 5) for shard in range(5)]
    assert [part.samples for part in parts] == [1, 1, 1, 0, 0]
