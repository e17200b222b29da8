"""Linear attention against its kernel's definition and diffusers' Sana processor, and what it cannot take."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from torch import Tensor, nn

from counterpoint.linear_attention import EPSILON, LinearAttention, linear_attention
from counterpoint.seeds import generator

WIDTH, SIDE = 12, 4


def tokens(count: int = SIDE * SIDE) -> Tensor:
    return torch.randn(2, count, WIDTH, generator=generator(0, "tokens"))


def module(heads: int = 3, kernel_size: int = 5) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(WIDTH, heads, kernel_size)


@pytest.mark.parametrize("heads", [1, 3])
def test_it_is_the_kernel_of_every_pair_of_tokens(heads: int) -> None:
    q, k, v = torch.randn(3, 2, heads, 9, 4, generator=generator(1, "qkv"))
    expected = torch.zeros_like(v)
    for sample in range(2):
        for head in range(heads):
            for i in range(9):
                weights = torch.stack(
                    [q[sample, head, i].relu() @ k[sample, head, j].relu() for j in range(9)]
                )
                expected[sample, head, i] = (weights[:, None] * v[sample, head]).sum(0) / (
                    weights.sum() + EPSILON
                )
    torch.testing.assert_close(linear_attention(q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_without_the_convolution_it_is_sanas(heads: int) -> None:
    ours = module(heads, kernel_size=0)
    theirs = Attention(
        WIDTH, heads=heads, dim_head=WIDTH // heads, bias=True, processor=SanaLinearAttnProcessor2_0()
    )
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), atol=1e-5, rtol=1e-4)


def test_the_convolution_of_the_values_is_added() -> None:
    """Each value's neighbours on the grid, summed by hand."""
    attention = module()
    x = tokens()
    grid = attention.to_v(x).reshape(2, SIDE, SIDE, WIDTH)
    padded = nn.functional.pad(grid, (0, 0, 2, 2, 2, 2))
    local, out = attention.local, attention.to_out[0]
    assert local is not None
    assert local.bias is not None
    assert isinstance(out, nn.Linear)
    convolved = local.bias.expand(2, SIDE, SIDE, WIDTH).clone()
    for row in range(5):
        for column in range(5):
            part = padded[:, row : row + SIDE, column : column + SIDE]
            convolved += part * local.weight[:, 0, row, column]
    plain = module(kernel_size=0)
    plain.load_state_dict(attention.state_dict(), strict=False)
    expected = plain(x) + convolved.flatten(1, 2) @ out.weight.T
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_only_the_convolution_knows_where_a_token_is() -> None:
    order = torch.randperm(SIDE * SIDE, generator=generator(0, "order"))
    x = tokens()
    plain, local = module(kernel_size=0), module()
    torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order], atol=1e-5, rtol=1e-4)
    assert (local(x[:, order]) - local(x)[:, order]).abs().max() > 1e-2


def test_features_that_are_all_zero_give_zero() -> None:
    value = torch.ones(1, 1, 5, 3)
    dead = -torch.ones(1, 1, 5, 3)
    for q, k in ((dead, -dead), (-dead, dead), (dead, dead)):
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        out = linear_attention(q, k, value)
        assert torch.equal(out, torch.zeros_like(value))
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.isfinite().all()


def test_sums_of_many_half_precision_tokens_do_not_overflow() -> None:
    large = torch.full((1, 1, 4096, 2), 8.0, dtype=torch.float16)
    out = linear_attention(large, large, large)
    assert out.dtype == torch.float16
    assert torch.equal(out, large)


@pytest.mark.parametrize(("heads", "kernel_size", "words"), [(5, 5, "heads=5"), (3, 4, "kernel_size=4")])
def test_shapes_that_cannot_be_are_refused(heads: int, kernel_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module(heads, kernel_size)


def test_only_self_attention_of_whole_grids_is_taken() -> None:
    with pytest.raises(ValueError, match="12 tokens are no square grid"):
        module()(tokens(12))
    assert module(kernel_size=0)(tokens(12)).shape == (2, 12, WIDTH)
    with pytest.raises(ValueError, match="pass neither"):
        module()(tokens(), attention_mask=torch.ones(2, SIDE * SIDE))
