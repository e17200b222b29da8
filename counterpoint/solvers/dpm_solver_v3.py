"""DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268) as a diffusers scheduler.

With alpha, sigma of the forward process and lambda = log(alpha / sigma), the sampling ODE is split as
d(x / alpha) / dlambda = -(l x / alpha + f) with f = (sigma eps(x) - l x) / alpha. f is taken to obey
f' = s f + b up to a polynomial in lambda, and l, s, b are fitted to the network (see `model_statistics`).
A step from lambda_s to lambda_t is then (eq. 14 and app. C.2)

    x_t = (alpha_t / alpha_s) e^{-L} x_s - alpha_t e^{-L} (sum_k E_k g^(k) + D),

with g = e^{-S} f - B anchored at lambda_s, and L, S, B, E_k, D of `exponential_integrals`.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from counterpoint.diffusion import BetaSchedule, PredictionType, add_noise
from counterpoint.solvers.derivatives import divided, polynomial
from counterpoint.solvers.empirical_statistics import (
    FILE,
    LIMITS,
    check_schedule,
    half_log_snr,
    limit,
    load_statistics,
    save_statistics,
)
from counterpoint.solvers.exponential_integrals import HIGHEST, Segment, segments

Spacing = Literal["trailing", "linspace", "lambda"]
HIGHEST_ORDER = 3


class DPMSolverV3Scheduler(SchedulerMixin, ConfigMixin):
    """Multistep solver of order 1 to 3 with a corrector that costs no evaluation of the network.

    A chain ends at the noise level of timestep 0 (`final_sigmas_type="sigma_min"` of diffusers' multistep
    solvers), as the statistics reach no further. Steps are whole timesteps, the same as those of diffusers'
    solvers with the same spacing, and are not moved to the statistics' grid as in the paper's code: the
    integrals hold between grid points too. The arithmetic is float64, on the sample's device.

    Args:
        statistics: path or URI of a file of `jobs.statistics`; or "data" or "noise", the fixed coefficients
            of data and noise prediction. With these, order 1 is DDIM and order 2 DPM-Solver(++) 2M with
            solver_type="heun". Order 3 is not DPM-Solver++ 3M of diffusers, which takes half the second
            derivative's term.
        solver_order: points that a step looks at.
        predictor: "polynomial" solves for all derivatives together (app. C.2); "pseudo" takes the k-th from
            k + 1 points by divided differences (theorem 3.4), stabler at 5 steps or so.
        corrector: "polynomial" does each step again with the network's answer at its end, in the predictor's
            order, "pseudo" in one order more by divided differences, "none" never.
        half_corrector: correct only in the cleaner half of the timesteps, for large guidance scales.
        lower_order_final: use lower orders for the last steps.
        timestep_spacing: "trailing" and "linspace" as in diffusers; "lambda" is even in lambda.

    The other arguments are those of DDIMScheduler. Raises ValueError for statistics of another schedule.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: PredictionType = "epsilon",
        statistics: str = "data",
        solver_order: int = 3,
        predictor: Literal["polynomial", "pseudo"] = "polynomial",
        corrector: Literal["none", "polynomial", "pseudo"] = "pseudo",
        half_corrector: bool = False,
        lower_order_final: bool = True,
        timestep_spacing: Spacing = "trailing",
    ) -> None:
        _check_choice("solver_order", solver_order, range(1, HIGHEST_ORDER + 1))
        _check_choice("predictor", predictor, ("polynomial", "pseudo"))
        _check_choice("corrector", corrector, ("none", "polynomial", "pseudo"))
        _check_choice("timestep_spacing", timestep_spacing, ("trailing", "linspace", "lambda"))
        _check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
        self.alphas_cumprod = DDPMScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas
        ).alphas_cumprod
        if statistics in LIMITS:
            self.statistics = limit(statistics, half_log_snr(self.alphas_cumprod))
        else:
            self.statistics = load_statistics(statistics)
            check_schedule(self.statistics, self.config, statistics)
        self.timesteps = torch.arange(num_train_timesteps).flip(0)
        self.num_inference_steps: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Prepare a chain of so many steps, each one evaluation of the network.

        Raises ValueError where the spacing would repeat a timestep or evaluate at the end point, timestep 0.
        """
        times = self._spaced(num_inference_steps)
        lambdas = half_log_snr(self.alphas_cumprod[torch.from_numpy(np.append(times, 0))])
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(times).to(device)
        self._lambdas = tuple(lambdas.tolist())
        self._linear = self.statistics.at(lambdas)[0]
        self._segments = segments(self.statistics, self._lambdas)
        self._index: int | None = None
        self._targets: tuple[Tensor, ...] = ()
        """g at the points passed, newest first, anchored at the newest."""
        self._start: Tensor | None = None
        """The state that the last step began from."""
        self._taken = 0
        """The last step's order."""

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample` as it is: the network takes states of the forward process."""
        return sample

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the step at `timestep` (one of `timesteps`) from `sample` [B,C,H,W].

        A chain may begin at any of the timesteps and then goes on in their order. Raises ValueError before
        `set_timesteps`, after the last step, and where the statistics are of another shape.
        """
        index = self._place(timestep)
        shape = self.statistics.shape
        if shape not in ((1, 1, 1), tuple(sample.shape[1:])):
            raise ValueError(
                f"statistics={self.config.statistics} are of shape {shape} but the samples of "
                f"{tuple(sample.shape[1:])}: make them for this model with jobs.statistics"
            )
        x = sample.double()
        target = self._target(model_output.double(), x, index)
        if self._targets:
            segment = self._part(index - 1, x.device)
            x = self._corrected(target, x, segment, index)
            self._targets = tuple(segment.scale.exp() * (g + segment.shift) for g in self._targets)
        self._targets = (target, *self._targets)[:HIGHEST]
        order = min(self.config.solver_order, len(self._targets))
        if self.config.lower_order_final:
            order = min(order, len(self._segments) - index)
        derivatives = self._derivatives(self._targets[:order], index, self.config.predictor)
        self._index, self._start, self._taken = index, x, order
        after = self._advance(x, derivatives, self._part(index, x.device), index).to(sample.dtype)
        return SchedulerOutput(after) if return_dict else (after,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the forward process's state at `timesteps`; see `diffusion.add_noise`."""
        return add_noise(self.alphas_cumprod, original_samples, noise, timesteps)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration and, beside it, the statistics, so that the folder needs nothing else."""
        if self.config.statistics in LIMITS:
            super().save_pretrained(save_directory, push_to_hub, **kwargs)
            return
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_statistics(Path(save_directory) / FILE, self.statistics)
        where = self.config.statistics
        self.register_to_config(statistics=FILE)
        try:
            super().save_pretrained(save_directory, push_to_hub, **kwargs)
        finally:
            self.register_to_config(statistics=where)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load from a local folder of `save_pretrained`, or from what diffusers takes without statistics."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder)
        if config.get("statistics") == FILE:
            folder = Path(pretrained_model_name_or_path or "") / (subfolder or "")
            kwargs.setdefault("statistics", str((folder / FILE).absolute()))
        return super().from_pretrained(
            pretrained_model_name_or_path, subfolder, return_unused_kwargs, **kwargs
        )

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _spaced(self, steps: int) -> np.ndarray:
        """Return the timesteps of a chain, int64, descending."""
        last = self.config.num_train_timesteps - 1
        if self.config.timestep_spacing == "trailing":
            times = np.arange(last + 1, 0, -(last + 1) / steps).round()[:steps] - 1
        elif self.config.timestep_spacing == "linspace":
            times = np.linspace(0, last, steps + 1).round()[:0:-1]
        else:
            grid = half_log_snr(self.alphas_cumprod).numpy()
            wanted = np.linspace(grid[-1], grid[0], steps + 1)[:-1]
            times = np.abs(grid[None] - wanted[:, None]).argmin(1)
        times = times.astype(np.int64)
        if times[-1] < 1 or (np.diff(times) >= 0).any():
            raise ValueError(
                f"num_inference_steps={steps} with timestep_spacing={self.config.timestep_spacing} repeats a "
                f"timestep or reaches 0 among {last + 1}: use fewer steps or another spacing"
            )
        return times

    def _place(self, timestep: int | Tensor) -> int:
        """Return the number of the step to be taken."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self._index is None:
            found = (self.timesteps == int(timestep)).nonzero()
            if not len(found):
                raise ValueError(f"timestep={int(timestep)} is not in the schedule: use one of `timesteps`")
            return int(found[0])
        if self._index + 1 >= len(self._segments):
            raise ValueError(
                f"all {self.num_inference_steps} steps are taken: call set_timesteps before another chain"
            )
        return self._index + 1

    def _target(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Return f = (sigma eps - l x) / alpha at a point, of which g anchored there is the same.

        Written for each prediction type such that 1 / alpha meets no difference of two large numbers.
        """
        alpha, sigma = self._alpha_sigma(index)
        linear = self._linear[index].to(x.device)
        if self.config.prediction_type == "epsilon":
            return (sigma * output - linear * x) / alpha
        if self.config.prediction_type == "sample":
            return (1.0 - linear) / alpha * x - output
        return sigma * output + (sigma**2 - linear) / alpha * x

    def _corrected(self, target: Tensor, x: Tensor, segment: Segment, index: int) -> Tensor:
        """Return the state at the last step's end, with the network's answer there known (app. C.2).

        The paper then moves eps with x such that g is as it was, which leaves nothing to be done here, where
        only g is kept.
        """
        kind = self.config.corrector
        order = self._taken + (kind == "pseudo")
        late = self.config.half_corrector and 2 * int(self.timesteps[index]) > len(self)
        if kind == "none" or order == 1 or late:
            return x
        assert self._start is not None
        ahead = (-segment.scale).exp() * target - segment.shift
        points = (self._targets[0], ahead, *self._targets[1:])[:order]
        return self._advance(
            self._start, self._derivatives(points, index - 1, kind, True), segment, index - 1
        )

    def _derivatives(
        self, targets: tuple[Tensor, ...], index: int, kind: str, corrector: bool = False
    ) -> list[Tensor]:
        """Return g and its derivatives at point `index` from g there, then, for a corrector, at the next
        point, then at earlier points, newest first."""
        places = [index, *([index + 1] if corrector else []), *range(index - 1, -1, -1)][: len(targets)]
        offsets = [self._lambdas[place] - self._lambdas[index] for place in places]
        return (divided if kind == "pseudo" else polynomial)(targets, offsets)

    def _advance(self, x: Tensor, derivatives: list[Tensor], segment: Segment, index: int) -> Tensor:
        """Return the state at the end of step `index` from `x` at its start; the module's equation."""
        alpha, next_alpha = self._alpha_sigma(index)[0], self._alpha_sigma(index + 1)[0]
        total = sum(m * g for m, g in zip(segment.moments, derivatives, strict=False)) + segment.drift
        return next_alpha * (-segment.growth).exp() * (x / alpha - total)

    def _alpha_sigma(self, index: int) -> tuple[float, float]:
        """alpha = sqrt(sigmoid(2 lambda)), sigma = sqrt(sigmoid(-2 lambda))."""
        double = 2.0 * self._lambdas[index]
        return (1.0 + math.exp(-double)) ** -0.5, (1.0 + math.exp(double)) ** -0.5

    def _part(self, index: int, device: torch.device) -> Segment:
        return self._segments[index].to(device)


def _check_choice(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value}: give one of {', '.join(map(str, allowed))}")
