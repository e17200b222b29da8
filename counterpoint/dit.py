"""A diffusion transformer in place of the UNet: diffusers' DiT, called as every network here is.

Peebles & Xie 2023 (arXiv 2212.09748), with softmax attention or the linear attention of LiT
(`counterpoint.linear_attention`), and with or without a learned variance.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,  # noqa: F401  diffusers loads a saved DiT through what it finds here
)
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.utils import BaseOutput
from pydantic import Field, model_validator
from torch import Tensor, nn

from counterpoint.linear_attention import LinearAttention
from counterpoint.section import Section
from counterpoint.unet import UNetConfig, build_unet

Attention = Literal["softmax", "linear"]


class DiTConfig(Section):
    """The shape of a diffusion transformer."""

    patch_size: int = Field(default=1, ge=1)
    """Side of the squares of pixels that become a token each; must divide the image side."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    num_attention_heads: int = Field(default=4, ge=1)
    """Heads of softmax attention; times attention_head_dim, the width of a token."""
    attention_head_dim: int = Field(default=16, ge=1)
    """Channels per head; heads x channels must be a multiple of 4, for positions in two dimensions."""
    attention: Attention = "softmax"
    """softmax, whose cost is quadratic in the tokens; or linear, a ReLU kernel and a convolution (LiT)."""
    linear_heads: int = Field(default=1, ge=1)
    """Heads of linear attention; must divide the width."""
    kernel_size: int = Field(default=5, ge=0)
    """Side of the depth-wise convolution beside linear attention, an odd number; 0 for none."""
    learned_variance: bool = False
    """Whether the network predicts the variance of its reverse steps too, and learns it (improved DDPM)."""

    @model_validator(mode="after")
    def _check(self) -> "DiTConfig":
        width = self.num_attention_heads * self.attention_head_dim
        if width % 4:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} times attention_head_dim="
                f"{self.attention_head_dim} is {width}: choose them so that it is a multiple of 4"
            )
        if self.attention == "linear" and width % self.linear_heads:
            raise ValueError(
                f"linear_heads={self.linear_heads} does not divide the width of {width}: use a divisor"
            )
        if self.kernel_size and not self.kernel_size % 2:
            raise ValueError(
                f"kernel_size={self.kernel_size} has no middle: use an odd one, or 0 for no convolution"
            )
        return self


@dataclass
class DiTOutput(BaseOutput):
    """What the network says of a batch."""

    sample: Tensor
    """The prediction [B,C,H,W]: noise, v or x_0."""
    variance: Tensor | None = None
    """The fraction v [B,C,H,W] of improved DDPM's eq. 15, log Sigma = v log beta + (1 - v) log beta~; it is
    not held to [0, 1]. None unless the variance is learned."""


class DiT(DiTTransformer2DModel):
    """diffusers' DiT with labels as `UNet2DModel` has them, and a choice of attention.

    `num_class_embeds` counts the classes and the null class, which comes last. Labels are never dropped here:
    that is the trainer's part.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        num_class_embeds: int = 11,
        patch_size: int = 1,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        attention_head_dim: int = 16,
        attention: Attention = "softmax",
        linear_heads: int = 1,
        kernel_size: int = 5,
        learned_variance: bool = False,
    ) -> None:
        """Make the network with weights from torch's global generator (see `build_dit`)."""
        own = dict(self.config)
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=2 * in_channels if learned_variance else in_channels,
            patch_size=patch_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_embeds_ada_norm=num_class_embeds - 1,
        )
        # The base class adds its arguments, which follow from ours and would be unknown when this is loaded.
        self._internal_dict = FrozenDict(own)
        for block in self._blocks():
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            if attention == "linear":
                block.attn1 = LinearAttention(self.inner_dim, linear_heads, kernel_size)
        self._initialize()

    def forward(
        self, sample: Tensor, timesteps: Tensor | float, class_labels: Tensor, return_dict: bool = True
    ) -> Any:
        """Return the `DiTOutput` for samples [B,C,H,W] at timesteps (a scalar or [B]) under labels [B].

        Without `return_dict` it is the tuple of what is not None.
        """
        times = torch.as_tensor(timesteps, device=sample.device).expand(len(sample))
        (output,) = super().forward(sample, times, class_labels, return_dict=False)
        mean, variance = output, None
        if self.config.learned_variance:
            mean, raw = output.chunk(2, dim=1)
            variance = (raw + 1.0) / 2.0
        found = DiTOutput(sample=mean, variance=variance)
        return found if return_dict else found.to_tuple()

    def _blocks(self) -> list[Any]:
        return list(cast(nn.ModuleList, self.transformer_blocks))

    def _initialize(self) -> None:
        """Set DiT's first weights: Xavier, and zeros so that blocks and output start as nothing (adaLN-Zero).

        diffusers leaves this out, for it only loads trained ones.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
        nn.init.zeros_(patches.bias)
        for block in self._blocks():
            embedder = block.norm1.emb
            nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
            nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
            nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(self.proj_out_1.weight)
        nn.init.zeros_(self.proj_out_2.weight)


def build_dit(config: DiTConfig, channels: int, side: int, num_classes: int, seed: int) -> DiT:
    """Build the transformer for `channels` x `side` x `side` images of `num_classes` classes.

    Raises ValueError if the patches do not fill the image.
    """
    if side % config.patch_size:
        raise ValueError(
            f"dit.patch_size={config.patch_size} does not divide a side of {side} pixels: use a divisor"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiT(
            sample_size=side, in_channels=channels, num_class_embeds=num_classes + 1, **config.model_dump()
        )


def build_network(
    config: UNetConfig | DiTConfig, channels: int, side: int, num_classes: int, seed: int
) -> Any:
    """Build the network that `config` describes; see `build_unet` and `build_dit`."""
    if isinstance(config, DiTConfig):
        return build_dit(config, channels, side, num_classes, seed)
    return build_unet(config, channels, side, num_classes, seed)
