"""Parquet shards as data hubs write them, whole and damaged."""

import io
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from counterpoint.data import DataConfig, Split, load_data


def pixels(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encode(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def table(seeds: range, as_struct: bool = True) -> pa.Table:
    contents = [encode(pixels(seed)) for seed in seeds]
    images = [{"bytes": content, "path": None} for content in contents] if as_struct else contents
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if as_struct else pa.binary()
    labels = pa.array([seed % 2 for seed in seeds], pa.int64())
    return pa.table({"image": pa.array(images, kind), "label": labels, "note": ["unused"] * len(seeds)})


def write(root: str | Path, name: str, content: pa.Table) -> None:
    with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
        pq.write_table(content, file, row_group_size=3, write_page_checksum=True)


def load(uri: str | Path, **fields: object) -> Split:
    return load_data(DataConfig(source="parquet", uri=str(uri), **fields))


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in fsspec's in-memory file system."""
    url = f"memory://{uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def expected(seeds: range) -> np.ndarray:
    return np.stack([pixels(seed) for seed in seeds]).transpose(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("as_struct", [True, False])
@pytest.mark.parametrize("names", ["data/{}-0000{}-of-00002.parquet", "{}/000{}.parquet"])
def test_shards_are_read_in_order(memory, names, as_struct):
    write(memory, names.format("train", 0), table(range(5), as_struct))
    write(memory, names.format("train", 1), table(range(5, 10), as_struct))
    write(memory, names.format("test", 0), table(range(10, 12), as_struct))
    write(memory, names.format("validation", 0), table(range(12, 14), as_struct))
    split = load(memory)
    assert np.abs(split.train.images.numpy() - expected(range(10))).max() < 1e-6
    assert np.abs(split.test.images.numpy() - expected(range(10, 12))).max() < 1e-6
    assert split.train.labels.tolist() == [0, 1] * 5
    assert split.train.num_classes == 2


@pytest.mark.parametrize("name", ["", "/shard.parquet"])
def test_unmarked_shard_is_split(tmp_path, name):
    write(tmp_path, "shard.parquet", table(range(10)))
    split = load(f"{tmp_path}{name}")
    assert split.train.labels.bincount().tolist() == [4, 4]
    assert split.test.labels.bincount().tolist() == [1, 1]


def test_columns_of_other_names(tmp_path):
    write(tmp_path, "shard.parquet", table(range(10)).rename_columns(["img", "fine_label", "note"]))
    split = load(tmp_path, image_column="img", label_column="fine_label", image_size=4)
    assert split.train.image_shape == (3, 4, 4)
    message = r"shard.parquet: data.image_column=image is not among its columns img, fine_label, note; set"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image_column": "note"},
            "column note must hold encoded images .* found string; set data.image_column",
        ),
        ({"image_column": "label"}, "column label must hold encoded images .* found int64"),
        ({"label_column": "note"}, "column note must be integers, found string; set data.label_column"),
    ],
)
def test_columns_of_other_kinds_are_refused(tmp_path, columns, message):
    write(tmp_path, "shard.parquet", table(range(10)))
    with pytest.raises(ValueError, match=f"shard.parquet: {message}"):
        load(tmp_path, **columns)


@pytest.mark.parametrize("damage", ["page", "cut", "text", "empty"])
def test_corrupt_shard_is_named(tmp_path, damage):
    write(tmp_path, "train-0.parquet", table(range(10)))
    write(tmp_path, "train-1.parquet", table(range(10, 20)))
    path = tmp_path / "train-1.parquet"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(encode(pixels(11))[100:120])] ^= 0xFF
    contents = {"page": bytes(flipped), "cut": whole[: len(whole) // 2], "text": b"<html>" * 9, "empty": b""}
    path.write_bytes(contents[damage])
    message = r"^file://\S*/train-1.parquet: cannot be read as Parquet \([^\n]*\); fetch the shard again$"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_bad_row_is_named(tmp_path):
    good = table(range(10), as_struct=False)
    contents = good.column("image").to_pylist()
    for content, message in (
        (None, "row 4: column image is empty; fill or drop the row"),
        (b"not an image", r"row 4: not a readable image \(.*of 12 bytes"),
        (encode(pixels(0, 9)), r"row 4: is 9x9 \(HxW\) but \S*shard.parquet row 0 is 8x8"),
    ):
        images = pa.array([*contents[:4], content, *contents[5:]], pa.binary())
        write(tmp_path, "shard.parquet", good.set_column(0, "image", images))
        with pytest.raises(ValueError, match=f"shard.parquet {message}"):
            load(tmp_path)
    labels = pa.array([0, None] * 5, pa.int64())
    write(tmp_path, "shard.parquet", good.set_column(1, "label", labels))
    with pytest.raises(ValueError, match=r"shard.parquet row 1: column label is empty"):
        load(tmp_path)


def test_unlabelled_test_shard_is_refused(tmp_path):
    write(tmp_path, "train.parquet", table(range(10)))
    unlabelled = table(range(2)).set_column(1, "label", pa.array([-1, -1], pa.int64()))
    write(tmp_path, "test.parquet", unlabelled)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), found \[-1, 1\]"):
        load(tmp_path)


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no .parquet file to train on among 0; add one"):
        load(tmp_path)
    write(tmp_path, "test.parquet", table(range(2)))
    with pytest.raises(ValueError, match="to train on among 1"):
        load(tmp_path)
    write(tmp_path, "train.parquet", table(range(0)))
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(ValueError, match="its shards hold no row"):
        load(tmp_path)
