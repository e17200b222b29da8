"""Requests as ASGI messages, where tests need what no HTTP library sends."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What came back; status 0 where nothing did."""

    status: int
    headers: dict[str, str]
    body: bytes
    calls_of_receive: int

    @property
    def error(self) -> dict[str, Any]:
        """The error of a body that is no success, whose form is checked."""
        body = json.loads(self.body)
        assert list(body) == ["error"]
        assert sorted(body["error"]) == ["code", "message", "param", "type"]
        assert self.headers["content-type"] == "application/json"
        message = body["error"]["message"]
        assert message.isprintable()
        assert len(message) < 700
        return body["error"]


def scope_of(method, path, headers=(), **more) -> dict[str, Any]:
    """Return the scope of a request; header names and values are latin-1 text or bytes."""

    def raw(text):
        return text if isinstance(text, bytes) else text.encode("latin-1")

    pairs = headers.items() if isinstance(headers, dict) else headers
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "path": path, "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": b"", "root_path": "",
        "scheme": "http", "server": ("testserver", 80), "client": ("127.0.0.1", 1),
        "headers": [(raw(name).lower(), raw(value)) for name, value in pairs],
    } | more  # fmt: skip


async def call(app, method, path, headers=(), chunks=(b"",), end="silence", **more) -> Answer:
    """Send a request whose body comes in `chunks`; `end` is what follows: "silence", or "disconnect".

    With `end="cut"` the client hangs up before the body's end.
    """
    chunks, received, sent = list(chunks), 0, []

    async def receive():
        nonlocal received
        if received < len(chunks):
            last = received == len(chunks) - 1 and end != "cut"
            received += 1
            return {"type": "http.request", "body": chunks[received - 1], "more_body": not last}
        if end == "silence":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope_of(method, path, headers, **more), receive, send)
    if not sent:
        return Answer(0, {}, b"", received)
    start, *rest = sent
    headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    assert len(headers) == len(start["headers"]), "a header is there twice"
    return Answer(start["status"], headers, b"".join(part["body"] for part in rest), received)


def post(app, path, body, headers=(), **more) -> Answer:
    """Send bytes, or anything else as JSON, and return the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    own = {"content-type": "application/json"} | dict(headers)
    return asyncio.run(call(app, "POST", path, own, [content], **more))


def get(app, path, headers=(), **more) -> Answer:
    """Ask for something, and return the answer."""
    return asyncio.run(call(app, "GET", path, headers, **more))
