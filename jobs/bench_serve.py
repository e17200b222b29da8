"""Images a second through HTTP against the same model called directly and against a plain FastAPI server.

    python -m jobs.bench serve configs/serve/bench.yaml

Arms take turns in each round: direct calls at the best of several batch sizes, the service with one replica
at saturation and at a share of it, the plain server under the same load. Each is a process of its own with as
many threads; the servers are up, and idle, all the time. The load is a further process (see jobs.load).
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from actors.serving.config import (
    BatchingConfig,
    ImageModelConfig,
    ImagesConfig,
    LimitsConfig,
    ReplicasConfig,
    ServiceConfig,
)
from cluster.storage import RunStore
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.unet import UNetConfig, build_unet, null_class
from jobs.bench_direct import DirectBenchConfig
from jobs.load import LoadConfig
from jobs.load_answers import Asked
from jobs.load_figures import spread
from jobs.plain_server import PlainServerConfig
from jobs.processes import SLACK_S, environment, free_port, module, pictures, result_from, run_load, server
from jobs.run_names import RunUri
from jobs.runs import load_pipeline, save_pipeline

logger = logging.getLogger(__name__)

Commands = dict[str, list[str]]

MODEL = "student"
CHECKED = 16
"""Pictures compared with the pipeline's, in one call of it; at this size its rows' bits have settled."""


class ServeBenchConfig(Section):
    """What is served and how hard it is tried."""

    run: RunUri | None = None
    """URI of a trained student's run; none takes random weights, which cost the same."""
    unet: UNetConfig = UNetConfig()
    """The network with random weights."""
    image_shape: tuple[int, int] = (3, 16)
    """Its channels and its pixels a side."""
    classes: int = Field(default=10, ge=1)
    """Its classes."""
    steps: tuple[int, ...] = Field(default=(4,), min_length=1)
    """Numbers of steps that requests, and direct calls, take turns in."""
    images: int = Field(default=1, ge=1, le=10)
    """Images of a request."""
    threads: int = Field(default=1, ge=1)
    """Threads of the maths in every arm."""
    batching: BatchingConfig = BatchingConfig()
    """How the service batches."""
    batches: tuple[int, ...] = Field(default=(1, 4, 16, 32, 64), min_length=1)
    """Batch sizes of direct calls."""
    concurrency: tuple[int, ...] = Field(default=(32, 64), min_length=1)
    """Clients at saturation; each arm is taken at its best, as direct calls are."""
    rounds: int = Field(default=3, ge=1)
    """Rounds, in each of which all take turns; figures are medians over rounds."""
    direct_s: float = Field(default=3.0, gt=0.0)
    """Seconds of direct calls at each batch size."""
    saturation_s: float = Field(default=6.0, gt=0.0)
    """Seconds at each number of clients."""
    open_s: float = Field(default=20.0, gt=0.0)
    """Seconds of the open load."""
    warmup_s: float = Field(default=2.0, ge=0.0)
    """Seconds of each load that are not measured."""
    share: float = Field(default=0.7, gt=0.0)
    """Rate of the open load over the throughput at saturation of the same round."""
    goodput_ms: float = Field(default=250.0, gt=0.0)
    """Latency within which an answer of the open load counts as good."""
    seed: int = 0
    """Seed of weights and loads."""


def main(config: ServeBenchConfig) -> dict[str, Any]:
    """Return `of_direct_at_saturation`, `over_plain_fastapi`, `p99_over_median_at_<share>` and what they
    are made of: medians over rounds, with the least and the largest."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        uri = config.run or str(folder / "models" / MODEL)
        if config.run is None:
            save_untrained(uri, config.unet, config.image_shape, config.classes, config.seed)
        urls = stack.enter_context(_servers(config, uri, folder))
        pipeline = load_pipeline(RunStore(uri))
        apart = {name: difference(url, pipeline, max(config.steps)) for name, url in urls.items()}
        labels = tuple(range(null_class(pipeline.unet)))
        rounds = []
        for turn in range(config.rounds):
            rounds.append(_round(config, turn, uri, urls, labels, folder))
            logger.info("round %d of %d: %s", turn + 1, config.rounds, rounds[-1])
    return headline(config, rounds) | {
        f"grey_levels_from_direct_{name}": value for name, value in apart.items()
    }


def headline(config: ServeBenchConfig, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and spreads over rounds, and the sums of what must be nought."""

    def over(above: str, below: str) -> list[float]:
        return [one[above] / one[below] for one in rounds]

    loads = [load for one in rounds for load in (*one["loads"], one["open"])]
    opened = [one["open"] for one in rounds]
    share = f"{100 * config.share:.0f}"
    told = {
        **spread("of_direct_at_saturation", over("serve", "direct")),
        **spread("over_plain_fastapi", over("serve", "plain")),
        **spread(f"p99_over_median_at_{share}", [one["p99_ms"] / one["p50_ms"] for one in opened]),
    }
    for arm in ("direct", "serve", "plain"):
        told |= spread(f"images_per_second_{arm}", [one[arm] for one in rounds], 1)
    for figure in ("p50_ms", "p99_ms", "rps", "goodput"):
        told |= spread(f"{figure}_at_{share}", [one[figure] for one in opened])
    batches = [one["mean_batch"] for one in rounds if one["mean_batch"] is not None]
    return told | {
        "mean_batch": float(np.median(batches)) if batches else None,
        "best_batch_direct": [one["best_batch"] for one in rounds],
        "requests_at_" + share: sum(one["requests"] for one in opened),
        "late_p99_ms": max(one["late_p99_ms"] for one in opened),
        "client_cpu": max(one["client_cpu"] for one in loads),
        "failed": sum(one["failed"] for one in loads),
        "wrong": sum(one["wrong"] for one in loads),
        "rounds": config.rounds,
        "threads": config.threads,
    }


