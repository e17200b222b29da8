"""Perturbed attention against a mask of minus infinity, diffusers' own guider, and the paper's formulas."""

import contextlib
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.guiders import PerturbedAttentionGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tiny import unet
from torch import Tensor, nn

from counterpoint.guidance import GuiderConfig, build_guider, classifier_free, guided
from counterpoint.guiders.perturbed_attention import (
    BatchedPerturbedAttentionGuidance,
    perturbed_rows,
    self_attention,
)
from counterpoint.guiders.random_direction import RandomDirectionGuidance
from counterpoint.sampling import sample
from counterpoint.seeds import generator

NULL = 10
LABELS = torch.tensor([3, 0, 9])
TIMES = torch.tensor([900, 500, 20])


def noise(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=generator(0, "test"))


def tiny_unet() -> nn.Module:
    return unet(mid_attention=True, attention=(False, True), attention_head_dim=4).eval()


def tiny_dit(layers: int = 3) -> nn.Module:
    """diffusers' transformer, with weights that make every branch differ; its null class is row 10."""
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        norm_num_groups=8,
        num_embeds_ada_norm=11,
    )
    for k, parameter in enumerate(dit.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=generator(0, "weights", k))
    dit.null_row = NULL
    return dit.eval()


NETWORKS = pytest.mark.parametrize("network", [tiny_unet(), tiny_dit()], ids=["unet", "dit"])


