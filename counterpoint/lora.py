"""LoRA through peft: the student trains low-rank adapters and leaves the teacher's weights alone."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pydantic import Field

from counterpoint.section import Section


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021): W + (alpha / rank) B A, with B zero at the start."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0 trains all weights and uses none."""
    alpha: int | None = Field(default=None, ge=1)
    """Numerator of the adapters' scale; None takes the rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of the linear or convolution layers that get an adapter."""

    def peft(self) -> LoraConfig:
        """Return peft's configuration."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            target_modules=list(self.target_modules),
            init_lora_weights=True,
        )


def add_lora(unet: UNet2DConditionModel, config: LoraSection, seed: int) -> UNet2DConditionModel:
    """Freeze `unet` and give it trainable adapters, the same for the same seed.

    Raises ValueError if `target_modules` names no layer.
    """
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            unet.add_adapter(config.peft())
        except ValueError as error:
            raise ValueError(
                f"lora.target_modules={list(config.target_modules)} does not fit this UNet ({error}): name "
                "endings of its linear layers, such as to_q"
            ) from error
    return unet


def merged(
    unet: UNet2DConditionModel, config: LoraSection, weights: dict[str, Any]
) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Put trained adapter `weights` on the `unet` they were trained on and merge them into its weights.

    Returns the network, without adapters, and the adapters' state as diffusers stores it.
    """
    add_lora(unet, config, seed=0)
    adapters = {name for name, p in unet.named_parameters() if p.requires_grad}
    if adapters != weights.keys():
        raise ValueError(
            f"the run's weights are no adapters of lora.rank={config.rank} and these target_modules: "
            f"{len(adapters ^ weights.keys())} names differ"
        )
    unet.load_state_dict(weights, strict=False)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    unet.fuse_lora()
    unet.unload_lora()
    return unet, state


def save_lora(folder: str, config: LoraSection, state: dict[str, Any]) -> None:
    """Write adapters into `folder` in the form that `load_lora_weights` of SDXL pipelines takes."""
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=state, unet_lora_adapter_metadata=config.peft().to_dict()
    )
