"""How any process builds the same panel: from the stored teacher and the configuration."""

from dataclasses import dataclass

import torch
from diffusers import UNet2DModel

from cluster.storage import RunStore
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.encoder import FrozenEncoder
from counterpoint.critics.group import CriticGroup
from counterpoint.critics.panel import LocalPanel
from counterpoint.critics.pool import Pool, build_pool
from counterpoint.critics.views import patch_side
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler

PIPELINE = "pipeline"


@dataclass(frozen=True)
class PanelRecipe:
    """Everything a panel is made of; small enough to send anywhere."""

    teacher: str
    """URI of the teacher's run."""
    critics: CriticsConfig
    noise: NoiseConfig
    seed: int


def load_unet(uri: str) -> UNet2DModel:
    """Load the network of a run's saved pipeline from any storage, with diffusers' `from_pretrained`."""
    store = RunStore(uri)
    if not store.exists(f"{PIPELINE}/unet/config.json"):
        raise ValueError(
            f"{uri} holds no trained pipeline: give the URI of a finished run of jobs.train or jobs.distill"
        )
    with store.local_folder(f"{PIPELINE}/unet") as folder:
        return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)


def build_pieces(recipe: PanelRecipe, device: torch.device) -> tuple[Pool, FrozenEncoder, torch.Tensor]:
    """Build the pool's layout, the frozen encoder and the noise schedule's alphas_cumprod."""
    encoder = FrozenEncoder(load_unet(recipe.teacher).to(device))
    abar = build_noise_scheduler(recipe.noise).alphas_cumprod
    side = int(encoder.sample_size)
    patch = patch_side(recipe.critics, side)
    pool = build_pool(
        recipe.critics, encoder.map_shapes(side), encoder.map_shapes(patch), side, abar, recipe.seed
    )
    return pool, encoder, abar


def build_group(recipe: PanelRecipe, index: int, device: torch.device) -> CriticGroup:
    """Build one critic group in its first state."""
    pool, encoder, abar = build_pieces(recipe, device)
    return CriticGroup(pool, index, encoder, abar)


def build_local_panel(recipe: PanelRecipe, device: torch.device) -> LocalPanel:
    """Build the whole panel in this process."""
    return LocalPanel(*build_pieces(recipe, device))
