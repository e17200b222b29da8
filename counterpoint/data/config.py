"""The configuration section that says which images a job works on."""

from typing import Annotated, Literal

from pydantic import Field

from counterpoint.section import Section

Source = Literal["digits", "textures", "idx", "folder", "parquet"]


class DataConfig(Section):
    """Which images, how large, and how they are split into train and test."""

    source: Source = "digits"
    """Where the images come from; each name is a module of `counterpoint.data` with a function `load`."""

    uri: str | None = None
    """Location of the idx, folder or parquet data: a path or any fsspec URL (s3://, gs://, memory:// ...)."""

    image_size: int | None = Field(None, ge=4)
    """Height and width in pixels; unset keeps the source's own size (digits 8, textures 16)."""

    seed: int = Field(0, ge=0)
    """Seed of the split into train and test, of the crops of textures and of the subset `limit` takes."""

    test_size: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Test images as a number or as a share below 1; unset takes the source's own (digits 497, textures 2000,
    the test files of idx, folder and parquet where there are some, else a share of 0.2)."""

    limit: int | None = Field(None, ge=1)
    """Keep this many training images, balanced over the classes; a smaller limit is part of a larger."""

    image_column: str = "image"
    """Parquet column of encoded images: bytes, or a struct with a field `bytes`."""

    label_column: str = "label"
    """Parquet column of integer class labels, counted from 0."""
