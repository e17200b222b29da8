"""The sampler's benchmark compares the same decisions, and tells what it should."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from counterpoint.selection.decoding import predraw, sample_candidates
from jobs import bench_sampler
from jobs.bench_sampler import SamplerBenchConfig

TINY = {
    "network": {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 16, "vision": {"channels": (4, 4, 4)}},
    "environment": {"image_size": 16},
    "vocabulary": 12,
    "horizon": 2,
    "candidates": (2, 3),
    "rival_candidates": 3,
    "rounds": 2,
}


@pytest.mark.parametrize(("dtype", "vision"), [("float32", "pointer"), ("bfloat16", "patches")])
def test_benchmark_tells_latencies_of_all_arms(dtype, vision):
    network = TINY["network"] | {"vision": {"kind": vision, "channels": (4, 4, 4)}}
    changes = {"dtype": dtype, "network": network, "batch": 2}
    told = bench_sampler.main(SamplerBenchConfig.model_validate(TINY | changes))
    expected = {"over_greedy_at_2", "over_greedy_at_3", "over_naive_at_3", "over_repeated_prefill_at_3"}
    assert expected <= set(told)
    for name in expected:
        low, high = told[f"spread_{name}"]
        assert 0 < low <= told[name] <= high
    assert told["ms_at_3"] > 0
    assert (told["tokens"], told["vocabulary"], told["batch"]) == (8, 12, 2)
    if dtype == "float32":
        assert told["rounds_that_agree_with_naive"] == 1


def test_rivals_make_the_same_decisions():
    config = SamplerBenchConfig.model_validate(TINY)
    bundle = bench_sampler.build_bundle(config)
    arms = bench_sampler.arms(config, bundle)
    assert list(arms) == ["greedy", "2", "3", "naive", "repeated_prefill"]
    made = {name: arm(1) for name, arm in arms.items()}
    assert bench_sampler.alike(made["3"], made["naive"])
    np.testing.assert_allclose(made["3"][0].confidences, made["naive"][0].confidences, atol=1e-4)
    assert bench_sampler.alike(made["3"], made["repeated_prefill"])
    assert not bench_sampler.alike(made["3"], arms["3"](2))
    assert made["2"][0].tokens == made["3"][0].tokens[:2]
    assert made["greedy"][0].tokens != made["3"][0].tokens[:1]


def test_one_by_one_has_a_prefill_for_every_candidate(monkeypatch):
    config = SamplerBenchConfig.model_validate(TINY)
    bundle = bench_sampler.build_bundle(config)
    inputs = bundle.prepare(bench_sampler.random_observations(config))
    uniforms = predraw([bench_sampler.Stream(0, 0)], 0, 3, 8)
    calls = []
    prefill = bundle.policy.prefill
    monkeypatch.setattr(bundle.policy, "prefill", lambda *told: calls.append(0) or prefill(*told))
    alone = bench_sampler.sample_one_by_one(bundle.policy, inputs, uniforms, config.selection)
    assert len(calls) == 3
    shared = sample_candidates(bundle.policy, inputs, uniforms, config.selection)
    assert len(calls) == 4
    assert torch.equal(alone.tokens, shared.tokens)


def test_the_gpu_variant_is_of_realistic_size():
    text = (Path(__file__).parent.parent / "configs/vla/bench_gpu.yaml").read_text(encoding="utf-8")
    config = SamplerBenchConfig.model_validate(yaml.safe_load(text))
    with torch.device("meta"):
        bundle = bench_sampler.build_bundle(config.model_copy(update={"device": "meta"}))
    parameters = list(bundle.policy.parameters())
    assert 2.5e9 < sum(parameter.numel() for parameter in parameters) < 3.5e9
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}


def test_rival_must_be_timed_by_us_too():
    with pytest.raises(ValidationError, match="rival_candidates=5 is not among"):
        SamplerBenchConfig(rival_candidates=5)
