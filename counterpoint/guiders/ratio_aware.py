"""Ratio-aware adaptive guidance: less of it where condition and no condition differ most (arXiv 2508.03442).

With few steps a constant scale ruins the samples of a flow: in the first ones the two velocities differ much,
and what is overshot there grows along the path.
"""

from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor


class Ratios(NamedTuple):
    """What one step did to each sample of a batch."""

    ratio: Tensor
    """rho [B], how large the difference is beside the unconditional velocity."""
    scale: Tensor
    """w [B], the guidance scale that follows."""


class RatioAwareGuidance(BaseGuidance):
    """null + w (conditional - null), with w from each sample's own ratio at each step.

    rho = |v_c - v_u| / |v_u| and w = 1 + (max_guidance_scale - 1) exp(-decay rho^exponent) (eq. 8), with
    norms over all dimensions but the batch's, in float32 or better. The authors' code takes them over the
    whole batch, whose images then depend on one another. The defaults are theirs for SD3.5; both numbers
    belong to the model and want tuning. It costs what classifier-free guidance does, and a rescaling or
    projection of the guided velocity comes after it.

    Args:
        max_guidance_scale: w where the condition makes no difference; 1 is the plain conditional model.
        decay: how fast w falls with the ratio; 0 is a constant scale.
        exponent: of the ratio; 2 is the other reading of the paper, at which `decay` means something else.
        max_push: largest w rho. Late ratios are small and w large, so that a network's errors in the
            difference are multiplied too. It lowers w to 1 at most; none unless given.
        any_process: also take outputs that are no velocities, for which the paper's own figures are worse.
        start, stop, enabled: as in diffusers, the share of steps with guidance.

    Attributes:
        ratios: what the last step with guidance did, None before.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        max_guidance_scale: float = 18.0,
        decay: float = 12.0,
        exponent: float = 1.0,
        max_push: float | None = None,
        any_process: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        for name, value, lowest in (
            ("max_guidance_scale", max_guidance_scale, 1.0),
            ("decay", decay, 0.0),
            ("max_push", max_push, 0.0),
        ):
            if value is not None and value < lowest:
                raise ValueError(f"{name}={value} must be at least {lowest:g}")
        if exponent <= 0.0:
            raise ValueError(f"exponent={exponent} must be above 0, such as 1")
        self.max_guidance_scale, self.decay, self.exponent = max_guidance_scale, decay, exponent
        self.max_push = max_push
        self.velocity_only = not any_process
        self.ratios: Ratios | None = None

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list[Any]:
        """Return the branches: conditional, with the first entries of `data`, and null, with the second."""
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Return the same branches in a modular pipeline of diffusers."""
        names = self._input_predictions[: self.num_conditions]
        return [
            self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)
        ]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Return the guided velocity [B,...], of the dtype of `pred_cond`; see the class."""
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        shift = pred_cond - pred_uncond
        self.ratios = self._ratios(shift, pred_uncond)
        scale = self.ratios.scale.reshape(-1, *[1] * (shift.ndim - 1)).to(shift)
        return GuiderOutput(pred=pred_uncond + scale * shift, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the branch that is being prepared is the conditional one."""
        return bool(self._count_prepared == 1)

    @property
    def num_conditions(self) -> int:
        """2, or 1 where the plain conditional model is asked for: then nothing else is evaluated."""
        if not self._enabled or self.max_guidance_scale == 1.0:
            return 1
        if self._num_inference_steps is None:
            return 2
        first, last = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return 2 if first <= self._step < last else 1

    def _ratios(self, shift: Tensor, unconditional: Tensor) -> Ratios:
        ratio = _norms(shift) / _norms(unconditional).clamp(min=1e-8)
        scale = 1.0 + (self.max_guidance_scale - 1.0) * torch.exp(-self.decay * ratio**self.exponent)
        if self.max_push is not None:
            scale = torch.minimum(scale, self.max_push / ratio.clamp(min=1e-8)).clamp(min=1.0)
        return Ratios(ratio, scale)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1)
