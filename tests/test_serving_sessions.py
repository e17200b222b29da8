"""WebSocket sessions: openpi's client works unmodified, the latest observation wins, bad frames do no harm."""

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager

import msgpack
import numpy as np
import pytest
import uvicorn
from openpi_client import WebsocketClientPolicy, packb, unpackb
from serving_parts import BLOCKS, FakeBackend, service, toy_choice
from toy_environment import OBSERVATION_SPACE, SIZE, SPACE
from toy_policy import observations
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from actors.serving.app import create_app
from actors.serving.errors import ApiError
from actors.serving.messages import ModelInfo
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream

SEEN = observations(1)[0]
GREEDY = SelectionConfig(rule="greedy", candidates=1)
SELECT = SelectionConfig(rule="masked_condition", mask="text", candidates=3)
STREAM = "v1/actions/stream"
TOKEN = "cp-test"
KEYS = [{"name": "robot", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}]
PATIENCE = 20.0


def frame(**changes: object) -> dict:
    """An observation as openpi's LIBERO client sends one, some of whose parts are others; None leaves out."""
    parts = {
        "observation/image": SEEN.images["top"],
        "observation/state": SEEN.state,
        "prompt": SEEN.instruction,
    }
    return {name: value for name, value in (parts | changes).items() if value is not None}


@asynccontextmanager
async def served(backend: FakeBackend, **config: object):
    """The application on a real server in this loop; yields its address and its application."""
    app = create_app(backend, service(**config))
    options = {"port": 0, "lifespan": "off", "log_config": None, "ws_ping_interval": None}
    server = uvicorn.Server(uvicorn.Config(app, **options, timeout_graceful_shutdown=1))
    running = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with asyncio.timeout(PATIENCE):
            yield f"ws://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        await running


def run(conversation, backend: FakeBackend | None = None, **config: object) -> None:
    """Let `conversation` talk to a service, whose address and backend it is given."""

    async def talk() -> None:
        found = backend or FakeBackend()
        async with served(found, **config) as address:
            await conversation(address, found)

    asyncio.run(talk())


async def said(socket) -> dict:
    answer = await socket.recv()
    return json.loads(answer) if isinstance(answer, str) else unpackb(answer)


async def turn(socket, content: dict) -> dict:
    await socket.send(packb(content))
    return await said(socket)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def metrics(address: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rsplit(":", 1)[1].strip("/")))
    writer.write(b"GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return text


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
        assert np.array_equal(seen.images["top"], SEEN.images["top"])
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
    {"observation/image": SEEN.images["top"]},
    {"observation/top": SEEN.images["top"]},
    {"observation/top_image": SEEN.images["top"]},
    {"image": SEEN.images["top"]},
    {"images": {"top": SEEN.images["top"]}},
    {"images": {"top": SEEN.images["top"], "side": "ignored"}, "more": [1, 2]},
    {"kinect": SEEN.images["top"]},
    {"images": {"cam_high": SEEN.images["top"]}},
    {"observation/image": SEEN.images["top"].transpose(2, 0, 1)},
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
        assert np.array_equal(asked.observation.images["top"], SEEN.images["top"])

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
    ({"image": SEEN.images["top"]}, "both show camera 'top'"),
    ({"observation/image": "x"}, "is no array"),
    ({"observation/image": [[1]]}, "is no array"),
    ({"observation/image": SEEN.images["top"].astype(np.float32)}, "is float32"),
    ({"observation/image": SEEN.images["top"][0]}, "is uint8 [16, 3]"),
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


async def ending(socket) -> tuple[int, str, list]:
    """Return how the server closes the connection, and what it has said before."""
    before = []
    while True:
        try:
            before.append(await socket.recv())
        except ConnectionClosedError as closed:
            return closed.rcvd.code, closed.rcvd.reason, before


VIOLATIONS = [
    ("hello", 1008, "text frames are not understood"),
    (b"", 1008, "not MessagePack"),
    (b"\xc1", 1008, "not MessagePack"),
    (b"\x81\xa1a\xdd\xff\xff\xff\xff", 1008, "max_array_len"),
    (b"\x81\xa1a" + b"\x91" * 3000, 1008, "not MessagePack"),
    (msgpack.packb([1, 2]), 1008, "no map"),
    (msgpack.packb({"a": msgpack.ExtType(1, b"")}), 1008, "extensions"),
    (packb(frame())[:-1], 1008, "incomplete"),
    (b"\x00" * 5000, 1009, "send at most 4096"),
    (msgpack.packb({"image": {b"__ndarray__": True, b"data": b"", b"dtype": "|u1", b"shape": [2**40]}}),
     1008, "shape"),
    (msgpack.packb({"image": {b"__ndarray__": True, b"data": b"x", b"dtype": "O", b"shape": [1]}}),
     1008, "refused"),
]  # fmt: skip


def test_a_hostile_frame_ends_its_session_and_no_other() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address) as other:
            await said(other)
            for sent, code, words in VIOLATIONS:
                async with connect(address) as socket:
                    await said(socket)
                    await socket.send(sent)
                    found, reason, before = await ending(socket)
                assert found == code, (sent[:20], reason)
                assert words in reason
                assert all(words in json.loads(text)["error"]["message"] for text in before)
            assert "actions" in await turn(other, frame())

    run(conversation, limits={"max_body_bytes": 4096})


