"""Load for a server of images, from a process of its own: what was answered, how soon, and whether rightly.

    python -m jobs.load url=http://127.0.0.1:8000 rate=40 seconds=30

With `rate` the load is open: requests are due at times fixed beforehand, whatever became of earlier ones,
and latency counts from when a request was due. Without it `concurrency` clients ask without a pause (closed
load), which finds the throughput at saturation and says little about latency.
"""

import asyncio
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
from pydantic import Field

from counterpoint.section import Section
from jobs.config import run_job
from jobs.load_answers import Answers, Asked, read_known
from jobs.load_figures import Outcome, Record, figures, timeline

PATH = "/v1/images/generations"
PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
GAPS, ORDER = 0, 1
"""Random streams; counterpoint.seeds would import torch, for which a load has no use."""


class LoadConfig(Section):
    """What is asked of whom, how often, for how long."""

    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+/?$")
    """Where the server listens."""
    model: str | None = None
    """Model to name; none for the server's default."""
    rate: float | None = Field(default=None, gt=0.0)
    """Requests due a second; none for a closed load."""
    arrivals: Literal["poisson", "even"] = "poisson"
    """Due times of an open load: with exponential gaps, or evenly spaced."""
    concurrency: int = Field(default=32, ge=1)
    """Clients of a closed load."""
    seconds: float = Field(default=10.0, gt=0.0)
    """Seconds that are measured."""
    warmup_s: float = Field(default=2.0, ge=0.0)
    """Seconds of the same load before, not measured."""
    steps: tuple[int, ...] = Field(default=(4,), min_length=1)
    """Numbers of steps that requests take turns in asking for."""
    labels: tuple[int, ...] = Field(default=tuple(range(10)), min_length=1)
    """Classes likewise."""
    seeds: int = Field(default=16, ge=1)
    """Seeds 0 to seeds - 1 likewise: each question comes again and again, so that answers can be compared."""
    images: int = Field(default=1, ge=1)
    """Images of a request."""
    guidance_scale: float = 1.0
    """Guidance of all requests."""
    timeout_s: float = Field(default=60.0, gt=0.0)
    """Seconds after which a try is given up."""
    retries: int = Field(default=0, ge=0)
    """Times the client sends a request again after a broken connection, a 429 or a 503; all carry seeds."""
    goodput_ms: float = Field(default=1000.0, gt=0.0)
    """Latency within which an answer counts as good."""
    key: str = "COUNTERPOINT_KEY"
    """Environment variable that holds the bearer token, if the server wants one."""
    seed: int = 0
    """Seed of the order of requests and of the gaps between them."""
    out: str | None = None
    """File for all outcomes as JSON lines, after a first line with the zero of their times."""
    known: str | None = None
    """JSON file of the pictures' digests from earlier loads to compare with; written anew at the end."""


@dataclass(frozen=True)
class _Try:
    """How one try ended."""

    status: int
    headers: Mapping[str, str]
    body: Any
    failed: str


class _Client:
    """Sends requests and judges what comes back."""

    def __init__(self, config: LoadConfig, session: aiohttp.ClientSession, record: Record) -> None:
        self.config, self.session, self.record = config, session, record
        self.answers = Answers(read_known(Path(config.known)) if config.known else None)
        self.questions = questions(config)
        token = os.environ.get(config.key)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def now(self) -> float:
        return time.monotonic() - self.record.zero

    async def ask(self, number: int, due: float) -> Outcome:
        """Send request `number` and record what became of it."""
        asked = self.questions[number % len(self.questions)]
        sent = self.now()
        first_failed = ""
        for tries in range(1, self.config.retries + 2):
            done = await self._try(asked)
            ended = self.now()
            first_failed = done.failed if tries == 1 else first_failed
            again = done.failed == "connection" or done.status in (429, 503)
            if not again or tries > self.config.retries:
                break
            await asyncio.sleep(_pause(done, tries))
        told = _told(done)
        wrong = "" if done.failed else self.answers.fault(asked, told["version"], done.body)
        outcome = Outcome(
            number, due, sent, ended, done.failed, wrong, first_failed, tries, **told
        )  # fmt: skip
        self.record.add(outcome)
        return outcome

    async def _try(self, asked: Asked) -> _Try:
        limit = aiohttp.ClientTimeout(total=self.config.timeout_s)
        url = self.config.url.rstrip("/") + PATH
        try:
            async with self.session.post(
                url, json=asked.body(), headers=self.headers, timeout=limit
            ) as response:
                text = await response.read()
                status, headers = response.status, response.headers
        except TimeoutError:
            return _Try(0, {}, None, "timeout")
        except (aiohttp.ClientError, OSError):
            return _Try(0, {}, None, "connection")
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        return _Try(status, headers, body, "" if status == 200 else f"{status} {_code(body)}".strip())


