"""Workers that estimate a model's statistics for DPM-Solver-v3, each from a shard of the samples."""

from dataclasses import dataclass

import torch

from actors.recipe import load_unet
from cluster.dumpable import dumpable
from cluster.failures import reporting
from counterpoint.data import DataConfig, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.solvers.model_statistics import EstimationConfig, Sums, estimate
from counterpoint.unet import frozen


@dataclass(frozen=True)
class EstimationRecipe:
    """What an estimating worker is made of."""

    model: str
    """URI of the run whose network is measured."""
    data: DataConfig
    """The images that the network was trained on."""
    noise: NoiseConfig
    config: EstimationConfig
    seed: int


class Estimator:
    """Estimates from shards; an ordinary class, to which `ray.remote` adds only transport."""

    def __init__(self, recipe: EstimationRecipe) -> None:
        dumpable()
        self.recipe = recipe
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = frozen(load_unet(recipe.model).to(device))

    @reporting("estimator")
    def estimate(self, shard: int, shards: int) -> Sums:
        """Return the sums over a shard of the samples."""
        images = load_data(self.recipe.data).train
        scheduler = build_noise_scheduler(self.recipe.noise)
        return estimate(
            self.network, scheduler, images.images, images.labels, self.recipe.config, self.recipe.seed,
            shard, shards,
        )  # fmt: skip