def test_nobody_gets_in_without_a_key() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        for path, headers, status, words in [
            ("", None, 401, "asks for a key"),
            (STREAM, {"Authorization": "Bearer wrong"}, 401, "of this service's"),
            (STREAM, {"Authorization": f"Basic {TOKEN}"}, 401, "another form"),
            (f"?key={TOKEN}", None, 400, "keys do not belong in addresses"),
            (f"?TOKEN={TOKEN}", {"Authorization": f"Bearer {TOKEN}"}, 400, "keys do not belong"),
            ("", [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "x")], 401, "given twice"),
        ]:
            with pytest.raises(InvalidStatus) as raised:
                await connect(address + path, additional_headers=headers)
            response = raised.value.response
            assert response.status_code == status
            assert response.headers["x-request-id"]
            message = json.loads(response.body)["error"]["message"]
            assert words in message
            assert TOKEN not in message
        for scheme in ("Bearer", "Api-Key", "api-key"):
            async with connect(address, additional_headers={"Authorization": f"{scheme} {TOKEN}"}) as socket:
                await said(socket)

    run(conversation, keys=KEYS)


def test_a_session_cannot_be_opened_with_what_the_policy_cannot_do() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        for query, status, words in [
            ("?selection=oracle", 400, "selection"),
            ("?num_candidates=99&selection=random", 400, "give at most 16"),
            ("?num_candidates=x", 400, "num_candidates"),
            ("?num_candidates=2", 400, "no meaning for selection=greedy"),
            ("?seed=-1", 400, "seed"),
            ("?colour=red", 400, "leave it out"),
            ("?model=digits", 400, "is no policy"),
            ("?model=nobody", 404, "is not served"),
            ("?model=", 400, "model"),
        ]:
            with pytest.raises(InvalidStatus) as raised:
                await connect(address + STREAM + query)
            assert raised.value.response.status_code == status
            assert words in json.loads(raised.value.response.body)["error"]["message"]

    run(conversation)


def test_there_are_so_many_sessions_and_no_more() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address) as first:
            await said(first)
            async with connect(address) as second:
                code, reason, before = await ending(second)
            assert (code, before) == (1013, [])
            assert "1 sessions are open" in reason
            assert "actions" in await turn(first, frame())
        async with connect(address) as third:
            assert "model" in await said(third)

    run(conversation, limits={"max_sessions": 1})


def test_each_decision_counts_against_the_keys_rate() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as socket:
            await said(socket)
            told = await turn(socket, frame())
            assert told["error"]["code"] == "rate_limit_exceeded"
        assert backend.started == 0

    run(conversation, keys=[KEYS[0] | {"requests_per_minute": 1}])


def test_errors_of_the_backend_are_told_and_the_session_goes_on() -> None:
    async def conversation(address: str, backend: FakeBackend) -> None:
        async with connect(address, additional_headers={"x-deadline-ms": "250"}) as socket:
            await said(socket)
            backend.error = ApiError("unavailable", "no replica", retry_after=1.0)
            assert (await turn(socket, frame()))["error"]["message"] == "no replica"
            backend.error = None
            assert "actions" in await turn(socket, frame())
            assert {deadline for _, deadline in backend.asked} == {0.25}
            backend.error = RuntimeError("/secret/path")
            await socket.send(packb(frame()))
            code, reason, before = await ending(socket)
            assert (code, before) == (1011, [])
            assert "secret" not in reason

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


def test_keys_of_the_configuration_that_fit_no_camera_are_the_services_fault() -> None:
    models = [{"name": "blocks", "checkpoint": "policy@7", "keys": {"k": "elbow"}}]

    async def conversation(address: str, backend: FakeBackend) -> None:
        with pytest.raises(InvalidStatus) as raised:
            await connect(address)
        assert raised.value.response.status_code == 503

    run(conversation, actions={"models": models})
