"""What a request may say of how its images are sampled: solvers and guiders by name, and their numbers.

Only what follows from the noise alone is offered: a solver that draws fresh noise would be as reproducible,
but no reason to choose one has come up. All take one evaluation of the network a step.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

SchedulerName = Literal[
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverV3Scheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
]
GuiderName = Literal[
    "ClassifierFreeGuidance",
    "AdaptiveProjectedGuidance",
    "ClassifierFreeZeroStarGuidance",
    "TangentialClassifierFreeGuidance",
    "BatchedPerturbedAttentionGuidance",
    "RatioAwareGuidance",
]
SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)
GUIDERS: tuple[str, ...] = get_args(GuiderName)


def _number(low: float, high: float, **more: Any) -> Any:
    return Field(None, ge=low, le=high, allow_inf_nan=False, **more)


class GuiderOptions(BaseModel):
    """Numbers of a guider, each by the name that diffusers gives it; null is the guider's own default."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    start: Annotated[float, Field(lt=1.0)] | None = _number(0.0, 1.0, examples=[0.0])
    """Of every guider. Fraction of the steps after which it starts; 0 by default."""
    stop: float | None = _number(0.0, 1.0, examples=[1.0])
    """Of every guider. Fraction of the steps after which it stops, at least `start`; 1 by default."""
    guidance_rescale: float | None = _number(0.0, 1.0, examples=[0.5])
    """Of diffusers' guiders. How far the output gets back the conditional output's standard deviation."""
    perturbed_guidance_scale: float | None = _number(0.0, 20.0, examples=[1.0])
    """Of BatchedPerturbedAttentionGuidance. How far away from the output of perturbed self-attention."""
    adaptive_projected_guidance_momentum: float | None = _number(-0.99, 0.99, examples=[-0.5])
    """Of AdaptiveProjectedGuidance. Momentum of the difference between the branches."""
    adaptive_projected_guidance_rescale: float | None = _number(0.0, 1000.0, examples=[15.0])
    """Of AdaptiveProjectedGuidance. The difference's largest norm; 0 for no limit."""
    eta: float | None = _number(0.0, 1.0, examples=[0.5])
    """Of AdaptiveProjectedGuidance. Share that the difference's part along the output keeps."""
    zero_init_steps: Annotated[int, Field(le=1000)] | None = Field(None, ge=0, examples=[1])
    """Of ClassifierFreeZeroStarGuidance. First steps in which the output is zero."""
    decay: float | None = _number(0.0, 1000.0, examples=[12.0])
    """Of RatioAwareGuidance. How fast the scale falls with the ratio; 0 is a constant scale."""
    exponent: float | None = _number(0.1, 10.0, examples=[1.0])
    """Of RatioAwareGuidance. Power of the ratio."""
    max_push: float | None = _number(0.0, 1000.0, examples=[5.0])
    """Of RatioAwareGuidance. Largest product of scale and ratio; none by default."""


_SPAN = ("start", "stop")
_OPTIONS = {
    "ClassifierFreeGuidance": (*_SPAN, "guidance_rescale"),
    "AdaptiveProjectedGuidance": (
        *_SPAN,
        "guidance_rescale",
        "adaptive_projected_guidance_momentum",
        "adaptive_projected_guidance_rescale",
        "eta",
    ),
    "ClassifierFreeZeroStarGuidance": (*_SPAN, "guidance_rescale", "zero_init_steps"),
    "TangentialClassifierFreeGuidance": (*_SPAN, "guidance_rescale"),
    "BatchedPerturbedAttentionGuidance": (*_SPAN, "perturbed_guidance_scale"),
    "RatioAwareGuidance": (*_SPAN, "decay", "exponent", "max_push"),
}


def options_of(guider: str) -> tuple[str, ...]:
    """Return the names of the options that a guider of GUIDERS takes beside its scale."""
    return _OPTIONS[guider]


def scale_of(guider: str) -> str:
    """Return what a guider of GUIDERS calls the scale that requests call `guidance_scale`."""
    return "max_guidance_scale" if guider == "RatioAwareGuidance" else "guidance_scale"
