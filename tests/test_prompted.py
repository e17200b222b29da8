"""A text-to-image network called with rows of a table is diffusers' own called with their embeddings."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_text import TIME_IDS, columns, pipeline, prompted, table

from counterpoint.critics.prompted_encoder import PromptedEncoder, shape_of
from counterpoint.guidance import classifier_free, guided
from counterpoint.prompted import plain_unet
from counterpoint.seeds import generator

T = torch.tensor([10, 500, 900])
ROWS = torch.tensor([4, 0, 11])


def states(side: int = 8) -> torch.Tensor:
    return torch.randn(3, 4, side, side, generator=generator(1, "x"))


def conditions(rows: torch.Tensor, ids: torch.Tensor | None = None) -> dict[str, object]:
    made = columns(12)
    ids = torch.tensor(TIME_IDS, dtype=torch.float32).expand(len(rows), -1) if ids is None else ids
    return {
        "encoder_hidden_states": made["embeds"][rows],
        "added_cond_kwargs": {"text_embeds": made["pooled"][rows], "time_ids": ids},
    }


def test_rows_give_what_their_embeddings_give(tmp_path: Path) -> None:
    unet = pipeline().unet
    network = prompted(unet, table(tmp_path))
    with torch.no_grad():
        expected = unet(states(), T, **conditions(ROWS)).sample
        assert torch.equal(network(states(), T, class_labels=ROWS).sample, expected)
        assert torch.equal(network(states(), T, **conditions(ROWS)).sample, expected)
    assert network.state_dict().keys() == unet.state_dict().keys()


def test_guidance_is_towards_the_null_row(tmp_path: Path) -> None:
    unet = pipeline().unet
    network, rows = prompted(unet, table(tmp_path)), torch.tensor([4, 0, 2])
    with torch.no_grad():
        conditional = unet(states(), 500, **conditions(rows)).sample
        free = unet(states(), 500, **conditions(torch.full_like(rows, 11))).sample
        found = guided(network, states(), torch.tensor(500), rows, classifier_free(3.0))
    torch.testing.assert_close(found, free + 3.0 * (conditional - free))


def test_diffusers_gets_its_own_network_back(tmp_path: Path) -> None:
    network = prompted(pipeline().unet, table(tmp_path / "table"))
    plain = plain_unet(network)
    assert type(plain) is UNet2DConditionModel
    assert plain.conv_in.weight.data_ptr() == network.conv_in.weight.data_ptr()
    plain.save_pretrained(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    with torch.no_grad():
        expected = network(states(), T, class_labels=ROWS).sample
        assert torch.equal(loaded(states(), T, **conditions(ROWS)).sample, expected)


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    network = prompted(pipeline().unet, table(tmp_path))
    other = pipeline(text_widths=(8, 24)).unet
    with pytest.raises(ValueError, match="cross_attention_dim=32"):
        prompted(other, network.table)
    with pytest.raises(ValueError, match="added conditioning has"):
        prompted(pipeline(text_widths=(12, 12)).unet, network.table)


def hooked(unet: UNet2DConditionModel, x: torch.Tensor, options: dict[str, object]) -> list[torch.Tensor]:
    """The encoder's maps as diffusers' own forward makes them."""
    seen: list[torch.Tensor] = []
    handles = [unet.conv_in.register_forward_hook(lambda _m, _i, out: seen.append(out))]
    for block in unet.down_blocks:
        handles.append(block.register_forward_hook(lambda _m, _i, out: seen.extend(out[1])))
    handles.append(unet.mid_block.register_forward_hook(lambda _m, _i, out: seen.append(out)))
    with torch.no_grad():
        unet(x, T, **options)
    for handle in handles:
        handle.remove()
    return seen


def test_critics_see_what_the_unet_computes(tmp_path: Path) -> None:
    unet = pipeline().unet
    encoder = PromptedEncoder(prompted(unet, table(tmp_path)), table(tmp_path))
    found = encoder(states(), T, ROWS)
    expected = hooked(unet, states(), conditions(ROWS))
    assert len(found) == 10  # As on SDXL: nine skips and the middle block.
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert encoder.null_class == 11
    shapes = [(m.shape[1], m.shape[2]) for m in expected]
    assert encoder.map_shapes(8) == shapes == shape_of(dict(unet.config)).map_shapes(8)


@pytest.mark.parametrize("patch_ids", ["image", "patch"])
def test_windows_are_given_the_time_ids_that_were_chosen(tmp_path: Path, patch_ids: str) -> None:
    unet, rows = pipeline().unet, table(tmp_path)
    encoder = PromptedEncoder(prompted(unet, rows), rows, patch_ids)
    corners = torch.tensor([[0, 0], [4, 1], [2, 3]])
    own = torch.tensor([[16, 16, 2 * top, 2 * left, 8, 8] for top, left in corners.tolist()]).float()
    ids = own if patch_ids == "patch" else None
    found = encoder(states(4), T, ROWS, corners)
    for ours, theirs in zip(found, hooked(unet, states(4), conditions(ROWS, ids)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_gradients_pass_through_frozen_eyes_of_any_precision(tmp_path: Path) -> None:
    rows = table(tmp_path)
    encoder = PromptedEncoder(prompted(pipeline().unet, rows), rows).to(torch.bfloat16)
    x = states().requires_grad_()
    maps = encoder(x, T, ROWS)
    assert {m.dtype for m in maps} == {torch.float32}
    sum(m.sum() for m in maps).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())


SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "layers_per_block": 2,
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def test_sdxl_at_full_size_has_the_ten_maps_of_the_paper() -> None:
    channels = [320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280]
    sides = [128, 128, 128, 64, 64, 64, 32, 32, 32, 32]
    encoder = shape_of(SDXL)  # On the meta device: no weights and no arithmetic.
    assert encoder.map_shapes(128) == list(zip(channels, sides, strict=True))
    assert [side for _, side in encoder.map_shapes(64)] == [side // 2 for side in sides]
    assert sum(p.numel() for p in encoder.parameters()) > 1e9
