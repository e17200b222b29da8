"""Distilling a teacher into a one- to four-step student: warm-up, heads alone, then against the panel."""

from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from counterpoint.batches import Batch, Batches
from counterpoint.critics.group import Samples
from counterpoint.critics.losses import blind_loss
from counterpoint.critics.panel import Panel, PanelVerdict
from counterpoint.data import ImageSet
from counterpoint.figures import describe_verdict, tally
from counterpoint.optimization import Optimization, OptimizerConfig, load_weights, rank_slices, weights_of
from counterpoint.pairs import Pairs
from counterpoint.place import ALONE, Place
from counterpoint.section import Section
from counterpoint.seeds import seed_of
from counterpoint.student import StudentConfig, student_x0

Stage = Literal["warmup", "heads", "panel"]


class WarmupConfig(Section):
    """Regression on the teacher's pairs; the paper's student, too, takes few steps from the start."""

    steps: int = Field(default=600, ge=0)
    """Optimizer steps; 0 starts from the teacher's weights, or from `start`."""
    batch_size: int = Field(default=128, ge=1)
    """Pairs per optimizer step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, warmup_steps=50, ema_decay=0.99)
    """AdamW, schedule, clipping and EMA."""


class AdversarialConfig(Section):
    """Training against the panel."""

    steps: int = Field(default=300, ge=0)
    """Optimizer steps of the student against the panel."""
    heads_alone: int = Field(default=100, ge=0)
    """Steps before that in which only the heads learn."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per optimizer step."""
    adversarial_weight: float = Field(default=0.05, ge=0.0)
    """Weight of the panel's loss; 0 continues the warm-up without a panel, at equal budget."""
    regression_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the regression on the teacher's pairs, kept beside the panel; the paper has 0."""
    real: Literal["data", "teacher"] = "data"
    """What heads compare with: images of the class, or the teacher's sample from the same noise (paper)."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, betas=(0.0, 0.99), weight_decay=0.0, warmup_steps=0, decay=False, ema_decay=0.99
    )
    """AdamW, schedule, clipping and EMA."""

    @property
    def uses_panel(self) -> bool:
        """Whether any step asks the critics."""
        return self.adversarial_weight > 0 and self.steps + self.heads_alone > 0


class Distiller:
    """One replica of the student's training: `step` is the algorithm, `state` and `load` its whole memory."""

    def __init__(
        self,
        unet: UNet2DModel,
        noise: DDPMScheduler,
        pairs: Pairs,
        images: ImageSet,
        panel: Panel | None,
        student: StudentConfig,
        warmup: WarmupConfig,
        adversarial: AdversarialConfig,
        seed: int,
        place: Place = ALONE,
        accumulate: int = 1,
    ) -> None:
        self.noise, self.batches = noise, Batches(pairs, images, student, seed)
        self.panel = panel if adversarial.uses_panel else None
        self._blind = None if self.panel is None else blind_loss(self.panel.pool.config.loss)
        self.student, self.warmup, self.adversarial = student, warmup, adversarial
        self.seed, self.place, self.accumulate = seed, place, accumulate
        heads_alone = adversarial.heads_alone if adversarial.uses_panel else 0
        self.starts: dict[Stage, int] = {
            "warmup": 0,
            "heads": warmup.steps,
            "panel": warmup.steps + heads_alone,
        }
        self.total_steps = self.starts["panel"] + adversarial.steps
        self._check()
        self.unet = unet.to(place.device).train()
        self.network = place.wrap(self.unet)
        self.optimization = self._optimization(self.stage(0))

    def stage(self, step: int) -> Stage:
        """Return the stage that `step` belongs to."""
        if step < self.starts["heads"]:
            return "warmup"
        return "heads" if step < self.starts["panel"] else "panel"

    def step(self, step: int) -> dict[str, Any]:
        """Take step `step` (from 0) and return its figures."""
        stage = self.stage(step)
        if step == self.starts["heads"]:
            self._leave_warmup()
        # Dropout draws from the global stream.
        torch.manual_seed(seed_of(self.seed, "dropout", step, self.place.rank))
        batch_size = self.samples_per_step(step)
        batch = self._draw(step, batch_size)
        slices = rank_slices(batch_size, self.place.rank, self.place.ranks, self.accumulate)
        figures: dict[str, Any] = {"stage": stage}
        for micro, part in enumerate(slices):
            mine = batch.part(part, self.place.device)
            with self.place.accumulating(self.network, micro == len(slices) - 1):
                self._micro_step(step, mine, part, micro, figures)
        if self._student_moves(step):
            rate, norm = self.optimization.step(step - self.starts[stage])
            figures |= {"learning_rate": rate, "gradient_norm": norm}
        return figures

    def samples_per_step(self, step: int) -> int:
        """Return the samples that all ranks together learn from in step `step`."""
        return self.warmup.batch_size if self.stage(step) == "warmup" else self.adversarial.batch_size

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and to keep: the moving average."""
        return self.optimization.averaged()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return everything the future depends on, the panel's state included, besides the step number."""
        state = {"unet": weights_of(self.unet), "optimizer": self.optimization.state()}
        return state if self.panel is None else state | self.panel.state()

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        """Return to a stored state, the panel's included, after which `step` comes next."""
        self.optimization = self._optimization(self.stage(max(step - 1, 0)))
        load_weights(self.unet, state["unet"])
        self.optimization.load(state["optimizer"])
        if self.panel is not None:
            groups = {name: part for name, part in state.items() if name not in ("unet", "optimizer")}
            self.panel.load(groups, max(0, step - self.starts["heads"]))

    def _check(self) -> None:
        """Raise ValueError if the configuration and what it is used on do not fit."""
        if self.adversarial.uses_panel and self.panel is None:
            raise ValueError(
                "adversarial.adversarial_weight is above 0 but there is no panel: give one, or set it to 0"
            )
        if self.panel is not None and self.adversarial.real == "data":
            self.batches.check()
        for first in sorted({0, self.starts["heads"]} - {self.total_steps}):
            parts = rank_slices(
                self.samples_per_step(first), self.place.rank, self.place.ranks, self.accumulate
            )
        if self.panel is not None and self.place.ranks * self.accumulate > 1:
            self._check_parts(parts[0].stop - parts[0].start, self.panel.pool.config.levels_per_step)

    def _check_parts(self, size: int, levels: int) -> None:
        """Each noise level must get its share of each part, or ranks would wait for each other in vain."""
        if size % levels:
            raise ValueError(
                f"critics.levels_per_step={levels} does not divide the {size} samples of a micro-batch: make "
                "adversarial.batch_size / (trainer.workers * trainer.accumulate) a multiple of it"
            )

    def _micro_step(self, step: int, batch: Batch, part: slice, micro: int, figures: dict[str, Any]) -> None:
        """Add one micro-batch's gradients and figures."""
        moves, shift = self._student_moves(step), self.student.timestep_shift
        with torch.set_grad_enabled(moves):
            fake = student_x0(self.network, batch.x_t, batch.timesteps, batch.labels, self.noise, shift)
        loss = F.mse_loss(fake, batch.target)
        tally(figures, "regression_loss", float(loss.detach()) / self.accumulate)
        tally(figures, "sample_std_ratio", float(fake.detach().std() / batch.real.std()) / self.accumulate)
        if self.stage(step) != "warmup":
            loss = self.adversarial.regression_weight * loss
        if self._asks(step):
            verdict = self._ask(step, fake, batch, part, micro, judge=moves)
            describe_verdict(figures, verdict, self.accumulate, self._blind)
            if verdict.gradient is not None:
                # The gradient is the verdict's whole content: a surrogate linear in the sample carries it
                # through any wrapper of the student, sharded ones included.
                loss = loss + self.adversarial.adversarial_weight * (fake * verdict.gradient).sum()
        if moves:
            (loss / self.accumulate).backward()

    def _ask(
        self, step: int, fake: Tensor, batch: Batch, part: slice, micro: int, judge: bool
    ) -> PanelVerdict:
        assert self.panel is not None
        panel_step = step - self.starts["heads"]
        groups = self.panel.pool.assign_groups(panel_step, self.adversarial.batch_size)[part]
        samples = Samples(panel_step, fake.detach(), batch.real, batch.labels, judge, micro, self.accumulate)
        return self.panel.ask(samples, groups).result()

    def _asks(self, step: int) -> bool:
        return self.panel is not None and step >= self.starts["heads"]

    def _student_moves(self, step: int) -> bool:
        """Whether the student takes a step: not while heads learn alone, then in every critic_steps-th."""
        if self.panel is None or self.stage(step) == "warmup":
            return True
        if self.stage(step) == "heads":
            return False
        every = self.panel.pool.config.critic_steps
        return (step - self.starts["panel"]) % every == every - 1

    def _draw(self, step: int, batch_size: int) -> Batch:
        progress = step / self.warmup.steps if self.stage(step) == "warmup" else 1.0
        data = self._asks(step) and self.adversarial.real == "data"
        return self.batches.draw(step, batch_size, self.student.stage(progress), data)

    def _leave_warmup(self) -> None:
        """Go on from the averaged weights with a fresh optimizer."""
        if self.warmup.steps > 0:
            load_weights(self.unet, self.optimization.averaged())
        self.optimization = self._optimization("panel")

    def _optimization(self, stage: Stage) -> Optimization:
        if stage == "warmup":
            return Optimization(self.unet, self.warmup.optimizer, max(1, self.warmup.steps))
        return Optimization(self.unet, self.adversarial.optimizer, max(1, self.adversarial.steps))
