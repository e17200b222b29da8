"""What critics look at, against slicing by hand and an encoder that only writes down what it is shown."""

from typing import Any

import pytest
import torch
from tiny import ABAR, CLASSES
from torch import Tensor

from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.views import (
    Look,
    cut_windows,
    draw_looks,
    draw_wrong_labels,
    look_at,
    patch_side,
)

NAME = (3, 1)


class Notebook:
    """An encoder with one map, the image itself, that remembers what it was asked."""

    null_class = CLASSES

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(
        self, x: Tensor, timesteps: Tensor, labels: Tensor, corners: Tensor | None = None
    ) -> list[Tensor]:
        self.asked.append((x, timesteps, labels))
        return [x]


def looked_at(
    images: Tensor, labels: Tensor, look: Look, **options: Any
) -> tuple[Notebook, list[list[Tensor]]]:
    notebook = Notebook()
    features = look_at(notebook, CriticsConfig(**options), images, labels, look, 40, ABAR)  # type: ignore[arg-type]
    return notebook, features


def test_windows_are_slices() -> None:
    images = torch.randn(5, 3, 8, 8)
    corners = torch.randint(0, 6, (10, 2), generator=torch.Generator().manual_seed(0))
    cut = cut_windows(images, corners, patch=3)
    for window, (top, left) in enumerate(corners.tolist()):
        expected = images[window // 2, :, top : top + 3, left : left + 3]
        assert torch.equal(cut[window], expected)


def test_windows_pass_gradients_to_the_pixels_they_show() -> None:
    images = torch.zeros(1, 1, 4, 4, requires_grad=True)
    cut_windows(images, torch.tensor([[1, 2], [2, 2]]), patch=2).sum().backward()
    expected = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 1, 1]])
    assert images.grad is not None
    assert torch.equal(images.grad, expected[None, None].float())


@pytest.mark.parametrize("windows", [1, 3])
def test_each_kind_sees_its_view_at_the_groups_noise_level(windows: int) -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 9, 3])
    options: dict[str, Any] = {"patch_windows": windows, "patch_side": 5}
    look, _ = draw_looks(CriticsConfig(**options), 0, NAME, images)
    notebook, features = looked_at(images, labels, look, **options)
    noised = ABAR[40].sqrt() * images + (1 - ABAR[40]).sqrt() * look.noise
    (whole, t, c), (patches, patch_t, patch_c) = notebook.asked
    torch.testing.assert_close(whole, noised)
    assert torch.equal(c, labels)
    assert set(t.tolist()) == set(patch_t.tolist()) == {40}
    n = 4 * windows
    assert torch.equal(patches[:n], patches[n:])
    assert patch_c[:n].tolist() == [label for label in labels.tolist() for _ in range(windows)]
    assert patch_c[n:].tolist() == [CLASSES] * n
    for window, (top, left) in enumerate(look.corners.tolist()):
        expected = noised[window // windows, :, top : top + 5, left : left + 5]
        torch.testing.assert_close(patches[window], expected)
    assert [len(maps) for maps in features] == [1, 1, 1]
    assert torch.equal(features[0][0], whole)
    assert torch.equal(features[1][0], patches[:n])
    assert torch.equal(features[2][0], patches[n:])


@pytest.mark.parametrize(
    ("kinds", "calls", "used"),
    [
        (("global_conditional",), 1, [True, False, False]),
        (("local_unconditional",), 1, [False, False, True]),
        (("local_conditional", "local_unconditional"), 1, [False, True, True]),
        (("global_conditional", "local_conditional"), 2, [True, True, False]),
    ],
)
def test_unused_kinds_cost_nothing(kinds: tuple[str, ...], calls: int, used: list[bool]) -> None:
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([4, 5])
    look, _ = draw_looks(CriticsConfig(), 0, NAME, images)
    notebook, features = looked_at(images, labels, look, kinds=kinds)
    assert len(notebook.asked) == calls
    assert [bool(maps) for maps in features] == used
    if used[2]:
        assert (notebook.asked[-1][2][-2:] == CLASSES).all()


@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("same_window", [True, False])
def test_real_and_fake_share_what_is_asked_for(same_window: bool, share_noise: bool) -> None:
    config = CriticsConfig(same_window=same_window, share_noise=share_noise)
    fake, real = draw_looks(config, 0, NAME, torch.zeros(16, 1, 8, 8))
    assert torch.equal(fake.corners, real.corners) is same_window
    assert torch.equal(fake.noise, real.noise) is share_noise


def test_looks_are_standard_noise_and_windows_everywhere() -> None:
    fake, real = draw_looks(CriticsConfig(), 0, NAME, torch.zeros(2000, 1, 8, 8))
    for look in (fake, real):
        assert abs(float(look.noise.mean())) < 0.02
        assert float(look.noise.std()) == pytest.approx(1, abs=0.02)
    # Sides 8 and 4 leave five positions each way.
    assert torch.bincount(fake.corners[:, 0] * 5 + fake.corners[:, 1]).min() > 40
    assert fake.corners.max() == 4


def test_looks_are_named_by_step_and_group() -> None:
    images = torch.zeros(2, 1, 8, 8)
    first = draw_looks(CriticsConfig(), 0, (3, 1), images)[0].noise
    assert torch.equal(first, draw_looks(CriticsConfig(), 0, (3, 1), images)[0].noise)
    for seed, name in ((1, (3, 1)), (0, (4, 1)), (0, (3, 2))):
        assert not torch.equal(first, draw_looks(CriticsConfig(), seed, name, images)[0].noise)


def test_micro_batches_see_what_the_whole_batch_sees() -> None:
    config, labels = CriticsConfig(patch_windows=2), torch.arange(6)
    whole = draw_looks(config, 0, NAME, torch.zeros(6, 1, 8, 8))
    parts = [draw_looks(config, 0, NAME, torch.zeros(2, 1, 8, 8), micro, 3) for micro in range(3)]
    for kind, look in enumerate(whole):
        assert torch.equal(torch.cat([part[kind].noise for part in parts]), look.noise)
        assert torch.equal(torch.cat([part[kind].corners for part in parts]), look.corners)
    wrong = [draw_wrong_labels(0, NAME, labels[2 * m : 2 * m + 2], CLASSES, m, 3) for m in range(3)]
    assert torch.equal(torch.cat(wrong), draw_wrong_labels(0, NAME, labels, CLASSES))


def test_a_wrong_label_is_any_other_class() -> None:
    labels = torch.full((900,), 7)
    counts = torch.bincount(draw_wrong_labels(0, NAME, labels, CLASSES), minlength=CLASSES)
    assert counts[7] == 0
    assert len(counts) == CLASSES
    assert counts[torch.arange(CLASSES) != 7].min() > 60


def test_patches_are_half_the_side_unless_set() -> None:
    assert patch_side(CriticsConfig(), 8) == 4
    assert patch_side(CriticsConfig(patch_side=8), 8) == 8
    with pytest.raises(ValueError, match="patch_side=9 does not fit images of 8 pixels: use at most 8"):
        patch_side(CriticsConfig(patch_side=9), 8)
