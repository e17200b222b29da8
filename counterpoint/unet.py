"""The network of teacher and student: diffusers' UNet2DModel, class-conditional, with a null class."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from pydantic import Field, model_validator

from counterpoint.section import Section


class UNetConfig(Section):
    """The shape of a `diffusers.UNet2DModel`, or where to load one from."""

    block_out_channels: tuple[int, ...] = (48, 96)
    """Channels of each resolution, finest first; the image side must divide by 2^(entries - 1)."""
    layers_per_block: int = Field(default=1, ge=1)
    """Residual blocks per resolution."""
    attention: tuple[bool, ...] = ()
    """Whether each resolution has self-attention, finest first; empty means none anywhere."""
    mid_attention: bool = False
    """Whether the middle block has self-attention."""
    attention_head_dim: int = Field(default=8, ge=1)
    """Channels per attention head."""
    norm_num_groups: int = Field(default=16, ge=1)
    """Groups of every GroupNorm; must divide each entry of block_out_channels."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout inside residual blocks."""
    pretrained: str | None = None
    """Folder of a saved UNet2DModel (`from_pretrained`); the other fields are then ignored."""

    @model_validator(mode="after")
    def _check(self) -> "UNetConfig":
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}, which norm_num_groups={self.norm_num_groups} "
                    "does not divide: use channels that are multiples of it"
                )
        if self.attention and len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {len(self.attention)} entries for {len(self.block_out_channels)} "
                "resolutions: give one per entry of block_out_channels, or none"
            )
        return self


def build_unet(config: UNetConfig, channels: int, side: int, num_classes: int, seed: int) -> UNet2DModel:
    """Build or load the UNet for `channels` x `side` x `side` images of `num_classes` classes.

    The class embedding has one row more than there are classes; the last is the null condition
    (see `null_class`). Raises ValueError if the side cannot be halved often enough, or a loaded network
    does not fit the images.
    """
    if config.pretrained is not None:
        unet = UNet2DModel.from_pretrained(Path(config.pretrained))
        _check_loaded(unet, config.pretrained, channels, side, num_classes)
        return unet
    depth = len(config.block_out_channels)
    if side % 2 ** (depth - 1):
        raise ValueError(
            f"unet.block_out_channels has {depth} resolutions, but a side of {side} pixels cannot be halved "
            f"{depth - 1} times: use fewer entries or another data.image_size"
        )
    attention = config.attention or (False,) * depth
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=config.layers_per_block,
            block_out_channels=config.block_out_channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            add_attention=config.mid_attention,
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_num_groups,
            dropout=config.dropout,
            num_class_embeds=num_classes + 1,
        )


def load_saved(folder: Path) -> Any:
    """Load a network that was saved with `save_pretrained`, whatever its class is.

    The class is the one in its configuration: UNet2DModel, or a network of this library's own. Raises
    ValueError for a class that is neither.
    """
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    modules = {"UNet2DModel": "diffusers", "DiT": "counterpoint.dit"}
    if name not in modules:
        raise ValueError(f"{folder} holds a {name}: a class-conditional network is a UNet2DModel or a DiT")
    cls = getattr(import_module(modules[name]), name)
    return cls.from_pretrained(folder, low_cpu_mem_usage=False)


def null_class(unet: UNet2DModel) -> int:
    """Return the label that stands for "no condition": the last row of the class or prompt table."""
    own = getattr(unet, "null_row", None)
    return int(unet.config.num_class_embeds) - 1 if own is None else int(own)


def empty_like(unet: UNet2DModel) -> UNet2DModel:
    """Return a network of the same configuration with its own, newly made weights."""
    return UNet2DModel.from_config(dict(unet.config))


def frozen(unet: UNet2DModel) -> UNet2DModel:
    """Return `unet` in eval mode with gradients off for its parameters (they still flow through it)."""
    return unet.eval().requires_grad_(False)


def _check_loaded(unet: Any, where: str, channels: int, side: int, num_classes: int) -> None:
    if (unet.config.in_channels, unet.config.sample_size) != (channels, side):
        raise ValueError(
            f"unet.pretrained={where} takes {unet.config.in_channels} channels of {unet.config.sample_size} "
            f"pixels a side but the images have {channels} of {side}: use data of the same kind"
        )
    if unet.config.num_class_embeds != num_classes + 1:
        raise ValueError(
            f"unet.pretrained={where} has {unet.config.num_class_embeds} class embeddings but "
            f"{num_classes} classes and the null class need {num_classes + 1}: use a network trained on this "
            "data"
        )