def save_untrained(uri: str, unet: UNetConfig, image_shape: tuple[int, int], classes: int, seed: int) -> None:
    """Save a student with random weights for images of (channels, side) as a run's pipeline."""
    network = build_unet(unet, *image_shape, classes, seed)
    save_pipeline(RunStore(uri), network, TimestepShiftScheduler())


def difference(url: str, pipeline: ClassConditionalPipeline, steps: int) -> int:
    """Return the largest difference, in grey levels of 255, between a server's pictures and the pipeline's.

    One means that a value on the edge between two grey levels was rounded to the other.
    """
    pipeline.set_progress_bar_config(disable=True)
    labels = [k % null_class(pipeline.unet) for k in range(CHECKED)]
    streams = [generator(seed, "sample", label, 0) for seed, label in enumerate(labels)]
    made = pipeline(labels, steps, 1.0, streams, output_type="np", return_dict=False)
    ours = (255 * made[0]).round().astype(np.int16)
    served = [pictures(url, Asked(label, steps, 1.0, seed))[0] for seed, label in enumerate(labels)]
    return int(np.abs(ours - np.stack(served).reshape(ours.shape)).max())


def service_config(config: ServeBenchConfig, uri: str, port: int) -> ServiceConfig:
    """Return the service: one replica, with room for all clients at once."""
    root, _, name = uri.rpartition("/")
    images = ImagesConfig(
        models=(ImageModelConfig(name=MODEL, checkpoint=name, max_steps=max(config.steps)),),
        replicas=ReplicasConfig(count=1, threads=config.threads),
        batching=config.batching,
    )
    limits = LimitsConfig(max_queue=4 * max(config.concurrency), max_images=max(10, config.images))
    return ServiceConfig(root=root, port=port, images=images, limits=limits)


def server_commands(config: ServeBenchConfig, uri: str, ports: dict[str, int], folder: Path) -> Commands:
    """Return the commands that start the service and the plain server at their ports."""
    plain = PlainServerConfig(run=uri, port=ports["plain"], threads=config.threads)
    return {
        "serve": module("jobs.serve", service_config(config, uri, ports["serve"]), folder),
        "plain": module("jobs.plain_server", plain, folder),
    }


def call_directly(config: DirectBenchConfig, folder: Path) -> dict[str, Any]:
    """Return what direct calls achieve in a process of their own."""
    limit = SLACK_S + len(config.batches) * config.seconds
    told: dict[str, Any] = result_from(
        module("jobs.bench_direct", config, folder), limit, environment(config.threads)
    )
    return told


@contextlib.contextmanager
def _servers(config: ServeBenchConfig, uri: str, folder: Path) -> Iterator[dict[str, str]]:
    """Have the service and the plain server up; give their addresses."""
    ports = {"serve": free_port(), "plain": free_port()}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    commands = server_commands(config, uri, ports, folder)
    env = environment(config.threads)
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            stack.enter_context(server(command, urls[name], folder / f"{name}.log", env=env))
        yield urls


def _round(
    config: ServeBenchConfig, turn: int, uri: str, urls: dict[str, str], labels: tuple[int, ...], folder: Path
) -> dict[str, Any]:
    """Let every arm have its turn; return images a second of each, the open load, and all loads."""
    direct = DirectBenchConfig(
        run=uri, batches=config.batches, steps=config.steps, seconds=config.direct_s, threads=config.threads
    )
    called = call_directly(direct, folder)

    def load(name: str, **options: Any) -> dict[str, Any]:
        every: dict[str, Any] = {
            "url": urls[name], "model": MODEL, "steps": config.steps, "labels": labels,
            "images": config.images, "warmup_s": config.warmup_s, "goodput_ms": config.goodput_ms,
            "seed": config.seed + turn, "known": str(folder / f"{name}.known.json"),
        }  # fmt: skip
        asked = LoadConfig.model_validate(every | options)
        told = run_load(asked, folder)
        if not told["completed"]:
            raise RuntimeError(f"{name} answered none of {told['requests']} requests: {told['failures']}")
        return told

    saturated = {
        name: [load(name, concurrency=many, seconds=config.saturation_s) for many in config.concurrency]
        for name in urls
    }
    best = {name: max(loads, key=lambda one: one["images_per_second"]) for name, loads in saturated.items()}
    return {
        "direct": called["best"],
        "best_batch": called["best_batch"],
        **{name: one["images_per_second"] for name, one in best.items()},
        "mean_batch": best["serve"]["mean_batch"],
        "open": load("serve", rate=config.share * best["serve"]["rps"], seconds=config.open_s),
        "loads": [one for loads in saturated.values() for one in loads],
    }
