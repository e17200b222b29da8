"""A hosted policy's decisions are the rollout's own, to the last bit, whoever its neighbours are."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_environment import OBSERVATION_SPACE
from toy_policy import observations, toy_bundle

from actors.batching import Batcher
from actors.serving.action_server import ActionServer, answered
from actors.serving.config import ServiceConfig
from actors.serving.errors import ApiError
from actors.serving.hosted_policy import MOST_SHAPES, HostedPolicy
from actors.serving.messages import ActionRequest
from actors.serving.policy_probe import made_up, policy_rows
from cluster.sealing import seal
from cluster.storage import RunStore
from counterpoint.actions.tokenizer import Undecodable
from counterpoint.exactness import exact_sizes
from counterpoint.selection.choice import decide
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream
from counterpoint.selection.decoding import predraw, sample_candidates

GREEDY = SelectionConfig(rule="greedy", candidates=1)
SELECT = SelectionConfig(rule="masked_condition", mask="text", candidates=3)
PATIENCE = 30.0
STREAMS = [Stream(seed, seed % 3) for seed in range(7)]


@pytest.fixture(scope="module")
def hosted() -> HostedPolicy:
    return HostedPolicy(toy_bundle(), "toy-v1", largest=8)


def asked(count: int) -> list:
    return list(zip(observations(count), STREAMS, strict=False))


def same(one: object, other: object) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name != "tokens")
        for name in ("actions", "candidates", "confidences", "token_confidences")
    ) and (one.tokens, one.chosen) == (other.tokens, other.chosen)


@pytest.mark.parametrize("selection", [GREEDY, SELECT, SelectionConfig(rule="entropy", candidates=2)])
def test_a_decisions_bits_do_not_depend_on_its_neighbours(hosted: HostedPolicy, selection) -> None:
    alone = [hosted.decide([one], selection)[0] for one in asked(7)]
    for size in range(2, 8):
        assert all(map(same, hosted.decide(asked(7)[:size], selection), alone)), size
    backwards = hosted.decide(asked(7)[::-1], selection)[::-1]
    assert all(map(same, backwards, alone))


def test_a_decision_is_the_rollouts_own(hosted: HostedPolicy) -> None:
    served = hosted.decide(asked(5), SELECT)
    rollout = decide(hosted.bundle, observations(5), STREAMS[:5], SELECT, seed=0)
    for ours, theirs in zip(served, rollout, strict=True):
        assert (ours.tokens, ours.chosen) == (theirs.tokens, theirs.chosen)
        np.testing.assert_allclose(ours.actions, theirs.actions, atol=1e-6)


class Uneven(HostedPolicy):
    """One whose rows are exact up to three in a batch only."""

    def _found(self, shape: SelectionConfig) -> tuple[int, ...]:
        return (1, 3)


def test_more_than_the_exact_sizes_hold_is_split_and_less_is_filled_up(monkeypatch) -> None:
    sizes = []

    def counting(bundle, observations, streams, selection, seed):
        sizes.append(len(observations))
        return decide(bundle, observations, streams, selection, seed)

    monkeypatch.setattr("actors.serving.hosted_policy.decide", counting)
    uneven = Uneven(toy_bundle(), "toy-v1", largest=8)
    decisions = uneven.decide(asked(5), GREEDY)
    assert sizes == [3, 3]
    assert len(decisions) == 5
    uneven.decide(asked(1), GREEDY)
    assert sizes[2:] == [1]
    HostedPolicy(toy_bundle(), "toy-v1", largest=8, exact=False).decide(asked(5), GREEDY)
    assert sizes[3:] == [5]


def test_a_policy_that_looks_at_its_neighbours_is_found_out() -> None:
    """The reference for what the search must notice: the batch's mean leaks into every row."""
    bundle = toy_bundle()
    encode = bundle.policy.encode

    def leaking(inputs):
        encoded = encode(inputs)
        return encoded | {"state": encoded["state"] + 1e-3 * encoded["state"].mean(0)}

    bundle.policy.encode = leaking
    assert HostedPolicy(bundle, "leak", largest=8).sizes(GREEDY) == (1,)
    assert HostedPolicy(toy_bundle(), "sound", largest=8).sizes(GREEDY)[-1] == 8


def test_a_row_is_told_apart_by_its_logits() -> None:
    bundle = toy_bundle()
    evaluate = policy_rows(bundle, GREEDY)
    first = evaluate([0])
    assert evaluate([0]) == first != evaluate([1])
    with torch.no_grad():
        bundle.policy.head.weight[0, 0] += 1e-6
    assert evaluate([0]) != first


