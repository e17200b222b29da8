"""A small SDXL pipeline from a configuration: every part and every input of the large one, random weights.

It proves the mechanics of text-to-image distillation where the real weights do not fit or may not be
fetched. Untrained, it is a fixed function of noise and prompt, which a student can learn;
pictures mean nothing.
"""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pydantic import Field
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from counterpoint.diffusion import LatentNoiseConfig
from counterpoint.section import Section
from counterpoint.seeds import seed_of

START, END = "<|startoftext|>", "<|endoftext|>"
TIME_IDS = 6


class TinySDXLConfig(Section):
    """The shape of a small SDXL."""

    sample_size: int = Field(default=8, ge=4)
    """Side of the latents."""
    block_out_channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the UNet's resolutions, finest first; the first has no attention, as in SDXL."""
    layers_per_block: int = Field(default=2, ge=1)
    """Residual blocks per resolution; 2 with three resolutions give critics ten maps."""
    transformer_layers: int = Field(default=1, ge=1)
    """Transformer layers per attention block."""
    attention_heads: int = Field(default=2, ge=1)
    """Attention heads per block."""
    norm_num_groups: int = Field(default=8, ge=1)
    """Groups of the UNet's GroupNorms."""
    addition_time_embed_dim: int = Field(default=8, ge=2)
    """Width of the embedding of each of the six time ids."""
    text_widths: tuple[int, int] = (16, 24)
    """Widths of the two text encoders; cross-attention sees their sum."""
    text_layers: int = Field(default=2, ge=2)
    """Layers of each text encoder; the last but one is read."""
    tokens: int = Field(default=16, ge=4)
    """Tokens of a prompt, the start and the end included."""
    vae_channels: tuple[int, ...] = (8, 8)
    """Channels of the VAE's resolutions; one entry fewer is the number of halvings."""
    noise: LatentNoiseConfig = LatentNoiseConfig()
    """The forward process."""


def build_tiny_sdxl(config: TinySDXLConfig, seed: int) -> StableDiffusionXLPipeline:
    """Build the pipeline, on the CPU; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "tiny-sdxl"))
        return StableDiffusionXLPipeline(
            vae=_vae(config),
            text_encoder=CLIPTextModel(_text(config, 0)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text(config, 1)).eval(),
            tokenizer=tokenizer(config.tokens),
            tokenizer_2=tokenizer(config.tokens),
            unet=_unet(config),
            scheduler=DDIMScheduler(
                timestep_spacing="trailing",
                clip_sample=False,
                set_alpha_to_one=False,
                **config.noise.diffusion_options(),
            ),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )


def tokenizer(tokens: int) -> CLIPTokenizer:
    """Return CLIP's tokenizer over a vocabulary of single printable characters, without merges."""
    letters = sorted(set(string.printable) - set(string.whitespace))
    words = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=tokens)


def _text(config: TinySDXLConfig, which: int) -> CLIPTextConfig:
    width = config.text_widths[which]
    known = tokenizer(config.tokens)
    return CLIPTextConfig(
        vocab_size=len(known), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=config.text_layers, num_attention_heads=2, max_position_embeddings=config.tokens,
        hidden_act="gelu" if which else "quick_gelu", bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
        # CLIP's own 0.02 would make all prompts of so narrow an encoder nearly the same.
        initializer_range=0.5, initializer_factor=4.0,
    )  # fmt: skip


def _unet(config: TinySDXLConfig) -> UNet2DConditionModel:
    deeper, pooled = len(config.block_out_channels) - 1, config.text_widths[1]
    options: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        "up_block_types": (*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        "transformer_layers_per_block": config.transformer_layers,
        "attention_head_dim": config.attention_heads,
    }
    unet = UNet2DConditionModel(
        sample_size=config.sample_size, in_channels=4, out_channels=4,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups, cross_attention_dim=sum(config.text_widths),
        addition_embed_type="text_time", addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=pooled + TIME_IDS * config.addition_time_embed_dim,
        use_linear_projection=True, **options,
    )  # fmt: skip
    return unet.eval()


def _vae(config: TinySDXLConfig) -> AutoencoderKL:
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=config.vae_channels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, sample_size=config.sample_size * 2 ** (levels - 1),
        scaling_factor=0.13025,
    )  # fmt: skip
    return vae.eval()
