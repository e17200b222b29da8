"""Encoding prompts and images once, with diffusers' own code, so that training holds no encoder."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor
from transformers.utils import logging as transformers_logging

from counterpoint.data.decode import decode
from counterpoint.data.images import from_uint8
from counterpoint.seeds import generator

KINDS = ("StableDiffusionXLPipeline", "StableDiffusionPipeline")
LatentDraw = Literal["mode", "sample"]


class Encoders:
    """The text encoders and, if images are wanted, the VAE of a pipeline; its UNet is never loaded."""

    def __init__(self, pipeline: str, images: bool, device: torch.device) -> None:
        """Load from what `from_pretrained` takes; `check_pipeline` says beforehand whether it will do."""
        disable_progress_bar()
        transformers_logging.disable_progress_bar()
        # Truncation is counted here; diffusers would log every prompt that is too long.
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        leave: dict[str, Any] = {"unet": None} if images else {"unet": None, "vae": None}
        self.pipeline = DiffusionPipeline.from_pretrained(pipeline, low_cpu_mem_usage=False, **leave).to(
            device
        )
        self.device = device
        names = ("tokenizer", "tokenizer_2")
        self.tokenizers = [t for t in (getattr(self.pipeline, name, None) for name in names) if t is not None]

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `embeds` [n,L,D] and, for SDXL, `pooled` [n,D2] of the texts, as diffusers encodes them."""
        return self._encoded(list(texts))[0]

    @torch.no_grad()
    def null(self) -> dict[str, Tensor]:
        """Return the same, with n = 1, of the null prompt: what diffusers takes where there is no prompt."""
        return self._encoded(["null"])[1]

    def _encoded(self, texts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        found = self.pipeline.encode_prompt(texts, **options)
        sides: list[dict[str, Tensor]] = []
        for side in (0, 1):
            columns = {"embeds": found[side]}
            if len(found) == 4:
                columns["pooled"] = found[side + 2]
            sides.append(columns)
        return sides[0], sides[1]

    def too_long(self, texts: Sequence[str]) -> int:
        """Return how many of the texts are longer than a tokenizer takes, and so are cut."""
        long = {
            i
            for t in self.tokenizers
            for i, ids in enumerate(t(list(texts), truncation=False).input_ids)
            if len(ids) > t.model_max_length
        }
        return len(long)

    @torch.no_grad()
    def images(
        self, encoded: Sequence[tuple[str, bytes]], side: int, draw: LatentDraw, seed: int, first: int
    ) -> Tensor:
        """Return scaled latents [n,C,h,w] of images (name, content), cut and resized to `side` pixels.

        `sample` draws from the VAE's distribution with the stream of each image's row, from `first` on.
        Raises ValueError naming an image that cannot be read.
        """
        vae = self.pipeline.vae
        pixels = [from_uint8(decode(name, content, side)) for name, content in encoded]
        batch = torch.stack([p.expand(3, -1, -1) for p in pixels]).to(self.device, vae.dtype)
        distribution = vae.encode(batch).latent_dist
        latents = distribution.mode()
        if draw == "sample":
            noise = [torch.randn(latents.shape[1:], generator=generator(seed, "vae", first + i))
                     for i in range(len(batch))]  # fmt: skip
            latents = latents + distribution.std * torch.stack(noise).to(latents)
        shift = vae.config.get("shift_factor") or 0.0
        return (latents - shift) * vae.config.scaling_factor


def check_pipeline(index: dict[str, Any], where: str, images: bool) -> None:
    """Raise ValueError unless the pipeline of model_index.json `index` can encode what is wanted."""
    kind = index.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"model: {where} is a {kind}: text-to-image distillation takes {' or '.join(KINDS)}")
    wanted = ["text_encoder", "tokenizer"]
    if kind == KINDS[0]:
        wanted += ["text_encoder_2", "tokenizer_2"]
    if images:
        wanted.append("vae")
    missing = [name for name in wanted if not any(index.get(name) or [None])]
    if missing:
        raise ValueError(f"model: {where} has no {', '.join(missing)}: give a complete {kind} folder")


def full_time_ids(side: int) -> tuple[int, ...]:
    """Return SDXL's time ids of a whole, uncropped image of `side` pixels."""
    return (side, side, 0, 0, side, side)