def test_when_a_neighbours_chunk_ends_does_not_matter() -> None:
    bundle = toy_bundle()
    bundle.policy.end_token = 3
    selection = SelectionConfig(rule="likelihood", candidates=1, temperature=50.0)
    evaluate = policy_rows(bundle, selection)
    size = exact_sizes(evaluate, 8)[-1]
    streams = [Stream(row, 0) for row in range(size)]
    inputs = bundle.prepare([made_up(bundle, row) for row in range(size)])
    uniforms = predraw(streams, 0, 1, bundle.policy.max_tokens)
    ends = sample_candidates(bundle.policy, inputs, uniforms, selection).alive.sum(-1).amax(1)
    assert size == 1 or len(ends.unique()) > 2
    together = evaluate(range(size))
    for row in range(size):
        assert evaluate([row] * size) == [together[row]] * size


def test_sizes_are_found_once_for_selections_that_compute_alike(hosted: HostedPolicy, monkeypatch) -> None:
    counted = HostedPolicy(hosted.bundle, "toy-v1", largest=2)
    found = []
    monkeypatch.setattr(counted, "_found", lambda shape: found.append(shape) or (1, 2))
    for change in ({}, {"temperature": 0.7}, {"aggregate": "mean"}, {"policy_temperature": 2.0}):
        counted.sizes(SELECT.model_copy(update=change))
    assert len(found) == 1
    counted.sizes(SELECT.model_copy(update={"candidates": 4}))
    counted.sizes(SELECT.model_copy(update={"mask": "state"}))
    assert len(found) == 3
    for candidates in range(5, 5 + 2 * MOST_SHAPES):
        counted.sizes(SELECT.model_copy(update={"candidates": candidates}))
    assert len(counted._sizes) == MOST_SHAPES


def test_a_damaged_policy_does_not_pass_the_canary(hosted: HostedPolicy) -> None:
    hosted.canary()
    bundle = toy_bundle()
    with torch.no_grad():
        bundle.policy.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        HostedPolicy(bundle, "broken", largest=2).canary()


def test_noise_that_cannot_be_decoded_passes_the_canary(monkeypatch) -> None:
    bundle = toy_bundle()

    def undecodable(tokens):
        raise Undecodable("no chunk")

    monkeypatch.setattr(bundle, "decode", undecodable)
    HostedPolicy(bundle, "toy-v1", largest=2).canary()


def test_made_up_observations_fit_and_differ(hosted: HostedPolicy) -> None:
    first, again, other = (made_up(hosted.bundle, index) for index in (0, 0, 1))
    hosted.bundle.prepare([first, other])
    assert np.array_equal(first.images["top"], again.images["top"])
    assert not np.array_equal(first.images["top"], other.images["top"])


def request(index: int = 0, **changes: object) -> ActionRequest:
    observation = replace(observations(index + 1)[index], **changes)
    return ActionRequest("toy", observation, SELECT, STREAMS[index])


class Gated:
    """Computes with a hosted policy once it is let, and keeps what it was given."""

    def __init__(self, hosted: HostedPolicy) -> None:
        self.hosted, self.gate, self.begun = hosted, threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __call__(self, key, items):
        assert key == (self.hosted, SELECT)
        self.begun.set()
        assert self.gate.wait(PATIENCE)
        self.batches.append(len(items))
        return self.hosted.decide(items, SELECT)


async def started(gated: Gated) -> None:
    assert await asyncio.to_thread(gated.begun.wait, PATIENCE)


def test_requests_meet_in_a_batch_and_learn_what_it_took(hosted: HostedPolicy) -> None:
    gated = Gated(hosted)
    gated.gate.set()
    batcher = Batcher(gated, max_batch=4, max_wait=PATIENCE)

    async def ask() -> list:
        return await asyncio.gather(
            *(answered(batcher, hosted, request(i), PATIENCE, "here") for i in range(4))
        )

    answers = asyncio.run(ask())
    batcher.close()
    assert gated.batches == [4]
    for i, answer in enumerate(answers):
        assert same(answer.decision, hosted.decide([asked(4)[i]], SELECT)[0])
        assert (answer.work.version, answer.work.replica) == ("toy-v1", "here")
        assert (answer.work.evaluations, answer.work.batch_size) == (1, 4.0)
        assert answer.work.queued_s >= 0
        assert answer.work.compute_s > 0


def test_a_cancelled_request_gives_up_its_place(hosted: HostedPolicy) -> None:
    gated = Gated(hosted)
    batcher = Batcher(gated, max_batch=2, max_wait=0.0)

    async def ask() -> None:
        first = asyncio.create_task(answered(batcher, hosted, request(0), PATIENCE, ""))
        await started(gated)
        second, third = (
            asyncio.create_task(answered(batcher, hosted, request(i), PATIENCE, "")) for i in (1, 2)
        )
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        gated.gate.set()
        await asyncio.gather(first, third)

    asyncio.run(ask())
    batcher.close()
    assert gated.batches == [1, 1]


