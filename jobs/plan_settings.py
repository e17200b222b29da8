"""What a plan is made of: the configuration of the job, as it is, and the machines it is planned for."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from counterpoint.section import Section
from jobs.config import choice, parse_config
from jobs.config_source import read_file
from jobs.run_names import absolute
from jobs.settings import DistillConfig, TrainConfig
from jobs.text_settings import DistillTextConfig
from jobs.train_policy import PolicyTrainConfig

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as "80GiB" or "16 GB" names; raises ValueError with one line."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no size of memory: write a number and a unit, such as 80GiB or 24GB")
    return int(float(found[1]) * UNITS[found[2]])


def _checked(text: str) -> str:
    parse_bytes(text)
    return text


Size = Annotated[str, AfterValidator(_checked)]
"""A size of memory with its unit."""


class MachinesConfig(Section):
    """The machines a job is planned for; all other fields are the job's own."""

    job: str | None = None
    """distill, distill_text, train or train_policy; unset is told from the keys of the file."""
    gpus: int = Field(default=8, ge=0)
    """GPUs in all; 0 plans for processors."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of one machine."""
    gpu_memory: Size = "80GiB"
    """Memory of one GPU."""
    host_memory: Size | None = None
    """Memory of one machine; unset does not check it."""
    teacher_config: Path | None = None
    """Configuration that makes the teacher (jobs.train, or jobs.encode with model.build), where it is not
    there yet; unset looks for one among the files beside this one."""
    unet_shape: Any = None
    """Shape of the text-to-image UNet as in diffusers' config.json, where the teacher is not there yet."""
    prompt_tokens: int = Field(default=77, ge=1)
    """Tokens of an encoded prompt, where the prompts are not encoded yet."""


class DistillPlan(MachinesConfig, DistillConfig):
    """Plan a distillation."""


class TextPlan(MachinesConfig, DistillTextConfig):
    """Plan a text-to-image distillation."""


class TrainPlan(MachinesConfig, TrainConfig):
    """Plan the training of a diffusion teacher."""


class PolicyPlan(MachinesConfig, PolicyTrainConfig):
    """Plan the training of a policy."""


PLANS: dict[str, type[MachinesConfig]] = {
    "distill": DistillPlan, "distill_text": TextPlan, "train": TrainPlan, "train_policy": PolicyPlan,
}  # fmt: skip


def with_teacher(model: type[MachinesConfig], argv: Sequence[str]) -> list[str]:
    """Add `teacher_config` to `argv`, if a file beside the configuration is that of the teacher's run."""
    path = _file_in(argv)
    if path is None or {"--help", "-h"} & set(argv) or not issubclass(model, DistillPlan | TextPlan):
        return list(argv)
    config = parse_config(model, argv)
    if config.teacher_config is not None:
        return list(argv)
    for other in sorted(path.parent.glob("*.y*ml")):
        run = read_file(other).get("run")
        if isinstance(run, str) and other != path and absolute(run) == config.teacher:
            return [*argv, f"teacher_config={other}"]
    return list(argv)


def _file_in(argv: Sequence[str]) -> Path | None:
    found = next((a for a in argv if not a.startswith("--") and a.endswith((".yaml", ".yml"))), None)
    return Path(found) if found else None


def plan_of(argv: Sequence[str]) -> type[MachinesConfig]:
    """Return the model of the job that `argv` configures: the one its `job` names, else by its keys."""
    path = _file_in(argv)
    keys = read_file(path) if path else {}
    guess = "distill"
    if keys.get("learner") == "policy":
        guess = "train_policy"
    elif "prompts" in keys or "lora" in keys or "held_out" in keys:
        guess = "distill_text"
    elif "learner" in keys or ("unet" in keys and "critics" not in keys):
        guess = "train"
    # `choice` reads `job=x` and not `--job x`.
    plain = [f"job={b}" if a == "--job" else a for a, b in zip(argv, [*argv[1:], ""], strict=True)]
    return choice(plain, "job", {guess: PLANS[guess]} | PLANS)
