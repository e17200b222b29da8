"""The student's sampler as a diffusers scheduler, so that any diffusers pipeline can run it."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from counterpoint.diffusion import (
    BetaSchedule,
    LatentNoiseConfig,
    PredictionType,
    add_noise,
    predict_x0,
)
from counterpoint.student import shifted, student_timesteps


@dataclass
class TimestepShiftOutput(BaseOutput):
    """What a step returns."""

    prev_sample: Tensor
    """The state [B,C,H,W] at the next noise time; x_0 after the last step."""
    pred_original_sample: Tensor
    """The estimate of x_0 [B,C,H,W]."""


class TimestepShiftScheduler(SchedulerMixin, ConfigMixin):
    """One to four steps with NitroFusion's timestep shift (sec. 3.5 and the published inference code's form).

    `timesteps` are the shifted times that the network must hear, so a pipeline needs no change; noise is
    added for the unshifted ones. Each step estimates x_0 with abar of the shifted time and re-noises it to
    the next unshifted time; the last returns x_0. Guidance is not part of the method: use guidance_scale 1
    (0 where a pipeline takes that for "off"). `trained_betas` take the place of the named schedule, as in
    diffusers' own schedulers.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: BetaSchedule = "squaredcos_cap_v2",
        prediction_type: PredictionType = "v_prediction",
        timestep_shift: int = 500,
        clip_sample: bool = True,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
    ) -> None:
        config = LatentNoiseConfig(
            num_train_timesteps=num_train_timesteps,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            beta_start=beta_start,
            beta_end=beta_end,
        )
        noise = DDPMScheduler(**config.diffusion_options(), trained_betas=trained_betas)
        self.alphas_cumprod = noise.alphas_cumprod
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Prepare a chain of 1 to 4 steps; raises ValueError for any other number."""
        self.num_inference_steps = num_inference_steps
        self.noise_times = torch.tensor(
            student_timesteps(num_inference_steps, self.config.num_train_timesteps)
        )
        self.timesteps = shifted(
            self.noise_times, self.config.timestep_shift, self.config.num_train_timesteps
        )
        self.timesteps = self.timesteps.to(device)
        self._step_index = 0

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample` as it is: the network takes states of the forward process."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TimestepShiftOutput | tuple[Tensor, Tensor]:
        """Take the step at `timestep` (one of `timesteps`) from `sample` [B,C,H,W].

        Steps are taken in order. Fresh noise comes from `generator`, one for the batch or one per sample.
        Raises ValueError after the last step.
        """
        if self._step_index >= len(self.noise_times):
            raise ValueError(
                f"all {self.num_inference_steps} steps are taken: call set_timesteps before another chain"
            )
        heard = self.timesteps[self._step_index].reshape(1)
        x0 = predict_x0(model_output, sample, heard, self.alphas_cumprod, self.config.prediction_type)
        if self.config.clip_sample:
            x0 = x0.clamp(-1.0, 1.0)
        self._step_index += 1
        previous = x0
        if self._step_index < len(self.noise_times):
            noise = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            previous = self.add_noise(x0, noise, self.noise_times[self._step_index].reshape(1))
        return TimestepShiftOutput(previous, x0) if return_dict else (previous, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the forward process's state at unshifted `timesteps`; see `diffusion.add_noise`."""
        return add_noise(self.alphas_cumprod, original_samples, noise, timesteps)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
