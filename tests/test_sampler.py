"""A sampler chooses what the policy would choose by itself, for many callers, and bad input harms nobody."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import ray
from toy_environment import OBSERVATION_SPACE, SPACE, ToySampler
from toy_policy import LONGEST, observations, save_toy_policy, toy_bundle

from actors.sampler import (
    ActionSampler,
    LocalSampler,
    RemoteSamplers,
    SamplerSettings,
    check_environment,
    load_policy,
    sampler_actor,
)
from cluster.failures import Failure
from cluster.waiting import NotReady, get, ready
from counterpoint.selection.choice import decide
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream

LIKELIHOOD = SelectionConfig(rule="likelihood", candidates=3)
MASKED = SelectionConfig(rule="masked_condition", mask="text", candidates=2)
SEED = 5
LONG = 60.0


def streams(count):
    return [Stream(seed, 2) for seed in range(count)]


def spoilt(observation):
    """Observations that do not fit, and what is said about each."""
    small = {"top": observation.images["top"][:4]}
    state = observation.state.copy()
    state[1] = np.nan
    long = " ".join(["go"] * (LONGEST + 1))
    return [
        (replace(observation, images=small), r"observation.images\['top'\] is uint8 \[4, 16, 3\]"),
        (replace(observation, images={}), "observation.images has no camera 'top'"),
        (replace(observation, state=state), "observation.state is not finite in y"),
        (replace(observation, state=state[:1]), r"observation.state has shape \[1\]"),
        (replace(observation, instruction=long), "instruction"),
        (replace(observation, instruction=" "), "observation.instruction is empty"),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_toy_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def sampler(run):
    hosted = ActionSampler(run, SamplerSettings(seed=SEED, max_batch=8, max_wait=LONG))
    yield hosted
    hosted.batcher.close()


def check_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.chosen == other.chosen
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-6)
        np.testing.assert_allclose(one.confidences, other.confidences, atol=1e-4)


def test_a_batch_of_many_callers_is_what_each_would_get_alone(run, sampler):
    seen, keys = observations(8), streams(8)
    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(sampler.act, seen[i : i + 2], keys[i : i + 2], MASKED) for i in (0, 2, 4, 6)]
        found = [decision for part in parts for decision in part.result(LONG)]
    assert sampler.statistics().mean_batch_size == 8
    assert sampler.statistics().requests == 4
    bundle = toy_bundle()
    check_same(found, [decide(bundle, [o], [s], MASKED, SEED)[0] for o, s in zip(seen, keys, strict=True)])
    check_same(LocalSampler(run, SEED).act(seen, keys, MASKED), found)
    assert all(isinstance(array, np.ndarray) for array in (found[0].actions, found[0].candidates))


def test_other_rules_are_not_mixed_into_one_forward(sampler):
    seen, keys = observations(8), streams(8)
    with ThreadPoolExecutor(4) as pool:
        halves = [(seen[:4], keys[:4]), (seen[4:], keys[4:])]
        asked = [
            (rule, half, pool.submit(sampler.act, *half, rule))
            for half in halves for rule in (LIKELIHOOD, MASKED)
        ]  # fmt: skip
        for rule, half, answer in asked:
            check_same(answer.result(LONG), decide(sampler.bundle, *half, rule, SEED))
    assert sampler.statistics().batches == 2


def test_bad_input_is_refused_in_one_line_and_its_neighbours_are_answered(sampler):
    good = observations(8)
    bad = spoilt(good[0])
    with ThreadPoolExecutor(len(bad) + 2) as pool:
        halves = [pool.submit(sampler.act, good[i : i + 4], streams(4), LIKELIHOOD) for i in (0, 4)]
        refused = [pool.submit(sampler.act, [one], streams(1), LIKELIHOOD) for one, _ in bad]
        for answer, (_, words) in zip(refused, bad, strict=True):
            with pytest.raises(ValueError, match=words) as caught:
                answer.result(LONG)
            assert "\n" not in str(caught.value)
        assert [len(half.result(LONG)) for half in halves] == [4, 4]
    assert sampler.statistics().batches == 1


def test_streams_must_be_as_many_as_observations(sampler):
    with pytest.raises(ValueError, match="2 observations have 1 streams"):
        sampler.act(observations(2), streams(1), LIKELIHOOD)
    assert sampler.act([], [], LIKELIHOOD) == []


def test_what_is_no_fault_of_the_input_is_a_failure_of_the_sampler(sampler, monkeypatch):
    def broken(observations):
        raise ZeroDivisionError("no weights")

    monkeypatch.setattr(sampler.bundle.policy, "encode", broken)
    with pytest.raises(Failure, match=r"sampler-0 failed \(code\): ZeroDivisionError: no weights"):
        sampler.act(observations(8), streams(8), LIKELIHOOD)


def test_it_says_what_it_hosts(sampler):
    described = sampler.describe()
    assert described["action_space"] == SPACE.model_dump(mode="json")
    assert described["observation_space"] == OBSERVATION_SPACE.model_dump(mode="json")
    assert described["conditions"] == ["state", "text"]
    assert (described["fingerprint"], described["source"]) == ("toy", "toy")


MISFITS = [
    ({}, {"names": ("dx", "dz")}, "action space: the policy has names=.*and the environment has"),
    ({}, {"low": (-1.0, -1.0)}, "action space: the policy has low="),
    ({"cameras": {"side": (16, 16)}}, {}, r"the policy sees camera 'top', the environment has only \['side'"),
    ({"cameras": {"top": (32, 32)}}, {}, r"the policy expects images of \[16, 16\], the environment gives"),
    ({"state": ("x",)}, {}, r"the policy is told the state \('x', 'y'\), the environment gives \('x',\)"),
]


@pytest.mark.parametrize(("observation", "action", "words"), MISFITS)
def test_a_policy_of_another_environment_is_refused(sampler, observation, action, words):
    spaces = OBSERVATION_SPACE.model_copy(update=observation), SPACE.model_copy(update=action)
    with pytest.raises(ValueError, match=words) as caught:
        sampler.check(*spaces)
    assert "\n" not in str(caught.value)


def test_a_fitting_environment_may_have_more(sampler):
    more = {"cameras": {"wrist": (4, 4), "top": (16, 16)}}
    check_environment(sampler.bundle, OBSERVATION_SPACE.model_copy(update=more), SPACE)
    check_environment(sampler.bundle, OBSERVATION_SPACE, SPACE.model_copy(update={"horizon": 9}))


def test_another_use_of_a_run_loads_its_policy_again(tmp_path):
    first = LocalSampler(save_toy_policy(tmp_path), SEED, "first")
    before = first.act(observations(2), streams(2), LIKELIHOOD)
    toy_bundle(seed=1).save(tmp_path / "policy")
    check_same(first.act(observations(2), streams(2), LIKELIHOOD), before)
    after = replace(first, visit="second").act(observations(2), streams(2), LIKELIHOOD)
    assert [one.tokens for one in after] != [one.tokens for one in before]


def test_a_run_without_a_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no policy: give the URI of a finished run"):
        load_policy(str(tmp_path))


@pytest.fixture(scope="module")
def actor(ray_cluster, run):
    settings = SamplerSettings(seed=SEED, max_batch=8, max_wait=LONG, patience=LONG)
    hosted = sampler_actor(callers=4).options(num_cpus=0.1).remote(run, settings)
    ready({"sampler-0": hosted}, timeout=400.0, what="sampler")
    yield hosted
    ray.kill(hosted)


def test_an_actor_answers_many_callers_at_once_and_survives_bad_input(actor, run):
    for one, words in spoilt(observations(1)[0]):
        with pytest.raises(ValueError, match=words) as caught:
            get(actor.act.remote([one], streams(1), LIKELIHOOD), timeout=LONG, what="decision")
        assert "\n" not in str(caught.value)
    misfit = actor.check.remote(OBSERVATION_SPACE, SPACE.model_copy(update={"names": ("a", "b")}))
    with pytest.raises(ValueError, match="action space: the policy has names"):
        get(misfit, timeout=LONG, what="check")
    seen, keys = observations(8), streams(8)
    # Nothing short of a full batch is computed, so these four must be inside at the same time.
    refs = [actor.act.remote(seen[i : i + 2], keys[i : i + 2], MASKED) for i in (0, 2, 4, 6)]
    found = [decision for part in get(refs, timeout=LONG, what="decisions") for decision in part]
    check_same(found, LocalSampler(run, SEED).act(seen, keys, MASKED))
    statistics = RemoteSamplers((actor,), SPACE).statistics()
    assert (statistics.batches, statistics.requests, statistics.observations) == (1, 4, 8)


def test_callers_wait_for_a_killed_sampler_and_get_the_same(actor, run):
    samplers = RemoteSamplers((actor,), SPACE, patience=LONG)
    seen, keys = observations(8), streams(8)
    pid = get(actor.pid.remote(), timeout=LONG, what="pid")
    with ThreadPoolExecutor(2) as pool:
        # The first half waits inside for a full batch when the process dies.
        first = pool.submit(samplers.act, seen[:4], keys[:4], MASKED)
        threading.Event().wait(0.5)
        assert not first.done()
        os.kill(pid, signal.SIGKILL)
        second = pool.submit(samplers.act, seen[4:], keys[4:], MASKED, caller=1)
        found = first.result(LONG) + second.result(LONG)
    check_same(found, LocalSampler(run, SEED).act(seen, keys, MASKED))
    assert get(actor.pid.remote(), timeout=LONG, what="pid") != pid


def test_a_sampler_that_does_not_come_back_is_given_up(ray_cluster):
    gone = ray.remote(ToySampler).options(num_cpus=0.1).remote()
    ready({"sampler-0": gone}, timeout=400.0, what="sampler")
    ray.kill(gone)
    with pytest.raises(ray.exceptions.RayActorError):
        RemoteSamplers((gone,), SPACE, patience=1.0).act(observations(1), streams(1), LIKELIHOOD)


def test_an_actor_without_a_policy_says_so_at_its_start(ray_cluster, tmp_path):
    nobody = sampler_actor(callers=1).options(num_cpus=0.1).remote(str(tmp_path), SamplerSettings())
    with pytest.raises(NotReady, match=r"sampler-0 failed to start: ValueError: .* has no policy") as caught:
        ready({"sampler-0": nobody}, timeout=400.0, what="sampler")
    assert isinstance(caught.value.cause, ValueError)
