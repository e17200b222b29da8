"""Estimating the statistics l, s, b of DPM-Solver-v3 (Zheng et al. 2023, sec. 3.4 and app. C.1.1).

Written with v = (eps - sigma x) / alpha, whatever the network predicts. Along the ODE dx/dlambda is
-alpha sigma v, and the paper's quantities are linear in x, v and v' = dv/dlambda:

    f  = (sigma eps - l x) / alpha = sigma v + (sigma^2 - l) x / alpha
    f' = sigma v' - sigma (1 - l) v + (sigma^2 (l - 1) - sigma^2 alpha^2 - l') x / alpha

No term is a difference of two large ones where alpha is small. The means that eqs. 60 and 61 take after l is
known follow from sums of products of x, v and v', so one pass over the samples is enough where the paper
takes two, and workers need not wait for each other's l.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from pydantic import Field
from torch import Tensor

from counterpoint.guidance import classifier_free, guided
from counterpoint.sampling import SamplerConfig, build_sampler, sample
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.solvers.empirical_statistics import ModelStatistics, half_log_snr, schedule_of

logger = logging.getLogger(__name__)

SUMS = ("linear", "x", "v", "dv", "xx", "xv", "vv", "xdv", "vdv")
_PROBE_STEP = 1e-2
_OWN_SAMPLES = SamplerConfig(
    scheduler="DPMSolverMultistepScheduler", options={"timestep_spacing": "trailing", "solver_order": 2}
)


class EstimationConfig(Section):
    """How l, s, b are estimated; samples count for more than intervals."""

    samples: int = Field(default=192, ge=2)
    """Images, each noised to every level of the grid."""
    intervals: int = Field(default=48, ge=16)
    """Intervals of the grid, even in lambda; the grid has one level more. Between levels l, s and b are
    taken as linear, which a much wider spacing than 0.5 in lambda does not bear where alpha is small."""
    batch_size: int = Field(default=64, ge=1)
    """Images that the network sees at once."""
    guidance_scale: float = 1.0
    """Guidance under which the network is measured. With another than 1 the images are the model's own
    samples under it, as the data are not where guided chains go."""
    own_sample_steps: int = Field(default=50, ge=1)
    """Steps of DPM-Solver++ 2M for the model's own samples."""
    ridge: float = Field(default=0.0, ge=0.0)
    """Share of E[f^2] added to the variance by which s is divided; 0.05 calms s at noisy levels."""
    clip: float = Field(default=2.0, gt=0.0)
    """Bound of |s|, a ratio of small numbers at noisy levels."""


@dataclass(frozen=True)
class Sums:
    """Sums over samples; those of shards add up to those of the whole."""

    count: int
    """Samples."""
    sums: Mapping[str, np.ndarray]
    """For each name in `SUMS`, sums at every level [N+1,C,H,W], float64."""

    def merge(self, other: "Sums") -> "Sums":
        """Return the sums over both."""
        return Sums(self.count + other.count, {name: self.sums[name] + other.sums[name] for name in SUMS})


def noise_levels(scheduler: SchedulerMixin, intervals: int) -> Tensor:
    """Return the grid of lambda [N+1], float64, even from the last timestep's to timestep 0's."""
    lambdas = half_log_snr(scheduler.alphas_cumprod)
    return torch.linspace(float(lambdas[-1]), float(lambdas[0]), intervals + 1, dtype=torch.float64)


