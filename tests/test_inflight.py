"""Chains at different steps share evaluations, and each is the image that the pipeline makes by itself."""

import copy
from functools import cache

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders import SkipLayerGuidance
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLASSES, unet

from counterpoint.exactness import exact_sizes, unet_rows
from counterpoint.guidance import GuiderConfig, build_guider
from counterpoint.inflight import Chain, advance
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.seeds import generator
from counterpoint.unet import frozen

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
STUDENT = TimestepShiftScheduler()
DDIM = DDIMScheduler(timestep_spacing="trailing", clip_sample=True, **COSINE)
DDPM = DDPMScheduler(timestep_spacing="trailing", **COSINE)
DPM = DPMSolverMultistepScheduler(**COSINE)
SDE = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **COSINE)
OTHERS = [DPM, SDE, UniPCMultistepScheduler(**COSINE), EulerAncestralDiscreteScheduler(**COSINE),
          HeunDiscreteScheduler(**COSINE)]  # fmt: skip
GUIDERS = [
    ("ClassifierFreeGuidance", {"guidance_scale": 2.5}),
    ("ClassifierFreeGuidance", {"guidance_scale": 2.5, "start": 0.3, "stop": 0.8, "guidance_rescale": 0.5}),
    ("AdaptiveProjectedGuidance", {"guidance_scale": 3.0, "adaptive_projected_guidance_momentum": -0.5,
                                   "adaptive_projected_guidance_rescale": 2.0, "eta": 0.3}),
    ("ClassifierFreeZeroStarGuidance", {"guidance_scale": 3.0}),
    ("TangentialClassifierFreeGuidance", {"guidance_scale": 3.0}),
    ("BatchedPerturbedAttentionGuidance", {"perturbed_guidance_scale": 2.0}),
    ("BatchedPerturbedAttentionGuidance", {"guidance_scale": 2.0, "layers": ["up"], "stop": 0.5}),
]  # fmt: skip
ASKED = [(STUDENT, steps) for steps in (1, 2, 3, 4)]
ASKED += [(scheduler, steps) for scheduler in (DDIM, DDPM, *OTHERS) for steps in (2, 5)]


@cache
def network():
    return frozen(unet(mid_attention=True, attention=(False, True)))


@cache
def sizes():
    return exact_sizes(unet_rows(network()), 16)


class Watched(torch.nn.Module):
    """The network, with a record of the rows of each evaluation; refuses a label."""

    def __init__(self, refused=-1):
        super().__init__()
        self.inner, self.config, self.refused, self.rows = network(), network().config, refused, []

    def forward(self, x, t, class_labels):
        self.rows.append(len(x))
        assert x.shape[0] == t.shape[0] == class_labels.shape[0]
        if self.refused in class_labels:
            raise RuntimeError(f"label {self.refused}")
        return self.inner(x, t, class_labels=class_labels)


def chain(scheduler=STUDENT, label=3, steps=4, guidance=1.0, seed=0):
    """A chain under `guidance`: a scale, or the index of one of GUIDERS."""
    scale, guider = (guidance, None) if isinstance(guidance, float) else (1.0, guider_of(guidance))
    return Chain(network(), scheduler, label, steps, scale, generator(seed, "sample", label, 0), guider)


def guider_of(index):
    name, options = GUIDERS[index]
    return build_guider(GuiderConfig(guider=name, options=options))


def finish(*chains, among=None):
    """Advance to the end those that are not there yet, and return the images."""
    while flying := [chain for chain in chains if not chain.done]:
        advance(network(), flying, among or sizes())
    return [chain.image for chain in chains]


@cache
def alone(*options):
    return finish(chain(*options))[0]


