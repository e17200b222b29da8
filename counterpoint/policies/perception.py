"""Teaching the pointer vision where things are.

Labels are the projected positions of the simulator's objects: privileged knowledge that exists in training
only. What is trained sees pixels and words; afterwards it is frozen, and policies see what it finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from counterpoint.data.demonstrations import Demonstrations
from counterpoint.optimization import OptimizerConfig
from counterpoint.policies.vision import Looks, VisionConfig, cell_of, map_size
from counterpoint.section import Section
from counterpoint.seeds import generator

Words = Callable[[Sequence[str]], Tensor]
"""Turns instructions into word ids int64 [n,W]."""
MOST_ASKED = 8


class PerceptionConfig(Section):
    """How the pointer vision is trained before it is frozen."""

    steps: int = Field(default=1200, ge=0)
    """Optimizer steps."""
    batch_size: int = Field(default=48, ge=1)
    """Frames per optimizer step, over all workers and micro-batches."""
    coordinate_weight: float = Field(default=2.0, ge=0.0)
    """Weight of the coordinate's smooth L1 loss beside the cross-entropy on the cell."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, warmup_steps=50, ema_decay=0.99)
    """AdamW, schedule, clipping and EMA."""


@dataclass(frozen=True)
class Views:
    """Frames, what is asked of each, and where the answers lie."""

    images: Tensor
    """uint8 [B,cameras,H,W,3]."""
    words: Tensor | None
    """Instructions asked of each frame, int64 [B,J,W]; None for a policy without text."""
    coordinates: Tensor
    """True (x, y) in [-1,1] for each query: J instructions, null (with text), slots [B,cameras,Q,2]."""
    known: Tensor
    """Whether there is a truth, in sight of the camera, bool [B,cameras,Q]."""

    def part(self, part: slice, device: torch.device) -> "Views":
        """Return the frames of `part`, moved to `device`."""
        words = None if self.words is None else self.words[part].to(device)
        moved = (x[part].to(device) for x in (self.images, self.coordinates, self.known))
        images, coordinates, known = moved
        return Views(images, words, coordinates, known)


class PerceptionData:
    """Draws the views of any step, from counter-based streams."""

    def __init__(self, frames: Demonstrations, words: Words | None, config: VisionConfig) -> None:
        """Take `frames` with their keypoints; `words` is None for a policy without text.

        Raises ValueError if the keypoints are not as many as the vision has slots, or no instruction is known
        to name one.
        """
        _check(frames, words is not None, config)
        height, width = frames.images.shape[2:4]
        self.images = torch.from_numpy(frames.images)
        self.coordinates = torch.from_numpy(frames.keypoints) / torch.tensor([width, height]) * 2 - 1
        self.targets = torch.from_numpy(frames.targets).long()
        self.nameable = torch.from_numpy(np.unique(frames.targets[frames.targets >= 0])).long()
        self.words: Tensor | None = None
        if words is not None:
            texts, self.own = np.unique(frames.instructions, return_inverse=True)
            self.words = words(texts.tolist())
            self.meanings = _meanings(torch.from_numpy(self.own), self.targets, len(texts))

    def draw(self, seed: int, step: int, size: int) -> Views:
        """Draw `size` frames with what is asked of them.

        Where each instruction names the same keypoint in all frames, every frame is asked all instructions
        (of more than eight, eight random ones), else its own. Null is a random thing that can be named.
        """
        stream = generator(seed, "perception", step)
        rows = torch.randint(len(self.images), (size,), generator=stream)
        slots = torch.arange(self.coordinates.shape[2]).expand(size, -1)
        wanted, words = slots, None
        if self.words is not None:
            asked, named = self._ask(rows, stream)
            words = self.words[asked]
            null = self.nameable[torch.randint(len(self.nameable), (size, 1), generator=stream)]
            wanted = torch.cat([named, null, slots], 1)
        index = wanted.clamp_min(0)[:, None, :, None].expand(-1, self.coordinates.shape[1], -1, 2)
        coordinates = self.coordinates[rows].gather(2, index)
        known = (wanted >= 0)[:, None] & (coordinates.abs() <= 1).all(-1)
        return Views(self.images[rows], words, coordinates, known)

    def _ask(self, rows: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of the instructions asked of each row, and the keypoints they name [B,J]."""
        if self.meanings is None:
            return torch.from_numpy(self.own)[rows][:, None], self.targets[rows][:, None]
        some = torch.randperm(len(self.meanings), generator=stream)[:MOST_ASKED]
        return some.expand(len(rows), -1), self.meanings[some].expand(len(rows), -1)


def perception_loss(looks: Looks, views: Views, weight: float) -> Tensor:
    """Return cross-entropy on the true cell plus `weight` times smooth L1 on the place, summed over queries.

    Places are measured in cells, as the offsets are.
    """
    height, width = map_size(*views.images.shape[2:4])
    cells = cell_of(views.coordinates, height, width)
    cross = F.cross_entropy(looks.attention[views.known], cells[views.known], reduction="sum")
    scale = torch.tensor([width, height], device=cells.device) / 2
    found, true = looks.coordinates[views.known] * scale, views.coordinates[views.known] * scale
    return cross + weight * F.smooth_l1_loss(found, true, reduction="sum") / 2


def pixel_errors(looks: Looks, views: Views) -> Tensor:
    """Return how far each known answer, but null's, is from the truth in pixels, as one vector."""
    height, width = views.images.shape[2:4]
    scale = torch.tensor([width, height], device=looks.coordinates.device) / 2
    counted = views.known.clone()
    if views.words is not None:
        counted[:, :, views.words.shape[1]] = False
    return ((looks.coordinates - views.coordinates) * scale).norm(dim=-1)[counted]


def _check(frames: Demonstrations, text: bool, config: VisionConfig) -> None:
    found = frames.keypoints.shape[2]
    if found != config.keypoints or found == 0:
        raise ValueError(
            f"vision.keypoints={config.keypoints}, but each frame of the data has {found} per camera: "
            f"set vision.keypoints={found}" + (" and vision.kind=patches" if found == 0 else "")
        )
    if text and not (frames.targets >= 0).any():
        raise ValueError(
            "no frame says which keypoint its instruction names (target is -1 throughout): "
            "collect with targets, or set vision.kind=patches"
        )
    if (frames.targets >= found).any():
        raise ValueError(
            f"target {frames.targets.max()} is not one of the {found} keypoints: collect the data again"
        )


def _meanings(own: Tensor, targets: Tensor, count: int) -> Tensor | None:
    """The keypoint that each of `count` instructions names, -1 if unknown; None if one names several."""
    meanings = torch.full((count,), -1)
    for text in range(count):
        named = targets[(own == text) & (targets >= 0)].unique()
        if len(named) > 1:
            return None
        if len(named):
            meanings[text] = named[0]
    return meanings
