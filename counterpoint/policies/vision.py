"""What a compact policy makes of its images: pointers at named and tracked objects, or plain patches.

`PointerVision` answers queries with places: each attends over the cells of a small convolutional map and
returns the attention-weighted coordinate and features. One query is computed from the instruction's words, so
that "where is the thing I am told of" is asked at run time; the others are free slots, one per tracked
object. It is trained on its own (see `perception`) and then frozen. `PatchVision` is the plain alternative,
trained end to end with the policy.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from counterpoint.section import Section

PAD_WORD = 0
"""Word id that fills an instruction up to its fixed length."""


class VisionConfig(Section):
    """How images become tokens."""

    kind: Literal["pointer", "patches"] = "pointer"
    """pointer: coordinates and features of objects, trained first on labelled keypoints, then frozen.
    patches: one token per image patch, trained end to end."""
    channels: tuple[int, int, int] = (16, 32, 48)
    """Channels of the pointer's convolutions; the last is also that of words, queries and features."""
    keypoints: int = Field(default=4, ge=0)
    """Pointer: free slots per camera, one per tracked object of the data."""
    patch: int = Field(default=8, ge=1)
    """Patches: side of a patch in pixels; it must divide the image."""


@dataclass(frozen=True)
class Looks:
    """What queries found in each camera's image; queries are named ones, null (with text), then slots."""

    attention: Tensor
    """Logits over the cells, row by row [B,cameras,Q,cells]."""
    coordinates: Tensor
    """Attention-weighted (x, y); -1 and 1 are the image's edges [B,cameras,Q,2]."""
    features: Tensor
    """Attention-weighted features [B,cameras,Q,C]."""


class PointerVision(nn.Module):
    """Attention queries over a quarter-resolution map with a learned offset per cell."""

    def __init__(self, config: VisionConfig, words: int) -> None:
        """Build for instructions of `words` known words; 0 for a policy without text."""
        super().__init__()
        first, second, last = config.channels
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, first, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(second, last, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(last, last, 1),
        )
        self.offset = nn.Conv2d(last, 2, 1)
        self.slots = nn.Parameter(torch.randn(config.keypoints, last))
        self.words = nn.Embedding(words, last, padding_idx=PAD_WORD) if words else None
        self.null = nn.Parameter(torch.randn(1, last)) if words else None
        self.width = 2 + last
        """Numbers per query in `describe`."""
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))

    def forward(self, images: Tensor, words: Tensor | None) -> Looks:
        """Look at `images` uint8 [B,cameras,H,W,3] with `words` int64 [B,named,W], None without text."""
        batch, cameras = images.shape[:2]
        cells = self.convolutions(_pixels(images))
        height, width = cells.shape[-2:]
        steps = 2.0 / torch.tensor([width, height], device=cells.device)
        offsets = self.offset(cells).flatten(2).mT * steps
        places = _centres(height, width, cells.device) + offsets
        keys = cells.flatten(2).mT
        queries = self._queries(batch, words).repeat_interleave(cameras, 0)
        attention = queries @ keys.mT / keys.shape[-1] ** 0.5
        found = attention.softmax(-1) @ torch.cat([places, keys], -1)
        attention, found = (x.unflatten(0, (batch, cameras)) for x in (attention, found))
        return Looks(attention, found[..., :2], found[..., 2:])

    def describe(self, looks: Looks) -> Tensor:
        """Return standardised coordinates and features as one vector per query [B,cameras,Q,2+C]."""
        found = torch.cat([looks.coordinates, looks.features], -1)
        return (found - self.mean) / self.std

    def standardise(self, found: Tensor) -> None:
        """Standardise from now on what `describe` has `found` in the training data [n,2+C].

        Coordinates get unit variance each, and features together as much as one of them: what a thing looks
        like must not drown where it is.
        """
        variance, mean = torch.var_mean(found, 0, correction=0)
        variance[2:] = variance[2:].sum()
        self.mean.add_(self.std * mean)
        self.std.mul_(variance.clamp_min(1e-12).sqrt())

    def _queries(self, batch: int, words: Tensor | None) -> Tensor:
        """Named ones by the mean of their words, null, slots [B,Q,C]."""
        slots = self.slots.expand(batch, -1, -1)
        if self.words is None or self.null is None:
            return slots
        assert words is not None
        known = (words != PAD_WORD).sum(-1, keepdim=True).clamp_min(1)
        named = self.words(words).sum(-2) / known
        return torch.cat([named, self.null.expand(batch, 1, -1), slots], 1)


class PatchVision(nn.Module):
    """Image patches, embedded."""

    def __init__(self, config: VisionConfig, hidden: int, size: tuple[int, int]) -> None:
        """Build for images of `size` (H, W); raises ValueError if patches do not tile them."""
        super().__init__()
        if any(side % config.patch for side in size):
            raise ValueError(
                f"vision.patch={config.patch} does not divide images of {size[0]}x{size[1]} (HxW): "
                "use a patch that does"
            )
        self.tokens = size[0] * size[1] // config.patch**2
        """Tokens per camera."""
        self.embed = nn.Conv2d(3, hidden, config.patch, stride=config.patch)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens of `images` uint8 [B,cameras,H,W,3] camera by camera [B,tokens,hidden]."""
        tokens: Tensor = self.embed(_pixels(images)).flatten(2).mT
        return tokens.reshape(len(images), -1, tokens.shape[-1])


def cell_of(coordinates: Tensor, height: int, width: int) -> Tensor:
    """Return the index, row by row, of the cell of a height x width map that (x, y) in [-1,1] lies in."""
    sizes = torch.tensor([width, height], device=coordinates.device)
    column, row = ((coordinates + 1) / 2 * sizes).floor().long().clamp_min(0).unbind(-1)
    return row.clamp_max(height - 1) * width + column.clamp_max(width - 1)


def map_size(height: int, width: int) -> tuple[int, int]:
    """Return the size of the pointer's map for an image: a quarter, rounded up."""
    return -(-height // 4), -(-width // 4)


def _pixels(images: Tensor) -> Tensor:
    """Scale to [-1,1], with cameras as rows of the batch [B*cameras,3,H,W]."""
    return images.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _centres(height: int, width: int, device: torch.device) -> Tensor:
    """The (x, y) of each cell's centre, row by row [cells,2]."""
    y = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)
