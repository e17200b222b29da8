"""Folders of real PNG and JPEG files, on disk and in fsspec's in-memory file system."""

import io
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from PIL import Image

from counterpoint.data import DataConfig, Split, load_data


def encode(pixels: np.ndarray, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg" if kind.startswith("jp") else kind, **options)
    return buffer.getvalue()


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8, 3), dtype=np.uint8)


def write(root: str | Path, name: str, content: bytes) -> None:
    with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
        file.write(content)


def write_classes(root: str | Path, count: int = 5) -> None:
    for label, class_name in enumerate(("cats", "dogs")):
        for index in range(count):
            write(root, f"{class_name}/{index}.png", encode(pixels(10 * label + index)))


def load(uri: str | Path, **fields: object) -> Split:
    return load_data(DataConfig(source="folder", uri=str(uri), **fields))


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in fsspec's in-memory file system."""
    url = f"memory://{uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_classes_are_split_with_equal_shares(tmp_path):
    write_classes(tmp_path)
    split = load(tmp_path)
    assert split.train.labels.bincount().tolist() == [4, 4]
    assert split.test.labels.bincount().tolist() == [1, 1]
    assert split.train.image_shape == (3, 8, 8)
    assert load(tmp_path).test.fingerprint() == split.test.fingerprint()


def test_pixels_and_labels_are_those_of_the_files(memory):
    write(memory, "train/dogs/a [1].png", encode(pixels(1)))
    write(memory, "train/cats/b.PNG", encode(pixels(2)))
    write(memory, "test/dogs/c.png", encode(pixels(3)))
    write(memory, "validation/dogs/d.png", encode(pixels(4)))
    write(memory, "train/cats/.hidden.png", b"thumbnail")
    write(memory, "README.md", b"read me")
    split = load(memory)
    expected = np.stack([pixels(2), pixels(1)]).transpose(0, 3, 1, 2) / 127.5 - 1
    assert np.abs(split.train.images.numpy() - expected).max() < 1e-6
    assert split.train.labels.tolist() == [0, 1]
    assert (len(split.test), split.test.labels.tolist()) == (1, [1])


def test_grey_images_have_one_channel_unless_some_are_coloured(tmp_path):
    for index in range(4):
        write(tmp_path, f"cats/{index}.png", encode(pixels(index, 8, 8)))
    assert load(tmp_path).train.image_shape == (1, 8, 8)
    write(tmp_path, "cats/4.png", encode(pixels(4)))
    split = load(tmp_path, test_size=1)
    assert split.train.image_shape == (3, 8, 8)
    grey = {pixels(index, 8, 8).tobytes() for index in range(4)}
    restored = ((split.train.images + 1) * 127.5).round().numpy().astype(np.uint8)
    assert sum(image[0].tobytes() in grey and (image[0] == image[2]).all() for image in restored) >= 3


def test_mixed_sizes_are_refused_naming_the_first(tmp_path):
    write_classes(tmp_path)
    write(tmp_path, "cats/9.png", encode(pixels(0, 9, 12, 3)))
    write(tmp_path, "dogs/0.png", encode(pixels(0, 7, 7, 3)))
    message = r"cats/9.png: is 9x12 \(HxW\) but \S*cats/0.png is 8x8 \(HxW\); set data.image_size=N"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    assert load(tmp_path, image_size=4).train.image_shape == (3, 4, 4)


def test_resizing_averages_and_keeps_the_centre(tmp_path):
    checks = np.zeros((32, 64, 3), dtype=np.uint8)
    checks[::2, 1::2] = checks[1::2, ::2] = 255
    checks[:, :16] = checks[:, 48:] = 0  # the sides, which the central square leaves out
    for index in range(2):
        write(tmp_path, f"checks/{index}.png", encode(checks))
    image = load(tmp_path, image_size=8, test_size=1).train.images[0]
    assert image.abs().max() < 0.1


def test_jpeg_is_read_upright(tmp_path):
    lying = np.zeros((8, 16, 3), dtype=np.uint8)
    lying[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    for name in ("0.jpg", "1.jpeg"):
        write(tmp_path, f"cats/{name}", encode(lying, "jpeg", exif=exif, quality=95))
    image = load(tmp_path, test_size=1).train.images[0]
    assert image.shape == (3, 16, 8)
    assert image[:, :7].max() < -0.9
    assert image[:, 9:].min() > 0.9


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "flipped"])
def test_unreadable_image_is_named(tmp_path, damage):
    write_classes(tmp_path)
    whole = encode(pixels(0, 8, 8, 3))
    middle = len(whole) // 2
    contents = {
        "text": b"not an image",
        "empty": b"",
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle:]),
    }
    write(tmp_path, "dogs/3.png", contents[damage])
    with pytest.raises(
        ValueError, match=r"^file://\S*/dogs/3.png: not a readable image \(.*; replace or rem"
    ):
        load(tmp_path)


def test_sixteen_bit_image_is_refused(tmp_path):
    write(tmp_path, "cats/0.png", encode(np.full((8, 8), 40_000, dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"cats/0.png: pixels of mode I;16 are not 8-bit; convert"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["0.png", "cats/tabby/0.png", "train/cats/0.png"])
def test_image_out_of_place_is_named(tmp_path, name):
    write_classes(tmp_path)
    write(tmp_path, name, encode(pixels(0)))
    with pytest.raises(ValueError, match=rf"/{name}: out of place; images belong in <class>/"):
        load(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    write(tmp_path, "cats/notes.txt", b"none yet")
    with pytest.raises(ValueError, match=r"data.uri=file://\S*: found no .png, .jpg, .jpeg file"):
        load(tmp_path)


def test_file_that_cannot_be_fetched_is_named(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "dogs" / "2.png").unlink()
    (tmp_path / "dogs" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"/dogs/2.png: cannot be read \(FileNotFoundError.*check the file"):
        load(tmp_path)
