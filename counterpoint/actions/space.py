"""What a policy's actions are: names and ranges of their dimensions, and how they come in chunks."""

import numpy as np
from pydantic import Field, model_validator

from counterpoint.section import Section


class ActionSpace(Section):
    """Named, bounded dimensions of one control step, and the chunk of steps that one decision covers."""

    names: tuple[str, ...] = Field(min_length=1)
    """What each dimension is, such as "dx" or "gripper"; policy and environment must agree on them."""
    low: tuple[float, ...]
    """Least value of each dimension."""
    high: tuple[float, ...]
    """Greatest value of each dimension."""
    control_hz: float = Field(default=25.0, gt=0.0)
    """Control steps per second."""
    horizon: int = Field(default=4, ge=1)
    """Control steps that one decision predicts."""
    execute: int = Field(default=4, ge=1)
    """How many of them are executed before the next decision."""

    @model_validator(mode="after")
    def _check(self) -> "ActionSpace":
        if not len(self.names) == len(self.low) == len(self.high):
            raise ValueError(
                f"names, low and high have {len(self.names)}, {len(self.low)} and {len(self.high)} entries: "
                "give one each per dimension"
            )
        if self.execute > self.horizon:
            raise ValueError(f"execute={self.execute} exceeds horizon={self.horizon}: lower it")
        if any(low >= high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low={self.low} must lie below high={self.high} in every dimension")
        return self

    @property
    def dimensions(self) -> int:
        """Dimensions of one control step."""
        return len(self.names)

    def clip(self, actions: np.ndarray) -> np.ndarray:
        """Return `actions` [..., D] within the bounds, as float32."""
        return np.clip(actions, self.low, self.high).astype(np.float32)

    def check_same(self, other: "ActionSpace", mine: str, theirs: str) -> None:
        """Raise ValueError, in one line, unless names and bounds are those of `other`."""
        for field in ("names", "low", "high", "control_hz"):
            if getattr(self, field) != getattr(other, field):
                raise ValueError(
                    f"action space: {mine} has {field}={getattr(self, field)} and {theirs} has "
                    f"{field}={getattr(other, field)}: use a policy that was trained for this environment"
                )
