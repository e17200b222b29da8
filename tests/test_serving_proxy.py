"""What stands before Serve's proxy, and whose threads step back for whose."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from actors.serving.priority import HTTP_NICENESS
from actors.serving.proxy_headers import DecodableHeaders, middlewares

NICENESS = """
import json, os, threading
from actors.serving.priority import step_back
over, started = threading.Event(), threading.Event()
ids = {}
def wait(name):
    ids[name] = threading.get_native_id()
    started.set()
    over.wait()
def start(name):
    started.clear()
    threading.Thread(target=wait, args=(name,)).start()
    started.wait()
start("maths")
start("speech")
step_back(but=[ids["maths"]])
start("child of speech")
ids["main"] = threading.get_native_id()
print(json.dumps({name: os.getpriority(os.PRIO_PROCESS, thread) for name, thread in ids.items()}))
over.set()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs niceness by thread")
def test_threads_that_speak_step_back_for_those_that_compute() -> None:
    done = subprocess.run([sys.executable, "-c", NICENESS], capture_output=True, text=True, check=True)
    niceness = json.loads(done.stdout)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness.pop("maths") == before
    assert set(niceness.values()) == {max(before, HTTP_NICENESS)}


def answered(kind: str, headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "passed"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    scope = {"type": kind, "headers": headers, "method": "GET", "path": "/"}
    asyncio.run(DecodableHeaders(app)(scope, receive, send))
    return sent


def test_headers_that_serve_can_decode_pass() -> None:
    for headers in ([], [(b"x-request-id", b"abc")], [(b"user-agent", "é".encode())]):
        assert answered("http", headers) == [{"type": "passed"}]


@pytest.mark.parametrize("header", [(b"x-request-id", b"\xe9\xff"), (b"traceparent", b"\x80")])
def test_others_are_refused_by_name(header: tuple[bytes, bytes]) -> None:
    start, body = answered("http", [(b"host", b"x"), header])
    assert start["status"] == 400
    error = json.loads(body["body"])["error"]
    assert error["param"] == header[0].decode()
    assert error["code"] == "invalid_value"
    assert answered("websocket", [header]) == [{"type": "websocket.close", "code": 1008}]


def test_the_callback_is_what_serve_takes() -> None:
    # In a process of its own: being called, it gives that process's threads another niceness.
    code = (
        "from ray.serve._private.http_util import validate_http_proxy_callback_return as check\n"
        "from actors.serving.proxy_headers import middlewares\n"
        "print(len(check(middlewares())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert middlewares.__module__ == "actors.serving.proxy_headers"
