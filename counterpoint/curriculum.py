"""A curriculum over noise levels (Kim et al. 2025, arXiv 2403.10348): from easy to hard, harder ones joining.

Telling images from nearly pure noise is easy, and the last traces of noise are hard. Timesteps are cut into
clusters; training begins with the noisiest, and the next joins once the loss has come to rest. Earlier
clusters stay. Network, loss and sampler are untouched. Samples made before all clusters have joined mean
nothing: the network has not seen the low noise levels that they end with.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from counterpoint.flow import flow_sigmas, follows_flow
from counterpoint.section import Section


class CurriculumConfig(Section):
    """Which timesteps are trained when; the defaults are the paper's, where it names any."""

    clusters: int = Field(default=20, ge=2)
    """Clusters of timesteps."""
    split: Literal["log_snr", "uniform"] = "log_snr"
    """Where to cut: so that log-SNR varies least within clusters, or into equally many timesteps."""
    order: Literal["easy_to_hard", "hard_to_easy"] = "easy_to_hard"
    """The noisiest cluster first, as the paper has it; or last, as a control."""
    patience: int = Field(default=200, ge=1)
    """Optimizer steps without improvement after which the next cluster joins."""
    min_improvement: float = Field(default=0.001, ge=0.0, lt=1.0)
    """Share by which the averaged loss must undercut the best so far to count as an improvement."""
    average_decay: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the average of the loss, which begins anew at each stage: clusters' losses differ in size."""
    max_stage_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which the next cluster joins whatever the loss does; unlimited unless given."""


class Curriculum:
    """Says which timesteps are trained, by the loss it sees; `state` is all that its future depends on."""

    moment: float
    """Weighted sum of the stage's losses, from which their average is made."""
    best: float
    """The lowest average of the stage."""

    def __init__(self, config: CurriculumConfig, log_snr: Tensor) -> None:
        """Cut the timesteps whose log-SNR [T] is given, from almost clean to almost pure noise."""
        if config.clusters > len(log_snr):
            raise ValueError(
                f"teacher.curriculum.clusters={config.clusters} exceeds the {len(log_snr)} timesteps of the "
                "noise: lower it"
            )
        self.config = config
        if config.split == "log_snr":
            self.bounds = cut(log_snr, config.clusters)
        else:
            self.bounds = even(len(log_snr), config.clusters)
        self.stage = 0
        """Clusters that have joined after the first."""
        self._begin()

    @property
    def finished(self) -> bool:
        """Whether all timesteps are trained."""
        return self.stage == self.config.clusters - 1

    @property
    def timesteps(self) -> range:
        """The timesteps that are trained now."""
        if self.config.order == "easy_to_hard":
            return range(self.bounds[self.config.clusters - 1 - self.stage], self.bounds[-1])
        return range(self.bounds[self.stage + 1])

    def see(self, loss: float) -> None:
        """Take in the loss of an optimizer step, over all ranks, and let the next cluster join if it is time.

        The average is free of its start's bias (Kingma & Ba 2015, sec. 3).
        """
        if self.finished:
            return
        decay = self.config.average_decay
        self.steps += 1
        self.moment = decay * self.moment + (1.0 - decay) * loss
        average = self.moment / (1.0 - decay**self.steps)
        if average < self.best * (1.0 - self.config.min_improvement):
            self.best, self.waited = average, 0
        else:
            self.waited += 1
        capped = self.config.max_stage_steps is not None and self.steps >= self.config.max_stage_steps
        if capped or self.waited > self.config.patience:
            self.stage += 1
            self._begin()

    def state(self) -> dict[str, Tensor]:
        """Return the stage and its counters for a checkpoint."""
        counts = {name: torch.tensor(getattr(self, name)) for name in ("stage", "steps", "waited")}
        losses = {n: torch.tensor(getattr(self, n), dtype=torch.float64) for n in ("moment", "best")}
        return counts | losses

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Return to a stored state."""
        self.stage, self.steps, self.waited = (int(state[name]) for name in ("stage", "steps", "waited"))
        self.moment, self.best = float(state["moment"]), float(state["best"])

    def _begin(self) -> None:
        self.steps = self.waited = 0
        self.moment, self.best = 0.0, float("inf")


def log_snr(noise: Any) -> Tensor:
    """Return log SNR [T], float64, of the timesteps of a training's scheduler, in falling order.

    log(abar / (1 - abar)) for a diffusion, 2 log((1 - sigma) / sigma) for a flow. The last of a flow is pure
    noise, minus infinity: it goes with the timestep before it.
    """
    if not follows_flow(noise):
        abar = noise.alphas_cumprod.double()
        return torch.log(abar / (1.0 - abar))
    count = int(noise.config.num_train_timesteps)
    sigma = flow_sigmas(torch.arange(count), count, float(noise.config.shift)).double()
    ratio = 2.0 * torch.log((1.0 - sigma) / sigma)
    return torch.where(ratio.isinf(), ratio[-2], ratio)


def cut(values: Tensor, clusters: int) -> list[int]:
    """Return where to cut monotone `values` [T] into runs: `clusters` + 1 bounds from 0 to T.

    The sum of |value - centre| over all values is least, where a run's centre is its middle value, its
    median: the interval clustering of Go et al. 2023 (arXiv 2306.00354), by dynamic programming.
    """
    count = len(values)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    ends = torch.arange(count + 1)
    start, stop = ends[:, None], ends[None, :]
    middle = (start + stop) // 2
    # Sums above and below the median of a run; a run of odd length leaves out its median itself.
    spread = (total[middle] - total[start]) - (total[stop] - total[(start + stop + 1) // 2])
    cost = torch.where(stop > start, spread.abs(), torch.inf)
    least, origins = cost[0], []
    for _ in range(clusters - 1):
        least, origin = (least[:, None] + cost).min(dim=0)
        origins.append(origin)
    bounds = [count]
    for origin in reversed(origins):
        bounds.append(int(origin[bounds[-1]]))
    return [0, *reversed(bounds)]


def even(count: int, clusters: int) -> list[int]:
    """Return where to cut `count` timesteps into equally long runs: bounds from 0 to `count`."""
    return [count * i // clusters for i in range(clusters + 1)]
