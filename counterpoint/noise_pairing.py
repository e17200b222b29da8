"""Immiscible diffusion: which noise an image is trained with (Li et al. 2024 and 2025, arXiv 2505.18521).

With independent noise the paths of different images cross, and near pure noise the best prediction is the
same for all of them. Pairing an image with noise that lies near it lets the paths cross less. Network, loss,
labels and sampler stay as they are, and sampling still starts from N(0, I).

|x - n|^2 = |x|^2 + |n|^2 - 2 <x, n>. An assignment uses every noise once, so the noise of a step stays the
Gaussian that was drawn. A choice among candidates prefers short noise, and noise that leans towards the mean
of the images: what is chosen is no longer N(0, I), the more so the fewer values an image has. `centred` and
`rescale` take that back in part.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from counterpoint.diffusion import NoisyBatch
from counterpoint.section import Section
from counterpoint.seeds import generator


class PairingConfig(Section):
    """How noise is chosen for the images of a step."""

    kind: Literal["none", "assignment", "nearest"] = "none"
    """none: independent noise. assignment: a step's noise is dealt out anew among its images, so that the sum
    of distances is least, in O(batch^3). nearest: each image takes the nearest of several noises. Distances
    are those of images in [-1,1], whatever noise.image_scale is."""
    candidates: int = Field(default=4, ge=1)
    """Noises that each image chooses from under `nearest`; 1 is independent noise."""
    centred: bool = False
    """Under `nearest`, measure the distance to the image less the mean image of the training set."""
    rescale: bool = False
    """Under `nearest`, scale the chosen noise of a step to unit variance again; the short is chosen more
    often, by 4 to 8 % on 8x8 images and under 1 % on 32x32 ones."""

    @model_validator(mode="after")
    def _check(self) -> "PairingConfig":
        for name in ("centred", "rescale"):
            if getattr(self, name) and self.kind != "nearest":
                raise ValueError(
                    f"{name}=true corrects what kind=nearest does, and kind is {self.kind}: set {name}=false"
                )
        return self


@dataclass(frozen=True)
class Paired:
    """A step's batch with the noise that was chosen, and what the choice did."""

    batch: NoisyBatch
    noise_norm: float
    """Mean of |n| / sqrt(D) over the batch; close to 1 for independent noise."""
    distance_drop: float
    """By what share the mean distance between an image and its noise fell."""


def pair(batch: NoisyBatch, config: PairingConfig, mean: Tensor | None, seed: int, step: int) -> Paired:
    """Choose noise for the images of step `step`, the batch of all ranks together.

    `mean` [C,H,W] is the training set's mean image, which `centred` needs. The batch's own noise is the first
    candidate; the others have streams of their own, so that one candidate is independent noise bit for bit.
    Images, labels and timesteps stay in place. Every rank finds the same.
    """
    noise = batch.noise
    if config.kind == "assignment":
        noise = assign(batch.images, noise)
    elif config.kind == "nearest":
        streams = (generator(seed, "candidate", step, i) for i in range(1, config.candidates))
        drawn = (torch.randn(noise.shape, generator=stream) for stream in streams)
        noise = nearest(batch.images if mean is None else batch.images - mean, noise, drawn)
        if config.rescale:
            noise = noise / noise.square().mean().sqrt()
    before, after = (distance(batch.images, n).mean() for n in (batch.noise, noise))
    norm = noise.flatten(1).norm(dim=1).mean() / noise[0].numel() ** 0.5
    return Paired(replace(batch, noise=noise), float(norm), float(1.0 - after / before))


def assign(images: Tensor, noise: Tensor) -> Tensor:
    """Return `noise` [B,C,H,W] in the order that makes the sum of |x_i - n_i| over the batch least.

    The cost matrix |x_i - n_j| is taken in float32 and the problem solved by scipy (Li et al. 2024, alg. 1).
    """
    cost = torch.cdist(images.flatten(1).float(), noise.flatten(1).float())
    _, order = linear_sum_assignment(cost.numpy())
    return noise[torch.as_tensor(order)]


def nearest(images: Tensor, noise: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Return for each image [B,C,H,W] the nearest of its rows in `noise` and in all `others`, [B,C,H,W] each.

    argmin_j |x - n_j| (Li et al. 2025, alg. 1); the first of equals. `others` is taken one by one, so that
    an iterator of draws needs the memory of two, however many candidates there are.
    """
    best, chosen = distance(images, noise), noise
    for other in others:
        found = distance(images, other)
        closer = found < best
        best = torch.where(closer, found, best)
        chosen = torch.where(closer.reshape(-1, 1, 1, 1), other, chosen)
    return chosen


def distance(images: Tensor, noise: Tensor) -> Tensor:
    """Return |x_i - n_i| [B] in float32 for images and noise [B,C,H,W]."""
    return (images.float() - noise.float()).flatten(1).norm(dim=1)
