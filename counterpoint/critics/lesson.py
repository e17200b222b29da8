"""What a panel learns in one step: gradients of its heads, summed over the step's micro-batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoint.critics.bank import HeadBank
from counterpoint.critics.config import KINDS, LossForm
from counterpoint.critics.losses import critic_loss, fake_part
from counterpoint.critics.messages import Samples
from counterpoint.critics.seats import Seats
from counterpoint.critics.views import Features


class Lesson:
    """The gradients of one step's panel until its heads take their optimizer step."""

    def __init__(self, panel: Sequence[Seats], step: int, levels: int) -> None:
        self.panel = panel
        self.step = step
        self.levels = levels
        """Feature levels of the pool."""
        self.samples = 0
        """Samples seen so far."""
        self.gradients = [
            seats.bank.rows.new_zeros(len(seats.rows), seats.bank.shape.size) for seats in panel
        ]
        """Of the heads' loss, summed over `samples`, [heads, P] for each of `panel`."""

    def check(self, samples: Samples) -> None:
        """Raise ValueError unless `samples` are the next micro-batch of this step, as large as the others."""
        if self.step != samples.step or self.samples != samples.micro * len(samples.fake):
            raise ValueError(
                f"micro-batch {samples.micro} of step {samples.step} brings {len(samples.fake)} samples, but "
                f"{self.samples} of step {self.step} came before: micro-batches must come in order and be "
                "of one size: let critics.levels_per_step divide adversarial.batch_size / trainer.accumulate"
            )

    def add(
        self, form: LossForm, real: Features, fake: Features, negative: Features | None
    ) -> tuple[float, Tensor, Tensor]:
        """Add a micro-batch of features; return mean loss, and mean logits on real and fake [kinds, levels].

        `negative`, if given, are features of real images under a wrong class: conditional heads are to call
        them fake, which does not count in the loss returned. No gradient reaches the features.
        """
        losses, taught = [], []
        for seats, total in zip(self.panel, self.gradients, strict=True):
            weights = seats.weights().requires_grad_()
            real_logits, fake_logits = seats.logits(weights, _joined(real, fake)).chunk(2)
            loss = critic_loss(form, real_logits, fake_logits)
            losses.append(loss.detach())
            if negative is not None:
                extra = fake_part(form, seats.logits(weights, negative))
                loss = loss + extra * _conditional(seats).to(extra)
            total += torch.autograd.grad(loss.sum(), weights)[0]
            taught.append((real_logits.detach(), fake_logits.detach()))
        self.samples += len(losses[0])
        real_means, fake_means = (
            self._by_place(torch.cat([t.mean(0) for t in logits]).cpu())
            for logits in zip(*taught, strict=True)
        )
        return float(torch.cat(losses, dim=1).mean()), real_means, fake_means

    def forget(self, bank: HeadBank, row: int) -> None:
        """Drop what head `row` of `bank` has learned in this step, because a new head took its place."""
        for seats, gradient in zip(self.panel, self.gradients, strict=True):
            if seats.bank is bank and row in seats.rows:
                gradient[seats.rows.index(row)] = 0.0

    def finish(
        self, gradients: Sequence[Tensor] | None = None, samples: int | None = None, progress: float = 0.0
    ) -> None:
        """Let each head take one optimizer step, with the settings of `progress`, along the mean gradient.

        `gradients`, summed over `samples`, are those of all replicas where this lesson saw a share of them.
        """
        for seats, gradient in zip(self.panel, gradients or self.gradients, strict=True):
            mean = gradient.to(seats.bank.rows) / (samples or self.samples)
            seats.bank.update(seats.rows, mean, progress)

    def _by_place(self, values: Tensor) -> Tensor:
        """Average one value a head [heads] to [kinds, levels]; NaN where no head sits."""
        homes = [slot for seats in self.panel for slot in seats.homes()]
        places = torch.tensor([slot.kind * self.levels + slot.level for slot in homes])
        size = len(KINDS) * self.levels
        sums = torch.bincount(places, weights=values, minlength=size)
        return (sums / torch.bincount(places, minlength=size)).reshape(len(KINDS), self.levels).float()


def _joined(real: Features, fake: Features) -> Features:
    """Put real and detached fake features into one batch: one pass through the heads serves both."""
    return [
        [torch.cat([r, f.detach()]) for r, f in zip(reals, fakes, strict=True)]
        for reals, fakes in zip(real, fake, strict=True)
    ]


def _conditional(seats: Seats) -> Tensor:
    return torch.tensor([KINDS[slot.kind].endswith("_conditional") for slot in seats.homes()])
