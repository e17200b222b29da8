"""The smallest configurations of the jobs that still go through every stage."""

from pathlib import Path
from typing import Any, Literal

import torch

from actors.critics import HostSettings, critic_actor
from actors.panel import HostHandle, RemotePanel, introduce
from actors.recipe import PanelRecipe, build_local_panel, build_pieces, load_unet
from actors.wire import Transport, WireDtype
from cluster.waiting import ready
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.panel import Panel
from counterpoint.data import DataConfig, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.distillation import AdversarialConfig, Distiller, WarmupConfig
from counterpoint.pairs import Pairs
from counterpoint.seeds import generator
from counterpoint.student import StudentConfig, student_timesteps
from jobs.settings import DistillConfig, TrainConfig

HERE = {"trainer": {"workers": 0, "threads": 1, "checkpoint_every": 5}}
UNET = {"block_out_channels": [16, 16], "norm_num_groups": 8}
CRITICS: dict[str, Any] = {
    "levels_per_step": 4,
    "heads_per_slot": 2,
    "refresh_rate": 0.01,
    "width": 4,
    "groups": 2,
    "reduction": "mean",
}


def train_config(run: Path, **options: Any) -> TrainConfig:
    """A teacher of a few steps, trained in this process."""
    base: dict[str, Any] = {
        "run": str(run), "unet": UNET, "steps": [1, 4], "teacher": {"steps": 12, "batch_size": 16},
        "features": {"classifier": {"steps": 30}}, "evaluation": {"workers": 0, "samples": 80}, **HERE,
    }  # fmt: skip
    return TrainConfig.model_validate(base | options)


def distill_config(run: Path, teacher: str, **options: Any) -> DistillConfig:
    """A student of a few steps through all three stages, trained in this process."""
    base: dict[str, Any] = {
        "run": str(run), "teacher": teacher, "pairs": {"count": 64, "chunk": 32, "steps": 4},
        "warmup": {"steps": 6, "batch_size": 16},
        "adversarial": {"heads_alone": 3, "steps": 8, "batch_size": 16},
        "critics": CRITICS | {"actors": 0}, "evaluation": {"workers": 0, "samples": 80}, **HERE,
    }  # fmt: skip
    return DistillConfig.model_validate(base | options)


def panel_recipe(teacher: str, **critics: Any) -> PanelRecipe:
    """A small panel over the tiny teacher."""
    return PanelRecipe(teacher, CriticsConfig(**CRITICS | critics), NoiseConfig(), seed=3)


def start_hosts(
    recipe: PanelRecipe, shares: list[tuple[int, ...]], folder: Path, ranks: int = 1, replicas: int = 1,
    wire_dtype: WireDtype = "float32", transport: Transport = "object_store",
) -> list[HostHandle]:  # fmt: skip
    """Start hosts of the groups in `shares`, one actor for each replica."""
    hosts = []
    for replica in range(replicas):
        for index, groups in enumerate(shares):
            settings = HostSettings(
                f"critics-{index}-{replica}", groups, str(folder / str(replica)), 7, 400.0, replica, replicas,
                transport, str(folder),
            )  # fmt: skip
            made = critic_actor(len(groups), ranks // replicas, replicas, transport=transport)
            actor = made.options(num_cpus=0.1).remote(recipe, settings)
            hosts.append(HostHandle(settings.name, groups, actor, replica, replicas, wire_dtype, transport))
    ready({host.name: host.actor for host in hosts}, timeout=400.0, what="hosts")
    introduce(hosts, hosts, timeout=240.0)
    return hosts


def remote_panel(
    recipe: PanelRecipe, hosts: list[HostHandle], rank: int = 0, ranks: int = 1, patience: float = 400.0
) -> RemotePanel:
    """The panel over running hosts."""
    return RemotePanel(build_pieces(recipe, torch.device("cpu"))[0], hosts, rank, ranks, patience)


def local_panel(recipe: PanelRecipe) -> Panel:
    """The same panel in this process."""
    return build_local_panel(recipe, torch.device("cpu"))


def distiller(
    recipe: PanelRecipe, panel: Panel, steps: int, staleness: Literal[0, 1] = 0, **options: Any
) -> Distiller:
    """A student's trainer against `panel`, from pairs of noise."""
    train = load_data(DataConfig()).train
    stream = generator(0, "pairs")
    shape = (64, *train.image_shape)
    noise, images = torch.randn(shape, generator=stream), torch.rand(shape, generator=stream) * 2 - 1
    states = {t: torch.randn(shape, generator=stream) for t in student_timesteps(4)}
    pairs = Pairs(noise, torch.arange(64) % 10, images, states, 1000)
    adversarial = AdversarialConfig(
        heads_alone=0, steps=steps, batch_size=16, adversarial_weight=0.5, staleness=staleness
    )
    return Distiller(
        load_unet(recipe.teacher), build_noise_scheduler(recipe.noise), pairs, train, panel, StudentConfig(),
        WarmupConfig(steps=0), adversarial, seed=5, **options,
    )  # fmt: skip
