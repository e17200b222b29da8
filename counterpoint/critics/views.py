"""What a critic group looks at: noised images and windows of them, as the frozen encoder's feature maps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.critics.config import KINDS, CriticsConfig
from counterpoint.critics.encoder import Encoder
from counterpoint.diffusion import add_noise
from counterpoint.seeds import generator

Features = list[list[Tensor]]
"""Feature maps [n or n * windows, C, s, s] by kind (index into KINDS) and level; empty for unused kinds."""


@dataclass(frozen=True)
class Look:
    """The random part of how one kind of image (real or fake) is looked at in one step."""

    noise: Tensor
    """Gaussian noise [n,C,H,W]."""
    corners: Tensor
    """Top and left corner of each window, int64 [n * windows, 2]."""


def draw_looks(
    config: CriticsConfig,
    seed: int,
    name: tuple[int | str, ...],
    images: Tensor,
    micro: int = 0,
    micros: int = 1,
) -> tuple[Look, Look]:
    """Draw the looks at the fake and the real images [n,C,H,W] of one message, from the stream `name`.

    The draws are made for the whole step and cut to micro-batch `micro` of `micros`, so that an accumulated
    step sees what the same samples would see in one batch.
    """
    n = images.shape[0]
    part = slice(micro * n, (micro + 1) * n)
    stream = generator(seed, "look", *name)
    positions = images.shape[-1] - patch_side(config, images.shape[-1]) + 1
    looks = []
    for _ in ("fake", "real"):
        noise = torch.randn((n * micros, *images.shape[1:]), generator=stream)
        corners = torch.randint(0, positions, (n * micros, config.patch_windows, 2), generator=stream)
        looks.append(Look(noise[part].to(images), corners[part].flatten(0, 1).to(images.device)))
    fake, real = looks
    noise = fake.noise if config.share_noise else real.noise
    return fake, Look(noise, fake.corners if config.same_window else real.corners)


def draw_wrong_labels(
    seed: int, name: tuple[int | str, ...], labels: Tensor, classes: int, micro: int = 0, micros: int = 1
) -> Tensor:
    """Draw another of the `classes` for each label [n]; cut to a micro-batch as in `draw_looks`."""
    n = len(labels)
    shift = torch.randint(1, classes, (n * micros,), generator=generator(seed, "wrong", *name))
    return (labels + shift[micro * n : (micro + 1) * n].to(labels)) % classes


def patch_side(config: CriticsConfig, side: int) -> int:
    """Return the side of a window of `side`-pixel images; raises ValueError if it does not fit."""
    patch = config.patch_side or side // 2
    if not 1 <= patch <= side:
        raise ValueError(
            f"critics.patch_side={patch} does not fit images of {side} pixels: use at most {side}"
        )
    return patch


def cut_windows(images: Tensor, corners: Tensor, patch: int) -> Tensor:
    """Cut windows [n * w, C, patch, patch] at `corners` [n * w, 2] from images [n,C,H,W], w per image."""
    device = images.device
    owner = torch.arange(images.shape[0], device=device).repeat_interleave(len(corners) // images.shape[0])
    offsets = torch.arange(patch, device=device)
    rows = (corners[:, :1] + offsets)[:, None, :, None]
    columns = (corners[:, 1:] + offsets)[:, None, None, :]
    channels = torch.arange(images.shape[1], device=device)[None, :, None, None]
    return images[owner[:, None, None, None], channels, rows, columns]


def look_at(
    encoder: Encoder,
    config: CriticsConfig,
    images: Tensor,
    labels: Tensor,
    look: Look,
    timestep: int,
    alphas_cumprod: Tensor,
) -> Features:
    """Return the features of images [n,C,H,W] noised to `timestep`, for every kind in use.

    Whole images under `labels` [n] for global heads; windows of the same noised images for local ones, under
    the labels or the null class. Differentiable in `images`.
    """
    t = torch.full((images.shape[0],), timestep, device=images.device)
    x_t = add_noise(alphas_cumprod, images, look.noise, t)
    features: Features = [[] for _ in KINDS]
    if "global_conditional" in config.kinds:
        features[0] = encoder(x_t, t, labels)
    local = [kind for kind in (1, 2) if KINDS[kind] in config.kinds]
    if local:
        patches = cut_windows(x_t, look.corners, patch_side(config, images.shape[-1]))
        owned = labels.repeat_interleave(config.patch_windows)
        conditions = {1: owned, 2: torch.full_like(owned, encoder.null_class)}
        both = encoder(
            patches.repeat(len(local), 1, 1, 1),
            torch.full((len(local) * len(patches),), timestep, device=images.device),
            torch.cat([conditions[kind] for kind in local]),
            look.corners.repeat(len(local), 1),
        )
        for position, kind in enumerate(local):
            features[kind] = [m.chunk(len(local))[position] for m in both]
    return features
