"""What it costs to bring a panel's message from one actor to another: Ray's ways against numpy arrays."""

import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import ray
import torch
from pydantic import Field
from torch import Tensor

from actors.wire import Message, WireDtype, pack, unpack
from cluster.connect import connected, thread_env
from cluster.environment import describe_environment
from cluster.storage import RunStore
from cluster.waiting import get, ready
from counterpoint.critics.messages import Samples
from counterpoint.section import Section
from counterpoint.seeds import generator

Way = Literal["numpy", "numpy_bf16", "torch", "gloo", "nccl", "nixl"]
DIRECT = ("gloo", "nccl", "nixl")
TIMEOUT = 120.0


class TransportBenchConfig(Section):
    """All ways take turns in one run between the same two actors; each ends with tensors to compute with."""

    ways: tuple[Way, ...] = get_args(Way)
    """numpy and numpy_bf16 as the panel sends; torch as Ray pickles tensors; the others are Ray's direct
    transport. What this cluster cannot do is left out, and said so."""
    shapes: tuple[tuple[int, int, int, int], ...] = ((64, 1, 8, 8), (8, 4, 128, 128))
    """Samples of a message, each [n,C,H,W]: a step on small images, and eight latents of a large model."""
    megabytes: int = Field(default=100, ge=0)
    """Size of one further message; 0 leaves it out."""
    repeats: int = Field(default=5, ge=1)
    """Messages of each way in a round, one after the other; the round's figure is their median."""
    rounds: int = Field(default=7, ge=1)
    """Rounds; ratios are within a round, their median and range over rounds."""
    gpus_per_actor: float = Field(default=0.0, ge=0.0)
    """GPUs of each end; above 0 messages begin and end in GPU memory."""
    out: str | None = None
    """File for all results (JSON): every round's seconds by every way; none is written unless set."""


class End:
    """One end: it holds a message to send, and takes in what the other end sent."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fake, real = torch.randn((2, *shape), generator=generator(0, "bench-transport")).to(self.device)
        labels = torch.zeros(shape[0], dtype=torch.long, device=self.device)
        self.samples = Samples(0, fake, real, labels)

    def arrays(self, dtype: WireDtype) -> Message:
        """Return the message as the panel sends it."""
        return pack(self.samples, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the message as tensors, which is how direct transports want it."""
        samples = self.samples
        return {"fake": samples.fake, "real": samples.real, "labels": samples.labels}

    def take(self, message: Message) -> tuple[float, float]:
        """Take a message in, and return of the fake and of the real samples a number each."""
        if isinstance(message["fake"], Tensor):
            fake, real = message["fake"].to(self.device), message["real"].to(self.device)
        else:
            samples = unpack([message], self.device)
            fake, real = samples.fake, samples.real
        return float(fake[0].sum()), float(real[-1].sum())


def main(config: TransportBenchConfig) -> dict[str, Any]:
    """Return, for each message, seconds by numpy and how many times as fast each other way is."""
    with connected():
        ways, left_out = available(config)
        told: dict[str, Any] = {
            "ways": list(ways),
            "left_out": left_out,
            "device": "cuda" if config.gpus_per_actor else "cpu",
        }
        rounds = {}
        for shape in (*config.shapes, *large(config.megabytes)):
            size = 2 * 4 * math.prod(shape)
            rounds[size] = measure(config, ways, shape)
            told |= described(size, rounds[size])
    if config.out is not None:
        write(config, Path(config.out).absolute(), told, rounds)
    return told


def write(
    config: TransportBenchConfig, path: Path, told: dict[str, Any], rounds: dict[int, list[dict[Way, float]]]
) -> None:
    """Write the figures, and what they are made of, to a JSON file."""
    results = {
        "label": "MEASURED",
        "environment": describe_environment(),
        "config": config.model_dump(mode="json"),
        "figures": told,
        "seconds_of_a_message": [
            {"bytes_in_float32": size, "rounds": measured} for size, measured in rounds.items()
        ],
    }
    RunStore(str(path.parent)).write_text(path.name, json.dumps(results, indent=1) + "\n")


def large(megabytes: int) -> list[tuple[int, int, int, int]]:
    """Return the shape of samples of which two, fake and real, are so many megabytes; none for 0."""
    return [(2, 1, 250 * megabytes, 250)] if megabytes else []


