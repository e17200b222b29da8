"""The forward process and the teacher's loss: diffusion or flow, noise schedule, condition dropout."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from counterpoint.flow import Process, flow_sigmas, flow_state, follows_flow
from counterpoint.section import Section

BetaSchedule = Literal["squaredcos_cap_v2", "linear", "scaled_linear"]
PredictionType = Literal["v_prediction", "epsilon", "sample"]


class NoiseConfig(Section):
    """The forward process; the names and values are diffusers' own."""

    num_train_timesteps: int = Field(default=1000, ge=4)
    """Number of noise levels; timestep 0 is almost clean, the last is almost pure noise."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """How the noise grows over the timesteps."""
    prediction_type: PredictionType = "v_prediction"
    """What the network predicts."""
    process: Process = "diffusion"
    """diffusion: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e. flow: x_t = (1 - sigma) x_0 + sigma e, of which
    the network predicts the velocity e - x_0; see `counterpoint.flow`."""
    shift: float = Field(default=1.0, gt=0.0)
    """How far a flow's noise levels, in training and sampling, lean to noise; 1 spreads sigma evenly."""
    image_scale: float = Field(default=1.0, gt=0.0)
    """What images are multiplied by before noise is added to them, which moves them apart (Li et al. 2025,
    arXiv 2505.18521). A diffusion does so by its schedule, see `scaled_betas`, so that nothing has to be
    divided again; a flow has `shift` = 1 / image_scale for it."""

    @model_validator(mode="after")
    def _check(self) -> "NoiseConfig":
        fields = type(self).model_fields
        for name in (
            ("beta_schedule", "prediction_type", "image_scale") if self.process == "flow" else ("shift",)
        ):
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no meaning with process={self.process}: leave it out"
                )
        return self

    def diffusion_options(self) -> dict[str, Any]:
        """Return the arguments of diffusers' schedulers of a diffusion; raises ValueError for a flow."""
        if self.process == "flow":
            raise ValueError("process=flow has no alphas_cumprod: set noise.process=diffusion")
        options = self.model_dump(exclude={"process", "shift", "image_scale"})
        if self.image_scale == 1.0:
            return options
        return options | {
            "trained_betas": scaled_betas(DDPMScheduler(**options).alphas_cumprod, self.image_scale)
        }


class LatentNoiseConfig(NoiseConfig):
    """The forward process of latent diffusion models, between other ends; SDXL's by default."""

    beta_schedule: BetaSchedule = "scaled_linear"
    """How the noise grows over the timesteps."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts."""
    beta_start: float = Field(default=0.00085, gt=0.0, lt=1.0)
    """Noise added at the first timestep."""
    beta_end: float = Field(default=0.012, gt=0.0, lt=1.0)
    """Noise added at the last timestep."""
    process: Literal["diffusion"] = "diffusion"
    """Flows of latents are not trained here."""


def build_noise_scheduler(config: NoiseConfig) -> SchedulerMixin:
    """Return the diffusers scheduler that holds the forward process.

    A diffusion's has `alphas_cumprod` and `add_noise`; a flow's, FlowMatchEulerDiscreteScheduler, neither.
    """
    if config.process == "flow":
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.shift)
    return DDPMScheduler(clip_sample=False, **config.diffusion_options())


def scaled_betas(alphas_cumprod: Tensor, scale: float) -> list[float]:
    """Return the betas [T] of the schedule by which images act as if multiplied by `scale`.

    alpha c x_0 + sigma e, divided by sqrt(c^2 abar + 1 - abar) to keep its variance, is the state of a
    schedule with abar' = c^2 abar / (c^2 abar + 1 - abar): the signal-to-noise ratio c^2 times as large. An
    epsilon network learns the same from either; beta_t = 1 - abar'_t / abar'_{t-1}.
    """
    abar = alphas_cumprod.double()
    scaled = scale**2 * abar / (scale**2 * abar + 1.0 - abar)
    before = torch.cat([torch.ones(1, dtype=torch.float64), scaled[:-1]])
    return (1.0 - scaled / before).tolist()


def check_distillable(config: NoiseConfig, teacher: str) -> None:
    """Raise ValueError if the teacher at the URI `teacher` is a flow, from which no student is distilled."""
    if config.process == "flow":
        raise ValueError(
            f"teacher={teacher} is a flow (noise.process=flow), and critics and students need a diffusion's "
            "alphas_cumprod: train one with noise.process=diffusion, such as configs/digits/teacher.yaml"
        )


