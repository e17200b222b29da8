"""A service on a real server in the test's own loop, and what a client says to it over WebSockets."""

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager

import uvicorn
from openpi_client import packb, unpackb
from serving_parts import FakeBackend, service
from toy_policy import observations
from websockets.exceptions import ConnectionClosedError

from actors.serving.app import create_app

SEEN = observations(1)[0]
IMAGE = SEEN.images["top"]
STREAM = "v1/actions/stream"
TOKEN = "cp-test"
KEYS = [{"name": "robot", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}]
PATIENCE = 20.0


def frame(**changes: object) -> dict:
    """An observation as openpi's LIBERO client sends one, some of whose parts are others; None leaves out."""
    parts = {
        "observation/image": IMAGE,
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


async def ending(socket) -> tuple[int, str, list]:
    """Return how the server closes the connection, and what it has said before."""
    before = []
    while True:
        try:
            before.append(await socket.recv())
        except ConnectionClosedError as closed:
            return closed.rcvd.code, closed.rcvd.reason, before
