"""Everything NitroFusion leaves open or a user may want to turn, as named options."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from counterpoint.schedules import Scheduled, bounds, is_constant, mean_of, turns, value_at
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
    heads_drawn: Annotated[Scheduled, bounds(ge=1.0)] | None = None
    """With `panel: uniform`, heads that judge a step at each noise level, rounded; unset, as many as there
    are slots. May change over training."""
    band_weights: tuple[Annotated[Scheduled, bounds(ge=0.0)], ...] = ()
    """Weight of each noise level's judgement in the student's gradient, one for each of noise_levels; only
    their ratios count: they are scaled to a mean of 1 at each moment. Empty weighs all alike. May change over
    training."""
    levels_per_step: int = Field(default=1, ge=1)
    """Noise levels in use in one step; the batch is shared out evenly among them."""
    refresh_rate: Annotated[Scheduled, bounds(ge=0.0, le=1.0)] = 0.01
    """Share of all heads that is re-initialised per tick of the refresh clock. May change over training."""
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
    learning_rate: Annotated[Scheduled, bounds(gt=0.0)] = 2e-3
    """AdamW learning rate of the heads. May change over training."""
    betas: tuple[float, float] = (0.0, 0.99)
    """AdamW betas of the heads."""
    weight_decay: Annotated[Scheduled, bounds(ge=0.0)] = 0.0
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
        if self.heads_drawn is not None and self.panel != "uniform":
            raise ValueError(
                f"heads_drawn needs panel=uniform, but panel={self.panel} says itself who judges: set "
                "panel=uniform, or heads_drawn=null"
            )
        self._check_band_weights()
        return self

    def _check_band_weights(self) -> None:
        if not self.band_weights:
            return
        if len(self.band_weights) != len(self.noise_levels):
            raise ValueError(
                f"band_weights has {len(self.band_weights)} entries for {len(self.noise_levels)} "
                "noise_levels: give one for each, or none"
            )
        breaks = sorted(set().union(*map(turns, self.band_weights)))
        # Between its breaks a schedule of numbers of 0 or more is 0 everywhere or nowhere.
        for moment in [*breaks, *((a + b) / 2 for a, b in pairwise(breaks))]:
            if not any(value_at(weight, moment) > 0 for weight in self.band_weights):
                raise ValueError(
                    f"band_weights are all 0 at progress {moment:g}, so that no noise level counts: keep one "
                    "above 0 there, or lower adversarial.adversarial_weight instead"
                )

    def changing(self) -> tuple[str, ...]:
        """Return the names of the fields that hold a number which changes over training."""
        found = []
        for name in ("refresh_rate", "heads_drawn", "band_weights", "learning_rate", "weight_decay"):
            held = getattr(self, name)
            parts = held if isinstance(held, tuple) else () if held is None else (held,)
            if not all(map(is_constant, parts)):
                found.append(name)
        return tuple(found)

    def updates_per_life(self, slots: int = 0) -> float:
        """Expected updates a head gets before it is refreshed: (chance to be drawn) / (refresh rate).

        Of numbers that change over training their means count. `slots` are those of one noise level, among
        whose heads `heads_drawn` are drawn.
        """
        drawn = 1.0 if self.panel == "all" else 1.0 / self.heads_per_slot
        if self.heads_drawn is not None and slots:
            drawn = mean_of(self.heads_drawn) / (slots * self.heads_per_slot)
        share, rate = self.levels_per_step / len(self.noise_levels), mean_of(self.refresh_rate)
        return float("inf") if rate == 0 else drawn * share / rate
