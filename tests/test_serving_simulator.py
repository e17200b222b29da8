"""The simulator behind the page: its episodes against the runner's, turns, faults and hanging up."""

import asyncio
import io
import json
import threading
from base64 import b64decode
from contextlib import aclosing, contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from toy_environment import SPACE, ToyEnvironment, decision, toy, toy_decision

from actors.serving.errors import ApiError
from actors.serving.messages import ActionAnswer, Work
from actors.serving.simulator import Simulator
from counterpoint.actions.tokenizer import Undecodable
from counterpoint.environments.running import NO_ACTION, Runner
from counterpoint.selection.decision import Stream

WORK = Work("v1", "replica-0", 0.001, 0.002, 1, 1.0)


async def choose(observation, stream):
    return ActionAnswer(toy_decision(observation, stream), WORK)


async def played(simulator, seed=3, chooser=choose, execute=None):
    return [event async for event in simulator.play(chooser, seed, execute)]


@contextmanager
def refused(code):
    with pytest.raises(ApiError) as caught:
        yield caught
    assert caught.value.code == code


@pytest.mark.parametrize("seed", [0, 1, 3, 8])
@pytest.mark.parametrize("execute", [None, 3])
def test_an_episode_is_the_one_that_the_runner_plays(seed, execute):
    def chooser(observations, streams):
        return [toy_decision(o, s) for o, s in zip(observations, streams, strict=True)]

    (episode,) = Runner(toy()).run([seed], chooser, execute, traced=[seed], filmed=[seed])
    start, *decisions, end = asyncio.run(played(Simulator(toy()), seed, execute=execute))
    steps = execute or SPACE.execute
    assert start["event"] == "start"
    assert (start["instruction"], start["seed"], start["max_steps"]) == (episode.instruction, seed, 12)
    assert start["action_space"] == SPACE.model_dump(mode="json") | {"execute": steps}
    assert [event["step"] for event in decisions] == [k * steps for k in range(episode.decisions)]
    for event, expected in zip(decisions, episode.trace, strict=True):
        assert event["event"] == "decision"
        assert event["chosen"] == expected.chosen
        np.testing.assert_allclose(event["actions"], expected.actions, atol=1e-6)
        np.testing.assert_allclose(event["candidates"], expected.candidates, atol=1e-6)
        assert event["confidences"] == [None, None]
        assert event["work"]["version"] == "v1"
        assert (seen(event) == episode.frames[event["step"]]).all()
    assert end["event"] == "end"
    assert (end["success"], end["outcome"], end["steps"]) == (episode.success, episode.outcome, episode.steps)
    assert (seen(end) == episode.frames[-1]).all()


def seen(event):
    return np.asarray(Image.open(io.BytesIO(b64decode(event["image"]))))


def test_events_are_json_and_what_is_not_finite_is_null():
    chunk = np.zeros((3, 2), np.float32)
    lost = np.full((3, 2), np.nan, np.float32)

    async def one_is_lost(observation, stream):
        made = decision(chunk, [lost, chunk], chosen=1, rejected=1)
        return ActionAnswer(replace(made, confidences=np.array([-np.inf, 0.25])), WORK)

    events = asyncio.run(played(Simulator(toy(max_steps=2)), chooser=one_is_lost))
    told = json.loads(json.dumps(events, allow_nan=False))[1]
    assert told["candidates"] == [None, chunk.tolist()]
    assert told["confidences"] == [None, 0.25]


class OwnThread(ToyEnvironment):
    """Notes which threads use it, and how many were built."""

    built, threads = [], set()

    def __init__(self, faults=None):
        super().__init__(faults)
        self.built.append(self)
        self.threads.add(threading.get_ident())

    def start(self, seed):
        self.threads.add(threading.get_ident())
        return super().start(seed)

    def act(self, action):
        self.threads.add(threading.get_ident())
        return super().act(action)

    def close(self):
        self.threads.add(threading.get_ident())
        super().close()


@pytest.fixture
def own_thread():
    OwnThread.built, OwnThread.threads = [], set()
    return OwnThread


def test_one_thread_alone_touches_the_one_environment(own_thread):
    async def several():
        simulator = Simulator(own_thread)
        observed, acted = await simulator.spaces()
        assert (list(observed.cameras), acted) == (["top"], SPACE)
        await asyncio.gather(played(simulator, 1), played(simulator, 2))
        await simulator.close()

    asyncio.run(several())
    assert len(own_thread.built) == 1
    assert own_thread.built[0].closed
    assert len(own_thread.threads) == 1
    assert threading.get_ident() not in own_thread.threads


def test_a_second_episode_waits_and_is_the_same_as_alone_and_a_third_is_turned_away():
    async def three():
        simulator = Simulator(toy(), waiting=1)
        gate, asked = asyncio.Event(), asyncio.Event()

        async def slow(observation, stream):
            asked.set()
            await gate.wait()
            return await choose(observation, stream)

        first = asyncio.create_task(played(simulator, 1, slow))
        await asked.wait()
        second = asyncio.create_task(played(simulator, 2))
        await asyncio.sleep(0)
        with refused("queue_full") as caught:
            await played(simulator, 3)
        assert caught.value.retry_after
        gate.set()
        return await first, await second

    together = asyncio.run(three())
    assert together == tuple(asyncio.run(played(Simulator(toy()), seed)) for seed in (1, 2))


