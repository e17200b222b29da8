"""What a policy is shown: camera images, proprioceptive state and an instruction, checked before use."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from counterpoint.section import Section


@dataclass(frozen=True)
class Observation:
    """One moment as a robot's sensors and its user give it."""

    images: Mapping[str, np.ndarray]
    """By camera: uint8 [H,W,3]."""
    state: np.ndarray
    """Proprioceptive state, float32 [D]."""
    instruction: str


class ObservationSpace(Section):
    """What a policy expects of each observation."""

    cameras: dict[str, tuple[int, int]] = Field(min_length=1)
    """Height and width in pixels by camera name; the order is that of the policy's image tokens."""
    state: tuple[str, ...] = ()
    """What each entry of the state is, such as "gripper_x"; empty for a policy without state."""

    def check(self, observation: Observation) -> None:
        """Raise ValueError, in one line that names the field, the value and the remedy, if it misfits."""
        for camera, size in self.cameras.items():
            image = observation.images.get(camera)
            if image is None:
                raise ValueError(
                    f"observation.images has no camera {camera!r}, only {sorted(observation.images)}: "
                    f"give images of {sorted(self.cameras)}"
                )
            if image.shape != (*size, 3) or image.dtype != np.uint8:
                raise ValueError(
                    f"observation.images[{camera!r}] is {image.dtype} {list(image.shape)}, the policy "
                    f"expects uint8 {[*size, 3]}: resize it as in training"
                )
        state = np.asarray(observation.state)
        if self.state and state.shape != (len(self.state),):
            raise ValueError(
                f"observation.state has shape {list(state.shape)}, the policy expects "
                f"[{len(self.state)}] ({', '.join(self.state)})"
            )
        if self.state and not np.isfinite(state).all():
            wrong = [name for name, value in zip(self.state, state, strict=True) if not np.isfinite(value)]
            raise ValueError(f"observation.state is not finite in {', '.join(wrong)}: repair the sensor")
        if not observation.instruction.strip():
            raise ValueError("observation.instruction is empty: say what the robot shall do")
