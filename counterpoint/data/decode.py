"""Encoded images (PNG, JPEG ...) turned into one array of pixels."""

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def decode_all(encoded: Iterable[tuple[str, bytes]], image_size: int | None) -> np.ndarray:
    """Decode pairs of name and content into uint8 [N, C, H, W]; C is 1 where every image is grey, else 3.

    With `image_size` each image is cut to its central square and resized, antialiased. Transparency is
    dropped. Raises ValueError naming the first image that is unreadable or, without `image_size`, differs in
    size from the first.
    """
    images: list[np.ndarray] = []
    first = ""
    for name, content in encoded:
        image = decode(name, content, image_size)
        first = first or name
        if images and image.shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"{name}: is {_size(image)} but {first} is {_size(images[0])}; "
                "set data.image_size=N to resize all images to NxN"
            )
        images.append(image)
    channels = max((len(image) for image in images), default=1)
    return np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images])


def decode(name: str, content: bytes, image_size: int | None) -> np.ndarray:
    """Decode one image into uint8 [C, H, W] with C 1 or 3, upright; `name` is for messages."""
    stream = io.BytesIO(content)
    try:
        with Image.open(stream) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    # Pillow reports broken files with any of these, depending on format and place.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(stream), f"of {len(content)} bytes")
        raise ValueError(f"{name}: not a readable image ({reason}); replace or remove it") from error
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise ValueError(
            f"{name}: pixels of mode {image.mode} are not 8-bit; convert it to 8-bit grey or RGB"
        )
    image = image.convert("L" if image.mode in GREY_MODES else "RGB")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[2]} (HxW)"
