"""A distillation step with the panel in actors against the same maths in one process, on the same cores."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from actors.critics import HostSettings, critic_actor
from actors.panel import HostHandle, RemotePanel, Timings
from actors.recipe import PIPELINE, PanelRecipe, build_local_panel, build_pieces, load_unet
from cluster.connect import connected, thread_env
from cluster.waiting import ready
from counterpoint.critics.panel import Panel
from counterpoint.data import DataConfig, ImageSet, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.distillation import AdversarialConfig, Distiller, WarmupConfig
from counterpoint.pairs import Pairs
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.student import StudentConfig, student_timesteps
from counterpoint.unet import UNetConfig, build_unet
from jobs.settings import HostedCriticsConfig
from jobs.stage import shares


class PanelBenchConfig(Section):
    """Both sides train the same student on the same batches against the same heads, in turns."""

    data: DataConfig = DataConfig()
    """Images; the network's weights are random, which costs the same."""
    unet: UNetConfig = UNetConfig()
    """The network of teacher and student."""
    critics: HostedCriticsConfig = HostedCriticsConfig(
        levels_per_step=4, heads_per_slot=2, refresh_rate=0.0025
    )
    """The panel."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per step."""
    steps: int = Field(default=15, ge=1)
    """Steps per turn."""
    rounds: int = Field(default=6, ge=1)
    """Turns of each side; the ratio is the median over rounds."""
    threads: int = Field(default=0, ge=0)
    """Threads of the trainer and of the one process; 0 keeps torch's default, one per core."""


def main(config: PanelBenchConfig) -> dict[str, Any]:
    """Return `ratio` (samples per second, actors over one process) and where a step's time goes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    train = load_data(config.data).train
    with tempfile.TemporaryDirectory() as folder, connected():
        unet = build_unet(config.unet, train.image_shape[0], train.image_shape[1], train.num_classes, 0)
        unet.save_pretrained(Path(folder) / PIPELINE / "unet")
        recipe = PanelRecipe(folder, config.critics.plain(), NoiseConfig(), 0)
        remote = remote_panel(config, recipe, folder)
        panels: dict[str, Panel] = {
            "actors": remote,
            "process": build_local_panel(recipe, torch.device("cpu")),
        }
        sides = {name: distiller(config, recipe, train, panel) for name, panel in panels.items()}
        return measure(config, sides, remote)


def measure(config: PanelBenchConfig, sides: dict[str, Distiller], remote: RemotePanel) -> dict[str, Any]:
    """Let both sides take turns, after one turn each that is not counted."""
    taken = {name: turn(side, 0, config.steps) for name, side in sides.items()}
    remote.timings = Timings()
    ratios, actors = [], 0.0
    for number in range(1, config.rounds + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        taken = {name: turn(sides[name], number * config.steps, config.steps) for name in order}
        ratios.append(taken["process"] / taken["actors"])
        actors += taken["actors"]
    steps = config.rounds * config.steps
    pairs = zip(sides["actors"].unet.parameters(), sides["process"].unet.parameters(), strict=True)
    spent = {
        name: round(getattr(remote.timings, name) / steps, 5) for name in ("compute_s", "wire_s", "wait_s")
    }
    return {
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        **spent,
        "step_s": round(actors / steps, 5),
        "threads": torch.get_num_threads(),
        "largest_weight_difference": max(float((a - b).detach().abs().max()) for a, b in pairs),
    }


def turn(side: Distiller, first: int, steps: int) -> float:
    """Return the seconds that `steps` steps take."""
    begun = time.perf_counter()
    for step in range(first, first + steps):
        side.step(step)
    return time.perf_counter() - begun


def remote_panel(config: PanelBenchConfig, recipe: PanelRecipe, folder: str) -> RemotePanel:
    """Start the hosts and return the panel over them."""
    hosts = []
    for index, groups in enumerate(shares(len(config.critics.noise_levels), config.critics.actors)):
        settings = HostSettings(
            f"critics-{index}", groups, f"{folder}/snapshots", config.critics.snapshot_every, 60.0
        )
        actor = critic_actor(len(groups), 1).options(
            num_cpus=config.critics.cpus_per_actor,
            runtime_env={"env_vars": thread_env(config.critics.threads)},
        )
        hosts.append(HostHandle(settings.name, groups, actor.remote(recipe, settings)))
    ready({host.name: host.actor for host in hosts}, timeout=120.0, what="start of the critic hosts")
    pool, _, _ = build_pieces(recipe, torch.device("cpu"))
    return RemotePanel(pool, hosts)


def distiller(config: PanelBenchConfig, recipe: PanelRecipe, train: ImageSet, panel: Panel) -> Distiller:
    """Return a trainer of a student against `panel`, from pairs of noise."""
    stream = generator(0, "bench-pairs")
    shape = (1024, *train.image_shape)
    states = {t: torch.randn(shape, generator=stream) for t in student_timesteps(4)}
    labels = torch.arange(shape[0]) % train.num_classes
    pairs = Pairs(
        torch.randn(shape, generator=stream), labels, torch.randn(shape, generator=stream), states, 1000
    )
    steps = (config.rounds + 1) * config.steps
    adversarial = AdversarialConfig(steps=steps, heads_alone=0, batch_size=config.batch_size)
    return Distiller(
        load_unet(recipe.teacher), build_noise_scheduler(recipe.noise), pairs, train, panel, StudentConfig(),
        WarmupConfig(steps=0), adversarial, seed=0,
    )  # fmt: skip
