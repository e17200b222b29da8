"""A stand-in for the service: pictures from seeds alone, made to stall, to fail or to err on request.

As a program, `python standin_service.py PORT`, it has two replicas: processes with the titles of Serve's own
that are started anew half a second after they die. It names a dashboard, as jobs.serve does.
"""

import asyncio
import base64
import io
import subprocess
import sys
import time
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

REBIRTH_S = 0.5


def picture(version: str, label: int, steps: int, seed: int, k: int, side: int = 8) -> str:
    """A picture of noise in base64 that depends on everything that may matter."""
    noise = np.random.default_rng([len(version), ord(version[-1]), label, steps, seed, k])
    buffer = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (side, side), np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Faults:
    """What the stand-in does wrong; tests set the fields."""

    def __init__(self) -> None:
        self.asked = 0
        self.version = "a"
        self.spoil: Any = None
        """Called with the number of the request and the answer, which it may change."""
        self.refuse: Any = None
        """Called with the number of the request; returns a status, headers and body, or None."""
        self.block: Any = None
        """Called with the number of the request; blocks as long as it likes."""
        self.delay_s = 0.0
        self.replicas: list[str] = []

    def replica(self) -> str:
        """Whose turn it is."""
        return self.replicas[self.asked % len(self.replicas)] if self.replicas else ""


def create_app(faults: Faults, side: int = 8) -> web.Application:
    """The application."""

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        number, faults.asked = faults.asked, faults.asked + 1
        if faults.block is not None:
            faults.block(number)
        if faults.delay_s:
            await asyncio.sleep(faults.delay_s)
        refusal = faults.refuse(number) if faults.refuse is not None else None
        if refusal is not None:
            status, headers, error = refusal
            return web.json_response(error, status=status, headers=headers)
        asked = (body["class_label"], body["num_inference_steps"], body["seed"])
        pictures = [picture(faults.version, *asked, k, side) for k in range(body["n"])]
        answer = {"data": [{"b64_json": one} for one in pictures], "seed": body["seed"], "model": "student"}
        if faults.spoil is not None:
            faults.spoil(number, answer)
        headers = {"x-model-version": faults.version, "x-batch-size": "4", "x-retries": "1"}
        headers |= {"x-queue-ms": "2.5", "x-compute-ms": "7.5", "x-replica": faults.replica()}
        return web.json_response(answer, headers=headers)

    async def readyz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    async def promote(_: web.Request) -> web.Response:
        faults.version = "b"
        return web.json_response({"version": "b"})

    app = web.Application()
    app.router.add_post("/v1/images/generations", generate)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/promote", promote)
    return app


class Replicas:
    """Two processes that look like Serve's replicas."""

    def __init__(self) -> None:
        self.running = [self.born(), self.born()]
        self.dead_since: dict[int, float] = {}

    def born(self) -> subprocess.Popen[bytes]:
        """A new one."""
        title = "ray::ServeReplica:counterpoint:ImageServer"
        return subprocess.Popen(["bash", "-c", f"exec -a {title} sleep 600"])

    def names(self) -> list[str]:
        """The names of those that answer; a dead one has a successor some time later."""
        for i, process in enumerate(self.running):
            if process.poll() is not None:
                since = self.dead_since.setdefault(process.pid, time.monotonic())
                if time.monotonic() - since > REBIRTH_S:
                    self.running[i] = self.born()
        return [str(process.pid) for process in self.running if process.poll() is None]


def serve(port: int) -> None:
    """Serve with replicas until SIGTERM."""
    replicas, faults = Replicas(), Faults()
    app = create_app(faults)

    @web.middleware
    async def look(request: web.Request, handler: Any) -> Any:
        faults.replicas = replicas.names()
        return await handler(request)

    app.middlewares.append(look)
    sys.stderr.write(f"dashboard: http://127.0.0.1:{port}\nready: http://127.0.0.1:{port}\n")
    sys.stderr.flush()
    try:
        web.run_app(app, host="127.0.0.1", port=port, print=None)
    finally:
        for process in replicas.running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
