"""Distilling a teacher into a one- to four-step student: warm-up, heads alone, then against the panel."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from counterpoint.ahead import Answered, verdict_tensors, verdicts_of
from counterpoint.batches import Batch, Batches
from counterpoint.critics.group import Samples
from counterpoint.critics.losses import blind_loss
from counterpoint.critics.panel import Panel, Pending
from counterpoint.data import ImageSet
from counterpoint.figures import describe_verdict, tally
from counterpoint.optimization import OptimizerConfig, rank_slices
from counterpoint.pairs import Pairs
from counterpoint.place import ALONE, Place
from counterpoint.schedules import Scheduled, bounds, extremes, is_constant, progress_at, value_at
from counterpoint.section import Section
from counterpoint.seeds import seed_of
from counterpoint.strategies.build import build_learner
from counterpoint.student import StudentConfig, student_x0

Stage = Literal["warmup", "heads", "panel"]
AHEAD = "ahead"
"""The name in a checkpoint of verdicts that were asked for a step ahead."""


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
    adversarial_weight: Annotated[Scheduled, bounds(ge=0.0)] = 0.05
    """Weight of the panel's loss; 0 continues the warm-up without a panel, at equal budget. May change over
    training, from the first step of the heads on."""
    regression_weight: Annotated[Scheduled, bounds(ge=0.0)] = 1.0
    """Weight of the regression on the teacher's pairs, kept beside the panel; the paper has 0. May change
    over training, from the first step of the heads on."""
    staleness: Literal[0, 1] = 0
    """Steps by which a verdict may be older than the weights it moves. With 1 critics judge the next batch
    while the student learns from this one, at the price of one more forward pass; 0 is exact and waits."""
    real: Literal["data", "teacher"] = "data"
    """What heads compare with: images of the class, or the teacher's sample from the same noise (paper)."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, betas=(0.0, 0.99), weight_decay=0.0, warmup_steps=0, decay=False, ema_decay=0.99
    )
    """AdamW, schedule, clipping and EMA."""

    @property
    def uses_panel(self) -> bool:
        """Whether any step asks the critics."""
        return extremes(self.adversarial_weight)[1] > 0 and self.steps + self.heads_alone > 0

    @property
    def panel_steps(self) -> int:
        """Steps after the warm-up, over which the numbers here and the critics' may change."""
        return self.steps + (self.heads_alone if self.uses_panel else 0)


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
        self._ahead: dict[int, list[Pending]] = {}
        """What has been asked about the batches of coming steps, by micro-batch."""
        self.starts: dict[Stage, int] = {
            "warmup": 0,
            "heads": warmup.steps,
            "panel": warmup.steps + adversarial.panel_steps - adversarial.steps,
        }
        self.total_steps = warmup.steps + adversarial.panel_steps
        self._check()
        self.unet = unet.to(place.device).train()
        # Whoever resumes has made the student from the same teacher: what stays frozen is there already.
        self.learner = build_learner(
            self.unet, *self._schedule(self.stage(0)), place, accumulate, frozen="rebuilt"
        )

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
        if self.adversarial.staleness:
            self._ask_ahead(step)
        self._seed_dropout(step)
        batch, slices = self._draw(step), self._slices(step)
        figures: dict[str, Any] = {"stage": stage} | self._changing(step)
        for micro, part in enumerate(slices):
            mine = batch.part(part, self.place.device)
            with self.learner.accumulating(micro == len(slices) - 1):
                self._micro_step(step, mine, part, micro, figures)
        if self._student_moves(step):
            rate, norm = self.learner.step(step - self.starts[stage])
            figures |= {"learning_rate": rate, "gradient_norm": norm}
        self._ahead.pop(step, None)
        return figures

    def samples_per_step(self, step: int) -> int:
        """Return the samples that all ranks together learn from in step `step`."""
        return self.warmup.batch_size if self.stage(step) == "warmup" else self.adversarial.batch_size

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and to keep: the moving average, on rank 0."""
        return self.learner.averaged()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's share of all that the future depends on, besides the step number.

        The panel's state is rank 0's. What was asked ahead is waited for and stored: the panel is then a step
        ahead of the student.
        """
        state = {"unet": self.learner.weights(), "optimizer": self.learner.state()}
        for step, asked in self._ahead.items():
            verdicts = [pending.result() for pending in asked]
            self._ahead[step] = [Answered(verdict) for verdict in verdicts]
            state[AHEAD] = verdict_tensors(verdicts, self._slices(step))
        return state if self.panel is None or self.place.rank > 0 else state | self.panel.state()

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Return to a stored state, the panel's included, which rank 0 reads; then `step` comes next."""
        self.learner.restart(*self._schedule(self.stage(max(step - 1, 0))), from_average=False)
        self.learner.load(state["unet"], state["optimizer"])
        self._ahead = {}
        if AHEAD in state:
            self._ahead[step] = [Answered(v) for v in verdicts_of(state[AHEAD], self._slices(step))]
        if self.panel is not None:
            mine = ("unet", "optimizer", AHEAD)
            names = [name for name in state if name not in mine and self.place.rank == 0]
            groups = {name: dict(state[name]) for name in names}
            self.panel.load(groups, max(0, step - self.starts["heads"]) + len(self._ahead))

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
        moves = self._student_moves(step)
        with torch.set_grad_enabled(moves):
            fake = self._sampled(batch)
        loss = F.mse_loss(fake, batch.target)
        tally(figures, "regression_loss", float(loss.detach()) / self.accumulate)
        tally(figures, "sample_std_ratio", float(fake.detach().std() / batch.real.std()) / self.accumulate)
        if self.stage(step) != "warmup":
            loss = value_at(self.adversarial.regression_weight, self._progress(step)) * loss
        if self._asks(step):
            ahead = self._ahead.get(step)
            asked = self._ask(step, fake, batch, part, micro) if ahead is None else ahead[micro]
            verdict = asked.result()
            describe_verdict(figures, verdict, self.accumulate, self._blind)
            if verdict.gradient is not None:
                # The gradient is the verdict's whole content: a surrogate linear in the sample carries it
                # through any wrapper of the student, sharded ones included.
                surrogate = (fake * verdict.gradient.to(fake.device)).sum()
                loss = loss + value_at(self.adversarial.adversarial_weight, self._progress(step)) * surrogate
        if moves:
            self.learner.backward(loss / self.accumulate)

    def _ask_ahead(self, step: int) -> None:
        """Ask about the batch of step `step`, unless that was done a step ago, and about the next one.

        Both are sampled with the weights as they are. Nothing is asked during the warm-up, which ends in
        other weights, nor beyond the last step.
        """
        for asked in (step, step + 1):
            if self._asks(step) and asked < self.total_steps and asked not in self._ahead:
                # The masks with which the sample is made again for its gradient.
                self._seed_dropout(asked)
                batch = self._draw(asked)
                questions = self._ahead[asked] = []
                for micro, part in enumerate(self._slices(asked)):
                    mine = batch.part(part, self.place.device)
                    with torch.no_grad():
                        fake = self._sampled(mine)
                    questions.append(self._ask(asked, fake, mine, part, micro))

    def _sampled(self, batch: Batch) -> Tensor:
        """Return the student's samples [n,C,H,W] of a batch."""
        shift = self.student.timestep_shift
        return student_x0(self.learner.network, batch.x_t, batch.timesteps, batch.labels, self.noise, shift)

    def _ask(self, step: int, fake: Tensor, batch: Batch, part: slice, micro: int) -> Pending:
        """Send samples to the panel; the student wants their gradient only in steps in which it moves."""
        assert self.panel is not None
        panel_step = step - self.starts["heads"]
        groups = self.panel.pool.assign_groups(panel_step, self.adversarial.batch_size)[part]
        judge = self._student_moves(step)
        samples = Samples(panel_step, fake.detach(), batch.real, batch.labels, judge, micro, self.accumulate)
        return self.panel.ask(samples, groups)

    def _seed_dropout(self, step: int) -> None:
        # Dropout draws from the global stream.
        torch.manual_seed(seed_of(self.seed, "dropout", step, self.place.rank))

    def _slices(self, step: int) -> list[slice]:
        """Return which samples of step `step` are this rank's, by micro-batch."""
        size = self.samples_per_step(step)
        return rank_slices(size, self.place.rank, self.place.ranks, self.accumulate)

    def _progress(self, step: int) -> float:
        """Return how far `step` is between the end of the warm-up and the last step, in [0,1]."""
        return progress_at(step - self.starts["heads"], self.adversarial.panel_steps)

    def _changing(self, step: int) -> dict[str, float]:
        """Return what numbers that change over training are in `step`; none in the warm-up."""
        if self.stage(step) == "warmup":
            return {}
        numbers = {
            "adversarial_weight": self.adversarial.adversarial_weight,
            "regression_weight": self.adversarial.regression_weight,
        }
        if self.panel is not None:
            numbers["refresh_rate"] = self.panel.pool.config.refresh_rate
        progress = self._progress(step)
        return {name: value_at(x, progress) for name, x in numbers.items() if not is_constant(x)}

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

    def _draw(self, step: int) -> Batch:
        progress = step / self.warmup.steps if self.stage(step) == "warmup" else 1.0
        data = self._asks(step) and self.adversarial.real == "data"
        return self.batches.draw(step, self.samples_per_step(step), self.student.stage(progress), data)

    def _leave_warmup(self) -> None:
        """Go on from the averaged weights with a fresh optimizer."""
        self.learner.restart(*self._schedule("panel"), from_average=self.warmup.steps > 0)

    def _schedule(self, stage: Stage) -> tuple[OptimizerConfig, int]:
        """The optimizer's settings in a stage, and the stage's steps."""
        part = self.warmup if stage == "warmup" else self.adversarial
        return part.optimizer, max(1, part.steps)
