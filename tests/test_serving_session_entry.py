"""Who gets into a session, what ends it, and that what is wrong is told without the service's insides."""

import json

import msgpack
import pytest
from openpi_client import packb
from serving_parts import FakeBackend
from session_parts import KEYS, STREAM, TOKEN, ending, frame, run, said, turn
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from actors.serving.errors import ApiError

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


def test_keys_of_the_configuration_that_fit_no_camera_are_the_services_fault() -> None:
    models = [{"name": "blocks", "checkpoint": "policy@7", "keys": {"k": "elbow"}}]

    async def conversation(address: str, backend: FakeBackend) -> None:
        with pytest.raises(InvalidStatus) as raised:
            await connect(address)
        assert raised.value.response.status_code == 503

    run(conversation, actions={"models": models})
