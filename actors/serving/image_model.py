"""A version of an image generator that is ready to serve."""

import logging
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin, UNet2DModel

from counterpoint.exactness import exact_sizes, unet_rows
from counterpoint.inflight import Chain, advance
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.seeds import generator
from counterpoint.student import MAX_STEPS
from counterpoint.unet import frozen, null_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageModel:
    """A loaded version; two are the same only if they are one object. It never changes."""

    unet: UNet2DModel
    """In eval mode, on its device."""
    scheduler: SchedulerMixin
    version: str
    """Names the weights."""
    sizes: tuple[int, ...]
    """Batch sizes that the network is evaluated at, rising."""
    max_steps: int
    """Most steps that the scheduler takes."""
    classes: int
    """Classes; labels run from 0 to one less."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes}: pass at least one, each at least 1")


def build_image_model(
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    version: str,
    largest: int,
    exact: bool,
    device: torch.device | str,
) -> ImageModel:
    """Move `unet` to `device` and find out the sizes, at most `largest`, at which it may be evaluated.

    With `exact` those are the ones at which a row's bits agree (`exactness.exact_sizes`, which raises
    ValueError if none is), else all. Takes a few dozen evaluations.
    """
    unet = frozen(unet).to(device)
    sizes = exact_sizes(unet_rows(unet), largest) if exact else tuple(range(1, largest + 1))
    if sizes[-1] < largest:
        logger.warning(
            "%s: batches of %d are not exact in every row; they have at most %d rows",
            version,
            largest,
            sizes[-1],
        )
    student = isinstance(scheduler, TimestepShiftScheduler)
    max_steps = MAX_STEPS if student else int(scheduler.config.num_train_timesteps)
    return ImageModel(unet, scheduler, version, sizes, max_steps, null_class(unet))


def canary(model: ImageModel) -> None:
    """Generate one image in one step; raise ValueError if it is not finite, or constant."""
    chain = Chain(model.unet, model.scheduler, 0, 1, 1.0, generator(0, "canary"))
    while not chain.done:
        advance(model.unet, [chain], model.sizes)
    image = chain.image
    if not bool(torch.isfinite(image).all()):
        raise ValueError("the model's image is not finite: its weights are damaged or its training diverged")
    if float(image.max()) == float(image.min()):
        raise ValueError("the model's image is one shade: its weights are damaged or it was not trained")