def test_a_deadline_that_passes_is_told_and_leaves_no_work(hosted: HostedPolicy) -> None:
    gated = Gated(hosted)
    batcher = Batcher(gated, max_batch=1, max_wait=0.0)

    async def ask() -> None:
        first = asyncio.create_task(answered(batcher, hosted, request(0), PATIENCE, ""))
        await started(gated)
        with pytest.raises(ApiError, match=r"no decision within 0\.01 s") as raised:
            await answered(batcher, hosted, request(1), 0.01, "")
        assert raised.value.code == "deadline_exceeded"
        gated.gate.set()
        await first

    asyncio.run(ask())
    batcher.close()
    assert gated.batches == [1]


def told(batcher: Batcher, hosted: HostedPolicy, asked_for: ActionRequest) -> ApiError:
    with pytest.raises(ApiError) as raised:
        asyncio.run(answered(batcher, hosted, asked_for, PATIENCE, ""))
    assert "\n" not in raised.value.message
    return raised.value


def test_what_does_not_fit_never_meets_a_batch(hosted: HostedPolicy) -> None:
    gated = Gated(hosted)
    batcher = Batcher(gated, max_batch=1, max_wait=0.0)
    for changes, words in [
        ({"instruction": "dance"}, "never taught"),
        ({"state": np.zeros(5, np.float32)}, "has shape"),
        ({"images": {}}, "no camera 'top'"),
    ]:
        error = told(batcher, hosted, request(**changes))
        assert error.code == "invalid_value"
        assert words in error.message
    assert not gated.begun.is_set()
    batcher.close()
    assert told(batcher, hosted, request()).code == "unavailable"


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (Undecodable("x"), "no_action", "no action to offer"),
        (RuntimeError("/secret"), "internal_error", "failed on this"),
    ],
)
def test_a_failure_of_the_policy_is_told_without_its_insides(
    hosted: HostedPolicy, fault, code: str, words: str
) -> None:
    def failing(key, items):
        raise fault

    batcher = Batcher(failing, max_batch=1, max_wait=0.0)
    error = told(batcher, hosted, request())
    batcher.close()
    assert error.code == code
    assert words in error.message
    assert "secret" not in error.message


def test_what_a_policy_does_not_look_at_does_not_keep_observations_apart() -> None:
    bundle = toy_bundle()
    bundle.observation_space = OBSERVATION_SPACE.model_copy(update={"state": ()})
    hosted = HostedPolicy(bundle, "toy-v1", largest=2)
    hosted.bundle.policy.conditions = frozenset({"text"})
    first = observations(1)[0]
    wide = replace(first, images={**first.images, "other": np.zeros(3)}, state=np.zeros(9))
    fitted = hosted.fitted(wide, GREEDY)
    assert list(fitted.images) == ["top"]
    assert fitted.state.shape == (0,)
    with pytest.raises(ValueError, match="mask=state hides state"):
        hosted.fitted(first, SelectionConfig(rule="masked_condition", mask="state"))


def test_a_server_loads_describes_and_answers(tmp_path, monkeypatch) -> None:
    # The tests' own process keeps its niceness.
    monkeypatch.setattr("actors.serving.action_server.step_back", lambda but: None)
    toy_bundle().save(tmp_path / "run" / "policy")
    seal(RunStore(str(tmp_path / "run")), "policy")
    config = ServiceConfig.model_validate(
        {
            "root": str(tmp_path),
            "actions": {"models": [{"name": "toy", "checkpoint": "run"}], "batching": {"max_batch": 2}},
        }
    )

    async def talk() -> None:
        server = ActionServer(config)
        await server.reconfigure({"models": {"toy": {"checkpoint": "run"}}})
        (info,) = await server.describe()
        assert (info.name, info.kind, info.checkpoint) == ("toy", "actions", "run")
        assert info.details["observation_space"] == OBSERVATION_SPACE.model_dump(mode="json")
        assert info.details["conditions"] == ["state", "text"]
        await server.probe()
        server.check_health()
        answer = await server.act(request(), PATIENCE)
        assert answer.work.version == info.version
        expected = HostedPolicy(toy_bundle(), "", largest=2).decide(asked(1), SELECT)[0]
        assert same(answer.decision, expected)
        with pytest.raises(ApiError, match="is not served"):
            await server.act(replace(request(), model="other"), PATIENCE)
        server.batcher.close()
        with pytest.raises(RuntimeError, match="thread has ended"):
            server.check_health()

    asyncio.run(talk())
