"""IDX files, the format of MNIST and its relatives: one pair of images and labels each for train and test."""

import gzip
import math
import zlib

import numpy as np
import torch

from counterpoint.data.config import DataConfig
from counterpoint.data.images import ImageSet, Split, from_uint8, resize
from counterpoint.data.location import Location, locate
from counterpoint.data.split import given_or_stratified_split

GZIP_MAGIC = b"\x1f\x8b"
UINT8 = 0x08  # the type code of the IDX header


def load(config: DataConfig) -> Split:
    """The pair `train-*-ubyte` and, where it exists, `t10k-*-ubyte` in `config.uri`, plain or as `.gz`.

    Raises ValueError naming the file that is missing, corrupt, truncated, or of another kind than its name.
    """
    location = locate(config)
    names = {location.parts(path)[-1].removesuffix(".gz") for path in location.files()}
    pixels, labels = _read_pair(location, "train")
    in_test = np.zeros(len(labels), dtype=bool)
    if {"t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"} & names:
        test_pixels, test_labels = _read_pair(location, "t10k")
        if test_pixels.shape[1:] != pixels.shape[1:]:
            sizes = f"{test_pixels.shape[1:]}, those of train {pixels.shape[1:]}"
            raise ValueError(
                f"{location.url()}: images of t10k are {sizes} (H, W); the two pairs do not match"
            )
        in_test = np.arange(len(labels) + len(test_labels)) >= len(labels)
        pixels, labels = np.concatenate([pixels, test_pixels]), np.concatenate([labels, test_labels])
    images = resize(from_uint8(pixels[:, None]), config.image_size)
    everything = ImageSet(
        images, torch.from_numpy(labels.astype(np.int64)), int(labels.max()) + 1, location.url()
    )
    return given_or_stratified_split(everything, torch.from_numpy(in_test), config.test_size, config.seed)


def parse_idx(content: bytes, dims: int, name: str) -> np.ndarray:
    """The uint8 array of `dims` dimensions in an IDX file, plain or gzip; `name` is for messages.

    The header is two zero bytes, a type code, the number of dimensions and each as a big-endian uint32.
    """
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name}: corrupt gzip ({error}); fetch the file again") from error
    wanted = bytes((0, 0, UINT8, dims))
    if content[:4] != wanted:
        found = f"0x{content[:4].hex()}, wanted 0x{wanted.hex()} (uint8, {dims} dimensions)"
        raise ValueError(f"{name}: magic number is {found}; check which file this is")
    header = 4 + 4 * dims
    shape = tuple(int(size) for size in np.frombuffer(content[4:header].ljust(4 * dims, b"\0"), dtype=">u4"))
    found_bytes, wanted_bytes = len(content), header + math.prod(shape)
    if found_bytes < header or found_bytes != wanted_bytes or 0 in shape:
        problem = "truncated" if found_bytes < max(header, wanted_bytes) else "of the wrong length"
        raise ValueError(
            f"{name}: {problem}, found {found_bytes} bytes for shape {shape}; fetch the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _read_pair(location: Location, side: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = _read(location, f"{side}-images-idx3-ubyte", dims=3)
    labels = _read(location, f"{side}-labels-idx1-ubyte", dims=1)
    if len(pixels) != len(labels):
        counts = f"{len(pixels)} images but {len(labels)} labels"
        raise ValueError(f"{location.url()}: the {side} pair has {counts}; use two files of one data set")
    return pixels, labels


def _read(location: Location, stem: str, dims: int) -> np.ndarray:
    for path in (f"{location.root}/{stem}", f"{location.root}/{stem}.gz"):
        if location.fs.exists(path):
            ((name, content),) = location.read([path])
            return parse_idx(content, dims, name)
    raise ValueError(f"{location.url()}: found neither {stem} nor {stem}.gz; put one of them there")