def available(config: TransportBenchConfig) -> tuple[tuple[Way, ...], dict[str, str]]:
    """Return the ways that can be measured here, numpy first, and why others cannot."""
    left_out = {}
    if importlib.util.find_spec("nixl") is None:
        left_out["nixl"] = "the package nixl is not installed"
    if not config.gpus_per_actor:
        left_out["nccl"] = "gpus_per_actor=0"
    elif importlib.util.find_spec("cupy") is None:
        left_out["nccl"] = "the package cupy is not installed"
    if config.gpus_per_actor:
        left_out["gloo"] = "Ray's gloo transport is for tensors in the host's memory"
    wanted = [way for way in config.ways if way not in left_out and way != "numpy"]
    return ("numpy", *wanted), {way: why for way, why in left_out.items() if way in config.ways}


def measure(
    config: TransportBenchConfig, ways: tuple[Way, ...], shape: tuple[int, int, int, int]
) -> list[dict[Way, float]]:
    """Send messages of samples of `shape` by all ways in turns; return seconds of one, for each round.

    One of each way comes first and is not counted.
    """
    from ray.experimental.collective import create_collective_group, destroy_collective_group

    options: dict[str, Any] = {"enable_tensor_transport": any(way in DIRECT for way in ways)}
    made: Any = ray.remote(**options)(End)
    actor = made.options(
        num_cpus=0.5, num_gpus=config.gpus_per_actor, runtime_env={"env_vars": thread_env(1)}
    )
    ends = [actor.remote(shape), actor.remote(shape)]
    ready({"sender": ends[0], "receiver": ends[1]}, timeout=TIMEOUT, what="start of the two ends")
    groups = [create_collective_group(ends, way) for way in ways if way in ("gloo", "nccl")]
    try:
        senders = {way: sender(way, *ends) for way in ways}
        check({way: send() for way, send in senders.items()}, math.prod(shape[1:]))
        rounds = []
        for number in range(config.rounds):
            order = list(ways) if number % 2 else list(ways)[::-1]
            rounds.append({way: typical(senders[way], config.repeats) for way in order})
    finally:
        for group in groups:
            destroy_collective_group(group)
        for end in ends:
            ray.kill(end)
    return rounds


def sender(way: Way, source: Any, target: Any) -> Callable[[], tuple[float, float]]:
    """Return a function that sends one message by `way` and waits until it has been taken in."""
    dtype: WireDtype = "bfloat16" if way == "numpy_bf16" else "float32"

    def send() -> tuple[float, float]:
        if way in DIRECT:
            ref = source.tensors.options(tensor_transport=way).remote()
        else:
            ref = source.tensors.remote() if way == "torch" else source.arrays.remote(dtype)
        taken: tuple[float, float] = get(target.take.remote(ref), timeout=TIMEOUT, what=f"message by {way}")
        return taken

    return send


def check(taken: dict[Way, tuple[float, float]], count: int = 1) -> None:
    """Raise RuntimeError unless all ways brought the same samples, of which each sum is over `count` numbers.

    bfloat16 may round them: to 2^-9 of a number of about 1, so a sum by about 0.001 sqrt(count).
    """
    for way, sums in taken.items():
        near = 0.02 * math.sqrt(count) if way == "numpy_bf16" else 1e-5
        pairs = zip(sums, taken["numpy"], strict=True)
        if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=near) for a, b in pairs):
            raise RuntimeError(f"{way} brought other samples than numpy: {sums} against {taken['numpy']}")


def typical(send: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of one message."""
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        send()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def described(size: int, rounds: list[dict[Way, float]]) -> dict[str, Any]:
    """Return seconds by numpy and the other ways' ratios, named by the bytes of the samples sent."""
    name = f"{size / 1e6:.0f}mb" if size >= 1e6 else f"{size / 1e3:.0f}kb"
    told: dict[str, Any] = {f"numpy_s_{name}": round(statistics.median(r["numpy"] for r in rounds), 5)}
    for way in rounds[0].keys() - {"numpy"}:
        ratios = [one["numpy"] / one[way] for one in rounds]
        told[f"{way}_ratio_{name}"] = round(statistics.median(ratios), 3)
        told[f"{way}_spread_{name}"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return dict(sorted(told.items()))
