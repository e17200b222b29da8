"""The scripted expert: above the block, down, close, lift; it looks only at where things are now."""

import numpy as np

METRES = 0.05
"""The motion of one control step at action 1.0."""
REACH = 0.4
"""Largest motion the expert asks for, as an action."""
GAIN = 0.8
"""Share of the remaining way that one step asks for."""
CLEARANCE = 0.08
"""Metres above the block's centre at which the gripper travels."""
ASIDE, LEVEL = 0.015, 0.012
"""Metres off the block's middle, sideways and in height, within which the fingers can close on it."""
HELD = 0.054
"""Metres between the fingers below which they hold the block, which is 0.05 wide."""


def expert_action(gripper: np.ndarray, openings: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Return the action float32 [4] for a gripper and block at these world positions [3], in metres.

    `openings` [2] are the two fingers' from the middle. The expert has no memory: pushed away or with the
    block lost, it begins again from what it finds.
    """
    way = block - gripper
    aside = float(np.hypot(way[0], way[1]))
    grip = 1.0
    if aside > ASIDE:
        way[2] += CLEARANCE
    elif abs(way[2]) < LEVEL:
        grip = -1.0
        held = float(openings.sum()) < HELD
        way = np.array([0.0, 0.0, REACH * METRES / GAIN if held else 0.0])
    motion = np.clip(GAIN * way / METRES, -REACH, REACH)
    return np.array([*motion, grip], dtype=np.float32)
