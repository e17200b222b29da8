"""Making a diffusion transformer linear: what a softmax teacher leaves to it, and what it learns from it.

LiT (arXiv 2501.12976): the student is the teacher with linear attention. It inherits all weights but those of
the attention, and learns the data's loss beside the teacher's prediction and variance.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from counterpoint.data import ImageSet
from counterpoint.diffusion import NoisyBatch, noisy_input
from counterpoint.dit import Attention, DiT
from counterpoint.learned_variance import output_loss
from counterpoint.place import ALONE, Place
from counterpoint.teacher import TeacherConfig, TeacherTrainer
from counterpoint.unet import frozen

Inherit = Literal["nothing", "all_but_attention", "everything"]
PREDICTION_WEIGHT, VARIANCE_WEIGHT = 0.5, 0.05
"""Lambda_1 and lambda_2 of the hybrid loss."""


class LinearStudentConfig(TeacherConfig):
    """What the student is made of, and how long and from whom it learns; the paper's choices by default."""

    attention: Attention = "linear"
    """linear; or softmax, the teacher's own, for the reference of a student that is trained as long."""
    heads: int = Field(default=1, ge=1)
    """Heads of linear attention: far fewer than the teacher's."""
    kernel_size: int = Field(default=5, ge=0)
    """Side of the depth-wise convolution, an odd number; 0 for none."""
    inherit: Inherit = "all_but_attention"
    """Which of the teacher's weights the student starts from. `everything` adds the attention's projections,
    whatever the heads; the convolution is always new."""
    distil: Literal["none", "noise", "hybrid"] = "hybrid"
    """What is learned from the teacher: nothing, its prediction, or its prediction and its variance."""

    @model_validator(mode="after")
    def _check(self) -> "LinearStudentConfig":
        if self.kernel_size and not self.kernel_size % 2:
            raise ValueError(
                f"kernel_size={self.kernel_size} has no middle: use an odd one, or 0 for no convolution"
            )
        return self


@dataclass(frozen=True)
class Conversion:
    """A student made of a teacher, and the names of its parameters by where they come from."""

    student: DiT
    copied: tuple[str, ...]
    fresh: tuple[str, ...]


def linearize(
    teacher: Any,
    heads: int = 1,
    kernel_size: int = 5,
    inherit: Inherit = "all_but_attention",
    attention: Attention = "linear",
    seed: int = 0,
) -> Conversion:
    """Return `teacher` with linear attention of `heads` and a convolution of `kernel_size`, to be trained.

    What it does not inherit is new, from `seed`. Raises ValueError if the teacher is not a diffusion
    transformer with softmax attention, or if the heads do not divide its width.
    """
    if not isinstance(teacher, DiT) or teacher.config.attention != "softmax":
        raise ValueError(
            f"the teacher is a {type(teacher).__name__} without softmax attention to convert: train one with "
            "jobs.train and a `dit` section, such as configs/digits/dit.yaml"
        )
    shape = {"attention": attention, "linear_heads": heads, "kernel_size": kernel_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student: DiT = DiT.from_config(dict(teacher.config) | shape)
    copied = _inherited(student, teacher, inherit)
    return Conversion(student, copied, tuple(n for n, _ in student.named_parameters() if n not in copied))


@torch.no_grad()
def _inherited(student: DiT, teacher: DiT, inherit: Inherit) -> tuple[str, ...]:
    """Copy the parameters that `inherit` names, and return their names."""
    theirs = dict(teacher.named_parameters())
    copied = []
    for name, parameter in student.named_parameters():
        attention = ".attn1." in name
        if inherit == "nothing" or name not in theirs or (attention and inherit != "everything"):
            continue
        parameter.copy_(theirs[name])
        copied.append(name)
    return tuple(copied)


class LinearStudentTrainer(TeacherTrainer):
    """Training of the student as a teacher is trained, with the teacher's answers beside the data.

    On the same x_t, timestep and label, in the networks' own prediction type,
    L = L_simple (+ L_vlb) + 0.5 ||eps_T - eps_S||^2 + 0.05 ||v_T - v_S||^2, means over elements, where v is
    the fraction that `DiTOutput.variance` is. The teacher's answer is its plain one, without guidance.
    """

    def __init__(
        self,
        student: DiT,
        teacher: DiT,
        noise: SchedulerMixin,
        images: ImageSet,
        config: LinearStudentConfig,
        seed: int,
        place: Place = ALONE,
        accumulate: int = 1,
    ) -> None:
        """Train `student` to `config`. Raises ValueError if the teacher lacks the variance to learn from."""
        if config.distil == "hybrid" and not teacher.config.learned_variance:
            raise ValueError(
                "student.distil=hybrid learns the teacher's variance, which it has not learned: use "
                "distil=noise, or a teacher with dit.learned_variance=true"
            )
        super().__init__(student, noise, images, config, seed, place, accumulate)
        self.distil = config.distil
        self.teacher = frozen(teacher.to(place.device))

    def loss(self, batch: NoisyBatch) -> Tensor:
        """Return the student's loss on `batch`, a scalar."""
        x_t, heard = noisy_input(self.noise, batch.images, batch.noise, batch.timesteps)
        output = self.learner.network(x_t, heard, class_labels=batch.labels)
        loss = output_loss(output, self.noise, batch, x_t)
        if self.distil == "none":
            return loss
        with torch.no_grad():
            told = self.teacher(x_t, heard, class_labels=batch.labels)
        loss = loss + PREDICTION_WEIGHT * F.mse_loss(output.sample, told.sample)
        if self.distil == "noise":
            return loss
        return loss + VARIANCE_WEIGHT * F.mse_loss(output.variance, told.variance)
