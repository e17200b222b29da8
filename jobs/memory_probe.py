"""The memory of one process that trains or judges, estimated or measured: what `jobs.bench memory` compares.

    python -m jobs.memory_probe CASE RANK RENDEZVOUS

Run as a program it does the work for real and prints what it held at most, as one line of JSON.
"""

import os
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn

from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.encoder import FrozenEncoder
from counterpoint.critics.group import CriticGroup, Samples
from counterpoint.critics.pool import build_pool
from counterpoint.critics.views import patch_side
from counterpoint.data.images import ImageSet
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.footprint.group import trace_group
from counterpoint.footprint.learner import trace_learner
from counterpoint.footprint.micro_steps import teacher_micro_step
from counterpoint.footprint.sharding import share_out
from counterpoint.footprint.tracing import on_paper
from counterpoint.optimization import OptimizerConfig
from counterpoint.place import Place
from counterpoint.section import Section
from counterpoint.strategies.config import StrategyConfig
from counterpoint.strategies.zero import load_deepspeed
from counterpoint.teacher import TeacherConfig, TeacherTrainer
from counterpoint.unet import UNetConfig, build_unet
from jobs.config import result_line

CLASSES, IMAGES = 10, 64
STEPS = 2


class MemoryCase(Section):
    """One process whose memory is estimated and measured."""

    role: Literal["trainer", "critics"] = "trainer"
    """trainer: steps of a teacher's training; critics: judgements of one critic group."""
    unet: UNetConfig = UNetConfig(
        block_out_channels=(128, 256, 384), layers_per_block=2, attention=(False, True, True),
        mid_attention=True, norm_num_groups=32,
    )  # fmt: skip
    """The network of the trainer, or of the critics' encoder."""
    channels: int = Field(default=3, ge=1)
    """Channels of the images."""
    side: int = Field(default=32, ge=4)
    """Side of the images in pixels."""
    samples: int = Field(default=16, ge=1)
    """Samples of one micro-batch of one trainer; or that the group judges at once."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per step."""
    ranks: int = Field(default=1, ge=1)
    """Trainers, over gloo on this machine; each is measured."""
    strategy: StrategyConfig = StrategyConfig()
    """How the trainers share out what they hold."""
    critics: CriticsConfig = CriticsConfig()
    """The pool of heads."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape [C,H,W] of an image."""
        return self.channels, self.side, self.side


def estimate(case: MemoryCase) -> int:
    """Return the bytes that each process of `case` should hold at most, worked out on paper."""
    noise = build_noise_scheduler(NoiseConfig())
    with on_paper() as ledger:
        if case.role == "critics":
            group = trace_group(
                ledger, lambda: FrozenEncoder(_unet(case)), case.critics, case.samples, noise.alphas_cumprod
            )
            return group.peak + group.scratch
        unet = _unet(case).train()
        micro_step = teacher_micro_step(noise, case.shape, case.samples)
        trace = trace_learner(
            ledger, unet, micro_step, OptimizerConfig(), case.strategy, case.accumulate, case.ranks
        )
    return share_out(trace, case.strategy, case.ranks, case.accumulate).host


def work(case: MemoryCase, rank: int, rendezvous: str) -> dict[str, int]:
    """Do the work of `case` and return its peak: resident bytes beyond what the imported libraries hold."""
    torch.set_num_threads(1)
    if case.ranks > 1:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=case.ranks)
    if case.strategy.name == "deepspeed":
        _load_deepspeed(case, rank)
    _warm_up()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    _judge(case) if case.role == "critics" else _train(case, rank)
    peak = resident("VmHWM") - before
    if case.ranks > 1:
        dist.destroy_process_group()
    return {"peak": peak, "before": before}


def resident(field: str) -> int:
    """Return a memory field of this process in bytes, as Linux counts it: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _train(case: MemoryCase, rank: int) -> None:
    images = ImageSet(
        torch.rand(IMAGES, *case.shape) * 2 - 1, torch.arange(IMAGES) % CLASSES, CLASSES, "made up"
    )
    batch = case.samples * case.accumulate * case.ranks
    config = TeacherConfig(steps=STEPS, batch_size=batch)
    trainer = TeacherTrainer(
        _unet(case), build_noise_scheduler(NoiseConfig()), images, config, 0,
        Place(rank, case.ranks, strategy=case.strategy), case.accumulate,
    )  # fmt: skip
    for step in range(STEPS):
        trainer.step(step)


def _judge(case: MemoryCase) -> None:
    alphas = build_noise_scheduler(NoiseConfig()).alphas_cumprod
    encoder = FrozenEncoder(_unet(case))
    shapes = [encoder.map_shapes(side) for side in (case.side, patch_side(case.critics, case.side))]
    group = CriticGroup(
        build_pool(case.critics, shapes[0], shapes[1], case.side, alphas, 0), 0, encoder, alphas
    )
    for step in range(STEPS):
        fake, real = torch.randn(2, case.samples, *case.shape)
        group.judge(Samples(step, fake, real, torch.arange(case.samples) % CLASSES))


def _unet(case: MemoryCase) -> nn.Module:
    return build_unet(case.unet, case.channels, case.side, CLASSES, 0)


def _load_deepspeed(case: MemoryCase, rank: int) -> None:
    """Say what DeepSpeed reads from a launcher's environment, and load it before anything is measured."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
    load_deepspeed().init_distributed("gloo", auto_mpi_discovery=False, dist_init_required=False)


def _warm_up() -> None:
    """Load what the first operations load."""
    layer = nn.Conv2d(8, 8, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.zeros(1, 8, 8, 8)).sum().backward()
    optimizer.step()


if __name__ == "__main__":
    result_line(work(MemoryCase.model_validate_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
