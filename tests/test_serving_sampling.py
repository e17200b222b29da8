"""Requests choose their solver and guidance; images are the pipeline's, and all share the evaluations."""

import copy
import inspect
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import CLASSES, unet

from actors.serving.config import BatchingConfig
from actors.serving.engine import Engine
from actors.serving.image_model import ImageModel, guiders_over, samplers_over
from actors.serving.images_sampling import GUIDERS, SCHEDULERS, GuiderOptions, options_of, scale_of
from actors.serving.messages import ImageRequest
from counterpoint.guidance import GuiderConfig, build_guider
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.seeds import generator
from counterpoint.unet import frozen

LONG = 60.0
COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
DDIM = DDIMScheduler(timestep_spacing="trailing", clip_sample=True, **COSINE)
FLOW = FlowMatchEulerDiscreteScheduler()
DIFFUSION = [name for name in SCHEDULERS if not name.startswith("Flow")]
OPTIONS = {
    "ClassifierFreeGuidance": {"guidance_rescale": 0.5, "start": 0.3},
    "AdaptiveProjectedGuidance": {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.5},
    "BatchedPerturbedAttentionGuidance": {"perturbed_guidance_scale": 2.0},
    "RatioAwareGuidance": {"decay": 3.0},
}


@cache
def network(mid_attention=True):
    return frozen(unet(mid_attention=mid_attention))


@cache
def served(scheduler):
    return ImageModel(
        network(), scheduler, "v1", (1, 2, 4, 8, 16, 32), 1000, CLASSES, samplers_over(scheduler),
        guiders_over(network(), scheduler),
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    engine = Engine(BatchingConfig(max_batch=32, max_wait=0.05))
    yield engine
    engine.close()


def ask(label=3, steps=4, scale=1.0, **options):
    return ImageRequest("digits", label, 1, steps, scale, 7, **options)


def piped(own, request):
    """Return the image that the pipeline makes of a request, as levels 0 to 255."""
    scheduler = served(own).samplers[request.scheduler] if request.scheduler else own
    guider = None
    if request.guider is not None:
        options = {scale_of(request.guider): request.guidance_scale, **dict(request.guider_options)}
        guider = build_guider(GuiderConfig(guider=request.guider, options=options))
    pipeline = ClassConditionalPipeline(network(), copy.deepcopy(scheduler))
    pipeline.set_progress_bar_config(disable=True)
    streams = [generator(request.seed, "sample", request.label, 0)]
    images = pipeline(
        [request.label], request.steps, request.guidance_scale, streams, output_type="pt", guider=guider
    )
    return images.images[0].permute(1, 2, 0).add(1.0).mul(127.5).numpy()


@pytest.mark.parametrize("own", [DDIM, FLOW], ids=["diffusion", "flow"])
def test_each_solver_and_guider_gives_the_pipelines_image_in_one_crowd(engine, own):
    model = served(own)
    asked = [ask(k, scheduler=name) for k, name in enumerate(model.samplers)]
    asked += [
        ask(k, 4, 2.5, scheduler=name, guider=guider, guider_options=tuple(OPTIONS.get(guider, {}).items()))
        for k, guider in enumerate(model.guiders)
        for name in list(model.samplers)[-1:]
    ]
    asked.append(ask(9, 3, 3.0, guider="BatchedPerturbedAttentionGuidance"))
    futures = [engine.submit(model, request, LONG) for request in asked]
    for request, future in zip(asked, futures, strict=True):
        answer = future.result(LONG)
        assert np.abs(answer.images[0] - piped(own, request)).max() < 1.0, request
        assert answer.evaluations == request.steps
    assert futures[-1].result().batch_size > 10


def test_a_diffusion_offers_its_own_first_and_the_others_of_its_process():
    model = served(DDIM)
    assert list(model.samplers) == DIFFUSION
    assert model.samplers["DDIMScheduler"] is DDIM
    assert {sampler.config.timestep_spacing for sampler in model.samplers.values()} == {"trailing"}
    assert {sampler.config.prediction_type for sampler in model.samplers.values()} == {"v_prediction"}
    assert set(model.guiders) == set(GUIDERS) - {"RatioAwareGuidance"}
    assert "BatchedPerturbedAttentionGuidance" not in guiders_over(network(mid_attention=False), DDIM)


def test_a_flow_offers_solvers_of_flows_and_all_guiders():
    assert list(served(FLOW).samplers) == ["FlowMatchEulerDiscreteScheduler"]
    assert served(FLOW).guiders == GUIDERS


def test_a_student_has_only_its_own_steps(engine):
    model = served(TimestepShiftScheduler())
    assert list(model.samplers) == ["TimestepShiftScheduler"]
    with pytest.raises(ValueError, match="scheduler=DDIMScheduler: the model offers TimestepShiftScheduler"):
        engine.submit(model, ask(scheduler="DDIMScheduler"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "the model offers DDIMScheduler, DEIS"),
        ({"scheduler": "DPMSolverV3Scheduler", "steps": 1000}, "1000"),
        ({"guider": "RatioAwareGuidance"}, "guider=RatioAwareGuidance: the model offers ClassifierFree"),
        (
            {"guider": "BatchedPerturbedAttentionGuidance", "guider_options": (("layers", "mid"),)},
            "give a list of one layer",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_it_waits(engine, options, message):
    before = engine.statistics().requests
    with pytest.raises(ValueError, match=message):
        engine.submit(served(DDIM), ask(**options))
    assert engine.statistics().requests == before


@pytest.mark.parametrize("name", GUIDERS)
def test_options_are_arguments_of_the_guider(name):
    guider = build_guider(GuiderConfig(guider=name, options={}))
    arguments = set(inspect.signature(type(guider).__init__).parameters)
    assert {*options_of(name), scale_of(name)} <= arguments
    assert set(options_of(name)) <= set(GuiderOptions.model_fields)


def test_every_option_is_one_of_a_guider():
    assert set(GuiderOptions.model_fields) == {option for name in GUIDERS for option in options_of(name)}


def test_images_do_not_depend_on_which_solvers_and_guiders_share_the_evaluation(engine):
    request = ask(3, 4, 2.0, guider="BatchedPerturbedAttentionGuidance", scheduler="UniPCMultistepScheduler")
    model = ImageModel(
        network(), DDIM, "v1", (16,), 1000, CLASSES, served(DDIM).samplers, served(DDIM).guiders
    )
    alone = engine.submit(model, request, LONG).result(LONG)
    crowd = [ask(k, 3, 3.0, guider=name) for k, name in enumerate(model.guiders)]
    futures = [engine.submit(model, each, LONG) for each in (*crowd, request)]
    together = futures[-1].result(LONG)
    assert torch.equal(torch.from_numpy(alone.images), torch.from_numpy(together.images))
    assert together.batch_size > alone.batch_size
