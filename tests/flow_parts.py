"""A flow whose velocities are known in closed form, in place of a trained network."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class MixtureFlow:
    """The exact velocity of x_0 ~ mean over points of N(point, deviation^2), under a class or under none.

    For one component E[x_0 | x_t] and E[e | x_t] are those of a Gaussian; their mean over components is
    weighted by how likely each made x_t. A class has the points with its label, the null class all of them.
    """

    device = torch.device("cpu")

    def __init__(self, points: Tensor, labels: Tensor, classes: int, deviation: float) -> None:
        self.points, self.labels, self.deviation = points.flatten(1), labels, deviation
        self.config = SimpleNamespace(
            sample_size=points.shape[-1], in_channels=points.shape[1], num_class_embeds=classes + 1
        )
        self.heard: list[float] = []

    def __call__(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Any:
        """Return an object with the velocity [B,C,H,W] as `sample`, as a network does."""
        self.heard.append(float(timesteps.flatten()[0]))
        sigma = (timesteps / 1000.0).to(x).reshape(-1, 1).expand(len(x), 1)
        flat, variance = x.flatten(1), ((1 - sigma) * self.deviation) ** 2 + sigma**2
        apart = flat[:, None] - (1 - sigma)[:, :, None] * self.points[None]
        unlikely = apart.square().sum(dim=2) / (2 * variance)
        null = (class_labels == self.config.num_class_embeds - 1)[:, None]
        allowed = null | (class_labels[:, None] == self.labels[None])
        weights = torch.softmax((-unlikely).masked_fill(~allowed, -torch.inf), dim=1)
        mean = weights @ self.points
        rest = flat - (1 - sigma) * mean
        image = mean + (1 - sigma) * self.deviation**2 / variance * rest
        return SimpleNamespace(sample=(sigma / variance * rest - image).reshape(x.shape))
