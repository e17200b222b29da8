"""Everything NitroFusion leaves open or a user may want to turn, as named options."""

from typing import Literal

from pydantic import Field, model_validator

from counterpoint.section import Section

Kind = Literal["global_conditional", "local_conditional", "local_unconditional"]
KINDS: tuple[Kind, ...] = ("global_conditional", "local_conditional", "local_unconditional")
LossForm = Literal["critic", "hinge", "softplus"]

REFERENCE_SIDE = 128
"""The side of the latents for which the paper states its noise levels."""


class CriticsConfig(Section):
    """The pool of discriminator heads; defaults follow the paper where it speaks."""

    noise_levels: tuple[int, ...] = (10, 250, 500, 750)
    """Timesteps t* at which samples are judged, as at a side of 128 (paper); one critic group each."""
    scale_levels: bool = True
    """Move the levels so that noise-to-signal times (128 / side) stays constant; at a side of 128 that
    changes nothing, and without it the upper levels are blind on small images."""
    kinds: tuple[Kind, ...] = KINDS
    """The kinds of heads; fewer for ablations."""
    heads_per_slot: int = Field(default=4, ge=1)
    """Interchangeable heads for each (noise level, kind, feature level); 4 gives SDXL's 480."""
    panel: Literal["one_per_slot", "uniform", "all"] = "one_per_slot"
    """Who judges a step: one head per slot, as many heads drawn uniformly from the level, or all of them."""
    levels_per_step: int = Field(default=1, ge=1)
    """Noise levels in use in one step; the batch is shared out evenly among them."""
    refresh_rate: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of all heads that is re-initialised per tick of the refresh clock."""
    refresh_draw: Literal["without_replacement", "bernoulli"] = "without_replacement"
    """A fixed number of heads per tick (fractions carry over), or an independent coin for each head."""
    refresh_clock: Literal["optimizer_step", "micro_step"] = "optimizer_step"
    """What one tick is: an optimizer step, or each micro-batch of an accumulated step."""
    refresh_optimizer_state: Literal["dropped", "kept"] = "dropped"
    """Whether a new head starts with empty moments, or inherits its predecessor's."""
    probation: int = Field(default=0, ge=0)
    """Updates a head must have had before its judgement reaches the student."""
    loss: LossForm = "hinge"
    """`critic` is the paper's unclamped difference; `hinge` and `softplus` are bounded for the critics."""
    reduction: Literal["sum", "mean"] = "sum"
    """How the heads of a panel add up in the student's loss; their own losses are always separate."""
    patch_side: int | None = Field(default=None, ge=1)
    """Side of the local heads' window; half the image's unless set."""
    patch_windows: int = Field(default=1, ge=1)
    """Windows per image; a local head's judgement is the mean over them."""
    same_window: bool = True
    """Cut the same windows from the real and the fake image."""
    share_noise: bool = False
    """Use the same noise draw for the real and the fake image."""
    shuffled_negatives: bool = False
    """Also show conditional heads real images under a wrong class, as fakes."""
    order: Literal["critics_first", "student_first"] = "critics_first"
    """Whether the student is judged by the heads after or before their update in the same step."""
    critic_steps: int = Field(default=1, ge=1)
    """Steps of the critics per step of the student."""
    width: int = Field(default=16, ge=1)
    """Channels inside a head."""
    groups: int = Field(default=4, ge=1)
    """Groups of a head's GroupNorm; must divide width."""
    learning_rate: float = Field(default=2e-3, gt=0.0)
    """AdamW learning rate of the heads."""
    betas: tuple[float, float] = (0.0, 0.99)
    """AdamW betas of the heads."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW weight decay of the heads that judge; resting heads are never touched."""

    @model_validator(mode="after")
    def _check(self) -> "CriticsConfig":
        if self.levels_per_step > len(self.noise_levels):
            raise ValueError(
                f"levels_per_step={self.levels_per_step} exceeds the {len(self.noise_levels)} noise_levels: "
                "lower it"
            )
        if self.width % self.groups:
            raise ValueError(f"width={self.width} is not a multiple of groups={self.groups}: make it one")
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds={list(self.kinds)} must name at least one kind, and none twice")
        if len(set(self.noise_levels)) != len(self.noise_levels) or min(self.noise_levels) < 0:
            raise ValueError(
                f"noise_levels={list(self.noise_levels)} must be different timesteps of 0 or more"
            )
        return self

    def updates_per_life(self) -> float:
        """Expected updates a head gets before it is refreshed: (chance to be drawn) / (refresh rate)."""
        drawn = 1.0 if self.panel == "all" else 1.0 / self.heads_per_slot
        share = self.levels_per_step / len(self.noise_levels)
        return float("inf") if self.refresh_rate == 0 else drawn * share / self.refresh_rate
