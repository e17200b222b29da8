"""Sheets of images against a picture put together pixel by pixel with PIL's own tools."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterpoint.data.digits import read
from counterpoint.data.images import from_uint8
from counterpoint.grids import CELL, GAP, GAP_SHADE, class_grid, image_grid


def pasted(cells: list[Image.Image], columns: int, rows: int) -> Image.Image:
    """The grid as PIL pastes it."""
    width, height = cells[0].size
    sheet = Image.new(
        cells[0].mode,
        (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP),
        (GAP_SHADE,) * len(cells[0].getbands()) if len(cells[0].getbands()) > 1 else GAP_SHADE,
    )
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % columns * (width + GAP), index // columns * (height + GAP)))
    return sheet


def enlarged(pixels: np.ndarray, scale: int) -> Image.Image:
    """One image of uint8 [C,H,W], enlarged by PIL."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1).copy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_grid_holds_every_pixel_in_its_place(channels: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, channels, 5, 4), dtype=np.uint8)
    grid = image_grid(from_uint8(pixels), columns=3, scale=2)
    assert grid.mode == mode
    expected = pasted([enlarged(image, 2) for image in pixels], columns=3, rows=3)
    np.testing.assert_array_equal(np.asarray(grid), np.asarray(expected))


@pytest.mark.parametrize(("side", "cell"), [(8, CELL), (28, 56), (64, 64)])
def test_tiny_images_are_enlarged_until_they_can_be_seen(side: int, cell: int) -> None:
    assert image_grid(torch.zeros(1, 1, side, side), columns=4).size == (cell, cell)


def test_values_out_of_range_are_cut_off_and_nan_is_grey() -> None:
    images = torch.tensor([-7.0, float("-inf"), float("nan"), float("inf")]).reshape(1, 1, 1, 4)
    grid = np.asarray(image_grid(images, columns=1, scale=1))
    assert grid.tolist() == [[0, 0, 128, 255]]


def test_a_grid_leaves_its_images_alone() -> None:
    images = torch.full((2, 1, 4, 4), 3.0, requires_grad=True)
    image_grid(images, columns=2)
    assert images.detach().eq(3.0).all()


def test_a_class_has_a_row_of_its_own() -> None:
    digits = read()
    labels = torch.tensor([4, 1, 1, 4, 1, 9])
    images = digits.images[:6]
    grid = class_grid(images, labels, per_class=2, scale=1)
    rows = [[1, 2], [0, 3], [5]]
    expected = class_rows(images, rows)
    np.testing.assert_array_equal(np.asarray(grid), expected)


def class_rows(images: Tensor, rows: list[list[int]]) -> np.ndarray:
    """Rows of 8x8 images by index, two a row, put together with NumPy."""
    sheet = np.full((len(rows) * (8 + GAP) - GAP, 2 * 8 + GAP), GAP_SHADE, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, index in enumerate(row):
            pixels = np.rint((images[index, 0].numpy() + 1) * 127.5)
            sheet[y * (8 + GAP) : y * (8 + GAP) + 8, x * (8 + GAP) : x * (8 + GAP) + 8] = pixels
    return sheet


@pytest.mark.parametrize(
    ("shape", "columns", "scale", "named"),
    [
        ((4, 2, 8, 8), 2, 1, r"\[4, 2, 8, 8\]"),
        ((0, 1, 8, 8), 2, 1, r"\[0, 1, 8, 8\]"),
        ((1, 8, 8), 2, 1, r"\[1, 8, 8\]"),
        ((4, 1, 8, 8), 0, 1, "columns=0"),
        ((4, 1, 8, 8), 2, 0, "scale=0"),
    ],
)
def test_what_is_no_grid_is_refused(shape: tuple[int, ...], columns: int, scale: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        image_grid(torch.zeros(shape), columns, scale)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images"):
        class_grid(torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long))
