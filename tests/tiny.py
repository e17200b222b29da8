"""The smallest networks, panels and batches that still have every part, for the tests of the maths."""

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.encoder import FrozenEncoder
from counterpoint.critics.group import CriticGroup, Samples
from counterpoint.critics.heads import HeadShape
from counterpoint.critics.panel import LocalPanel
from counterpoint.critics.pool import Pool, build_pool
from counterpoint.critics.views import patch_side
from counterpoint.data import DataConfig, ImageSet, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.pairs import Pairs
from counterpoint.student import student_timesteps
from counterpoint.unet import UNetConfig, build_unet

SIDE, CLASSES = 8, 10
ABAR: Tensor = build_noise_scheduler(NoiseConfig()).alphas_cumprod
CRITICS: dict[str, Any] = {"heads_per_slot": 2, "width": 4, "groups": 2, "learning_rate": 1e-2}
"""Small heads; the rest of CriticsConfig's defaults."""


def unet(channels: tuple[int, ...] = (16, 16), seed: int = 0, **options: Any) -> UNet2DModel:
    """A UNet for [1, 8, 8] images of ten classes."""
    config = UNetConfig(block_out_channels=channels, norm_num_groups=8, **options)
    return build_unet(config, 1, SIDE, CLASSES, seed)


def pool(config: CriticsConfig, encoder: FrozenEncoder, seed: int = 0) -> Pool:
    """The pool over an encoder's maps."""
    whole, patches = encoder.map_shapes(SIDE), encoder.map_shapes(patch_side(config, SIDE))
    return build_pool(config, whole, patches, SIDE, ABAR, seed)


def panel(seed: int = 0, network: UNet2DModel | None = None, **options: Any) -> LocalPanel:
    """All critic groups of CriticsConfig(**CRITICS | options)."""
    encoder = FrozenEncoder(network or unet())
    return LocalPanel(pool(CriticsConfig(**CRITICS | options), encoder, seed), encoder, ABAR)


def group(index: int = 1, seed: int = 0, **options: Any) -> CriticGroup:
    """One critic group of CriticsConfig(**CRITICS | options)."""
    encoder = FrozenEncoder(unet())
    return CriticGroup(pool(CriticsConfig(**CRITICS | options), encoder, seed), index, encoder, ABAR)


def samples(step: int = 0, n: int = 6, **options: Any) -> Samples:
    """Random samples that depend on `step` alone."""
    stream = torch.Generator().manual_seed(step)
    fake, real = torch.randn(2, n, 1, SIDE, SIDE, generator=stream)
    return Samples(step, fake, real, torch.randint(0, CLASSES, (n,), generator=stream), **options)


def rows_of(group: CriticGroup) -> Tensor:
    """All heads' weights of a group as one vector."""
    return torch.cat([bank.rows.flatten() for bank in group.banks]).clone()


def single_head(shape: HeadShape, row: Tensor, stages: int) -> nn.Sequential:
    """The head of one row, as the paper describes it, out of torch's own modules.

    A stage that leaves one position has no norm; see `counterpoint.critics.heads`.
    """
    layers: list[nn.Module] = []
    channels, side = shape.channels, shape.side
    for _ in range(stages):
        layers.append(nn.Conv2d(channels, shape.width, 4, stride=2, padding=1))
        side //= 2
        layers += [nn.GroupNorm(shape.groups, shape.width)] if side > 1 else []
        layers.append(nn.SiLU())
        channels = shape.width
    if not stages:
        layers += [nn.Conv2d(channels, shape.width, 1), nn.SiLU()]
    layers += [nn.Conv2d(shape.width, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    head = nn.Sequential(*layers).to(row.dtype)
    nn.utils.vector_to_parameters(row.clone(), head.parameters())
    return head


def double(group: CriticGroup) -> CriticGroup:
    """The same group in double precision, so that comparisons need no tolerance to speak of."""
    group.encoder.double()
    for bank in group.banks:
        bank.rows, bank.exp_avg, bank.exp_avg_sq = (
            x.double() for x in (bank.rows, bank.exp_avg, bank.exp_avg_sq)
        )
    return group


def digits(n: int = 60) -> ImageSet:
    """Some real digits, all classes among them."""
    return load_data(DataConfig()).train.subset(range(n))


def pairs(n: int = 40, dtype: torch.dtype = torch.float32) -> Pairs:
    """Noise that is said to end in real digits, with states of the forward process on the way."""
    images = digits(60)
    noise = torch.randn(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)
    ends = images.images[:n].to(dtype)
    states = {t: ABAR[t].sqrt() * ends + (1 - ABAR[t]).sqrt() * noise for t in student_timesteps(4)}
    return Pairs(noise, images.labels[:n], ends, states, 1000)
