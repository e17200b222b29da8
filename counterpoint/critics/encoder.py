"""The critics' eyes: the frozen encoder and middle block of the teacher's UNet (NitroFusion, sec. 3.2)."""

from typing import Any, Protocol

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn


class Encoder(Protocol):
    """What a panel sees through, whatever the kind of its teacher."""

    null_class: int
    in_channels: int
    sample_size: int
    conv_in: Any

    def __call__(
        self, x_t: Tensor, timesteps: Tensor, labels: Tensor, corners: Tensor | None = None, /
    ) -> list[Tensor]:
        """Return one feature map [n, channels, side, side] a level; windows say where they lie."""
        ...

    def map_shapes(self, side: int) -> list[tuple[int, int]]:
        """Return (channels, side) of each level for images of `side` pixels."""
        ...


class FrozenEncoder(nn.Module):
    """The down path and middle block of a UNet2DModel: noised images in, one feature map per level out.

    The levels are every skip tensor of the down path and the output of the middle block, as on SDXL, where
    they are ten. Parameters never change; gradients pass through to the input. The modules are `unet`'s own,
    frozen: give it a network that nobody trains. Raises ValueError for the rare kinds of UNet2DModel whose
    encoder does more than that.
    """

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        special = unet.config.center_input_sample or unet.config.class_embed_type is not None
        if special or any(hasattr(block, "skip_conv") for block in unet.down_blocks):
            raise ValueError(
                "the teacher's UNet centres its input, has no class table or has skip convolutions; "
                "critics do not follow that: use one of DownBlock2D and AttnDownBlock2D"
            )
        # The up path is most of the weights and is never run here.
        self.conv_in = unet.conv_in
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.class_embedding = unet.class_embedding
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block
        self.null_class = int(unet.config.num_class_embeds) - 1
        self.in_channels = int(unet.config.in_channels)
        self.sample_size = int(unet.config.sample_size)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in eval mode: a frozen network has no training mode."""
        return super().train(False)

    def forward(
        self, x_t: Tensor, timesteps: Tensor, labels: Tensor, corners: Tensor | None = None
    ) -> list[Tensor]:
        """Return the feature maps of noised images x_t [n,C,H,W] at `timesteps` [n] under `labels` [n].

        The maps are [n, channels, side, side], from the finest to the middle block. Where a window lies in
        its image (`corners`) is nothing that this network is told.
        """
        embedding = self.time_embedding(self.time_proj(timesteps).to(x_t.dtype))
        embedding = embedding + self.class_embedding(labels).to(x_t.dtype)
        hidden = self.conv_in(x_t)
        maps = [hidden]
        for block in self.down_blocks:
            hidden, skips = block(hidden, embedding)
            maps.extend(skips)
        if self.mid_block is not None:
            maps.append(self.mid_block(hidden, embedding))
        return maps

    @torch.no_grad()
    def map_shapes(self, side: int) -> list[tuple[int, int]]:
        """Return (channels, side) of each level for images of `side` pixels."""
        weight = self.conv_in.weight
        x = torch.zeros(1, self.in_channels, side, side, device=weight.device, dtype=weight.dtype)
        zero = torch.zeros(1, dtype=torch.long, device=weight.device)
        return [(m.shape[1], m.shape[2]) for m in self(x, zero, zero)]
