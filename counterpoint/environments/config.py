"""What the block-lifting environment looks like; its spaces follow without a simulator."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from counterpoint.actions.space import ActionSpace
from counterpoint.policies.observation import ObservationSpace
from counterpoint.section import Section

if TYPE_CHECKING:
    from counterpoint.environments.blocks import BlocksEnv

CAMERA = "front"
CONTROL_HZ = 25.0
"""The rate of gymnasium-robotics' Fetch environments: 20 substeps of 2 ms."""

Triple = tuple[float, float, float]


class CameraConfig(Section):
    """Where the camera stands, in the world's metres, and what it takes in."""

    position: Triple = (1.95, 0.75, 0.95)
    """Its place; the table's top is centred at (1.3, 0.75, 0.4)."""
    right: Triple = (0.0, 1.0, 0.0)
    """The world direction that points right in the image."""
    up: Triple = (-0.6, 0.0, 0.8)
    """The world direction that points up in the image."""
    fovy: float = Field(default=32.0, gt=1.0, lt=170.0)
    """Vertical field of view in degrees."""


class EnvironmentConfig(Section):
    """A Fetch arm before a table with coloured blocks, told to pick up one of them."""

    image_size: int = Field(default=64, ge=16, le=1024)
    """Height and width of the camera image in pixels."""
    camera: CameraConfig = CameraConfig()
    max_steps: int = Field(default=48, ge=1)
    """Control steps after which the episode is over."""
    colours: dict[str, Triple] = Field(
        default={"red": (0.85, 0.1, 0.1), "green": (0.1, 0.65, 0.1), "blue": (0.1, 0.15, 0.9)}, min_length=1
    )
    """Red, green and blue shares in [0, 1] of each block by the name that instructions use."""
    instruction: str = "pick up the {colour} block"
    """What the robot is told; {colour} becomes the named block's."""
    spread: tuple[float, float] = (0.10, 0.13)
    """Blocks start within this many metres of the gripper along x (away from the robot) and y."""
    least_distance: float = Field(default=0.085, ge=0.075)
    """Least distance in metres between the centres of two blocks; below 0.075 they may touch."""
    yaw: float = Field(default=0.25, ge=0.0, le=0.8)
    """Blocks are turned by up to this many radians either way."""
    mass: float = Field(default=0.5, gt=0.0, le=2.0)
    """Mass of a block in kg."""
    lift_height: float = Field(default=0.08, gt=0.0, le=0.2)
    """Metres above its rest at which a block counts as picked up."""
    settle: int = Field(default=2, ge=0)
    """Control steps without motion before each episode, so that the blocks lie still."""

    @model_validator(mode="after")
    def _check(self) -> "EnvironmentConfig":
        if "{colour}" not in self.instruction:
            raise ValueError(
                f"instruction={self.instruction!r} does not name a block: put {{colour}} into it"
            )
        for name, shares in self.colours.items():
            if not all(0.0 <= share <= 1.0 for share in shares):
                raise ValueError(f"colours[{name!r}]={shares} must lie in [0, 1]: divide by 255")
        if not all(0.0 <= metres <= 0.15 for metres in self.spread):
            raise ValueError(f"spread={self.spread} must lie in [0, 0.15]: beyond it the arm reaches badly")
        return self

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instruction for each block, in the order of `colours`."""
        return tuple(self.instruction.replace("{colour}", name) for name in self.colours)

    def observation_space(self) -> ObservationSpace:
        """Return what the environment shows: one camera, and where the gripper and its fingers are."""
        return ObservationSpace(
            cameras={CAMERA: (self.image_size, self.image_size)},
            state=("gripper_x", "gripper_y", "gripper_z", "finger_right", "finger_left"),
        )

    def action_space(self, horizon: int = 4, execute: int = 4) -> ActionSpace:
        """Return what the environment takes: a motion (1.0 is 5 cm a step) and the fingers' (1.0 opens)."""
        return ActionSpace(
            names=("dx", "dy", "dz", "gripper"),
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            control_hz=CONTROL_HZ,
            horizon=horizon,
            execute=execute,
        )


def build_environment(config: EnvironmentConfig) -> "BlocksEnv":
    """Return the environment; the simulator is imported here, so that reading a configuration is cheap."""
    from counterpoint.environments.blocks import BlocksEnv

    return BlocksEnv(config)
