"""The samples of each step of a distillation: what the student starts from, aims at and is compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.data import ImageSet
from counterpoint.pairs import Pairs
from counterpoint.seeds import generator
from counterpoint.student import StudentConfig, draw_inputs


@dataclass(frozen=True)
class Batch:
    """One step's samples, for all ranks; cut by rank and micro-batch."""

    x_t: Tensor
    """What the student starts from [B,C,H,W]."""
    timesteps: Tensor
    """Its noise times [B]."""
    labels: Tensor
    """Classes [B]."""
    target: Tensor
    """The teacher's x_0 of each input."""
    real: Tensor
    """What critics compare with."""

    def part(self, part: slice, device: torch.device) -> "Batch":
        """Return the samples of `part`, moved to `device`."""
        tensors = (self.x_t, self.timesteps, self.labels, self.target, self.real)
        return Batch(*(x[part].to(device) for x in tensors))


class Batches:
    """Draws the batch of any step, from counter-based streams."""

    def __init__(self, pairs: Pairs, images: ImageSet, student: StudentConfig, seed: int) -> None:
        self.pairs, self.images, self.student, self.seed = pairs, images, student, seed
        self._by_class = [images.of_class(label) for label in range(images.num_classes)]

    def check(self) -> None:
        """Raise ValueError if there is a class without an image to compare with."""
        empty = [label for label, indices in enumerate(self._by_class) if len(indices) == 0]
        if empty:
            raise ValueError(
                f"{self.images.name} has no image of classes {empty}: set adversarial.real=teacher"
            )

    def draw(self, step: int, size: int, stage: int, data: bool) -> Batch:
        """Draw `size` samples for a student of up to `stage` steps.

        Critics compare with images of the same classes if `data`, else with the teacher's samples.
        """
        x_t, timesteps, labels, target = draw_inputs(self.pairs, size, stage, self.student, self.seed, step)
        return Batch(x_t, timesteps, labels, target, self._images_like(labels, step) if data else target)

    def _images_like(self, labels: Tensor, step: int) -> Tensor:
        """Draw an image of each label's class [B,C,H,W]."""
        draw = torch.rand(len(labels), generator=generator(self.seed, "real", step)).tolist()
        own = [self._by_class[label] for label in labels.tolist()]
        return self.images.images[torch.stack([own[i][int(u * len(own[i]))] for i, u in enumerate(draw)])]