def test_whoever_has_waited_too_long_is_turned_away_and_the_next_one_plays():
    async def impatient():
        simulator = Simulator(toy(), patience=0.01)
        gate = asyncio.Event()

        async def slow(observation, stream):
            await gate.wait()
            return await choose(observation, stream)

        first = asyncio.create_task(played(simulator, 1, slow))
        await asyncio.sleep(0)
        with refused("queue_full"):
            await played(simulator, 2)
        gate.set()
        await first
        return await played(simulator, 2)

    assert asyncio.run(impatient()) == asyncio.run(played(Simulator(toy()), 2))


def test_cancelling_stops_at_the_next_step_and_leaves_the_environment_usable():
    acts, going, go = [], threading.Event(), threading.Event()

    class Slow(ToyEnvironment):
        def act(self, action):
            acts.append(self.seed)
            if self.seed == 1:
                going.set()
                go.wait(10)
            return super().act(action)

    async def cancelled():
        simulator = Simulator(Slow)
        first = asyncio.create_task(played(simulator, 1))
        await asyncio.to_thread(going.wait, 10)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(played(simulator, 2))
        await asyncio.sleep(0)
        go.set()
        return await second

    assert asyncio.run(cancelled()) == asyncio.run(played(Simulator(toy()), 2))
    assert acts.count(1) == 1


def test_an_episode_that_is_left_between_its_events_frees_the_simulator(own_thread):
    async def left():
        simulator = Simulator(own_thread, waiting=0)
        async with aclosing(simulator.play(choose, 1)) as events:
            assert (await anext(events))["event"] == "start"
        return await played(simulator, 2)

    assert asyncio.run(left()) == asyncio.run(played(Simulator(toy()), 2))
    assert len(own_thread.built) == 1


@pytest.mark.parametrize("at", ["start", 0, 3])
def test_an_environment_that_raises_is_built_anew_and_its_words_stay_in_the_log(own_thread, at, caplog):
    async def twice():
        simulator = Simulator(lambda: own_thread({5: ("raise", at)}))
        with refused("unavailable") as caught:
            await played(simulator, 5)
        return caught.value, await played(simulator, 2)

    error, after = asyncio.run(twice())
    assert "seed=5" in error.message
    assert "motor" not in error.message
    assert "motor is stuck" in caplog.text
    assert after == asyncio.run(played(Simulator(toy()), 2))
    first, second = own_thread.built[:2]
    assert (first.closed, second.closed) == (True, False)


def test_an_environment_that_cannot_be_built_is_tried_again(own_thread):
    tries = []

    def build():
        tries.append(1)
        if len(tries) == 1:
            raise ImportError("libEGL.so.1 is missing")
        return own_thread()

    async def twice():
        simulator = Simulator(build)
        with refused("unavailable") as caught:
            await simulator.spaces()
        assert "EGL" not in caught.value.message
        return await played(simulator)

    assert asyncio.run(twice())[-1]["event"] == "end"


def test_a_policy_without_an_action_has_failed_and_the_episode_counts():
    async def speechless(observation, stream):
        if stream == Stream(3, 1):
            raise Undecodable("no candidate")
        return await choose(observation, stream)

    events = asyncio.run(played(Simulator(toy()), chooser=speechless))
    assert [event["event"] for event in events] == ["start", "decision", "end"]
    assert (events[-1]["success"], events[-1]["outcome"], events[-1]["steps"]) == (False, NO_ACTION, 2)


@pytest.mark.parametrize("shape", [(1, 2), (3, 4)])
def test_chunks_that_do_not_fit_are_the_requests_fault_and_break_nothing(own_thread, shape):
    async def misfit(observation, stream):
        return ActionAnswer(decision(np.zeros(shape, np.float32)), WORK)

    async def twice():
        simulator = Simulator(own_thread)
        with refused("invalid_value") as caught:
            await played(simulator, chooser=misfit)
        assert str(list(shape)) in caught.value.message
        await played(simulator)

    asyncio.run(twice())
    assert len(own_thread.built) == 1


def test_what_the_policies_say_is_passed_on_and_frees_the_simulator():
    async def busy(observation, stream):
        raise ApiError("deadline_exceeded", "no answer within 1 s")

    async def twice():
        simulator = Simulator(toy(), waiting=0)
        with refused("deadline_exceeded"):
            await played(simulator, chooser=busy)
        return await played(simulator)

    assert asyncio.run(twice())[-1]["event"] == "end"


def test_every_deed_has_its_guard():
    deeds = []

    @contextmanager
    def guard(deed, seed, step):
        deeds.append((deed, seed, step))
        yield

    events = asyncio.run(played(Simulator(toy(), guard=guard)))
    assert deeds == [("build", 3, 0), ("start", 3, 0), *(("act", 3, k) for k in range(events[-1]["steps"]))]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="waiting=-1"):
        Simulator(toy(), waiting=-1)
    with pytest.raises(ValueError, match="patience=0"):
        Simulator(toy(), patience=0)