class Velocity:
    """A network as the field v(x, lambda) of its class labels, for any prediction type, lambda in between.

    Args:
        network: called as `network(x, timesteps, class_labels=labels).sample`.
        scheduler: holds the forward process and the prediction type.
        labels: classes [B].
        guidance_scale: see `sampling.sample`.
    """

    def __init__(
        self, network: Any, scheduler: SchedulerMixin, labels: Tensor, guidance_scale: float = 1.0
    ) -> None:
        self.network, self.labels, self.kind = network, labels, scheduler.config.prediction_type
        self.guider = classifier_free(guidance_scale)
        self.known = half_log_snr(scheduler.alphas_cumprod).flip(0).contiguous()  # ascending
        self.range = float(self.known[0]), float(self.known[-1])
        self.dtype = next((weights.dtype for weights in network.parameters()), torch.float64)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        """Return v [B,C,H,W], float64, at x [B,C,H,W] and the scalar lambda `level`, both float64."""
        alpha, sigma = torch.sigmoid(2 * level).sqrt(), torch.sigmoid(-2 * level).sqrt()
        time = self.timestep(level).to(self.dtype)
        output = guided(self.network, x.to(self.dtype), time, self.labels, self.guider).double()
        if self.kind == "epsilon":
            return (output - sigma * x) / alpha
        if self.kind == "sample":
            return (alpha * x - output) / sigma
        return output

    def timestep(self, level: Tensor) -> Tensor:
        """Return the timestep with that lambda, linear between whole ones."""
        right = int(torch.searchsorted(self.known, level.detach().cpu()).clamp(1, len(self.known) - 1))
        start, end = self.known[right - 1], self.known[right]
        return (len(self.known) - right) - (level - float(start)) / float(end - start)


def estimate(
    network: Any,
    scheduler: SchedulerMixin,
    images: Tensor,
    labels: Tensor,
    config: EstimationConfig,
    seed: int,
    shard: int = 0,
    shards: int = 1,
) -> Sums:
    """Return the sums over shard number `shard` of `shards` of the samples.

    They are drawn with replacement from images [n,C,H,W] and their labels [n]; sample i depends on `seed` and
    on i alone. It has one noise and one Rademacher probe for all levels, which
    makes l smooth over levels and so l' precise.
    """
    levels = noise_levels(scheduler, config.intervals)
    totals = {name: np.zeros((len(levels), *images.shape[1:])) for name in SUMS}
    indices = range(shard, config.samples, shards)
    forward, width = None, float(levels[1] - levels[0])
    for start in range(0, len(indices), config.batch_size):
        batch = indices[start : start + config.batch_size]
        clean, noise, probe, own = _draw(network, scheduler, images, labels, config, seed, batch)
        field = Velocity(network, scheduler, own, config.guidance_scale)
        for i, level in enumerate(levels.to(clean.device)):
            alpha, sigma = torch.sigmoid(2 * level).sqrt(), torch.sigmoid(-2 * level).sqrt()
            x = alpha * clean + sigma * noise
            if forward is None:
                forward = has_forward_mode(field, x, level)
            v, along, dv = observe(field, x, level, probe, forward, width)
            linear = sigma * (sigma + alpha * along * probe)  # eq. 58
            products = (linear, x, v, dv, x * x, x * v, v * v, x * dv, v * dv)
            for name, product in zip(SUMS, products, strict=True):
                totals[name][i] += product.sum(0).cpu().numpy()
    return Sums(len(indices), totals)


