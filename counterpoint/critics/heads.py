"""Many discriminator heads as one computation over stacked parameters.

A head (NitroFusion, sec. 3.2) is up to four 4x4 convolutions of stride 2, each with GroupNorm and SiLU, and
a 1x1 convolution to one logit. A stage whose output is a single position has no norm: there it would divide
the sample's own magnitude away.

All heads of one `HeadShape` share an architecture, so a head is a row of
`shape.size` numbers and a bank of K heads is one tensor [K, P]; a step over any subset of them is a handful
of grouped convolutions whatever K is.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_STAGES = 4
KERNEL, STRIDE, PADDING = 4, 2, 1


@dataclass(frozen=True)
class HeadShape:
    """The architecture of the heads on feature maps of `channels` x `side` x `side`."""

    channels: int
    """Channels of the feature map."""
    side: int
    """Side of the feature map, in pixels."""
    width: int = 16
    """Channels inside the head."""
    groups: int = 4
    """Groups of each GroupNorm; must divide `width`."""

    @cached_property
    def stages(self) -> tuple[tuple[int, bool], ...]:
        """Kernel side of each stage, and whether it is normalised: it is unless one position is left.

        Kernels are 4 while the map can be halved; a map of one position gets a single stage of kernel 1.
        """
        stages: list[tuple[int, bool]] = []
        side = self.side
        while len(stages) < MAX_STAGES and side > 1:
            side = (side + 2 * PADDING - KERNEL) // STRIDE + 1
            stages.append((KERNEL, side > 1))
        return tuple(stages) or ((1, False),)

    @cached_property
    def layout(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of each parameter of one head, in the order in which they lie in its row."""
        parts: list[tuple[str, tuple[int, ...]]] = []
        channels = self.channels
        for stage, (kernel, normalised) in enumerate(self.stages):
            parts.append((f"{stage}.weight", (self.width, channels, kernel, kernel)))
            parts.append((f"{stage}.bias", (self.width,)))
            if normalised:
                parts.append((f"{stage}.norm.weight", (self.width,)))
                parts.append((f"{stage}.norm.bias", (self.width,)))
            channels = self.width
        parts.append(("logit.weight", (1, channels, 1, 1)))
        parts.append(("logit.bias", (1,)))
        return tuple(parts)

    @cached_property
    def size(self) -> int:
        """Number of parameters of one head."""
        return sum(math.prod(shape) for _, shape in self.layout)

    def initial(self, generator: torch.Generator) -> Tensor:
        """Draw one head's row [P], float32: torch's default initialisation of Conv2d and GroupNorm."""
        parts = []
        bound = 1.0
        for name, shape in self.layout:
            if name.endswith("norm.weight"):
                parts.append(torch.ones(shape))
            elif name.endswith("norm.bias"):
                parts.append(torch.zeros(shape))
            else:
                if name.endswith("weight"):
                    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
                parts.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        return torch.cat([part.reshape(-1) for part in parts])

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """View rows [K, P] as named parameters, each [K, *shape]."""
        sizes = [math.prod(shape) for _, shape in self.layout]
        return {
            name: part.reshape(rows.shape[0], *shape)
            for (name, shape), part in zip(self.layout, rows.split(sizes, dim=1), strict=True)
        }


def head_logits(shape: HeadShape, rows: Tensor, features: Tensor) -> Tensor:
    """Judge features [n, S, C, s, s] of S slots with the heads `rows` [S * r, P]; returns logits [n, S * r].

    Rows come slot by slot, r interchangeable heads each, and the heads of a slot share its features: their
    first convolution is then one dense convolution with r times the channels, the cheapest form there is.
    A logit is the mean over what positions remain where four halvings leave more than one.
    """
    n, slots = features.shape[:2]
    heads = rows.shape[0]
    parameters = shape.split(rows)
    x = features.reshape(n, slots * shape.channels, *features.shape[3:])
    for stage, (kernel, normalised) in enumerate(shape.stages):
        weight = parameters[f"{stage}.weight"].flatten(0, 1)
        bias = parameters[f"{stage}.bias"].flatten()
        stride, padding = (STRIDE, PADDING) if kernel == KERNEL else (1, 0)
        x = F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=heads if stage else slots)
        if normalised:
            norm_weight = parameters[f"{stage}.norm.weight"].flatten()
            norm_bias = parameters[f"{stage}.norm.bias"].flatten()
            x = F.group_norm(x, heads * shape.groups, norm_weight, norm_bias)
        x = F.silu(x)
    # A 1x1 convolution to one channel is a weighted sum, and it commutes with the mean over positions.
    pooled = x.mean(dim=(2, 3)).reshape(n, heads, shape.width)
    weight = parameters["logit.weight"].reshape(heads, shape.width)
    return (pooled * weight).sum(-1) + parameters["logit.bias"].reshape(heads)
