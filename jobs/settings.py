"""The configuration model of every training job; a field's default lives here or in the section it names."""

from typing import Literal

from pydantic import Field, model_validator

from actors.training import TrainerConfig
from actors.wire import COLLECTIVE, Transport, WireDtype
from counterpoint.alarms import AlarmsConfig
from counterpoint.critics.config import CriticsConfig
from counterpoint.data import DataConfig
from counterpoint.diffusion import NoiseConfig
from counterpoint.distillation import AdversarialConfig, WarmupConfig
from counterpoint.dit import DiTConfig
from counterpoint.evaluation import EvaluationConfig
from counterpoint.flow import check_process
from counterpoint.metrics.features import FeatureConfig
from counterpoint.pairs import PairsConfig
from counterpoint.sampling import SamplerConfig, default_sampler
from counterpoint.section import Section
from counterpoint.student import StudentConfig
from counterpoint.teacher import TeacherConfig
from counterpoint.unet import UNetConfig
from jobs.batch_sizes import check_batch_sizes
from jobs.run_names import RunUri


class EvaluatorsConfig(EvaluationConfig):
    """What is scored, and by how many evaluation workers."""

    workers: int = Field(default=1, ge=0)
    """Evaluation workers, each scoring a shard. With 0 the driver's process scores the end, and a teacher's
    trainer its snapshots, for which training waits; a student's are then not scored."""
    cpus_per_worker: float = Field(default=0.25, gt=0.0)
    """Logical CPUs reserved for each."""
    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each."""
    against: Literal["test", "train"] = "test"
    """Real images that snapshots are compared with: held-out ones, or those of the training, which leaves the
    held-out ones to figures that chose nothing."""
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
    replicas: int = Field(default=1, ge=1)
    """Actors for each share of the critic groups, each judging the samples of trainer.workers / replicas
    workers; the gradients of their heads are averaged, so that all hold the same heads."""
    transport: Transport = "object_store"
    """What carries tensors. nixl: gradients come to trainers by Ray's direct transport; gloo: replicas of a
    group exchange what heads learn in a collective group, and a lost one costs the run the steps since its
    last checkpoint."""
    wire_dtype: WireDtype = "float32"
    """What samples and the student's gradients cross as: exact, or rounded to half the bytes."""

    @model_validator(mode="after")
    def _check_actors(self) -> "HostedCriticsConfig":
        if self.actors > len(self.noise_levels):
            raise ValueError(
                f"actors={self.actors} exceeds the {len(self.noise_levels)} critic groups: lower it"
            )
        self._check_transport()
        wired = (self.replicas, self.wire_dtype, self.transport) != (1, "float32", "object_store")
        if self.actors == 0 and wired:
            raise ValueError(
                f"actors=0 keeps the critics in the trainer, with no wire: replicas={self.replicas}, "
                f"wire_dtype={self.wire_dtype} and transport={self.transport} must be 1, float32 and "
                "object_store, or actors 1 or more"
            )
        return self

    def _check_transport(self) -> None:
        """Raise ValueError for a transport with nothing to carry, or whose ends would block each other."""
        if self.transport not in COLLECTIVE:
            return
        if self.replicas == 1:
            raise ValueError(
                f"transport={self.transport} carries what replicas exchange, and a Ray Train worker cannot "
                "be an end of it: set replicas to 2 or more, or transport to object_store or nixl"
            )
        if self.actors != len(self.noise_levels):
            raise ValueError(
                f"transport={self.transport} needs an actor for each of the {len(self.noise_levels)} noise "
                f"levels, not actors={self.actors}: exchanges of one actor would block each other"
            )

    def check_replicas(self, workers: int) -> None:
        """Raise ValueError unless `workers` trainers can be shared out among the replicas."""
        if workers % self.replicas:
            raise ValueError(
                f"critics.replicas={self.replicas} does not divide trainer.workers={workers}, of which each "
                "replica serves as many: choose a divisor"
            )

    def plain(self) -> CriticsConfig:
        """Return the pool's own part."""
        return CriticsConfig(**{name: getattr(self, name) for name in CriticsConfig.model_fields})


