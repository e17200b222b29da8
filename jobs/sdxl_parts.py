"""An SDXL-shaped cast from a configuration alone: network, encoder, heads and made-up prompts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from counterpoint.critics.bank import HeadBank
from counterpoint.critics.config import KINDS, CriticsConfig
from counterpoint.critics.pool import Pool, build_pool
from counterpoint.critics.prompted_encoder import PromptedEncoder
from counterpoint.critics.seats import Seats
from counterpoint.critics.views import patch_side
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.prompted import PromptedUNet
from counterpoint.prompts import TableLayout

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""The UNet of stabilityai/stable-diffusion-xl-base-1.0: what differs from diffusers' defaults."""
TOKENS, TIME_IDS = 77, 6
"""Tokens of an encoded prompt; and numbers of size and crop beside it."""


class MadePrompts:
    """A table of random embeddings, without numbers on the meta device, used as `PromptTable` is."""

    def __init__(
        self, unet: Mapping[str, Any], prompts: int, device: torch.device, tokens: int = TOKENS
    ) -> None:
        width = int(unet["cross_attention_dim"])
        pooled = int(unet["projection_class_embeddings_input_dim"]) - TIME_IDS * int(
            unet["addition_time_embed_dim"]
        )
        side = 8 * int(unet["sample_size"])
        self.uri = "made up"
        self.layout = TableLayout(
            prompts, (tokens, width), pooled, None, "float32", (side, side, 0, 0, side, side),
            prompts + 1, (), prompts + 1,
        )  # fmt: skip
        self.null_row = prompts
        stream = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        self._embeds = torch.randn(prompts + 1, tokens, width, device=device, generator=stream)
        self._pooled = torch.randn(prompts + 1, pooled, device=device, generator=stream)

    def take(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the embeddings [n,L,D] and pooled embeddings [n,D2] of `rows` int64 [n]."""
        return self._embeds[rows].to(device, dtype), self._pooled[rows].to(device, dtype)


def build_network(
    unet: Mapping[str, Any], prompts: Any, device: torch.device, dtype: torch.dtype
) -> PromptedUNet:
    """Build a network with random weights in `dtype` on `device`, reading `prompts`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network: PromptedUNet = PromptedUNet.from_config({**SDXL, **unet})
    finally:
        torch.set_default_dtype(before)
    return network.attach(prompts)


def build_layout(encoder: PromptedEncoder, critics: CriticsConfig) -> tuple[Pool, Tensor]:
    """Return the pool's layout for an encoder's latents, and the schedule's alphas_cumprod."""
    side = encoder.sample_size
    alphas = build_noise_scheduler(NoiseConfig()).alphas_cumprod
    whole, patches = encoder.map_shapes(side), encoder.map_shapes(patch_side(critics, side))
    return build_pool(critics, whole, patches, side, alphas, 0), alphas


def weightless_panel(pool: Pool) -> list[Seats]:
    """Return the heads that judge at one noise level, one a slot, without numbers (on the meta device)."""
    homes: dict[Any, list[int]] = {}
    for number, slot in enumerate(pool.slots):
        homes.setdefault((slot.shape, KINDS[slot.kind].startswith("local")), []).append(number)
    panel = []
    for (shape, _), slots in homes.items():
        rows = torch.empty(len(slots), shape.size, device="meta")
        bank = HeadBank(shape, slots, rows, pool.config)
        panel.append(Seats(bank, list(range(len(slots))), [pool.slots[slot] for slot in slots]))
    return panel