@torch.no_grad()
def observe(
    field: Velocity, x: Tensor, level: Tensor, probe: Tensor, forward: bool, width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v, its derivative along `probe` in x, and its derivative in lambda along the ODE.

    The first derivative is by forward mode, or by a difference to one side, whose error of first order has
    mean zero over probes. The second is a central difference over `width` in lambda, at the schedule's ends
    over half of it: networks hear time as sinusoids of up to one radian a timestep, and its exact derivative
    is mostly their jitter, which a step of the solver never sees.
    """
    if forward:
        v, along = torch.func.jvp(field, (x, level), (probe, torch.zeros_like(level)))[:2]
    else:
        v = field(x, level)
        along = (field(x + _PROBE_STEP * probe, level) - v) / _PROBE_STEP
    slope = -torch.sigmoid(2 * level).sqrt() * torch.sigmoid(-2 * level).sqrt() * v
    ends = [(level + side * width / 2).clamp(*field.range) for side in (-1, 1)]
    before, after = (field(x + (end - level) * slope, end) for end in ends)
    return v, along, (after - before) / (ends[1] - ends[0])


def has_forward_mode(field: Velocity, x: Tensor, level: Tensor) -> bool:
    """Return whether all layers of the network have forward-mode derivatives; fused attention has none."""
    try:
        with torch.no_grad():
            torch.func.jvp(field, (x, level), (torch.ones_like(x), torch.zeros_like(level)))
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        logger.info("derivatives of the network by differences, as forward mode fails: %s", reason)
        return False
    return True


def coefficients(
    sums: Sums, scheduler: SchedulerMixin, config: EstimationConfig, made_for: Mapping[str, str]
) -> ModelStatistics:
    """Return l (eq. 58) and s, b (eqs. 60, 61) from the sums over all samples."""
    levels = noise_levels(scheduler, config.intervals)
    mean = {name: torch.from_numpy(total) / sums.count for name, total in sums.sums.items()}
    alpha, sigma = (torch.sigmoid(k * levels).sqrt().reshape(-1, 1, 1, 1) for k in (2, -2))
    linear = mean["linear"]
    (rate,) = torch.gradient(linear, spacing=(levels,), dim=0, edge_order=2)
    of_v, of_x = sigma, (sigma**2 - linear) / alpha
    rate_of_v = -sigma * (1 - linear)
    rate_of_x = (sigma**2 * (linear - 1) - sigma**2 * alpha**2 - rate) / alpha
    f = of_v * mean["v"] + of_x * mean["x"]
    df = sigma * mean["dv"] + rate_of_v * mean["v"] + rate_of_x * mean["x"]
    ff = of_v**2 * mean["vv"] + 2 * of_v * of_x * mean["xv"] + of_x**2 * mean["xx"]
    fdf = of_v * (sigma * mean["vdv"] + rate_of_v * mean["vv"] + rate_of_x * mean["xv"])
    fdf = fdf + of_x * (sigma * mean["xdv"] + rate_of_v * mean["xv"] + rate_of_x * mean["xx"])
    variance = (ff - f**2).clamp_min(1e-12) + config.ridge * ff
    s = ((fdf - f * df) / variance).clamp(-config.clip, config.clip)
    return ModelStatistics(levels, linear, s, df - s * f, dict(made_for))


def describe(
    network: torch.nn.Module, scheduler: SchedulerMixin, config: EstimationConfig, seed: int
) -> dict[str, str]:
    """Return what statistics are of: the weights, the schedule and how they were estimated, as text."""
    settings = {name: str(value) for name, value in config.model_dump().items() if name != "batch_size"}
    settings |= {"seed": str(seed), "weights": weights_fingerprint(network)}
    return schedule_of(scheduler.config) | settings


def probe_of(index: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a sample's Rademacher probe of `shape`, float64: a row of a Hadamard matrix with signs flipped.

    Over a whole matrix of rows the products of two different pixels add up to 0, so that what Hutchinson's
    estimate of a diagonal takes from the rest of the Jacobian cancels but for its change over samples
    (Bekas, Kokiopoulou & Saad 2007).
    """
    pixels = math.prod(shape)
    block, row = divmod(index, 1 << (pixels - 1).bit_length())
    signs = torch.randint(0, 2, (pixels,), generator=generator(seed, "statistics", "probes", block))
    odd = torch.from_numpy(np.bitwise_count(np.arange(pixels) & row) % 2)
    return (1.0 - 2.0 * ((signs + odd) % 2).double()).reshape(shape)


def weights_fingerprint(network: torch.nn.Module) -> str:
    """Return 16 hex digits of the SHA-256 of all names and values of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _draw(
    network: Any,
    scheduler: SchedulerMixin,
    images: Tensor,
    labels: Tensor,
    config: EstimationConfig,
    seed: int,
    batch: range,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return clean images, noise and probes, each [B,C,H,W] in float64, and labels [B]."""
    device = next((weights.device for weights in network.parameters()), torch.device("cpu"))
    shape, chosen, noises, probes, starts = images.shape[1:], [], [], [], []
    for index in batch:
        stream = generator(seed, "statistics", index)
        chosen.append(int(torch.randint(len(images), (), generator=stream)))
        noises.append(torch.randn(shape, generator=stream, dtype=torch.float64))
        probes.append(probe_of(index, shape, seed))
        starts.append(torch.randn(shape, generator=stream))
    noise, probe = torch.stack(noises).to(device), torch.stack(probes).to(device)
    own, clean = labels[chosen].to(device), images[chosen].to(device).double()
    if config.guidance_scale != 1.0:
        sampler = build_sampler(_OWN_SAMPLES, scheduler)
        begun = torch.stack(starts).to(device)
        clean = sample(network, sampler, begun, own, config.own_sample_steps, config.guidance_scale)[
            0
        ].double()
    return clean, noise, probe, own
