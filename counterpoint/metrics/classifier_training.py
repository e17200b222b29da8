"""Training of the small classifier on an image set."""

import logging

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from counterpoint.data.images import ImageSet
from counterpoint.metrics.classifier import ClassifierArchitecture, SmallClassifier
from counterpoint.section import Section
from counterpoint.seeds import generator, seed_of

logger = logging.getLogger(__name__)


class ClassifierConfig(Section):
    """The classifier whose penultimate layer is the default feature space, and its training."""

    width: int = Field(default=32, ge=1)
    """Channels of the first convolution."""
    feature_dim: int = Field(default=64, ge=1)
    """Length of the penultimate layer, the feature space."""
    steps: int = Field(default=1200, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=96, ge=2)
    """Images a step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW; it rises over the first tenth of the steps and falls to zero."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Weight decay of AdamW."""
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    """Share of the target spread over all classes."""
    shift: int = Field(default=1, ge=0)
    """Largest shift, in pixels, of the augmentation along each axis."""


def train_classifier(
    train: ImageSet, config: ClassifierConfig, seed: int, device: torch.device | str = "cpu"
) -> SmallClassifier:
    """Return a frozen classifier trained on `train` alone, the same for the same seed.

    Raises ValueError when `train` holds no image.
    """
    if len(train.images) == 0:
        raise ValueError(f"data set {train.name!r} holds 0 training images: the classifier needs some")
    model = _initial(train, config, seed).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    draws = generator(seed, "classifier", "batches")
    for step in range(config.steps):
        images, labels = draw_batch(train, config, draws)
        loss = F.cross_entropy(model(images), labels.to(device), label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0 or step + 1 == config.steps:
            logger.info("classifier step %d of %d loss %.4f", step + 1, config.steps, loss.item())
    return model.eval().requires_grad_(False)


def draw_batch(train: ImageSet, config: ClassifierConfig, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images [B,C,H,W], drawn with replacement and shifted, and their labels [B]."""
    rows = torch.randint(len(train.images), (config.batch_size,), generator=draws)
    return shift_images(train.images[rows], config.shift, draws), train.labels[rows]


def shift_images(images: Tensor, largest: int, draws: torch.Generator) -> Tensor:
    """Shift each of `images` [N,C,H,W] by up to `largest` pixels along each axis, repeating its border."""
    if largest == 0:
        return images
    count, _, height, width = images.shape
    top, left = torch.randint(2 * largest + 1, (2, count, 1), generator=draws)
    padded = F.pad(images, (largest,) * 4, mode="replicate")
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], channels, rows, columns]


def _initial(train: ImageSet, config: ClassifierConfig, seed: int) -> SmallClassifier:
    """Return the untrained classifier of this seed; torch's global generator is left as it was."""
    architecture = ClassifierArchitecture(
        channels=train.images.shape[1],
        num_classes=train.num_classes,
        width=config.width,
        feature_dim=config.feature_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "classifier", "weights"))
        return SmallClassifier(architecture)