def alpha_sigma(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t), each [B,1,1,1] with `like`'s dtype and device.

    The roots are taken in the schedule's own precision on its own device, then moved.
    """
    abar = alphas_cumprod[timesteps.to(alphas_cumprod.device)].reshape(-1, 1, 1, 1)
    return abar.sqrt().to(like), (1.0 - abar).sqrt().to(like)


def add_noise(alphas_cumprod: Tensor, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e for samples [B,C,H,W] and timesteps [B]."""
    alpha, sigma = alpha_sigma(alphas_cumprod, timesteps, sample)
    return alpha * sample + sigma * noise


def predict_x0(
    output: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Convert the network's output at `timesteps` [B] to its estimate of x_0 [B,C,H,W].

    v: x_0 = alpha x_t - sigma v (Salimans & Ho 2022, appendix D); epsilon: x_0 = (x_t - sigma e) / alpha.
    """
    if prediction_type == "sample":
        return output
    alpha, sigma = alpha_sigma(alphas_cumprod, timesteps, x_t)
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    return (x_t - sigma * output) / alpha


def noisy_input(
    scheduler: SchedulerMixin, sample: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_t [B,C,H,W] at the noise levels `timesteps` [B], and the times [B] that the network hears.

    A diffusion's network hears the levels themselves, a flow's num_train_timesteps * sigma (float32).
    """
    if not follows_flow(scheduler):
        return scheduler.add_noise(sample, noise, timesteps), timesteps
    horizon = scheduler.config.num_train_timesteps
    sigmas = flow_sigmas(timesteps, horizon, scheduler.config.shift)
    return flow_state(sample, noise, sigmas), horizon * sigmas


def training_target(scheduler: SchedulerMixin, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network should predict for x_t made of `sample` and `noise` at levels `timesteps`."""
    if follows_flow(scheduler):
        return noise - sample
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "sample":
        return sample
    if prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(sample, noise, timesteps)


def drop_condition(labels: Tensor, null: int, probability: float, generator: torch.Generator) -> Tensor:
    """Replace each label [B] by the null class with `probability` (Ho & Salimans 2022)."""
    drop = torch.rand(labels.shape, generator=generator) < probability
    return torch.where(drop.to(labels.device), torch.full_like(labels, null), labels)


@dataclass(frozen=True)
class NoisyBatch:
    """What one step of the diffusion loss needs; cut it to give a rank or a micro-batch its share."""

    images: Tensor
    """x_0 [B,C,H,W] in [-1,1]."""
    labels: Tensor
    """Conditions [B] after dropout."""
    timesteps: Tensor
    """Noise levels int64 [B], from 0; what sigma each is for a flow, `counterpoint.flow.flow_sigmas` says."""
    noise: Tensor
    """Gaussian noise [B,C,H,W]."""

    def part(self, part: slice, device: torch.device | str) -> "NoisyBatch":
        """Return the samples of `part`, moved to `device`."""
        parts = (x[part].to(device) for x in (self.images, self.labels, self.timesteps, self.noise))
        return NoisyBatch(*parts)


def draw_noisy_batch(
    images: Tensor,
    labels: Tensor,
    batch: int,
    timesteps: int,
    null: int,
    condition_dropout: float,
    generator: torch.Generator,
    within: range | None = None,
) -> NoisyBatch:
    """Draw a batch with replacement from images [N,C,H,W] and labels [N], with noise at uniform timesteps.

    The timesteps are those below `timesteps`, or of `within` where it is given.
    """
    within = within or range(timesteps)
    index = torch.randint(0, len(labels), (batch,), generator=generator)
    t = torch.randint(within.start, within.stop, (batch,), generator=generator)
    noise = torch.randn((batch, *images.shape[1:]), generator=generator)
    condition = drop_condition(labels[index], null, condition_dropout, generator)
    return NoisyBatch(images[index], condition, t, noise)


def diffusion_loss(unet: Any, scheduler: SchedulerMixin, batch: NoisyBatch) -> Tensor:
    """Return the mean squared error of the network's prediction on `batch`, a scalar; for flows as well.

    `unet` may be wrapped (DistributedDataParallel): only its call is used.
    """
    noisy, heard = noisy_input(scheduler, batch.images, batch.noise, batch.timesteps)
    output = unet(noisy, heard, class_labels=batch.labels).sample
    target = training_target(scheduler, batch.images, batch.noise, batch.timesteps)
    return F.mse_loss(output, target)
