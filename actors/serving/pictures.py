"""Images as files: enlarged without smoothing, encoded by Pillow, in base64 as JSON carries them."""

import asyncio
from base64 import b64encode
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

Format = Literal["png", "jpeg", "webp"]
INLINE_PIXELS = 2**16
"""Pixels that are encoded at once on the event loop, in about 2 ms; more go to a thread."""


async def pictures(images: np.ndarray, factor: int, form: Format, quality: int) -> list[str]:
    """Return `images` as `encoded` does, in a thread where that would hold the event loop up."""
    pixels = images.shape[0] * images.shape[1] * images.shape[2] * factor**2
    if pixels <= INLINE_PIXELS:
        return encoded(images, factor, form, quality)
    return await asyncio.to_thread(encoded, images, factor, form, quality)


def encoded(images: np.ndarray, factor: int, form: Format, quality: int) -> list[str]:
    """Return `images`, uint8 [N,H,W,C] with C of 1 or 3, as files in base64, one each.

    Every pixel becomes a square of `factor` by `factor` (nearest neighbour). `quality`, 0 to 100, is that of
    JPEG and WebP, whose files lose detail; PNG keeps all. Equal pixels give equal bytes. Raises ValueError
    for another shape or type.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; files take uint8 [N,H,W,1 or 3]")
    return [b64encode(_file(image, factor, form, quality)).decode("ascii") for image in images]


def _file(image: np.ndarray, factor: int, form: Format, quality: int) -> bytes:
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    picture = Image.fromarray(large[..., 0] if large.shape[-1] == 1 else large)
    buffer = BytesIO()
    if form == "png":
        picture.save(buffer, "png")
    else:
        picture.save(buffer, form, quality=quality)
    return buffer.getvalue()
