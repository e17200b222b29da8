"""WebSocket sessions: openpi's client works unmodified, and the latest observation wins."""

import asyncio
import json

import numpy as np
import pytest
from openpi_client import WebsocketClientPolicy, packb
from serving_parts import BLOCKS, FakeBackend, toy_choice
from session_parts import IMAGE, KEYS, SEEN, STREAM, TOKEN, frame, metrics, run, said, turn, until
from toy_environment import OBSERVATION_SPACE, SIZE, SPACE
from websockets.asyncio.client import connect

from actors.serving.messages import ModelInfo
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream

GREEDY = SelectionConfig(rule="greedy", candidates=1)
SELECT = SelectionConfig(rule="masked_condition", mask="text", candidates=3)


def test_openpis_client_works_unmodified() -> None:
    def talk(address: str) -> None:
        policy = WebsocketClientPolicy(address, api_key=TOKEN)
        assert policy.metadata["horizon"] == SPACE.horizon
        assert policy.metadata["action_space"] == SPACE.model_dump(mode="json")
        assert policy.metadata["cameras"] == {"top": [SIZE, SIZE]}
        assert (policy.metadata["model"], policy.metadata["version"]) == ("blocks", "blocks-v1")
        for index in range(3):
            answer = policy.infer(frame())
            expected = toy_choice(Stream(policy.metadata["seed"], index), GREEDY)
            assert answer["actions"].dtype == np.float32
            assert np.array_equal(answer["actions"], expected.actions)
            assert answer["policy_timing"] == {"infer_ms": 2.0}
            assert answer["server_timing"]["total_ms"] >= answer["server_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in answer["server_timing"]) == (index > 0)
            assert (answer["decision"], answer["dropped"], answer["version"]) == (index, 0, "blocks-v1")
        with pytest.raises(RuntimeError, match="the policy expects uint8"):
            policy.infer(frame(**{"observation/image": np.zeros((224, 224, 3), np.uint8)}))
        assert policy.infer(frame())["decision"] == 3, "the session goes on, and the bad one was no decision"
        policy.socket.close()

    async def conversation(address: str, backend: FakeBackend) -> None:
        await asyncio.to_thread(talk, address)
        assert [asked.stream.decision for asked, _ in backend.asked] == [0, 1, 2, 3]
        seen = backend.asked[0][0].observation
        assert np.array_equal(seen.images["top"], IMAGE)
        assert np.array_equal(seen.state, SEEN.state)
        assert seen.instruction == SEEN.instruction

    run(conversation, keys=KEYS)


def test_the_stream_takes_its_selection_from_the_address_and_each_frame() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        query = "?model=blocks&selection=mg-select&num_candidates=3&mask=text&seed=5&return_candidates=true"
        async with connect(address + STREAM + query) as socket:
            metadata = await said(socket)
            assert (metadata["seed"], metadata["selection"], metadata["num_candidates"]) == (
                5,
                "mg-select",
                3,
            )
            answer = await turn(socket, frame(observation_id="a7"))
            expected = toy_choice(Stream(5, 0), SELECT)
            np.testing.assert_array_equal(answer["candidates"], expected.candidates)
            np.testing.assert_array_equal(answer["confidences"], expected.confidences)
            assert (answer["chosen"], answer["observation_id"]) == (expected.chosen, "a7")
            answer = await turn(socket, frame(num_candidates=np.int64(2), observation_id=12))
            assert len(answer["candidates"]) == 2
            assert answer["observation_id"] == 12
            assert len((await turn(socket, frame()))["candidates"]) == 3

    run(conversation)


def test_episodes_begin_with_reset_or_another_seed() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address + STREAM + "?seed=5") as socket:
            await said(socket)
            frames = [{}, {}, {"reset": True}, {"reset": False}, {"seed": 6}, {"seed": 6}, {"seed": 5}]
            for changes in frames:
                await turn(socket, frame(**changes))
        streams = [(asked.stream.seed, asked.stream.decision) for asked, _ in backend.asked]
        assert streams == [(5, 0), (5, 1), (5, 0), (5, 1), (6, 0), (6, 1), (5, 0)]

    run(conversation)