class TrainConfig(Section):
    """Train a class-conditional diffusion teacher."""

    learner: Literal["diffusion"] = "diffusion"
    """What is trained: diffusion (this), or linear or policy, which have configurations of their own."""
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
    dit: DiTConfig | None = None
    """A diffusion transformer in place of the UNet."""
    noise: NoiseConfig = NoiseConfig()
    """The forward process."""
    teacher: TeacherConfig = TeacherConfig()
    """Training."""
    sampler: SamplerConfig = Field(
        default_factory=lambda given: default_sampler(given.get("noise", NoiseConfig()))
    )
    """The sampler that figures and pictures of the teacher are made with; Euler's for a flow unless given."""
    steps: tuple[int, ...] = (1, 4, 25)
    """Numbers of steps at which the teacher is scored."""
    features: FeatureConfig = FeatureConfig()
    """The feature space of all figures, trained or loaded once and stored with the teacher."""
    evaluation: EvaluatorsConfig = EvaluatorsConfig(every=0)
    """Scoring. `every` draws a learning curve, of which the figure `fd_halfway` is one point."""
    target_fd: float | None = Field(default=None, gt=0.0)
    """A distance, in the most of `steps`, that the learning curve is to reach: `steps_to_target` says after
    how many training steps it did, between snapshots by the logarithm. Where it did not, that is a lower
    bound: the last snapshot's step and `evaluation.every` more."""
    trainer: TrainerConfig = TrainerConfig()
    """Workers, checkpoints and failures."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        check_batch_sizes({"teacher.batch_size": self.teacher.batch_size}, self.trainer)
        check_process(self.sampler.scheduler, self.sampler.options, self.noise.process)
        if self.target_fd is not None and not self.evaluation.every:
            raise ValueError(
                f"target_fd={self.target_fd} is looked for in scores of snapshots, and evaluation.every=0 "
                "takes none: set evaluation.every to the steps between two"
            )
        if self.dit is not None and self.dit.learned_variance and self.noise.process == "flow":
            raise ValueError(
                "dit.learned_variance=true with noise.process=flow: a flow's steps have no variance; set "
                "learned_variance=false, or process=diffusion"
            )
        return self

    @property
    def network(self) -> UNetConfig | DiTConfig:
        """The shape of the network that is trained."""
        return self.dit or self.unet


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
        check_distillation(self.critics, self.warmup, self.adversarial, self.trainer)
        return self


def check_distillation(
    critics: HostedCriticsConfig, warmup: WarmupConfig, adversarial: AdversarialConfig, trainer: TrainerConfig
) -> None:
    """Raise ValueError where the sections of a distillation do not fit together."""
    if critics.actors == 0 and trainer.workers > 1 and adversarial.uses_panel:
        raise ValueError(
            f"critics.actors=0 gives each of trainer.workers={trainer.workers} a panel of its own: "
            "set critics.actors to 1 or more, or trainer.workers to 1"
        )
    if trainer.workers == 0 and critics.actors > 0 and adversarial.uses_panel:
        raise ValueError(
            f"critics.actors={critics.actors} needs Ray, which trainer.workers=0 does without: "
            "set critics.actors=0, or trainer.workers=1"
        )
    if critics.actors > 0 and adversarial.uses_panel:
        critics.check_replicas(max(1, trainer.workers))
    if critics.order == "critics_first" and trainer.accumulate > 1:
        raise ValueError(
            "critics.order=critics_first cannot judge before all trainer.accumulate="
            f"{trainer.accumulate} micro-batches have taught heads: set critics.order=student_first"
        )
    if warmup.steps:
        check_batch_sizes({"warmup.batch_size": warmup.batch_size}, trainer)
    levels = critics.levels_per_step if adversarial.uses_panel else 1
    if adversarial.steps:
        check_batch_sizes({"adversarial.batch_size": adversarial.batch_size}, trainer, levels)
