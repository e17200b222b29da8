"""Networks whose score is known in closed form, for tests of solvers."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from counterpoint.solvers.empirical_statistics import half_log_snr

SIDE = 4


class Mixture(nn.Module):
    """The exact network for data that are a mixture of Gaussians, an equal share for each of `centres`.

    `spread` is the standard deviation around centres [n,C,H,W], one number or [C,H,W]; a class's share is
    one centre where `by_class` is set.
    """

    def __init__(
        self, scheduler: DDPMScheduler, centres: Tensor, spread: float | Tensor, by_class: bool = False
    ) -> None:
        super().__init__()
        self.lambdas, self.kind = half_log_snr(scheduler.alphas_cumprod), scheduler.config.prediction_type
        self.centres, self.by_class = centres.double(), by_class
        self.variance = torch.as_tensor(spread).double() ** 2
        self.config = SimpleNamespace(num_class_embeds=len(centres) + 1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Any:
        time = torch.as_tensor(t).double()
        left = time.detach().floor().clamp(0, len(self.lambdas) - 2).long()
        level = self.lambdas[left] + (time - left) * (self.lambdas[left + 1] - self.lambdas[left])
        return SimpleNamespace(sample=self.at(x, level, class_labels)[self.kind])

    def at(self, x: Tensor, level: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """All three predictions at lambda `level`."""
        alpha, sigma = torch.sigmoid(2 * level).sqrt(), torch.sigmoid(-2 * level).sqrt()
        variance = alpha**2 * self.variance + sigma**2
        if self.by_class:
            centre = self.centres[labels]
        else:
            distance = (x[:, None] - alpha * self.centres) ** 2 / (2 * variance)
            weights = torch.softmax(-distance.flatten(2).sum(-1), 1)
            centre = torch.einsum("bn,nchw->bchw", weights, self.centres)
        clean = centre + alpha * self.variance / variance * (x - alpha * centre)
        eps = (x - alpha * clean) / sigma
        return {"epsilon": eps, "sample": clean, "v_prediction": alpha * eps - sigma * clean}


def schedule(kind: str = "v_prediction", betas: str = "linear") -> DDPMScheduler:
    return DDPMScheduler(prediction_type=kind, beta_schedule=betas, clip_sample=False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(network: Any, solver: Any, noise: Tensor, steps: int, labels: Tensor | None = None) -> Tensor:
    """The sample in the noise's own precision."""
    labels = torch.zeros(len(noise), dtype=torch.long) if labels is None else labels
    solver.set_timesteps(steps)
    x = noise.clone()
    for t in solver.timesteps:
        x = solver.step(network(x, t, labels).sample, t, x).prev_sample
    return x
