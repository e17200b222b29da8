"""Pictures of coloured squares with an instruction, a state and an action that follows from all three."""

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.demonstrations import Demonstrations
from counterpoint.policies.compact import CompactConfig, CompactPolicy
from counterpoint.policies.observation import ObservationSpace
from counterpoint.policies.vision import VisionConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 60, 230)}
GRIPPER = (230, 230, 40)
WORDS = ("<pad>", "block", "blue", "green", "pick", "red", "the", "up")
LENGTH = 5
BINS, STEPS = 8, 2
"""Bins of each of the two action dimensions, and steps of a chunk."""


def words(instructions: list[str]) -> Tensor:
    """Word ids by position in `WORDS`."""
    rows = [[WORDS.index(word) for word in text.split()] for text in instructions]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows]).reshape(len(rows), LENGTH)


def squares(episodes: int, steps: int = 4, size: int = 32, seed: int = 0) -> Demonstrations:
    """Demonstrations in which the action is the way from the gripper to the named square, in pixels."""
    stream = np.random.default_rng(seed)
    rows = episodes * steps
    points = stream.uniform(4, size - 4, (rows, 4, 2)).astype(np.float32)
    images = np.full((rows, 1, size, size, 3), 90, np.uint8)
    for image, row in zip(images[:, 0], points, strict=True):
        for colour, (x, y) in zip((*COLOURS.values(), GRIPPER), row, strict=True):
            image[max(0, round(y) - 2) : round(y) + 2, max(0, round(x) - 2) : round(x) + 2] = colour
    targets = np.repeat(stream.integers(0, 3, episodes), steps).astype(np.int32)
    named = points[np.arange(rows), targets]
    return Demonstrations(
        ("front",),
        images,
        np.concatenate([points[:, 3], np.ones((rows, 1))], 1).astype(np.float32),
        (named - points[:, 3]).astype(np.float32),
        np.array([f"pick up the {list(COLOURS)[target]} block" for target in targets]),
        np.repeat(np.arange(episodes), steps),
        np.tile(np.arange(steps, dtype=np.int32), episodes),
        points[:, None],
        targets,
        np.full(rows, "demonstration"),
    )


def tokens_of(actions: np.ndarray, size: int = 32) -> list[list[int]]:
    """Each action [2] as the tokens of a chunk: its bins, once per step."""
    bins = np.clip((actions / size + 1) / 2 * BINS, 0, BINS - 1).astype(int)
    return [list(row) * STEPS for row in bins.tolist()]


def policy(
    kind: str = "pointer",
    end_token: int | None = None,
    cameras: tuple[str, ...] = ("front",),
    size: int = 32,
    seed: int = 0,
    **options: object,
) -> CompactPolicy:
    """A small policy for `squares`."""
    config = CompactConfig(
        hidden=32, layers=2, heads=2, intermediate=48, vision=VisionConfig(kind=kind), **options
    )
    space = ObservationSpace(cameras=dict.fromkeys(cameras, (size, size)), state=("x", "y", "open"))
    extra = end_token is not None
    return CompactPolicy(config, space, BINS + extra, end_token, 2 * STEPS + extra, len(WORDS), LENGTH, seed)


def inputs_of(data: Demonstrations) -> dict[str, Tensor]:
    """What a policy is told of each frame."""
    return {
        "images": torch.from_numpy(data.images),
        "state": torch.from_numpy(data.states),
        "words": words(data.instructions.tolist()),
    }