def test_the_latest_observation_wins_and_stale_ones_are_counted() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address + "?seed=1") as socket:
            await said(socket)
            await socket.send(packb(frame(observation_id=0)))
            await until(lambda: backend.started == 1)
            for index in range(1, 6):
                await socket.send(packb(frame(observation_id=index, reset=index == 3)))
            await (await socket.ping())  # is answered while a decision is under way
            while 'counterpoint_dropped_observations_total{model="blocks"} 4.0' not in await metrics(address):
                pass
            assert backend.started == 1, "one decision at a time"
            backend.gate.set()
            first, second = await said(socket), await said(socket)
            assert (first["observation_id"], first["decision"]) == (0, 0)
            assert (second["observation_id"], second["dropped"]) == (5, 4)
            assert second["decision"] == 0, "a reset counts even if its observation was dropped"
            assert (await turn(socket, frame()))["decision"] == 1
        assert backend.started == 3

    run(conversation, FakeBackend(gate=asyncio.Event()))


def test_an_episode_begun_during_a_decision_leaves_that_decisions_numbers_alone() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address + "?seed=1") as socket:
            await said(socket)
            await socket.send(packb(frame()))
            await until(lambda: backend.started == 1)
            await socket.send(packb(frame(seed=2)))
            backend.gate.set()
            first, second = await said(socket), await said(socket)
            assert [(one["seed"], one["decision"]) for one in (first, second)] == [(1, 0), (2, 0)]

    run(conversation, FakeBackend(gate=asyncio.Event()))


def test_leaving_cancels_the_decision_under_way() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address) as socket:
            await said(socket)
            await socket.send(packb(frame()))
            await until(lambda: backend.started == 1)
            assert "counterpoint_sessions 1.0" in await metrics(address)
        await until(lambda: backend.cancelled == 1)
        text = await metrics(address)
        assert "counterpoint_sessions 0.0" in text
        assert 'counterpoint_queue_length{kind="actions"} 0.0' in text

    run(conversation, FakeBackend(gate=asyncio.Event()))


def test_a_lost_connection_cancels_too() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        socket = await connect(address)
        await said(socket)
        await socket.send(packb(frame()))
        await until(lambda: backend.started == 1)
        socket.transport.abort()
        await until(lambda: backend.cancelled == 1)

    run(conversation, FakeBackend(gate=asyncio.Event()))


VIEWS = [
    {"observation/image": IMAGE},
    {"observation/top": IMAGE},
    {"observation/top_image": IMAGE},
    {"image": IMAGE},
    {"images": {"top": IMAGE}},
    {"images": {"top": IMAGE, "side": "ignored"}, "more": [1, 2]},
    {"kinect": IMAGE},
    {"images": {"cam_high": IMAGE}},
    {"observation/image": IMAGE.transpose(2, 0, 1)},
]


@pytest.mark.parametrize("view", VIEWS, ids=[next(iter(view)) for view in VIEWS])
def test_cameras_are_found_under_the_keys_of_openpis_robots(view: dict) -> None:
    keys = {
        "kinect": "top",
        "images/cam_high": "top",
        "task": "prompt",
        "gripper": "state",
        "joints": "state",
    }
    models = [{"name": "blocks", "checkpoint": "policy@7", "keys": keys}]

    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address) as socket:
            await said(socket)
            answer = await turn(socket, frame(**{"observation/image": None} | view))
            assert "actions" in answer, answer
        (asked, _), *_ = backend.asked
        assert np.array_equal(asked.observation.images["top"], IMAGE)

    run(conversation, actions={"models": models})


