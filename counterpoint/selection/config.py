"""How a policy's action is chosen among candidates."""

from typing import Literal

from pydantic import Field, model_validator

from counterpoint.policies.masks import Mask
from counterpoint.section import Section

Rule = Literal["greedy", "random", "likelihood", "entropy", "self_certainty", "masked_condition", "oracle"]


class SelectionConfig(Section):
    """Which candidates are sampled and which one is kept.

    Defaults are MG-Select's (arXiv 2510.05681): four candidates at temperature 0.5, the reference at
    temperature 4, confidence summed over the first five action tokens.
    """

    rule: Rule = "greedy"
    """greedy: the likeliest token each time, no candidates. random: any of the candidates (the first), which
    with candidates=1 is plain temperature sampling. likelihood: the likeliest candidate. entropy: the one
    whose distributions are sharpest. self_certainty: the one whose distributions lie furthest from uniform.
    masked_condition: the one whose distributions lie furthest from those of the same policy with conditions
    masked (MG-Select). oracle: whatever the simulator says; a ceiling, not a method."""
    candidates: int = Field(default=4, ge=1)
    """Candidates N per decision."""
    temperature: float = Field(default=0.5, gt=0.0)
    """Temperature at which candidates are sampled."""
    mask: Mask | None = None
    """Conditions that the reference is not told: text, state or both; for masked_condition only."""
    reference_temperature: float = Field(default=4.0, gt=0.0)
    """Temperature of the reference Q."""
    policy_temperature: float = Field(default=1.0, gt=0.0)
    """Temperature of the policy's own distribution P in the confidence."""
    first_tokens: int | None = Field(default=5, ge=1)
    """Action tokens whose terms are aggregated, from the first; none takes all. Likelihood always does."""
    aggregate: Literal["sum", "mean"] = "sum"
    """Over a candidate's own tokens; a sum (the paper's) favours longer chunks where lengths vary."""

    @model_validator(mode="after")
    def _check(self) -> "SelectionConfig":
        if self.rule == "masked_condition" and self.mask in (None, "none"):
            raise ValueError(f"mask={self.mask}: rule=masked_condition needs mask=text, state or both")
        if self.rule != "masked_condition" and self.mask is not None:
            raise ValueError(f"mask={self.mask} has no meaning for rule={self.rule}: leave it out")
        return self
