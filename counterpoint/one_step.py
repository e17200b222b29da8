"""A stock diffusers scheduler that makes the student's one step, for people who do not have this package."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler

from counterpoint.diffusion import LatentNoiseConfig
from counterpoint.student import shifted, student_timesteps

_PARTS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")


def one_step_scheduler(noise: LatentNoiseConfig, timestep_shift: int) -> DDIMScheduler:
    """Return a DDIMScheduler whose single step is `student_x0` from pure noise.

    With num_inference_steps=1 "leading" spacing visits 0 + steps_offset alone, which is made the shifted time
    t'; the step before it is the clean end (set_alpha_to_one), so DDIM returns its estimate of x_0 as it is:
    (x - sqrt(1-abar_t') e) / sqrt(abar_t'). More steps want `TimestepShiftScheduler`. Guidance must be off.
    """
    last = torch.tensor(student_timesteps(1, noise.num_train_timesteps))
    heard = int(shifted(last, timestep_shift, noise.num_train_timesteps))
    return DDIMScheduler(
        **noise.diffusion_options(),
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        steps_offset=heard,
    )


def noise_of(config: Mapping[str, Any]) -> LatentNoiseConfig:
    """Return the forward process in the stored configuration of a pipeline's scheduler.

    Raises ValueError for one that this package does not express.
    """
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "teacher: its scheduler has trained_betas or rescale_betas_zero_snr, which students do not "
            "follow: use a teacher with a plain schedule"
        )
    try:
        return LatentNoiseConfig(**{name: config[name] for name in _PARTS})
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"teacher: its scheduler {config.get('_class_name')} does not give a noise schedule that "
            f"students follow ({error}): save the pipeline with DDIMScheduler or EulerDiscreteScheduler"
        ) from error
