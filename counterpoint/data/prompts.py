"""Prompts, and images beside them, from a text file (one a line) or a column of a Parquet file."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from pydantic import Field

from counterpoint.section import Section


class PromptsConfig(Section):
    """Where prompts, and images that belong to them, are read from."""

    uri: str = Field(default="", min_length=0)
    """A .txt file with a prompt a line, or a .parquet file; a path or any fsspec URL."""
    column: str = "prompt"
    """Parquet column of prompts."""
    image_column: str | None = None
    """Parquet column of encoded images (bytes, or a struct with `bytes`); unset encodes no images."""
    limit: int | None = Field(default=None, ge=2)
    """Read only so many prompts, from the beginning."""


@dataclass(frozen=True)
class PromptSource:
    """Prompts in their order, and where each one's image is."""

    config: PromptsConfig
    texts: list[str]
    rows: list[int]
    """The row of the file that each prompt stands in; blank ones are left out."""

    def images(self, start: int, stop: int) -> list[tuple[str, bytes]]:
        """Return name and content of the images of prompts `start` to `stop`."""
        return read_images(self.config, self.rows[start:stop])


def read_prompts(config: PromptsConfig) -> PromptSource:
    """Read the prompts; blank ones are left out. Raises ValueError that names what is wrong with the file."""
    if not config.uri:
        raise ValueError("prompts.uri is not set: give a .txt or .parquet file of prompts")
    if config.uri.endswith(".parquet"):
        with _parquet(config) as parquet:
            _column_of(config, parquet, config.column, "column", pa.types.is_string, pa.types.is_large_string)
            if config.image_column is not None:
                _column_of(config, parquet, config.image_column, "image_column", _holds_images)
            lines = [
                "" if text is None else str(text)
                for batch in parquet.iter_batches(columns=[config.column])
                for text in batch.column(0).to_pylist()
            ]
    elif config.image_column is not None:
        raise ValueError(
            f"prompts.image_column={config.image_column}: images need prompts in a .parquet file"
        )
    else:
        fs, root = url_to_fs(config.uri)
        try:
            lines = fs.cat_file(root).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts.uri={config.uri} cannot be read as text ({error})") from error
    kept = [(row, line.strip()) for row, line in enumerate(lines) if line.strip()][: config.limit]
    if len(kept) < 2:
        raise ValueError(
            f"prompts.uri={config.uri} holds {len(kept)} prompts: give at least 2, "
            "one to train on and one to hold out"
        )
    return PromptSource(config, [text for _, text in kept], [row for row, _ in kept])


def read_images(config: PromptsConfig, rows: list[int]) -> list[tuple[str, bytes]]:
    """Return name and content of the images in `rows` (ascending) of the Parquet file."""
    assert config.image_column is not None
    found: list[tuple[str, bytes]] = []
    with _parquet(config) as parquet:
        begin, wanted = 0, list(rows)
        for group in range(parquet.num_row_groups):
            end = begin + parquet.metadata.row_group(group).num_rows
            mine = [row for row in wanted if begin <= row < end]
            if mine:
                column = parquet.read_row_group(group, columns=[config.image_column]).column(0)
                if pa.types.is_struct(column.type):
                    column = pc.struct_field(column, "bytes")
                for row, content in zip(
                    mine, column.take(pa.array([r - begin for r in mine])).to_pylist(), strict=True
                ):
                    if content is None:
                        raise ValueError(
                            f"{config.uri} row {row}: column {config.image_column} is empty; "
                            "fill or drop the row"
                        )
                    found.append((f"{config.uri} row {row}", content))
            begin = end
    return found


def _parquet(config: PromptsConfig) -> Any:
    fs, root = url_to_fs(config.uri)
    try:
        return pq.ParquetFile(fs.open(root, "rb"))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"prompts.uri={config.uri} cannot be read as Parquet ({reason})") from error


def _column_of(config: PromptsConfig, parquet: pq.ParquetFile, name: str, field: str, *kinds: Any) -> None:
    schema = parquet.schema_arrow
    if name not in schema.names:
        raise ValueError(
            f"prompts.{field}={name} is not among the columns {', '.join(schema.names)} of {config.uri}"
        )
    if not any(kind(schema.field(name).type) for kind in kinds):
        raise ValueError(f"prompts.{field}={name} of {config.uri} has type {schema.field(name).type}")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
