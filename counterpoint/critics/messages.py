"""What trainers and critic groups say to each other: samples one way, a verdict the other, features never."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What a group is asked to judge: one micro-batch of one step."""

    step: int
    fake: Tensor
    """Student samples [n,C,H,W]."""
    real: Tensor
    """What they are compared with, [n,C,H,W], under the same labels."""
    labels: Tensor
    """Class of each sample, int64 [n]."""
    judge: bool = True
    """Whether the student wants the gradient; heads learn either way."""
    micro: int = 0
    """Index of this micro-batch in an accumulated step."""
    micros: int = 1
    """Micro-batches in the step, of equal size; heads step with the last."""

    @property
    def last(self) -> bool:
        """Whether this micro-batch ends its step."""
        return self.micro == self.micros - 1


@dataclass(frozen=True)
class Verdict:
    """What a group answers."""

    step: int
    loss: float
    """Student's loss, summed over the samples and times the weight of the group's noise level."""
    gradient: Tensor | None
    """Gradient of that sum with respect to `fake`, [n,C,H,W]; None if not asked for."""
    critic_loss: float
    """The heads' loss on real and fake samples (not on wrong classes), averaged over samples and heads."""
    real_logits: Tensor
    """Mean logit on real samples by kind and level, [kinds, levels]; NaN where nobody judged."""
    fake_logits: Tensor
    """The same on fake samples."""
    samples: int
    refreshed: int
    """Heads of this group renewed since the last verdict."""
    voting: int
    """Heads whose judgement reached the student."""
