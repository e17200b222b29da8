"""Labelled images from a few sources, each one module with a function `load(config) -> Split`.

    config.py     which images a job works on
    images.py     ImageSet and Split, the form in which every source hands over its content
    split.py      seeded stratified split and class-balanced small subsets
    digits.py     scikit-learn's handwritten digits, 8x8 grey
    textures.py   crops of the photographs inside scikit-image, 16x16 RGB
    idx.py        the files of MNIST and its relatives
    folder.py     image files, one folder a class
    parquet.py    shards of encoded images, as data hubs publish them
    prompts.py    prompts, and images beside them, for text-to-image models
    location.py   a place that holds data files, on disk or behind a URL
    decode.py     encoded images to pixels

A source of your own is a new module here with `load`, and its name in `config.Source`.
"""

from importlib import import_module

from counterpoint.data.config import DataConfig, Source
from counterpoint.data.images import ImageSet, Split
from counterpoint.data.split import balanced_subset

__all__ = ["DataConfig", "ImageSet", "Source", "Split", "load_data"]


def load_data(config: DataConfig) -> Split:
    """The train and test images that `config` names; raises ValueError with one clear line on bad data."""
    # By name, so that a source's libraries are imported only when it is used; Source admits no other names.
    split: Split = import_module(f"{__name__}.{config.source}").load(config)
    if config.limit is None:
        return split
    return Split(balanced_subset(split.train, config.limit, config.seed), split.test)
