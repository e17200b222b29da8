"""The configuration model of every training job; a field's default lives here or in the section it names."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from actors.training import TrainerConfig
from counterpoint.alarms import AlarmsConfig
from counterpoint.critics.config import CriticsConfig
from counterpoint.data import DataConfig
from counterpoint.diffusion import NoiseConfig
from counterpoint.distillation import AdversarialConfig, WarmupConfig
from counterpoint.evaluation import EvaluationConfig
from counterpoint.metrics.features import FeatureConfig
from counterpoint.pairs import PairsConfig
from counterpoint.sampling import SamplerConfig
from counterpoint.section import Section
from counterpoint.student import StudentConfig
from counterpoint.teacher import TeacherConfig
from counterpoint.unet import UNetConfig
from jobs.batch_sizes import check_batch_sizes


def absolute(uri: str) -> str:
    """Return a storage URI that means the same in every process: a local path is made absolute."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


RunUri = Annotated[str, AfterValidator(absolute)]
"""A run's storage: a local path, s3://, gs:// or whatever fsspec knows."""


class EvaluatorsConfig(EvaluationConfig):
    """What is scored, and by how many evaluation workers."""

    workers: int = Field(default=1, ge=0)
    """Evaluation workers, each scoring a shard; 0 scores in the driver's process and only at the end."""
    cpus_per_worker: float = Field(default=0.25, gt=0.0)
    """Logical CPUs reserved for each."""
    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each."""
    every: int = Field(default=100, ge=0)
    """Steps between snapshots scored while training goes on; 0 scores only the end."""


class HostedCriticsConfig(CriticsConfig):
    """The pool of heads, and the actors that host it."""

    actors: int = Field(default=4, ge=0)
    """Actors that host the critic groups (one group per noise level), at most one a group; 0 keeps them in
    the trainer's own process."""
    cpus_per_actor: float = Field(default=0.15, gt=0.0)
    """Logical CPUs reserved for each."""
    gpus_per_actor: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each."""
    threads: int = Field(default=1, ge=1)
    """Threads of each actor's maths."""
    snapshot_every: int = Field(default=50, ge=1)
    """Steps between a group's snapshots; what came since is sent again to a restarted actor."""
    patience: float = Field(default=120.0, gt=0.0)
    """Seconds to wait for a verdict, restarts included, before the step fails."""

    @model_validator(mode="after")
    def _check_actors(self) -> "HostedCriticsConfig":
        if self.actors > len(self.noise_levels):
            raise ValueError(
                f"actors={self.actors} exceeds the {len(self.noise_levels)} critic groups: lower it"
            )
        return self

    def plain(self) -> CriticsConfig:
        """Return the pool's own part."""
        return CriticsConfig(**{name: getattr(self, name) for name in CriticsConfig.model_fields})


class TrainConfig(Section):
    """Train a class-conditional diffusion teacher."""

    learner: Literal["diffusion"] = "diffusion"
    """What is trained: diffusion (this), or policy, which has a configuration of its own."""
    run: RunUri = "runs/digits/teacher"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    resume: bool = False
    """Go on with the run that is there; without it a used `run` is refused."""
    seed: int = 0
    """Seed of everything random in the run."""
    data: DataConfig = DataConfig()
    """Images to learn."""
    unet: UNetConfig = UNetConfig()
    """The network."""
    noise: NoiseConfig = NoiseConfig()
    """The forward process."""
    teacher: TeacherConfig = TeacherConfig()
    """Training."""
    sampler: SamplerConfig = SamplerConfig()
    """The sampler that figures and pictures of the teacher are made with."""
    steps: tuple[int, ...] = (1, 4, 25)
    """Numbers of steps at which the teacher is scored."""
    features: FeatureConfig = FeatureConfig()
    """The feature space of all figures, trained or loaded once and stored with the teacher."""
    evaluation: EvaluatorsConfig = EvaluatorsConfig(every=0)
    """Scoring."""
    trainer: TrainerConfig = TrainerConfig()
    """Workers, checkpoints and failures."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        check_batch_sizes({"teacher.batch_size": self.teacher.batch_size}, self.trainer)
        return self


class DistillConfig(Section):
    """Distil a teacher into a one- to four-step student against a panel of critics."""

    run: RunUri = "runs/digits/student"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    teacher: RunUri = "runs/digits/teacher"
    """URI of a finished run of jobs.train; its data, noise schedule and feature space are used."""
    start: RunUri | None = None
    """URI of a finished run of jobs.distill to start from, with its pairs; warmup.steps=0 skips warm-up."""
    resume: bool = False
    """Go on with the run that is there; without it a used `run` is refused."""
    seed: int = 0
    """Seed of everything random in the run."""
    real_limit: int | None = Field(default=None, ge=1)
    """Show the heads only so many real images (class-balanced), for studies of overfitting."""
    pairs: PairsConfig = PairsConfig()
    """The teacher's pairs for the warm-up."""
    student: StudentConfig = StudentConfig()
    """How the student steps."""
    warmup: WarmupConfig = WarmupConfig()
    """Regression on the pairs."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """Training against the panel."""
    critics: HostedCriticsConfig = HostedCriticsConfig()
    """The panel."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of steps at which the student is scored."""
    evaluation: EvaluatorsConfig = EvaluatorsConfig()
    """Scoring."""
    alarms: AlarmsConfig = AlarmsConfig()
    """When to raise an alarm."""
    trainer: TrainerConfig = TrainerConfig()
    """Workers, checkpoints and failures."""

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if self.critics.actors == 0 and self.trainer.workers > 1 and self.adversarial.uses_panel:
            raise ValueError(
                f"critics.actors=0 gives each of trainer.workers={self.trainer.workers} a panel of its own: "
                "set critics.actors to 1 or more, or trainer.workers to 1"
            )
        if self.trainer.workers == 0 and self.critics.actors > 0 and self.adversarial.uses_panel:
            raise ValueError(
                f"critics.actors={self.critics.actors} needs Ray, which trainer.workers=0 does without: "
                "set critics.actors=0, or trainer.workers=1"
            )
        if self.critics.order == "critics_first" and self.trainer.accumulate > 1:
            raise ValueError(
                "critics.order=critics_first cannot judge before all trainer.accumulate="
                f"{self.trainer.accumulate} micro-batches have taught heads: set critics.order=student_first"
            )
        if self.warmup.steps:
            check_batch_sizes({"warmup.batch_size": self.warmup.batch_size}, self.trainer)
        levels = self.critics.levels_per_step if self.adversarial.uses_panel else 1
        if self.adversarial.steps:
            check_batch_sizes({"adversarial.batch_size": self.adversarial.batch_size}, self.trainer, levels)
        return self
