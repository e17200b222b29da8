"""Parquet shards with a column of encoded images and one of integer labels, as data hubs publish them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from counterpoint.data.config import DataConfig
from counterpoint.data.decode import decode_all
from counterpoint.data.images import ImageSet, Split, from_uint8
from counterpoint.data.location import Location, locate
from counterpoint.data.split import given_or_stratified_split

ROWS_AT_ONCE = 1024


class Shard(NamedTuple):
    """One Parquet file and the part of the data, `train` or `test`, that its name or folder says it holds."""

    path: str
    side: str


class Row(NamedTuple):
    """One encoded image; `name` says where it came from."""

    name: str
    content: bytes
    label: int
    in_test: bool


def load(config: DataConfig) -> Split:
    """The shards at `config.uri`, a file or a folder, in the order of their paths.

    A file or folder name such as `train-00000-of-00002.parquet` or `test/0000.parquet` says to which side a
    shard belongs; shards of other names are read only where no shard is marked as train. Raises ValueError
    naming the shard (and row) that is corrupt or lacks a column, an image or a label.
    """
    location = locate(config)
    rows = [row for shard in find_shards(location) for row in _rows(location, shard, config)]
    if not rows:
        raise ValueError(f"data.uri={location.url()}: its shards hold no row; fetch them again")
    pixels = decode_all(((row.name, row.content) for row in rows), config.image_size)
    labels = torch.tensor([row.label for row in rows])
    images = ImageSet(from_uint8(pixels), labels, int(labels.max()) + 1, location.url())
    in_test = torch.tensor([row.in_test for row in rows])
    return given_or_stratified_split(images, in_test, config.test_size, config.seed)


def find_shards(location: Location) -> list[Shard]:
    """The shards of train (where none is marked so, the unmarked ones), then those of test."""
    shards = [
        Shard(path, _side(location.parts(path))) for path in location.files() if path.endswith(".parquet")
    ]
    train = [shard for shard in shards if shard.side == "train"] or [
        shard for shard in shards if not shard.side
    ]
    if not train:
        raise ValueError(
            f"data.uri={location.url()}: found no .parquet file to train on among {len(shards)}; add one"
        )
    return train + [shard for shard in shards if shard.side == "test"]


def _side(parts: list[str]) -> str:
    """`train` or `test` where a folder or the file is named so, up to the first dot, dash or underscore."""
    for part in parts:
        word = re.split(r"[-_.]", part)[0]
        if word in ("train", "test"):
            return word
    return ""


def _rows(location: Location, shard: Shard, config: DataConfig) -> Iterator[Row]:
    name = location.url(shard.path)
    index = 0
    for batch in _batches(location, shard, config):
        images = batch.column(config.image_column)
        if pa.types.is_struct(images.type):
            images = pc.struct_field(images, "bytes")
        for content, label in zip(
            images.to_pylist(), batch.column(config.label_column).to_pylist(), strict=True
        ):
            if content is None or label is None:
                column = config.image_column if content is None else config.label_column
                raise ValueError(f"{name} row {index}: column {column} is empty; fill or drop the row")
            yield Row(f"{name} row {index}", content, label, shard.side == "test")
            index += 1


def _batches(location: Location, shard: Shard, config: DataConfig) -> Iterator[pa.RecordBatch]:
    name = location.url(shard.path)
    columns = [config.image_column, config.label_column]
    try:
        with location.fs.open(shard.path, "rb") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            _check_schema(parquet.schema_arrow, name, config)
            yield from parquet.iter_batches(ROWS_AT_ONCE, columns=columns)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot be read as Parquet ({reason}); fetch the shard again") from error


def _check_schema(schema: pa.Schema, name: str, config: DataConfig) -> None:
    for key in ("image_column", "label_column"):
        if getattr(config, key) not in schema.names:
            found = f"{getattr(config, key)} is not among its columns {', '.join(schema.names)}"
            raise ValueError(f"{name}: data.{key}={found}; set data.{key} to one of them")
    image, label = schema.field(config.image_column).type, schema.field(config.label_column).type
    encoded = image.field("bytes").type if _has_bytes(image) else image
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
        kind = "must hold encoded images (binary, or a struct with binary `bytes`)"
        raise ValueError(f"{name}: column {config.image_column} {kind}, found {image}; set data.image_column")
    if not pa.types.is_integer(label):
        raise ValueError(
            f"{name}: column {config.label_column} must be integers, found {label}; set data.label_column"
        )


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