def main(config: LoadConfig) -> dict[str, Any]:
    """Put the load on the server; return the figures, the timeline and the client's own share of a core."""
    begun, spent = time.monotonic(), time.process_time()
    record = asyncio.run(put_load(config))
    share = (time.process_time() - spent) / (time.monotonic() - begun)
    told = figures(record.outcomes, config.seconds, config.goodput_ms)
    return {
        **told,
        "images_per_second": round(told["rps"] * config.images, 2),
        "client_cpu": round(share, 3),
        "timeline": timeline(record.outcomes),
    }


async def put_load(config: LoadConfig) -> Record:
    """Send all requests, wait for their ends (no try outlives `timeout_s`); return what became of them."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        record = Record(Path(config.out) if config.out else None, time.monotonic() + config.warmup_s)
        client = _Client(config, session, record)
        try:
            await (_closed(client) if config.rate is None else _open(client, due_times(config)))
        finally:
            record.close()
    if config.known:
        Path(config.known).write_text(json.dumps(client.answers.digests), encoding="utf-8")
    return record


def due_times(config: LoadConfig) -> list[float]:
    """Return when requests of an open load are due, in seconds, rising from -warmup_s to `seconds`."""
    if config.rate is None:
        raise ValueError("rate is missing: a closed load has no due times")
    length = config.warmup_s + config.seconds
    if config.arrivals == "even":
        gaps = np.full(int(length * config.rate) + 1, 1.0 / config.rate)
    else:
        chance = np.random.default_rng([config.seed, GAPS])
        gaps = chance.exponential(1.0 / config.rate, int(2 * length * config.rate) + 100)
    times = np.cumsum(gaps) - gaps[0] - config.warmup_s
    return times[times < config.seconds].tolist()


def questions(config: LoadConfig) -> list[Asked]:
    """Return every question that the load may ask once, in an order drawn from the seed."""
    every = [
        Asked(label, steps, config.guidance_scale, seed, config.images, config.model)
        for steps, label, seed in itertools.product(config.steps, config.labels, range(config.seeds))
    ]
    order = np.random.default_rng([config.seed, ORDER]).permutation(len(every))
    return [every[i] for i in order]


async def _open(client: _Client, times: list[float]) -> None:
    async with asyncio.TaskGroup() as group:
        for number, due in enumerate(times):
            await asyncio.sleep(max(0.0, due - client.now()))
            group.create_task(client.ask(number, due))


async def _closed(client: _Client) -> None:
    numbers = itertools.count()

    async def one_by_one() -> None:
        while (now := client.now()) < client.config.seconds:
            outcome = await client.ask(next(numbers), now)
            if outcome.failed:  # a server that refuses at once must not be drowned in requests
                await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(client.config.concurrency):
            group.create_task(one_by_one())


def _pause(done: _Try, tries: int) -> float:
    """Return the seconds before another try: as told by Retry-After, else doubling."""
    try:
        asked = float(done.headers.get("retry-after", ""))
    except ValueError:
        asked = PAUSE_S * 2 ** (tries - 1)
    return min(max(asked, 0.0), LONGEST_PAUSE_S)


def _told(done: _Try) -> dict[str, Any]:
    """Return what the answer's headers and body say about how it was made."""
    body = done.body if isinstance(done.body, dict) else {}

    def number(name: str) -> float | None:
        try:
            return float(done.headers[name])
        except (KeyError, ValueError):
            return None

    return {
        "version": str(done.headers.get("x-model-version") or body.get("version") or ""),
        "replica": done.headers.get("x-replica", ""),
        "retries": int(number("x-retries") or 0),
        "batch_size": number("x-batch-size"),
        "queued_ms": number("x-queue-ms"),
        "compute_ms": number("x-compute-ms"),
    }


def _code(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("code", "")) if isinstance(error, dict) else ""


if __name__ == "__main__":
    run_job(main, LoadConfig)
