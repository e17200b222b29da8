"""A policy's bundle: what is saved is what is loaded, by whoever loads it, and what is damaged is refused."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy_environment import OBSERVATION_SPACE, SPACE
from toy_policy import observations, toy_bundle

from actors.sampler import ActionSampler, LocalSampler, SamplerSettings, sampler_actor
from cluster.waiting import get
from counterpoint.actions.statistics import ActionStatistics
from counterpoint.policies.bundle import PolicyBundle, check_sample
from counterpoint.policies.observation import Observation
from counterpoint.selection.choice import decide
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream

SELECTION = SelectionConfig(rule="masked_condition", mask="text", candidates=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("bundle")
    toy_bundle().save(run / "policy")
    return run


def test_what_is_loaded_is_what_was_saved(saved: Path) -> None:
    before, after = toy_bundle(), PolicyBundle.load(saved / "policy")
    assert after.observation_space == before.observation_space == OBSERVATION_SPACE
    assert after.action_space == before.action_space == SPACE
    assert after.tokenizer.statistics == before.tokenizer.statistics
    assert np.array_equal(after.sample, before.sample)
    for name, tensor in before.policy.state_dict().items():
        assert torch.equal(tensor, after.policy.state_dict()[name]), name
    prepared = [bundle.prepare(observations(3)) for bundle in (before, after)]
    assert all(torch.equal(prepared[0][name], prepared[1][name]) for name in prepared[0])


def test_trainer_rollout_actor_and_endpoint_choose_the_same_action(saved: Path, ray_cluster: object) -> None:
    from ray import serve

    shown, streams = observations(1), [Stream(seed=7, decision=0)]
    settings = SamplerSettings(seed=5)
    trained = decide(toy_bundle(), shown, streams, SELECTION, 5)[0]
    rollout = LocalSampler(str(saved), 5).act(shown, streams, SELECTION)[0]
    actor = sampler_actor(1).remote(str(saved), settings)
    remote = get(actor.act.remote(shown, streams, SELECTION), timeout=240, what="a decision")[0]
    try:
        endpoint = serve.run(
            serve.deployment(ActionSampler, ray_actor_options={"num_cpus": 0.1}).bind(str(saved), settings),
            name="policy",
            route_prefix=None,
        )
        served = endpoint.act.remote(shown, streams, SELECTION).result(timeout_s=60)[0]
    finally:
        serve.shutdown()
    for other in (rollout, remote, served):
        assert other.tokens == trained.tokens
        assert other.chosen == trained.chosen
        np.testing.assert_allclose(other.actions, trained.actions, atol=1e-6)
        np.testing.assert_allclose(other.confidences, trained.confidences, atol=1e-5)


def damaged(saved: Path, folder: Path) -> Path:
    shutil.copytree(saved / "policy", folder)
    return folder


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop("places")
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def short_sample(folder: Path) -> None:
    safetensors.torch.save_file({"actions": torch.zeros(3, 1, 2)}, folder / "sample.safetensors")


def unreal_sample(folder: Path) -> None:
    safetensors.torch.save_file(
        {"actions": torch.full((3, SPACE.horizon, 2), torch.nan)}, folder / "sample.safetensors"
    )


DAMAGE = [
    (lambda f: (f / "policy.json").unlink(), "it has no policy.json"),
    (lambda f: (f / "policy.json").write_text("{"), "is not JSON"),
    (lambda f: rewrite(f / "policy.json", format=99), "has format 99, this version reads 1"),
    (lambda f: rewrite(f / "policy.json", words_length=0), "words_length"),
    (lambda f: (f / "model.safetensors").write_bytes(b"nothing"), "model.safetensors cannot be read"),
    (drop_a_weight, "does not fit the network"),
    (lambda f: rewrite(f / "policy.json", words_length=9), "does not fit the network"),
    (lambda f: shutil.rmtree(f / "words"), "has no tokenizer.json"),
    (lambda f: (f / "words/tokenizer.json").write_text("{}"), "not a word tokenizer"),
    (lambda f: shutil.rmtree(f / "actions"), "actions"),
    (short_sample, r"chunks of shape \[1, 2\]"),
    (unreal_sample, "not finite"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_bundle_is_refused_in_one_line(saved: Path, tmp_path: Path, damage, words: str) -> None:
    folder = damaged(saved, tmp_path / "policy")
    damage(folder)
    with pytest.raises(ValueError, match=words) as raised:
        PolicyBundle.load(folder)
    assert "\n" not in str(raised.value)


def test_statistics_of_other_data_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    bundle = toy_bundle()
    assert check_sample(bundle)["clipped"] == 0.0
    assert caplog.records == []
    wide = ActionStatistics.from_actions(100.0 * bundle.sample.reshape(-1, 2).astype(np.float64), "other")
    bundle.tokenizer = replace(bundle.tokenizer, statistics=wide)
    with caplog.at_level(logging.WARNING):
        report = check_sample(bundle)
    assert report["median_error"] > 0.05
    assert "hardly fit the policy's own training data" in caplog.text


def observation(**changes: object) -> Observation:
    given = observations(1)[0]
    fields = {"images": given.images, "state": given.state, "instruction": given.instruction}
    return Observation(**fields | changes)


CAMERA = next(iter(OBSERVATION_SPACE.cameras))
BAD = [
    ({"images": {CAMERA: np.zeros((5, 5, 3), np.uint8)}}, r"the policy expects uint8"),
    ({"images": {CAMERA: np.zeros((*OBSERVATION_SPACE.cameras[CAMERA], 3))}}, "is float64"),
    ({"images": {}}, f"has no camera '{CAMERA}'"),
    ({"state": np.full(len(OBSERVATION_SPACE.state), np.nan, np.float32)}, "is not finite in"),
    ({"state": np.zeros(99, np.float32)}, r"has shape \[99\]"),
    ({"instruction": " "}, "instruction is empty"),
    ({"instruction": "go " * 50}, "reads at most"),
    ({"instruction": "dance"}, "never taught, dance"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_bad_observation_is_refused_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        toy_bundle().prepare([observation(), observation(**changes)])
    assert "\n" not in str(raised.value)
