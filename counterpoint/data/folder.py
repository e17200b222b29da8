"""A folder of images, one subfolder a class: `<class>/*.png`, or the same below `train/` and `test/`."""

from typing import NamedTuple

import torch

from counterpoint.data.config import DataConfig
from counterpoint.data.decode import decode_all
from counterpoint.data.images import ImageSet, Split, from_uint8
from counterpoint.data.location import Location, locate
from counterpoint.data.split import given_or_stratified_split

SUFFIXES = (".png", ".jpg", ".jpeg")


class Entry(NamedTuple):
    """One image file, its class (the name of its folder), and whether it belongs to a test set of its own."""

    path: str
    class_name: str
    in_test: bool


def load(config: DataConfig) -> Split:
    """The images below `config.uri`; labels count the class folders in the order of their names.

    Where there are folders `train` and `test`, they are the split and folders beside them are not read.
    Raises ValueError naming the file that is out of place, unreadable, or of another size than the others.
    """
    location = locate(config)
    entries = find_entries(location)
    class_names = sorted({entry.class_name for entry in entries})
    pixels = decode_all(location.read([entry.path for entry in entries]), config.image_size)
    labels = torch.tensor([class_names.index(entry.class_name) for entry in entries])
    images = ImageSet(from_uint8(pixels), labels, len(class_names), location.url())
    in_test = torch.tensor([entry.in_test for entry in entries])
    return given_or_stratified_split(images, in_test, config.test_size, config.seed)


def find_entries(location: Location) -> list[Entry]:
    """All image files of `location`, sorted by path."""
    paths = [path for path in location.files() if path.lower().endswith(SUFFIXES)]
    tops = {location.parts(path)[0] for path in paths}
    entries = []
    for path in paths:
        folders = location.parts(path)[:-1]
        side = ""
        if {"train", "test"} <= tops:
            side = folders.pop(0) if folders else ""
            if side not in ("train", "test"):
                continue
        if len(folders) != 1:
            raise ValueError(
                f"{location.url(path)}: out of place; images belong in <class>/, "
                f"or in both train/<class>/ and test/<class>/, below {location.url()}"
            )
        entries.append(Entry(path, folders[0], side == "test"))
    if not entries:
        raise ValueError(
            f"data.uri={location.url()}: found no {', '.join(SUFFIXES)} file; images belong in <class>/"
        )
    return entries
