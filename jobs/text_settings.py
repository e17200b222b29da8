"""The configuration model of text-to-image distillation."""

from typing import Literal

from pydantic import Field, model_validator

from actors.training import TrainerConfig
from counterpoint.alarms import AlarmsConfig
from counterpoint.critics.prompted_encoder import PatchIds
from counterpoint.distillation import AdversarialConfig, WarmupConfig
from counterpoint.held_out import HeldOutConfig
from counterpoint.lora import LoraSection
from counterpoint.pairs import PairsConfig
from counterpoint.section import Section
from counterpoint.student import StudentConfig
from jobs.encode import ModelUri
from jobs.run_names import RunUri
from jobs.settings import HostedCriticsConfig, check_distillation


class DistillTextConfig(Section):
    """Distil a text-to-image model of SDXL's family into a one- to four-step student against a panel."""

    run: RunUri = "runs/sdxl/student"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    teacher: ModelUri = "runs/sdxl/prompts"
    """Pipeline of the teacher: a folder or run on any storage, or a hub id as `from_pretrained` takes it."""
    prompts: RunUri = "runs/sdxl/prompts"
    """URI of a finished run of jobs.encode, made with the teacher's encoders."""
    start: ModelUri | None = None
    """Pipeline whose UNet the student starts from; unset starts from the teacher's."""
    resume: bool = False
    """Go on with the run that is there; without it a used `run` is refused."""
    seed: int = 0
    """Seed of everything random in the run."""
    lora: LoraSection = LoraSection()
    """Adapters that are trained instead of the whole student; rank 0 for none."""
    pairs: PairsConfig = PairsConfig(count=1024, chunk=64)
    """The teacher's pairs, of the prompts that are not held out."""
    student: StudentConfig = StudentConfig()
    """How the student steps."""
    warmup: WarmupConfig = WarmupConfig()
    """Regression on the pairs."""
    adversarial: AdversarialConfig = AdversarialConfig(real="teacher")
    """Training against the panel; `real: data` compares with the latents of the prompts' own images."""
    critics: HostedCriticsConfig = HostedCriticsConfig()
    """The panel."""
    patch_time_ids: PatchIds = "image"
    """Time ids that windows show to local critics: the whole image's, or the window's own crop and size."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the critics' frozen encoder."""
    steps: tuple[int, ...] = (1,)
    """Numbers of steps at which the student is measured."""
    held_out: HeldOutConfig = HeldOutConfig()
    """The measurement on prompts that no pair is made of."""
    pictures: int = Field(default=8, ge=0)
    """Held-out samples that are decoded for the picture of teacher and student; 0 for none."""
    alarms: AlarmsConfig = AlarmsConfig()
    """When to raise an alarm."""
    trainer: TrainerConfig = TrainerConfig()
    """Workers, checkpoints and failures."""

    @model_validator(mode="after")
    def _check(self) -> "DistillTextConfig":
        check_distillation(self.critics, self.warmup, self.adversarial, self.trainer)
        return self
