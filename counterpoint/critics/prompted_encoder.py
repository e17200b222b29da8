"""The critics' eyes on a text-to-image teacher: its UNet2DConditionModel's down path and middle block."""

from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from counterpoint.prompted import PromptedUNet, full_ids
from counterpoint.prompts import PromptTable

PatchIds = Literal["image", "patch"]


class PromptedEncoder(nn.Module):
    """Noised latents in, one feature map per level out: ten on SDXL, nine skips and the middle block.

    Conditional heads see features under their prompt, unconditional ones under the null prompt. Parameters
    never change; gradients pass through to the input. The modules are `unet`'s own, frozen. The time ids of
    windows are an option: those of the whole image ("image"), or the window's own crop and size ("patch").
    Raises ValueError for the kinds of UNet2DConditionModel whose encoder does more than SDXL's.
    """

    def __init__(
        self, unet: UNet2DConditionModel, table: PromptTable | None, patch_ids: PatchIds = "image"
    ) -> None:
        super().__init__()
        config = unet.config
        special = {
            "center_input_sample": config.center_input_sample,
            "time_embedding_act_fn": config.time_embedding_act_fn,
            "class_embed_type": config.class_embed_type,
            "encoder_hid_dim_type": config.encoder_hid_dim_type,
            "time_cond_proj_dim": config.time_cond_proj_dim,
        }
        found = [f"{name}={value}" for name, value in special.items() if value]
        if found or config.addition_embed_type not in (None, "text_time"):
            found = found or [f"addition_embed_type={config.addition_embed_type}"]
            raise ValueError(
                f"the teacher's UNet has {', '.join(found)}, which critics do not follow: use SDXL's"
            )
        self.conv_in = unet.conv_in
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.added = config.addition_embed_type is not None
        self.add_time_proj = unet.add_time_proj if self.added else None
        self.add_embedding = unet.add_embedding if self.added else None
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block
        self.in_channels = int(config.in_channels)
        self.sample_size = int(config.sample_size)
        self.widths = _widths(config)
        self.table, self.patch_ids = table, patch_ids
        self.null_class = -1 if table is None else table.null_row
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PromptedEncoder":
        """Stay in eval mode: a frozen network has no training mode."""
        return super().train(False)

    def forward(
        self, x_t: Tensor, timesteps: Tensor, labels: Tensor, corners: Tensor | None = None
    ) -> list[Tensor]:
        """Return the feature maps of noised latents x_t [n,C,h,w] at `timesteps` [n] under prompts [n].

        `corners` are the top and left of windows, int64 [n, 2] in latent pixels; None for whole latents. Maps
        are [n, channels, side, side] in the type of x_t, from the finest to the middle block, whatever type
        the weights have.
        """
        if self.table is None:
            raise ValueError("this encoder was built for its shapes alone: give it a prompt table")
        x = x_t.to(self.conv_in.weight.dtype)
        embeds, pooled = self.table.take(labels, x.device, x.dtype)
        maps = self._maps(x, timesteps, embeds, pooled, self._time_ids(x, corners) if self.added else None)
        return [m.to(x_t.dtype) for m in maps]

    def map_shapes(self, side: int) -> list[tuple[int, int]]:
        """Return (channels, side) of each level for latents of `side` pixels."""
        device, dtype = self.conv_in.weight.device, self.conv_in.weight.dtype
        width, pooled, ids = self.widths
        with torch.no_grad():
            maps = self._maps(
                torch.zeros(1, self.in_channels, side, side, device=device, dtype=dtype),
                torch.zeros(1, dtype=torch.long, device=device),
                torch.zeros(1, 1, width, device=device, dtype=dtype),
                torch.zeros(1, pooled, device=device, dtype=dtype) if self.added else None,
                torch.zeros(1, ids, device=device, dtype=dtype) if self.added else None,
            )
        return [(m.shape[1], m.shape[2]) for m in maps]

    def _maps(
        self, x: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor | None, ids: Tensor | None
    ) -> list[Tensor]:
        embedding = self.time_embedding(self.time_proj(timesteps).to(x.dtype))
        if self.add_embedding is not None and self.add_time_proj is not None:
            assert pooled is not None
            assert ids is not None
            times = self.add_time_proj(ids.flatten()).reshape(len(x), -1).to(x.dtype)
            embedding = embedding + self.add_embedding(torch.cat([pooled, times], dim=-1))
        hidden = self.conv_in(x)
        maps = [hidden]
        for block in self.down_blocks:
            crossed = (
                {"encoder_hidden_states": embeds} if getattr(block, "has_cross_attention", False) else {}
            )
            hidden, skips = block(hidden, embedding, **crossed)
            maps.extend(skips)
        if self.mid_block is not None:
            crossed = (
                {"encoder_hidden_states": embeds}
                if getattr(self.mid_block, "has_cross_attention", False)
                else {}
            )
            maps.append(self.mid_block(hidden, embedding, **crossed))
        return maps

    def _time_ids(self, x: Tensor, corners: Tensor | None) -> Tensor:
        """Return the time ids [n, 6] of whole latents, or of windows at `corners` as the option says."""
        assert self.table is not None
        ids = full_ids(self.table.layout.time_ids, len(x), x)
        if corners is None or self.patch_ids == "image":
            return ids
        # Pixels per latent pixel: what the whole image's target size says.
        scale = ids[:, 4:6] / self.sample_size
        side = torch.tensor([x.shape[-2], x.shape[-1]], device=x.device, dtype=x.dtype)
        return torch.cat([ids[:, :2], ids[:, 2:4] + corners.to(x) * scale, side * scale], dim=1)


def shape_of(config: dict[str, Any]) -> PromptedEncoder:
    """Return the encoder of a UNet of `config` without weights (on the meta device), for its `map_shapes`."""
    with torch.device("meta"):
        return PromptedEncoder(PromptedUNet.from_config(config), None)


def _widths(config: Any) -> tuple[int, int, int]:
    """Return the widths of embeddings and pooled embeddings, and the number of time ids."""
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else max(width)
    if config.addition_embed_type is None:
        return width, 0, 0
    ids = 6
    return (
        width,
        int(config.projection_class_embeddings_input_dim) - ids * config.addition_time_embed_dim,
        ids,
    )