def piped(scheduler, labels, steps, guidance, seeds):
    pipeline = ClassConditionalPipeline(network(), copy.deepcopy(scheduler))
    pipeline.set_progress_bar_config(disable=True)
    streams = [generator(seed, "sample", label, 0) for label, seed in zip(labels, seeds, strict=True)]
    scale, guider = (guidance, None) if isinstance(guidance, float) else (1.0, guider_of(guidance))
    return pipeline(labels, steps, scale, streams, output_type="pt", guider=guider).images


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    ("scheduler", "steps"), ASKED, ids=lambda x: str(x) if isinstance(x, int) else type(x).__name__
)
def test_a_chain_is_the_image_of_the_pipeline(scheduler, steps, guidance):
    found = finish(chain(scheduler, 3, steps, guidance), chain(STUDENT, 5, 2))[0]
    expected = piped(scheduler, [3], steps, guidance, [0])[0]
    torch.testing.assert_close(found.clamp(-1, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [DDIM, DDPM, DPM], ids=["ddim", "ddpm", "dpm"])
@pytest.mark.parametrize("guidance", range(len(GUIDERS)), ids=[name for name, _ in GUIDERS])
def test_a_guided_chain_is_the_image_of_the_pipeline(guidance, scheduler):
    found = finish(chain(scheduler, 3, 6, guidance), chain(STUDENT, 5, 2), chain(DDIM, 4, 5, 2.0))[0]
    expected = piped(scheduler, [3], 6, guidance, [0])[0]
    torch.testing.assert_close(found.clamp(-1, 1), expected, atol=5e-5, rtol=1e-4)


def test_chains_under_all_kinds_of_guidance_share_an_evaluation():
    evaluated = []
    hook = network().register_forward_pre_hook(lambda _, args: evaluated.append(len(args[0])))
    chains = [chain(DDIM, 3, 4, guidance) for guidance in (1.0, 2.0, *range(len(GUIDERS)))]
    rows = [link.rows for link in chains]
    assert rows == [1, 2, 2, 1, 2, 2, 2, 2, 3]
    assert advance(network(), chains, (32,)) == 32
    assert [link.rows for link in chains] == [1, 2, 2, 2, 2, 2, 2, 2, 3]
    advance(network(), chains, (32,))
    assert [link.rows for link in chains] == [1, 2, 2, 2, 2, 2, 2, 2, 1]
    assert evaluated == [32, 32]
    hook.remove()


@pytest.mark.parametrize("scheduler", [STUDENT, DDPM, SDE], ids=["student", "ddpm", "sde"])
def test_sixteen_chains_have_the_very_bits_of_a_pipelines_batch(scheduler):
    labels, seeds = [k % CLASSES for k in range(16)], list(range(16))
    chains = [chain(scheduler, label, 3, 1.0, seed) for label, seed in zip(labels, seeds, strict=True)]
    found = torch.stack(finish(*chains, among=(16,)))
    assert torch.equal(found.clamp(-1, 1), piped(scheduler, labels, 3, 1.0, seeds))


ASK = st.tuples(
    st.sampled_from([STUDENT, DDIM, DDPM, DPM]),
    st.integers(0, CLASSES - 1),
    st.integers(1, 4),
    st.sampled_from([1.0, 2.0, 4.5, *range(len(GUIDERS))]),
    st.integers(0, 3),
)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), ASK), min_size=2, max_size=7), st.randoms(use_true_random=False))
def test_a_chains_bits_do_not_depend_on_who_comes_and_goes(arrivals, order):
    chains = [(begin, options, chain(*options)) for begin, options in arrivals]
    for turn in range(10):
        flying = [link for begin, _, link in chains if begin <= turn and not link.done]
        order.shuffle(flying)
        if flying:
            advance(network(), flying, sizes())
    for _, options, link in chains:
        assert torch.equal(link.image, alone(*options))


def test_rows_are_filled_up_to_the_next_size():
    watched = Watched()
    chains = [chain(seed=seed) for seed in range(3)]
    assert advance(watched, chains, (2, 5, 8)) == 5
    assert advance(watched, [*chains, chain(guidance=2.0), chain(guidance=3.0)], (2, 5, 8)) == 8
    assert advance(watched, chains[:1], (2, 5, 8)) == 2
    assert watched.rows == [5, 8, 2]


