"""Training the teacher: a class-conditional diffusion model with condition dropout."""

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field
from torch import Tensor

from counterpoint.curriculum import Curriculum, CurriculumConfig, log_snr
from counterpoint.data import ImageSet
from counterpoint.diffusion import NoisyBatch, draw_noisy_batch
from counterpoint.learned_variance import denoising_loss
from counterpoint.noise_pairing import PairingConfig, pair
from counterpoint.optimization import OptimizerConfig, rank_slices
from counterpoint.place import ALONE, Place
from counterpoint.section import Section
from counterpoint.seeds import generator, seed_of
from counterpoint.strategies.build import build_learner
from counterpoint.unet import null_class


class TeacherConfig(Section):
    """How long and on what the teacher trains."""

    steps: int = Field(default=2000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=128, ge=1)
    """Images per optimizer step, over all workers and micro-batches."""
    condition_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    """Probability with which a label is replaced by the null class."""
    pairing: PairingConfig = PairingConfig()
    """Which noise an image is trained with."""
    curriculum: CurriculumConfig | None = None
    """Which timesteps are trained when; all of them all the time unless given."""
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
        self.null_class = null_class(self.unet)
        self.curriculum = None if config.curriculum is None else Curriculum(config.curriculum, log_snr(noise))
        self.mean = images.images.mean(dim=0) if config.pairing.centred else None
        self.learner = build_learner(self.unet, config.optimizer, config.steps, place, accumulate)

    def step(self, step: int) -> dict[str, Any]:
        """Take optimizer step `step` (from 0) and return its figures."""
        # Dropout draws from the global stream.
        torch.manual_seed(seed_of(self.seed, "dropout", step, self.place.rank))
        batch, figures = self._batch(step)
        total = 0.0
        for micro, part in enumerate(self.slices):
            mine = batch.part(part, self.place.device)
            with self.learner.accumulating(micro == len(self.slices) - 1):
                loss = self.loss(mine) / len(self.slices)
                self.learner.backward(loss)
            total += float(loss.detach())
        rate, norm = self.learner.step(step)
        if self.curriculum is not None:
            # Every rank must come to the same decision.
            self.curriculum.see(mean_over_ranks(total, self.place))
        return {"loss": total, "learning_rate": rate, "gradient_norm": norm} | figures

    def loss(self, batch: NoisyBatch) -> Tensor:
        """Return the loss on a micro-batch, a scalar."""
        return denoising_loss(self.learner.network, self.noise, batch)

    def _batch(self, step: int) -> tuple[NoisyBatch, dict[str, float]]:
        """Draw the samples of a step for all ranks, and return them with the figures of how."""
        batch = draw_noisy_batch(
            self.images.images,
            self.images.labels,
            self.config.batch_size,
            self.noise.config.num_train_timesteps,
            self.null_class,
            self.config.condition_dropout,
            generator(self.seed, "teacher", step),
            None if self.curriculum is None else self.curriculum.timesteps,
        )
        figures: dict[str, float] = {}
        if self.curriculum is not None:
            figures["curriculum_stage"] = self.curriculum.stage
        if self.config.pairing.kind == "none":
            return batch, figures
        begun = time.perf_counter()
        paired = pair(batch, self.config.pairing, self.mean, self.seed, step)
        spent = time.perf_counter() - begun
        told = {"noise_norm": paired.noise_norm, "distance_drop": paired.distance_drop}
        return paired.batch, figures | told | {"pairing_seconds": spent}

    def samples_per_step(self, step: int) -> int:
        """Return the images that all ranks together learn from in a step."""
        return self.config.batch_size

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and to keep: the moving average, on rank 0."""
        return self.learner.averaged()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's share of all that the future depends on, besides the step number."""
        state = {"unet": self.learner.weights(), "optimizer": self.learner.state()}
        if self.curriculum is not None:
            # All ranks hold the same: rank 0 writes it.
            state["curriculum"] = self.curriculum.state() if self.place.rank == 0 else {}
        return state

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Return to a stored state, after which `step` comes next."""
        self.learner.load(state["unet"], state["optimizer"])
        if self.curriculum is not None:
            self.curriculum.load(state["curriculum"])


def mean_over_ranks(value: float, place: Place) -> float:
    """Return the mean of what each rank gives, the same number on all of them; every rank must call."""
    if place.ranks == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=place.device)
    dist.all_reduce(total)
    return float(total) / place.ranks
