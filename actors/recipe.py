"""How any process builds the same panel: from the stored teacher and the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.prompted import PromptsRecipe, load_prompted_unet, prompted_encoder, prompted_shape
from cluster.storage import RunStore
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.encoder import Encoder, FrozenEncoder
from counterpoint.critics.group import CriticGroup
from counterpoint.critics.panel import LocalPanel
from counterpoint.critics.pool import Pool, build_pool
from counterpoint.critics.views import patch_side
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.unet import load_saved

PIPELINE = "pipeline"


@dataclass(frozen=True)
class PanelRecipe:
    """Everything a panel is made of; small enough to send anywhere."""

    teacher: str
    """URI of the teacher's run."""
    critics: CriticsConfig
    noise: NoiseConfig
    seed: int
    prompts: PromptsRecipe | None = None
    """What a text-to-image teacher is prompted with; None for a class-conditional one."""
    total_steps: int = 0
    """Panel steps of the whole training, in which numbers of `critics` may change; 0 where nobody knows."""


def load_unet(uri: str) -> Any:
    """Load the network of a run's saved pipeline from any storage, with diffusers' `from_pretrained`."""
    store = RunStore(uri)
    if not store.exists(f"{PIPELINE}/unet/config.json"):
        raise ValueError(
            f"{uri} holds no trained pipeline: give the URI of a finished run of jobs.train or jobs.distill"
        )
    with store.local_folder(f"{PIPELINE}/unet") as folder:
        return load_saved(folder)


def load_network(recipe: PanelRecipe) -> Any:
    """Load the teacher, called as `unet(x_t, timesteps, class_labels=labels).sample` whatever its kind."""
    if recipe.prompts is not None:
        return load_prompted_unet(recipe.teacher, recipe.prompts)
    return load_unet(recipe.teacher)


def build_pieces(recipe: PanelRecipe, device: torch.device) -> tuple[Pool, Encoder, torch.Tensor]:
    """Build the pool's layout, the frozen encoder and the noise schedule's alphas_cumprod."""
    network = load_network(recipe)
    encoder: Encoder
    if recipe.prompts is not None:
        encoder = prompted_encoder(network, recipe.prompts).to(device)
    else:
        encoder = FrozenEncoder(network.to(device))
    return _pool(recipe, encoder), encoder, build_noise_scheduler(recipe.noise).alphas_cumprod


def build_layout(recipe: PanelRecipe) -> Pool:
    """Build the pool's layout alone, which for a text-to-image teacher takes no weights at all."""
    if recipe.prompts is not None:
        return _pool(recipe, prompted_shape(recipe.teacher))
    return build_pieces(recipe, torch.device("cpu"))[0]


def _pool(recipe: PanelRecipe, encoder: Encoder) -> Pool:
    side = int(encoder.sample_size)
    whole, patches = encoder.map_shapes(side), encoder.map_shapes(patch_side(recipe.critics, side))
    abar = build_noise_scheduler(recipe.noise).alphas_cumprod
    return build_pool(recipe.critics, whole, patches, side, abar, recipe.seed, recipe.total_steps)


def build_groups(recipe: PanelRecipe, indices: Sequence[int], device: torch.device) -> list[CriticGroup]:
    """Build critic groups in their first state; they look through one frozen encoder."""
    pool, encoder, abar = build_pieces(recipe, device)
    return [CriticGroup(pool, index, encoder, abar) for index in indices]


def build_local_panel(recipe: PanelRecipe, device: torch.device) -> LocalPanel:
    """Build the whole panel in this process."""
    return LocalPanel(*build_pieces(recipe, device))