def test_a_guided_chain_takes_two_rows_in_two_evaluations_where_only_one_fits():
    watched, guided = Watched(), chain(steps=1, guidance=2.0)
    assert guided.rows == 2
    assert advance(watched, [guided], (1,)) == 2
    assert watched.rows == [1, 1]
    torch.testing.assert_close(guided.image, alone(STUDENT, 3, 1, 2.0, 0), atol=2e-5, rtol=1e-4)


def test_chains_at_the_same_step_share_a_call_of_the_scheduler(monkeypatch):
    calls, step = [], TimestepShiftScheduler.step

    def counted(self, output, *args, **options):
        calls.append(len(output))
        return step(self, output, *args, **options)

    monkeypatch.setattr(TimestepShiftScheduler, "step", counted)
    late = [chain(seed=seed) for seed in range(2)]
    advance(network(), late, sizes())
    advance(network(), [*late, *(chain(steps=2, seed=seed) for seed in range(3)), chain(seed=9)], sizes())
    assert calls == [2, 2, 3, 1]


@pytest.mark.parametrize("scheduler", [STUDENT, DDIM, DPM], ids=["student", "ddim", "dpm"])
def test_the_scheduler_given_never_changes(scheduler):
    scheduler.set_timesteps(2)
    before = copy.deepcopy(vars(scheduler))
    finish(chain(scheduler, steps=4), chain(scheduler, steps=3))
    after = vars(scheduler)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def test_a_failing_network_leaves_every_chain_as_it_was():
    good, bad = chain(steps=2), chain(label=7, steps=2)
    with pytest.raises(RuntimeError, match="label 7"):
        advance(Watched(refused=7), [good, bad], sizes())
    assert (good.index, bad.index) == (0, 0)
    assert torch.equal(finish(good)[0], alone(STUDENT, 3, 2, 1.0, 0))


def test_a_failing_scheduler_leaves_every_chain_as_it_was(monkeypatch):
    options = [(DDPM, 3, 3, 1.0, 0), (SDE, 3, 3, 2, 1), (DDIM, 3, 3, 1.0, 2), (DDIM, 3, 3, 6, 2)]
    chains = [chain(*each) for each in options]
    advance(network(), chains, sizes())
    with monkeypatch.context() as patch:
        patch.setattr(DDIMScheduler, "step", lambda self, *args, generator: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            advance(network(), chains, sizes())
    for link, each in zip(chains, options, strict=True):
        assert torch.equal(finish(link)[0], alone(*each))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="student takes 1 to 4 steps"):
        chain(steps=5)
    link = chain(steps=2)
    advance(network(), [link], sizes())
    with pytest.raises(ValueError, match="1 of 2 steps are taken"):
        _ = link.image
    advance(network(), [link], sizes())
    with pytest.raises(ValueError, match="none that is done"):
        advance(network(), [link, chain()], sizes())
    with pytest.raises(ValueError, match="pass chains"):
        advance(network(), [], sizes())
    hooking = SkipLayerGuidance(skip_layer_guidance_layers=[0])
    with pytest.raises(ValueError, match="guider=SkipLayerGuidance hooks the network's layers"):
        Chain(network(), DDIM, 3, 4, 1.0, generator(0), hooking)


@pytest.mark.gpu
def test_a_chain_on_a_gpu_is_the_image_of_the_pipeline_there():
    there = frozen(unet()).to("cuda")
    chains = [Chain(there, DDPM, 3, 4, guidance, generator(0, "sample", 3, 0)) for guidance in (1.0, 2.0)]
    for _ in range(4):
        advance(there, chains, (4,))
    pipeline = ClassConditionalPipeline(there, copy.deepcopy(DDPM))
    pipeline.set_progress_bar_config(disable=True)
    for link in chains:
        stream = [generator(0, "sample", 3, 0)]
        expected = pipeline([3], 4, link.guidance_scale, stream, output_type="pt").images[0]
        torch.testing.assert_close(link.image.clamp(-1, 1).cpu(), expected, atol=1e-3, rtol=1e-3)
