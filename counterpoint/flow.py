"""Flow matching: the straight path from an image to noise, and diffusers' schedulers that follow it.

x_t = (1 - sigma) x_0 + sigma e, and the network predicts the path's velocity e - x_0 (rectified flow: Liu et
al. 2023, eq. 1; Lipman et al. 2023, eq. 23 with sigma_min = 0). sigma is 1 at pure noise, as in diffusers,
and the network hears num_train_timesteps * sigma.
"""

from typing import Any, Literal

import numpy as np
from torch import Tensor

Process = Literal["diffusion", "flow"]

FLOW_SAMPLER = "FlowMatchEulerDiscreteScheduler"
FLOW_SAMPLERS = (FLOW_SAMPLER, "FlowMatchHeunDiscreteScheduler")
"""Schedulers of diffusers that follow a flow and no other process; multistep ones do with use_flow_sigmas."""


def flow_sigmas(levels: Tensor, num_train_timesteps: int, shift: float) -> Tensor:
    """Return sigma, float32 [B], of noise levels int64 [B] from 0, almost clean, to T - 1, pure noise.

    u = (level + 1) / T and sigma = shift u / (1 + (shift - 1) u) (Esser et al. 2024, eq. 23): the grid of
    FlowMatchEulerDiscreteScheduler, from its end. Levels are thus whole numbers for a flow as for a
    diffusion, and whatever chooses them need not know which it is.
    """
    u = (levels + 1).float() / num_train_timesteps
    return shift * u / (1.0 + (shift - 1.0) * u)


def flow_state(sample: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Return x_t = (1 - sigma) x_0 + sigma e for samples and noise [B,C,H,W] at sigmas [B]."""
    sigma = sigmas.reshape(-1, 1, 1, 1).to(sample)
    return (1.0 - sigma) * sample + sigma * noise


def named_flow(scheduler: str, options: Any) -> bool:
    """Whether the scheduler called `scheduler`, made with `options`, follows a flow."""
    return scheduler in FLOW_SAMPLERS or bool(options.get("use_flow_sigmas"))


def follows_flow(scheduler: Any) -> bool:
    """Whether a scheduler takes a network's output for the velocity of a flow."""
    return named_flow(type(scheduler).__name__, scheduler.config)


def check_process(scheduler: str, options: Any, process: Process) -> None:
    """Raise ValueError unless the sampler called `scheduler` follows the process that a teacher learned."""
    found: Process = "flow" if named_flow(scheduler, options) else "diffusion"
    if found != process:
        remedy = FLOW_SAMPLER if process == "flow" else "DDIMScheduler"
        raise ValueError(
            f"sampler.scheduler={scheduler} follows a {found}, but the teacher has noise.process={process}: "
            f"use {remedy} with its own options"
        )


def shared_options(noise: Any, options: Any) -> dict[str, Any]:
    """Return what a sampler of a flow, to be made with `options`, shares with the training's scheduler."""
    shared: dict[str, Any] = {"num_train_timesteps": noise.config.num_train_timesteps}
    if options.get("use_flow_sigmas"):
        return shared | {"prediction_type": "flow_prediction", "flow_shift": noise.config.shift}
    return shared | {"shift": noise.config.shift}


def set_steps(scheduler: Any, steps: int) -> None:
    """Prepare any scheduler for `steps` steps; Euler's of a flow for steps of equal length (before shift).

    By itself that one goes from sigma = 1 to the smallest sigma of its grid in `steps` - 1 steps, and the
    last step is nearly empty: one network evaluation of five is lost.
    """
    if type(scheduler).__name__ == FLOW_SAMPLER:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)


def initial_scale(scheduler: Any) -> float:
    """Return the standard deviation of the noise that sampling starts from; 1 for a flow, which has none."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def scaled_input(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """Return what the network is shown of the state x [B,C,H,W] at time t: a flow's does not scale."""
    scaled: Tensor = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return scaled


def check_guider(guider: Any, scheduler: Any) -> None:
    """Raise ValueError if `guider` reads velocities and `scheduler` takes another kind of output."""
    if getattr(guider, "velocity_only", False) and not follows_flow(scheduler):
        raise ValueError(
            f"guider={type(guider).__name__} reads velocities of a flow, but {type(scheduler).__name__} "
            "samples a diffusion: use a teacher with noise.process=flow, or set its option any_process=true"
        )
