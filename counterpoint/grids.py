"""Sheets of images for people to look at: rows and columns of samples, enlarged without smoothing."""

import math

import torch
from PIL import Image
from torch import Tensor

CELL = 40
"""Smallest side in pixels at which a tiny image is still easy to see."""
GAP = 2
GAP_SHADE = 128


def image_grid(images: Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """Lay `images` [N,C,H,W] in [-1,1] out in rows of `columns`, in reading order, with thin gaps.

    One channel gives a grey picture (mode "L"), three an RGB one. Each pixel becomes a square of `scale` by
    `scale`; unset, images are enlarged to about 40 pixels. Values beyond [-1,1] are cut off and NaN
    is drawn as 0, so that a diverged generator can be looked at too. Raises ValueError for another shape, no
    images, or `columns` or `scale` below 1.
    """
    _check(images, columns, scale)
    factor = scale or math.ceil(CELL / min(images.shape[-2:]))
    pixels = _to_uint8(images).repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    count, channels, height, width = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = torch.full(
        (channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), GAP_SHADE, dtype=torch.uint8
    )
    for index, cell in enumerate(pixels):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = cell
    return Image.fromarray(sheet[0].numpy() if channels == 1 else sheet.permute(1, 2, 0).contiguous().numpy())


def class_grid(images: Tensor, labels: Tensor, per_class: int = 10, scale: int | None = None) -> Image.Image:
    """Lay out the first `per_class` images of each class that occurs in `labels` [N], one row a class.

    A class with fewer is filled up with empty places. Images and the rest are as in `image_grid`. Raises
    ValueError where labels and images differ in number.
    """
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels have shape {list(labels.shape)} for {len(images)} images: give one an image"
        )
    if per_class < 1:
        raise ValueError(f"per_class={per_class} must be at least 1")
    empty = torch.full_like(images[:1], GAP_SHADE / 127.5 - 1.0)
    rows = []
    for label in labels.unique():
        own = images[labels == label][:per_class]
        rows += [own, empty.expand(per_class - len(own), -1, -1, -1)]
    return image_grid(torch.cat(rows or [images]), per_class, scale)


def _to_uint8(images: Tensor) -> Tensor:
    finite = images.detach().float().cpu().nan_to_num(0.0)
    return finite.clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


def _check(images: Tensor, columns: int, scale: int | None) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            f"images are {list(images.shape)}; a grid takes [N, C, H, W] with C of 1 or 3, N at least 1"
        )
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    if scale is not None and scale < 1:
        raise ValueError(f"scale={scale} must be at least 1: it enlarges, it does not shrink")
