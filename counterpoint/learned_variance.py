"""The loss of a network that also learns the variance of its reverse steps (improved DDPM).

Nichol & Dhariwal 2021 (arXiv 2102.09672): the network's `variance` is the fraction v of eq. 15,
log Sigma = v log beta_t + (1 - v) log beta~_t, and it learns from the variational bound alone, beside the
usual squared error of the prediction.
"""

import math
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from counterpoint.diffusion import NoisyBatch, noisy_input, predict_x0, training_target

BOUND_WEIGHT = 0.001
"""Lambda of eq. 16."""
HALF_LEVEL = 1.0 / 255.0
"""Half the distance of two of the 256 levels of a pixel in [-1, 1]."""
SMALLEST_PROBABILITY = 1e-12
"""What a level's probability counts as at least, so that its logarithm is finite."""


def denoising_loss(network: Any, noise: SchedulerMixin, batch: NoisyBatch) -> Tensor:
    """Return the loss of any network on `batch`, a scalar: see `output_loss`.

    `network` may be wrapped (DistributedDataParallel): only its call is used.
    """
    x_t, heard = noisy_input(noise, batch.images, batch.noise, batch.timesteps)
    return output_loss(network(x_t, heard, class_labels=batch.labels), noise, batch, x_t)


def output_loss(output: Any, noise: SchedulerMixin, batch: NoisyBatch, x_t: Tensor) -> Tensor:
    """Return the loss of a network's `output` at x_t, a scalar.

    It is L_simple, the mean squared error of the prediction; with a learned variance L_simple + 0.001 L_vlb
    (eq. 16), where L_vlb is estimated as the mean of `bound_terms` times the number of timesteps. The
    prediction is held fixed in it, so that it teaches the variance alone (sec. 3.1). Only a diffusion has it.
    """
    target = training_target(noise, batch.images, batch.noise, batch.timesteps)
    simple = F.mse_loss(output.sample, target)
    variance = getattr(output, "variance", None)
    if variance is None:
        return simple
    assert isinstance(noise, DDPMScheduler)
    terms = bound_terms(output.sample.detach(), variance, noise, batch, x_t)
    return simple + BOUND_WEIGHT * noise.config.num_train_timesteps * terms.mean()


def bound_terms(
    prediction: Tensor, variance: Tensor, noise: DDPMScheduler, batch: NoisyBatch, x_t: Tensor
) -> Tensor:
    """Return each sample's term of the variational bound [B], in bits per dimension (eq. 4-7).

    It is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at the first timestep -log p(x_0 | x_1) of pixels
    with 256 levels. `prediction` and `variance` [B,C,H,W] are the network's, of any prediction type.
    """
    abar, kind = noise.alphas_cumprod, noise.config.prediction_type
    x_0 = predict_x0(prediction, x_t, batch.timesteps, abar, kind)
    true_mean = posterior_mean(batch.images, x_t, batch.timesteps, noise)
    mean = posterior_mean(x_0, x_t, batch.timesteps, noise)
    low, high = log_variances(batch.timesteps, noise, x_t)
    log_variance = variance * high + (1.0 - variance) * low
    divergence = gaussian_kl(true_mean, low, mean, log_variance)
    decoder = -log_likelihood(batch.images, mean, 0.5 * log_variance)
    first = (batch.timesteps == 0).reshape(-1, 1, 1, 1)
    nats = torch.where(first, decoder, divergence)
    return nats.flatten(1).mean(dim=1) / math.log(2.0)


def posterior_mean(x_0: Tensor, x_t: Tensor, timesteps: Tensor, noise: DDPMScheduler) -> Tensor:
    """Return the mean [B,C,H,W] of q(x_{t-1} | x_t, x_0) at `timesteps` [B] (eq. 11)."""
    abar, before = _cumulative(noise)
    of_x0 = before.sqrt() * noise.betas / (1.0 - abar)
    of_xt = noise.alphas.sqrt() * (1.0 - before) / (1.0 - abar)
    return _at(of_x0, timesteps, x_t) * x_0 + _at(of_xt, timesteps, x_t) * x_t


def log_variances(timesteps: Tensor, noise: DDPMScheduler, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return log beta~_t and log beta_t, each [B,1,1,1] as `like` is, between which the variance lies.

    beta~ (eq. 10) is zero at the first timestep, where the second one's stands in.
    """
    abar, before = _cumulative(noise)
    posterior = noise.betas * (1.0 - before) / (1.0 - abar)
    posterior = torch.cat([posterior[1:2], posterior[1:]])
    return _at(posterior.log(), timesteps, like), _at(noise.betas.log(), timesteps, like)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)) of every element, in nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1.0
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
    )


def log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Return log p(x) of every element: a Gaussian's mass on the pixel level around it, in nats.

    x lies in [-1, 1]; the lowest and the highest level reach to infinity (Ho et al. 2020, eq. 13).
    """
    inverse = (-log_deviation).exp()
    above = torch.special.ndtr((x - mean + HALF_LEVEL) * inverse)
    below = torch.special.ndtr((x - mean - HALF_LEVEL) * inverse)
    above = torch.where(x > 1.0 - HALF_LEVEL, torch.ones_like(above), above)
    below = torch.where(x < -1.0 + HALF_LEVEL, torch.zeros_like(below), below)
    return (above - below).clamp(min=SMALLEST_PROBABILITY).log()


def _cumulative(noise: DDPMScheduler) -> tuple[Tensor, Tensor]:
    """Return abar of each timestep [T] and of the one before it, which is 1 before the first."""
    abar = noise.alphas_cumprod
    return abar, torch.cat([abar.new_ones(1), abar[:-1]])


def _at(schedule: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Return a schedule's values [T] at `timesteps` [B] as [B,1,1,1] with `like`'s dtype and device."""
    return schedule[timesteps.to(schedule.device)].reshape(-1, 1, 1, 1).to(like)
