"""Building, loading and copying the network, and the streams that name its seeds."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLASSES, SIDE, unet

from counterpoint.seeds import generator, seed_of
from counterpoint.unet import UNetConfig, build_unet, empty_like, frozen, null_class


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_seed_makes_the_weights_and_leaves_the_global_stream() -> None:
    before = torch.get_rng_state()
    assert equal(unet(seed=3), unet(seed=3))
    assert not equal(unet(seed=3), unet(seed=4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [{"attention": (False, True), "mid_attention": True, "layers_per_block": 2}, {"channels": (8, 16, 24)}],
)
def test_every_shape_runs_and_the_null_class_is_the_last(options: dict[str, Any]) -> None:
    network = unet(**options)
    assert null_class(network) == CLASSES
    labels = torch.tensor([0, CLASSES])
    assert network(torch.zeros(2, 1, SIDE, SIDE), 5, class_labels=labels).sample.shape == (2, 1, SIDE, SIDE)
    with pytest.raises(IndexError):
        network(torch.zeros(2, 1, SIDE, SIDE), 5, class_labels=labels + 1)


def test_attention_sits_where_it_is_asked_for() -> None:
    network = unet(attention=(False, True))
    assert [type(block).__name__ for block in network.down_blocks] == ["DownBlock2D", "AttnDownBlock2D"]
    assert [type(block).__name__ for block in network.up_blocks] == ["AttnUpBlock2D", "UpBlock2D"]


def test_an_empty_copy_has_the_shape_and_a_frozen_one_passes_gradients() -> None:
    network = unet(channels=(16, 32))
    copy = empty_like(network)
    assert {n: p.shape for n, p in copy.named_parameters()} == {
        n: p.shape for n, p in network.named_parameters()
    }
    assert not equal(copy, network)
    x = torch.zeros(1, 1, SIDE, SIDE, requires_grad=True)
    frozen(network)(x, 5, class_labels=torch.tensor([1])).sample.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in network.parameters())


def test_a_saved_network_is_loaded_and_must_fit_the_images(tmp_path: Path) -> None:
    network = unet()
    network.save_pretrained(tmp_path)
    config = UNetConfig(pretrained=str(tmp_path))
    assert equal(build_unet(config, 1, SIDE, CLASSES, seed=9), network)
    for channels, side, classes, message in (
        (3, SIDE, CLASSES, "takes 1 channels of 8 pixels a side but the images have 3 of 8"),
        (1, 16, CLASSES, "the images have 1 of 16"),
        (1, SIDE, 5, "has 11 class embeddings but 5 classes and the null class need 6"),
    ):
        with pytest.raises(ValueError, match=message):
            build_unet(config, channels, side, classes, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_out_channels": (16, 20)},
            "block_out_channels has 20, which norm_num_groups=16 does not divide",
        ),
        ({"attention": (True,)}, "attention has 1 entries for 2 resolutions"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**options)


def test_a_side_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="3 resolutions, but a side of 6 pixels cannot be halved 2 times"):
        build_unet(UNetConfig(block_out_channels=(16, 16, 16)), 1, 6, CLASSES, seed=0)


def test_streams_are_named_by_all_their_parts() -> None:
    parts: tuple[int | str, ...] = ("a", "a1", "1", 1, 12, 2, "12")
    names = [name for n in (1, 2) for name in product(parts, repeat=n)]
    seeds = {seed_of(seed, *name) for seed in (0, 1) for name in names}
    assert len(seeds) == 2 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draw = torch.rand(3, generator=generator(5, "x", 1))
    assert torch.equal(draw, torch.rand(3, generator=generator(5, "x", 1)))


def test_seeds_stay_what_they_were() -> None:
    """A stored run is resumed by later versions: its streams must not move."""
    assert seed_of(0) == 1887154467326967967
    assert seed_of(7, "head", 203, 3) == 9018944438177216478
