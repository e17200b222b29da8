"""A version of an image generator that is ready to serve."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance

from actors.serving.images_sampling import GUIDERS, SCHEDULERS
from counterpoint.exactness import exact_sizes, unet_rows
from counterpoint.flow import check_guider
from counterpoint.guidance import GuiderConfig, build_guider
from counterpoint.inflight import Chain, advance
from counterpoint.sampling import SamplerConfig, build_sampler
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.seeds import generator
from counterpoint.student import MAX_STEPS
from counterpoint.unet import frozen, null_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageModel:
    """A loaded version; two are the same only if they are one object. It never changes."""

    unet: Any
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
    samplers: Mapping[str, SchedulerMixin] = field(default_factory=dict)
    """The schedulers that requests may ask for by name, its own first."""
    guiders: tuple[str, ...] = ()
    """The guiders that requests may ask for."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes}: pass at least one, each at least 1")


def build_image_model(
    unet: Any,
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
    return ImageModel(
        unet, scheduler, version, sizes, max_steps, null_class(unet), samplers_over(scheduler),
        guiders_over(unet, scheduler),
    )  # fmt: skip


def samplers_over(own: SchedulerMixin) -> dict[str, SchedulerMixin]:
    """Return the schedulers by name that follow the process of a model's `own`, which is the first.

    They have its noise schedule and spacing of timesteps, and else their defaults. A distilled student has
    learned its own steps, and takes no others.
    """
    samplers = {type(own).__name__: own}
    if isinstance(own, TimestepShiftScheduler):
        return samplers
    options = {name: own.config[name] for name in ("timestep_spacing",) if name in own.config}
    for name in SCHEDULERS:
        try:
            samplers.setdefault(name, build_sampler(SamplerConfig(scheduler=name, options=options), own))
        except ValueError as error:  # of another process, or it has no such spacing
            logger.info("%s is not offered: %s", name, error)
    return samplers


def guiders_over(unet: Any, scheduler: SchedulerMixin) -> tuple[str, ...]:
    """Return the names of the guiders that a network and its scheduler can do with."""
    return tuple(
        name
        for name in GUIDERS
        if _fits(build_guider(GuiderConfig(guider=name, options={})), unet, scheduler)
    )


def _fits(guider: BaseGuidance, unet: Any, scheduler: SchedulerMixin) -> bool:
    try:
        check_guider(guider, scheduler)
        if hasattr(guider, "perturbing"):
            with guider.perturbing(unet, torch.tensor([True])):
                return True
    except ValueError as error:  # no self-attention to perturb, or not a flow
        logger.info("%s is not offered: %s", type(guider).__name__, error)
        return False
    return True


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
