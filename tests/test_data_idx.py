"""IDX pairs written byte by byte from the format's definition, whole and damaged."""

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest

from counterpoint.data import DataConfig, Split, load_data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 6), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 2


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_pair(folder: str, side: str = "train", count: int = 20, packed: bool = False) -> None:
    for kind, array in (("images-idx3", PIXELS[:count]), ("labels-idx1", LABELS[:count])):
        content = gzip.compress(idx(array)) if packed else idx(array)
        with fsspec.open(f"{folder}/{side}-{kind}-ubyte{'.gz' if packed else ''}", "wb") as file:
            file.write(content)


def load(uri: str | Path, **fields: object) -> Split:
    return load_data(DataConfig(source="idx", uri=str(uri), **fields))


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in fsspec's in-memory file system."""
    url = f"memory://{uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.mark.parametrize("packed", [False, True])
def test_both_pairs_are_read_in_order(memory, packed):
    write_pair(memory, packed=packed)
    write_pair(memory, "t10k", 4, packed=packed)
    split = load(memory)
    expected = PIXELS[:, None].astype(np.float64) / 127.5 - 1
    assert np.abs(split.train.images.numpy() - expected).max() < 1e-6
    assert split.train.labels.tolist() == LABELS.tolist()
    assert np.abs(split.test.images.numpy() - expected[:4]).max() < 1e-6
    assert split.test.labels.tolist() == LABELS[:4].tolist()
    assert split.train.num_classes == 2


def test_train_pair_alone_is_split(tmp_path):
    write_pair(str(tmp_path))
    split = load(tmp_path, test_size=6, image_size=4)
    assert split.train.labels.bincount().tolist() == [7, 7]
    assert split.test.labels.bincount().tolist() == [3, 3]
    assert split.test.image_shape == (1, 4, 4)


def test_corrupt_gzip_is_named(tmp_path):
    write_pair(str(tmp_path), packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S*train-images-idx3-ubyte.gz: corrupt gzip \(.*fetch the file"):
        load(tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: corrupt gzip \(.*fetch the file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(PIXELS)[:-1], r"truncated, found 735 bytes for shape \(20, 6, 6\); fetch the file again"),
        (idx(PIXELS)[:10], r"truncated, found 10 bytes"),
        (idx(PIXELS) + b"\0", r"of the wrong length, found 737 bytes for shape \(20, 6, 6\)"),
        (idx(PIXELS[:0]), r"of the wrong length, found 16 bytes for shape \(0, 6, 6\)"),
        (idx(LABELS), r"magic number is 0x00000801, wanted 0x00000803 \(uint8, 3 dimensions\)"),
        (b"", r"magic number is 0x, wanted 0x00000803"),
        (b"<html>not found</html>", "magic number is 0x3c68746d"),
    ],
)
def test_damaged_images_are_named(tmp_path, content, message):
    write_pair(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^file://\S*train-images-idx3-ubyte: {message}"):
        load(tmp_path)


def test_pair_of_different_counts_is_refused(tmp_path):
    write_pair(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:19]))
    with pytest.raises(ValueError, match="the train pair has 20 images but 19 labels"):
        load(tmp_path)


def test_pairs_of_different_sizes_are_refused(tmp_path):
    write_pair(str(tmp_path))
    write_pair(str(tmp_path), "t10k", 4)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[:4, :, :5]))
    with pytest.raises(ValueError, match=r"images of t10k are \(6, 5\), those of train \(6, 6\)"):
        load(tmp_path)


@pytest.mark.parametrize("missing", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_missing_file_is_named(tmp_path, missing):
    write_pair(str(tmp_path))
    write_pair(str(tmp_path), "t10k")
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"found neither {missing} nor {missing}.gz"):
        load(tmp_path)


def test_location_must_be_given_and_exist(tmp_path):
    with pytest.raises(ValueError, match=r"data.uri is unset, but data.source=idx reads files; set it"):
        load_data(DataConfig(source="idx"))
    with pytest.raises(ValueError, match=r"data.uri=\S*/nowhere does not exist; check the path"):
        load(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"data.uri=nope://x cannot be opened \(Protocol not known: nope\); check"
    ):
        load("nope://x")