def heard(network: nn.Module, labels: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the output at noise(), perturbed in the middle for `rows`."""
    layers = self_attention(network, ["mid"])
    with perturbed_rows(layers, rows) if rows is not None else contextlib.nullcontext(), torch.no_grad():
        return network(noise(), TIMES, class_labels=labels).sample


ALL = torch.tensor([True, True, True])


@NETWORKS
@pytest.mark.parametrize("marked", [[True, True, True], [False, True, False], [False, False, False]])
def test_the_identity_is_a_mask_of_minus_infinity(network: nn.Module, marked: list[bool]) -> None:
    """Against attention written out: softmax of logits that are -inf off the diagonal in marked rows."""
    rows = torch.tensor(marked)
    (layer,) = self_attention(network, ["mid"]).values()
    found = heard(network, LABELS, rows)
    layer.set_processor(WrittenOut(rows))
    try:
        with torch.no_grad():
            expected = network(noise(), TIMES, class_labels=LABELS).sample
    finally:
        layer.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    plain = heard(network, LABELS)
    assert torch.equal(found[~rows], plain[~rows])
    assert not rows.any() or (found[rows] - plain[rows]).abs().max() > 1e-3


class WrittenOut:
    """Self-attention by its formula, with the ADM code's mask for the marked rows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __call__(self, attn, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        x = hidden_states
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            part(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        off = ~torch.eye(logits.shape[-1], dtype=torch.bool)
        logits = logits.masked_fill(self.rows[:, None, None, None] & off, -torch.inf)
        out = attn.to_out[0]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        out = out.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else out
        return (out + x if attn.residual_connection else out) / attn.rescale_output_factor


@NETWORKS
@pytest.mark.parametrize(("scale", "s"), [(3.0, 1.5), (3.0, 0.0), (1.0, 2.0), (0.0, 0.7)])
def test_guidance_is_equation_14_of_separate_passes(network: nn.Module, scale: float, s: float) -> None:
    conditional, null = heard(network, LABELS), heard(network, torch.full_like(LABELS, NULL))
    perturbed = heard(network, LABELS, ALL)
    w = scale - 1.0
    expected = conditional + w * (conditional - null) + s * (conditional - perturbed)
    with torch.no_grad():
        guider = BatchedPerturbedAttentionGuidance(scale, s)
        found = guided(network, noise(), TIMES, LABELS, guider)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@NETWORKS
def test_an_unconditional_model_needs_two_branches(network: nn.Module) -> None:
    null = torch.full_like(LABELS, NULL)
    plain, perturbed = heard(network, null), heard(network, null, ALL)
    guider = BatchedPerturbedAttentionGuidance(1.0, 2.0)
    assert guider.branches == ["pred_cond", "pred_cond_skip"]
    with torch.no_grad():
        found = guided(network, noise(), TIMES, null, guider)
    torch.testing.assert_close(found, plain + 2.0 * (plain - perturbed), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "layers", "blocks"),
    [(tiny_unet(), ["mid"], ("mid_block.attentions", [0])), (tiny_dit(), [0, 2], ("auto", [0, 2]))],
    ids=["unet", "dit"],
)
def test_batches_are_diffusers_own_branch_by_branch(network, layers, blocks) -> None:  # type: ignore[no-untyped-def]
    """Through its hooks, one pass a branch; without classifier-free guidance it (0.42.1) hooks nothing."""
    config = LayerSkipConfig(
        blocks[1], fqn=blocks[0], skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    theirs = PerturbedAttentionGuidance(
        guidance_scale=4.0,
        perturbed_guidance_scale=1.5,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=config,
    )
    ours = BatchedPerturbedAttentionGuidance(4.0, 1.5, layers)
    outputs = []
    for guider in (theirs, ours):
        guider.set_state(step=3, num_inference_steps=10, timestep=TIMES)
        with torch.no_grad():
            outputs.append(guided(network, noise(), TIMES, LABELS, guider))
    assert theirs.num_conditions == ours.num_conditions == 3
    torch.testing.assert_close(*outputs, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_without_a_scale_samples_are_the_plain_ones_bit_for_bit(scale: float) -> None:
    network, scheduler = tiny_unet(), DDIMScheduler(timestep_spacing="trailing")
    off = [
        BatchedPerturbedAttentionGuidance(scale, 0.0),
        BatchedPerturbedAttentionGuidance(scale, 0.0, ["up", "down"]),
    ]
    if scale == 1.0:
        off.append(BatchedPerturbedAttentionGuidance(3.0, 2.0, enabled=False))
    plain, _ = sample(network, scheduler, noise(), LABELS, 4, guider=classifier_free(scale))
    for guider in off:
        assert torch.equal(sample(network, scheduler, noise(), LABELS, 4, guider=guider)[0], plain)


def test_guidance_acts_within_its_steps() -> None:
    guider = BatchedPerturbedAttentionGuidance(2.0, 1.0, start=0.2, stop=0.6)
    told = []
    for step in range(10):
        guider.set_state(step=step, num_inference_steps=10, timestep=TIMES)
        told.append(guider.num_conditions)
    assert told == [1, 1, 3, 3, 3, 3, 1, 1, 1, 1]


def test_the_network_is_as_before_after_an_error() -> None:
    network = tiny_unet()
    before = {name: layer.processor for name, layer in self_attention(network, ["mid", "up"]).items()}
    guider = BatchedPerturbedAttentionGuidance(2.0, 1.0, ["mid", "up"])
    with pytest.raises(IndexError):
        guided(network, noise(), TIMES, torch.tensor([3, 0, 99]), guider)
    with pytest.raises(RuntimeError, match="size of tensor"), guider.perturbing(network, ALL[:2]):
        network(noise(), TIMES, class_labels=LABELS)
    for name, layer in self_attention(network, ["mid", "up"]).items():
        assert layer.processor is before[name]
    assert torch.equal(heard(network, LABELS), heard(tiny_unet(), LABELS))


def test_nested_perturbations_mark_the_rows_of_both() -> None:
    network = tiny_unet()
    layers = self_attention(network, ["mid"])
    first, second = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    with perturbed_rows(layers, first):
        found = heard(network, LABELS, second)
        again = heard(network, LABELS)
    torch.testing.assert_close(found, heard(network, LABELS, first | second), atol=0, rtol=0)
    torch.testing.assert_close(again, heard(network, LABELS, first), atol=0, rtol=0)


def test_threads_at_one_network_do_not_perturb_each_other() -> None:
    """Each enters, meets the other inside, and hears only its own rows, also after others left."""
    network = tiny_unet()
    marks = [torch.tensor([True, False, False]), torch.tensor([False, True, True]), None]
    alone = [heard(network, LABELS, rows) for rows in marks]
    inside, found = threading.Barrier(3, timeout=30), [torch.empty(0)] * 3
    layers = self_attention(network, ["mid"])

    def work(index: int) -> None:
        rows = marks[index]
        with perturbed_rows(layers, rows) if rows is not None else contextlib.nullcontext():
            inside.wait()
            first = heard(network, LABELS)
            inside.wait()
            if index == 1:
                inside.wait()
            found[index] = torch.stack([first, heard(network, LABELS)])
        if index != 1:
            inside.wait()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for own, expected in zip(found, alone, strict=True):
        assert torch.equal(own, torch.stack([expected, expected]))
    assert type(layers["mid_block.attentions.0"].processor) is AttnProcessor2_0


@pytest.mark.parametrize(
    ("network", "layers", "names"),
    [
        (tiny_dit(11), [1], ["transformer_blocks.1.attn1"]),
        (tiny_dit(11), ["transformer_blocks.10"], ["transformer_blocks.10.attn1"]),
        (tiny_dit(11), ["mid"], ["transformer_blocks.5.attn1"]),
        (tiny_unet(), ["mid"], ["mid_block.attentions.0"]),
        (tiny_unet(), ["up"], ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]),
        (tiny_unet(), ["up_blocks.0.attentions.1", "down"],
         ["up_blocks.0.attentions.1", "down_blocks.1.attentions.0"]),
    ],
)  # fmt: skip
def test_layers_are_named_exactly(network: nn.Module, layers: list[str | int], names: list[str]) -> None:
    assert list(self_attention(network, layers)) == names


@pytest.mark.parametrize("entry", ["mid_block.attention", "up_blocks.00", "conv_in", "", 1, "m"])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(entry: str | int) -> None:
    network = tiny_unet()
    with pytest.raises(ValueError, match=r"no self-attention: it has .*mid_block\.attentions\.0") as refused:
        guided(network, noise(), TIMES, LABELS, BatchedPerturbedAttentionGuidance(1.0, 1.0, [entry]))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="it has none at all"):
        self_attention(unet(), ["mid"])


def test_attention_of_another_kind_is_refused() -> None:
    network = tiny_unet()
    network.mid_block.attentions[0].set_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"layers has mid_block.attentions.0, .* by AttnProcessor: only"):
        heard(network, LABELS, ALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "give a list of one layer or more"),
        ({"layers": "mid"}, "layers='mid': give a list"),
        ({"perturbed_guidance_scale": -1}, "perturbed_guidance_scale=-1: give 0"),
        ({"scale": 1}, "does not fit BatchedPerturbedAttentionGuidance"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_guider(GuiderConfig(guider="BatchedPerturbedAttentionGuidance", options=options))


def test_the_control_goes_as_far_in_a_direction_that_follows_from_the_seed() -> None:
    network = tiny_unet()
    plain = heard(network, LABELS)
    steps = []
    for options in ({}, {"seed": 0}, {"seed": 1}):
        guider = RandomDirectionGuidance(1.0, 2.0, **options)
        guider.set_state(step=2, num_inference_steps=10, timestep=TIMES)
        with torch.no_grad():
            steps.append(guided(network, noise(), TIMES, LABELS, guider) - plain)
    torch.testing.assert_close(steps[0], steps[1], atol=0, rtol=0)
    assert (steps[0] - steps[2]).abs().max() > 1e-3
    expected = 2.0 * (plain - heard(network, LABELS, ALL)).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps[0].flatten(1).norm(dim=1), expected, atol=1e-4, rtol=1e-3)
