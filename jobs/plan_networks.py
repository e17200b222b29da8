"""The networks of a job as they are built on paper: from a stored teacher's shape or from a configuration."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel, UNet2DModel
from torch import nn

from actors.prompted import is_hub_id, model_part
from actors.recipe import PIPELINE
from cluster.storage import RunStore
from counterpoint.critics.encoder import FrozenEncoder
from counterpoint.critics.prompted_encoder import PromptedEncoder
from counterpoint.data import load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler, check_distillable
from counterpoint.dit import build_network
from counterpoint.lora import add_lora
from counterpoint.prompted import PromptedUNet
from counterpoint.tiny_sdxl import build_tiny_sdxl
from jobs.config import parse_config
from jobs.encode import EncodeConfig
from jobs.plan_settings import DistillPlan, MachinesConfig, TextPlan, TrainPlan
from jobs.runs import read_config
from jobs.sdxl_parts import SDXL, MadePrompts
from jobs.settings import TrainConfig

SDXL_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Network:
    """What a job trains, to be built on paper."""

    shape: tuple[int, int, int]
    """Shape [C,H,W] of a sample."""
    noise: SchedulerMixin
    build: Callable[[], nn.Module]
    """Builds the network that learns."""
    frozen: Callable[[], nn.Module]
    """Builds the teacher."""
    encoder: Callable[[], nn.Module]
    """Builds the critics' frozen encoder."""
    images: int = 0
    """Bytes of the images that every trainer keeps."""


def network_of(config: MachinesConfig) -> Network:
    """Return the networks of a planned job; raises ValueError with one line if nothing says their shape."""
    if isinstance(config, TextPlan):
        return _prompted(config)
    if isinstance(config, TrainPlan):
        return _trained(config)
    assert isinstance(config, DistillPlan)
    store = RunStore(config.teacher)
    if not store.exists(f"{PIPELINE}/unet/config.json"):
        if config.teacher_config is not None:
            unborn: TrainConfig = parse_config(TrainConfig, [str(config.teacher_config)])
            check_distillable(unborn.noise, config.teacher)
            return _trained(unborn)
        raise ValueError(
            f"teacher={config.teacher} is not a finished run: train it, or give its configuration, such as "
            "teacher_config=configs/digits/teacher.yaml"
        )
    shape = json.loads(store.read_text(f"{PIPELINE}/unet/config.json"))
    teacher: TrainConfig = read_config(store, TrainConfig)
    check_distillable(teacher.noise, config.teacher)
    images = int(load_data(teacher.data).train.images.nbytes)
    return _of_unet(lambda: UNet2DModel.from_config(shape), shape, teacher.noise, images)


def _trained(teacher: TrainConfig) -> Network:
    train = load_data(teacher.data).train
    channels, side, _ = train.image_shape
    shape = {"in_channels": channels, "sample_size": side}

    def build() -> nn.Module:
        return build_network(teacher.network, channels, side, train.num_classes, 0)

    return _of_unet(build, shape, teacher.noise, train.images.nbytes)


def _of_unet(
    build: Callable[[], nn.Module], shape: Mapping[str, Any], noise: NoiseConfig, images: int
) -> Network:
    side = int(shape["sample_size"])
    return Network(
        (int(shape["in_channels"]), side, side),
        build_noise_scheduler(noise),
        build,
        build,
        lambda: FrozenEncoder(build()),
        images,
    )


def _prompted(config: TextPlan) -> Network:
    """The text-to-image networks, prompted from a table that is made up."""
    full = dict(config.unet_shape or _shape(config))
    side = int(full["sample_size"])

    def frozen() -> Any:
        return PromptedUNet.from_config(full).attach(_prompts(full, config))

    def build() -> nn.Module:
        unet: nn.Module = add_lora(frozen(), config.lora, 0) if config.lora.rank else frozen()
        return unet

    def encoder() -> nn.Module:
        unet = frozen()
        eyes = PromptedEncoder(unet, unet.table, config.patch_time_ids)
        dtype = DTYPES[config.encoder_dtype]
        for part in eyes.modules():
            for name, p in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))
        return eyes

    noise = build_noise_scheduler(NoiseConfig())
    return Network((int(full["in_channels"]), side, side), noise, build, frozen, encoder)


def _prompts(shape: Mapping[str, Any], config: TextPlan) -> MadePrompts:
    return MadePrompts(shape, 1, torch.device("cpu"), config.prompt_tokens)


def _shape(config: TextPlan) -> dict[str, Any]:
    """The shape of the teacher's UNet: stored, of a known name, or as an encoding that builds it says."""
    if config.teacher == SDXL_NAME:
        return dict(SDXL)
    stored = is_hub_id(config.teacher) or RunStore(config.teacher).exists(f"{PIPELINE}/manifest.json")
    if config.teacher_config is not None and not stored:
        encoding = parse_config(EncodeConfig, [str(config.teacher_config)])
        if encoding.model.build is not None:
            return dict(build_tiny_sdxl(encoding.model.build, encoding.seed).unet.config)
    return _stored_shape(config.teacher)


def _stored_shape(teacher: str) -> dict[str, Any]:
    try:
        with model_part(teacher, "unet") as (where, options):
            if options:
                return dict(UNet2DConditionModel.load_config(where, **options))
            found: dict[str, Any] = json.loads((Path(where) / "config.json").read_text())
            return found
    except (ValueError, OSError) as error:
        raise ValueError(
            f"teacher={teacher} cannot be read ({' '.join(str(error).split())}): give the UNet's shape as "
            "unet_shape, as configs/sdxl/plan.yaml does"
        ) from None
