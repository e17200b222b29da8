"""The critics' features against forward hooks on diffusers' own UNet2DModel."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from tiny import group, panel, samples, unet
from torch import Tensor, nn

from counterpoint.critics.encoder import FrozenEncoder

NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {"channels": (16, 32)},
    "deep": {"channels": (8, 16, 16), "layers_per_block": 2},
    "attention": {
        "channels": (16, 32),
        "attention": (True, True),
        "mid_attention": True,
        "layers_per_block": 2,
    },
}


def hooked_maps(network: UNet2DModel, x: Tensor, t: Tensor, labels: Tensor) -> list[Tensor]:
    """Run the whole network and catch what its down path hands to the up path, and the middle's output."""
    watched: list[nn.Module] = [network.conv_in]
    for block in network.down_blocks:
        # With attention, a layer's output is the attention's, which follows the residual block.
        watched += list(getattr(block, "attentions", None) or block.resnets)
        watched += list(block.downsamplers or [])
    watched.append(network.mid_block)
    caught: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _m, _i, output: caught.append(output)) for module in watched]
    network(x, t, class_labels=labels)
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [8, 4])
def test_maps_are_the_networks_own(name: str, side: int) -> None:
    network = unet(**NETWORKS[name]).eval()
    x, t = torch.randn(3, 1, side, side), torch.tensor([0, 40, 900])
    labels = torch.tensor([1, 9, 10])
    with torch.no_grad():
        expected = hooked_maps(network, x, t, labels)
        found = FrozenEncoder(network)(x, t, labels)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert FrozenEncoder(network).map_shapes(side) == [(m.shape[1], m.shape[2]) for m in expected]


def test_time_and_class_reach_every_map_but_the_first() -> None:
    encoder = FrozenEncoder(unet())
    x = torch.randn(1, 1, 8, 8)
    base, later, other = (
        encoder(x, torch.tensor([t]), torch.tensor([c])) for t, c in ((10, 1), (500, 1), (10, 2))
    )
    assert torch.equal(base[0], later[0])
    assert torch.equal(base[0], other[0])
    assert not any(torch.equal(a, b) for a, b in zip(base[1:], later[1:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(base[1:], other[1:], strict=True))


def test_gradients_pass_through_but_parameters_stay_frozen() -> None:
    encoder = FrozenEncoder(unet())
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    maps = encoder(x, torch.tensor([5, 5]), torch.tensor([0, 1]))
    for level in maps:
        (gradient,) = torch.autograd.grad(level.square().sum(), x, retain_graph=True)
        assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training


def test_weights_never_change_over_judging() -> None:
    critics = group(refresh_rate=0.1)
    before = {name: p.clone() for name, p in critics.encoder.named_parameters()}
    for step in range(4):
        critics.judge(samples(step))
    assert all(torch.equal(p, before[name]) for name, p in critics.encoder.named_parameters())
    assert all(p.grad is None for p in critics.encoder.parameters())


def test_dropout_of_the_teacher_is_off() -> None:
    encoder = FrozenEncoder(unet(dropout=0.5))
    critics = panel(network=unet(dropout=0.5)).groups[0]
    x, zero = torch.randn(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)
    assert all(torch.equal(a, b) for a, b in zip(encoder(x, zero, zero), encoder(x, zero, zero), strict=True))
    assert torch.equal(critics.logits(x, zero, 0), critics.logits(x, zero, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"center_input_sample": True},
        {"class_embed_type": "timestep"},
        {
            "down_block_types": ("SkipDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "SkipUpBlock2D"),
        },
    ],
)
def test_a_network_whose_encoder_does_more_is_refused(options: dict[str, Any]) -> None:
    config = {key: value for key, value in unet().config.items() if not key.startswith("_")}
    network = UNet2DModel(**config | {"norm_num_groups": 32, "block_out_channels": (32, 32)} | options)
    with pytest.raises(ValueError, match="use one of DownBlock2D and AttnDownBlock2D"):
        FrozenEncoder(network)
