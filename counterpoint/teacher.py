"""Training the teacher: a class-conditional diffusion model with condition dropout."""

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field
from torch import Tensor

from counterpoint.data import ImageSet
from counterpoint.diffusion import diffusion_loss, draw_noisy_batch
from counterpoint.optimization import Optimization, OptimizerConfig, load_weights, rank_slices, weights_of
from counterpoint.place import ALONE, Place
from counterpoint.section import Section
from counterpoint.seeds import generator, seed_of
from counterpoint.unet import null_class


class TeacherConfig(Section):
    """How long and on what the teacher trains."""

    steps: int = Field(default=2000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=128, ge=1)
    """Images per optimizer step, over all workers and micro-batches."""
    condition_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    """Probability with which a label is replaced by the null class."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, schedule, clipping and EMA."""


class TeacherTrainer:
    """One replica of the teacher's training: `step` is the algorithm, `state` and `load` its whole memory."""

    def __init__(
        self,
        unet: UNet2DModel,
        noise: DDPMScheduler,
        images: ImageSet,
        config: TeacherConfig,
        seed: int,
        place: Place = ALONE,
        accumulate: int = 1,
    ) -> None:
        self.config, self.noise, self.images, self.seed, self.place = config, noise, images, seed, place
        self.slices = rank_slices(config.batch_size, place.rank, place.ranks, accumulate)
        self.total_steps = config.steps
        self.unet = unet.to(place.device).train()
        self.network = place.wrap(self.unet)
        self.optimization = Optimization(self.unet, config.optimizer, config.steps)

    def step(self, step: int) -> dict[str, Any]:
        """Take optimizer step `step` (from 0) and return its figures."""
        # Dropout draws from the global stream.
        torch.manual_seed(seed_of(self.seed, "dropout", step, self.place.rank))
        batch = draw_noisy_batch(
            self.images.images,
            self.images.labels,
            self.config.batch_size,
            self.noise.config.num_train_timesteps,
            null_class(self.unet),
            self.config.condition_dropout,
            generator(self.seed, "teacher", step),
        )
        total = 0.0
        for micro, part in enumerate(self.slices):
            with self.place.accumulating(self.network, micro == len(self.slices) - 1):
                loss = diffusion_loss(self.network, self.noise, batch.part(part, self.place.device)) / len(
                    self.slices
                )
                loss.backward()
            total += float(loss.detach())
        rate, norm = self.optimization.step(step)
        return {"loss": total, "learning_rate": rate, "gradient_norm": norm}

    def samples_per_step(self, step: int) -> int:
        """Return the images that all ranks together learn from in a step."""
        return self.config.batch_size

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and to keep: the moving average."""
        return self.optimization.averaged()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return everything the future depends on, besides the step number."""
        return {"unet": weights_of(self.unet), "optimizer": self.optimization.state()}

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        """Return to a stored state, after which `step` comes next."""
        load_weights(self.unet, state["unet"])
        self.optimization.load(state["optimizer"])