def test_state_and_prompt_are_found_under_other_keys_too() -> None:
    keys = {"gripper": "state", "joints": "state", "task": "prompt"}
    models = [{"name": "blocks", "checkpoint": "policy@7", "keys": keys}]
    x, y = SEEN.state.tolist()
    parts = [
        {"gripper": np.array([x]), "joints": y},
        {"gripper": [x], "joints": np.float64(y)},
        {"state": SEEN.state.astype(np.float64)},
        {"state": [x, y], "task": SEEN.instruction, "prompt": None},
        {"state": SEEN.state, "prompt": np.str_(SEEN.instruction)},
    ]

    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address) as socket:
            await said(socket)
            for changes in parts:
                answer = await turn(socket, frame(**{"observation/state": None} | changes))
                assert "actions" in answer, answer
        for asked, _ in backend.asked:
            np.testing.assert_array_equal(asked.observation.state, SEEN.state)
            assert asked.observation.instruction == SEEN.instruction

    run(conversation, actions={"models": models})


BAD = [
    ({"observation/image": None}, "no camera 'top'"),
    ({"image": IMAGE}, "both show camera 'top'"),
    ({"observation/image": "x"}, "is no array"),
    ({"observation/image": [[1]]}, "is no array"),
    ({"observation/image": IMAGE.astype(np.float32)}, "is float32"),
    ({"observation/image": IMAGE[0]}, "is uint8 [16, 3]"),
    ({"observation/image": np.array(["a"])}, "the policy expects"),
    ({"observation/state": None}, "has shape [0]"),
    ({"observation/state": np.array([np.nan, 0])}, "not finite in x"),
    ({"observation/state": np.array([1e300, 0])}, "not finite in x"),
    ({"observation/state": "up"}, "holds no numbers"),
    ({"observation/state": {"x": 1}}, "holds no numbers"),
    ({"observation/state": [[1], [2, 3]]}, "holds no numbers"),
    ({"observation/state": [None, 1]}, "holds no numbers"),
    ({"observation/state": np.zeros(5000)}, "send at most"),
    ({"observation/state": np.frombuffer(b"\xff" * 8, "<U1")}, "holds no numbers"),
    ({"prompt": None}, "instruction is empty"),
    ({"prompt": b"bytes"}, "prompt is no text"),
    ({"prompt": "x" * 3000}, "prompt is no text"),
    ({"prompt": ["a"]}, "prompt is no text"),
    ({"reset": 1}, "reset is no truth value"),
    ({"seed": -1}, "seed is no whole number"),
    ({"seed": 2**63}, "seed is no whole number"),
    ({"seed": True}, "seed is no whole number"),
    ({"seed": 1.5}, "seed is no whole number"),
    ({"seed": np.zeros(3)}, "seed is no whole number"),
    ({"num_candidates": 0}, "num_candidates is no whole number"),
    ({"num_candidates": 99}, "give at most 16"),
]


def test_a_bad_observation_is_told_as_text_and_the_session_goes_on() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address + "?selection=mg-select&seed=3") as socket:
            await said(socket)
            for changes, words in BAD:
                await socket.send(packb(frame(observation_id=9, **changes)))
                text = await socket.recv()
                assert isinstance(text, str), changes
                told = json.loads(text)
                assert "\n" not in text
                assert told["observation_id"] == 9
                assert words in told["error"]["message"], (changes, told)
                assert told["error"]["code"] == "invalid_value"
            assert backend.started == 0
            assert (await turn(socket, frame()))["decision"] == 0

    run(conversation)


def test_a_frame_at_fault_begins_no_episode() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address + "?seed=3") as socket:
            await said(socket)
            await turn(socket, frame())
            assert "error" in await turn(socket, frame(seed=4, reset=True, prompt=""))
            answer = await turn(socket, frame())
            assert (answer["seed"], answer["decision"]) == (3, 1)

    run(conversation)


def test_a_promotion_is_told_and_what_the_new_weights_expect_is_followed() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address) as socket:
            assert (await said(socket))["version"] == "blocks-v1"
            await turn(socket, frame())
            wide = OBSERVATION_SPACE.model_dump(mode="json") | {"state": ["x", "y", "z"]}
            details = {**BLOCKS.details, "observation_space": wide}
            backend.infos = (ModelInfo("blocks", "actions", "policy@8", "blocks-v2", 0, details),)
            assert (await turn(socket, frame()))["version"] == "blocks-v2"
            told = await turn(socket, frame())
            assert "the policy expects [3] (x, y, z)" in told["error"]["message"]

    run(conversation)
