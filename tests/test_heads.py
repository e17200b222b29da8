"""Batched heads against torch's own modules, one head at a time."""

import math

import pytest
import scipy.stats
import torch
from tiny import single_head
from torch import nn

from counterpoint.critics.heads import HeadShape, head_logits

STAGES = {32: 4, 8: 3, 7: 2, 4: 2, 2: 1, 1: 0}
"""How often a map of each side is halved; the last has one 1x1 convolution instead."""


def rows_for(shape: HeadShape, heads: int) -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    return torch.stack([shape.initial(stream) for _ in range(heads)]).double()


@pytest.mark.parametrize("heads_per_slot", [1, 3])
@pytest.mark.parametrize(("side", "stages"), STAGES.items())
def test_batched_heads_equal_single_modules(side: int, stages: int, heads_per_slot: int) -> None:
    shape = HeadShape(channels=5, side=side, width=6, groups=3)
    slots, n = 2, 3
    rows = rows_for(shape, slots * heads_per_slot)
    # Norms that are not the identity, so that one head's would show in another.
    rows += 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=rows.dtype)
    features = torch.randn(n, slots, 5, side, side, dtype=rows.dtype)
    batched = head_logits(shape, rows, features)
    assert batched.shape == (n, slots * heads_per_slot)
    for head, row in enumerate(rows):
        expected = single_head(shape, row, stages)(features[:, head // heads_per_slot])
        torch.testing.assert_close(batched[:, [head]], expected)


def test_gradients_equal_single_modules() -> None:
    shape = HeadShape(channels=5, side=8, width=4, groups=2)
    rows = rows_for(shape, 4).requires_grad_()
    features = torch.randn(3, 2, 5, 8, 8, dtype=rows.dtype, requires_grad=True)
    batched = torch.autograd.grad(head_logits(shape, rows, features).sin().sum(), (rows, features))
    expected_rows, expected_features = torch.zeros_like(rows), torch.zeros_like(features)
    for head, row in enumerate(rows.detach()):
        module, x = single_head(shape, row, stages=3), features[:, head // 2].detach().requires_grad_()
        loss = module(x).sin().sum()
        parts = torch.autograd.grad(loss, [x, *module.parameters()])
        expected_features[:, head // 2] += parts[0]
        expected_rows[head] = torch.cat([part.flatten() for part in parts[1:]])
    torch.testing.assert_close(batched, (expected_rows, expected_features))


def test_one_head_hears_nothing_of_the_others() -> None:
    shape = HeadShape(channels=3, side=4, width=4, groups=2)
    rows = rows_for(shape, 4)
    features = torch.randn(2, 2, 3, 4, 4, dtype=rows.dtype)
    before = head_logits(shape, rows, features)
    rows[1] = torch.nan
    features[:, 1] = 0.0
    after = head_logits(shape, rows, features)
    assert torch.equal(before[:, 0], after[:, 0])
    assert after[:, 1].isnan().all()


def test_a_row_holds_exactly_the_parameters_of_a_head() -> None:
    shape = HeadShape(channels=320, side=128, width=64, groups=32)
    module = single_head(shape, torch.zeros(shape.size), stages=4)
    assert shape.size == sum(p.numel() for p in module.parameters())
    parts = shape.split(torch.arange(2.0 * shape.size).reshape(2, -1))
    assert torch.equal(
        torch.cat([part[1].flatten() for part in parts.values()]), torch.arange(shape.size) + shape.size
    )


def test_new_heads_are_drawn_like_torch_draws_its_layers() -> None:
    shape = HeadShape(channels=8, side=4, width=16, groups=4)
    parts = shape.split(rows_for(shape, 400))
    torch.manual_seed(0)
    layers = [(nn.Conv2d(8, 16, 4), nn.Conv2d(16, 1, 1)) for _ in range(400)]
    for stage, layer in enumerate(("0", "logit")):
        for name in ("weight", "bias"):
            mine = parts[f"{layer}.{name}"].flatten()
            torchs = torch.cat([getattr(pair[stage], name).flatten() for pair in layers]).detach()
            bound = 1 / math.sqrt(8 * 16 if layer == "0" else 16)
            assert 0.97 * bound < mine.abs().max() <= bound
            assert scipy.stats.ks_2samp(mine.numpy(), torchs.numpy()).pvalue > 0.01
    assert (parts["0.norm.weight"] == 1).all()
    assert (parts["0.norm.bias"] == 0).all()
