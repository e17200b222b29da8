"""MEASURED: real distillation steps on this machine, with critics in real actors and one or two trainers.

A trainer here is an actor that builds the same `Distiller` from the same recipe as a Ray Train worker does
and calls its `step`; with two of them gradients are averaged over gloo by the same strategy. Ray Train's
controller and worker group, which stand around the steps and not in them, are left out, so that all
arrangements can be up at once and take turns.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch.nn import functional as F

from actors.critics import HostSettings, critic_actor
from actors.panel import HostHandle
from actors.recipe import PanelRecipe
from actors.timeline import Recorder, merged, timed
from actors.trainers import StudentRecipe
from actors.worker import silent
from cluster.connect import thread_env
from cluster.storage import RunStore
from cluster.waiting import get, ready
from counterpoint.critics.group import Samples
from counterpoint.data import DataConfig
from counterpoint.distillation import AdversarialConfig, WarmupConfig
from counterpoint.pairs import PairsConfig
from counterpoint.place import Place
from counterpoint.student import StudentConfig
from jobs.stage import shares

START_S, TURN_S = 300.0, 600.0


@dataclass(frozen=True)
class Arm:
    """An arrangement that is measured."""

    actors: int
    trainers: int
    batch: int

    @property
    def name(self) -> str:
        """How results call it."""
        return f"{self.actors} critic actors, {self.trainers} trainers, batch {self.batch}"


class StepTaker:
    """A trainer that takes steps when told to, and tells where their time went."""

    def __init__(self, recipe: StudentRecipe, uri: str, rank: int, ranks: int, meeting: str) -> None:
        torch.set_num_threads(1)
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        self.rank = rank
        self.trainer = recipe(Place(rank, ranks), RunStore(uri), silent)
        self.panel = self.trainer.panel

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Take `count` steps from `first`; return their record and the seconds of each."""
        recorder, seconds = Recorder(self.rank, kept=count), []
        self.trainer.panel = self.panel
        timed(self.trainer, recorder)
        for step in range(first, first + count):
            begun = time.perf_counter()
            recorder.begin(step)
            self.trainer.step(step)
            recorder.end()
            seconds.append(time.perf_counter() - begun)
        return recorder.record() | {"seconds": seconds}

    def alone(self, step: int, samples: int) -> tuple[float, float]:
        """Have group 0 alone judge noise; return the seconds of its judging and of the wait beyond that."""
        shape = (samples, *self.trainer.batches.pairs.noise.shape[1:])
        asked = Samples(step, torch.randn(shape), torch.randn(shape), torch.zeros(samples, dtype=torch.long))
        panel: Any = self.panel
        before = panel.timings.compute_s, panel.timings.wait_s
        panel.ask(asked, torch.zeros(samples, dtype=torch.long)).result()
        return panel.timings.compute_s - before[0], panel.timings.wait_s - before[1]

    def network(self, samples: int) -> tuple[float, float]:
        """Return the seconds of the student's forward and backward passes alone."""
        unet = self.trainer.unet
        x = torch.randn((samples, *self.trainer.batches.pairs.noise.shape[1:]))
        begun = time.perf_counter()
        zeros = torch.zeros(samples, dtype=torch.long)
        loss = F.mse_loss(unet(x, zeros, class_labels=zeros).sample, x)
        between = time.perf_counter()
        torch.autograd.grad(loss, [p for p in unet.parameters() if p.requires_grad], allow_unused=True)
        return between - begun, time.perf_counter() - between

    def averaging(self) -> float:
        """Return the seconds of averaging as many numbers as the student has over the trainers."""
        flat = torch.ones(sum(p.numel() for p in self.trainer.unet.parameters()))
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(flat)
        return time.perf_counter() - begun


@dataclass
class Cast:
    """An arm's actors, and how far they have come."""

    arm: Arm
    trainers: list[Any]
    hosts: list[HostHandle]
    next: int = 0
    seconds: list[float] = field(default_factory=list)
    """Seconds of a step, the median of each round."""
    parts: list[dict[str, float]] = field(default_factory=list)
    """Medians over the steps of each round, see `parts_of`."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """The records of the newest round, by rank."""

    def turn(self, count: int) -> None:
        """Take `count` steps and keep what they took; ranks start together and wait for each other."""
        refs = {f"trainer-{i}": one.steps.remote(self.next, count) for i, one in enumerate(self.trainers)}
        told = get(refs, timeout=TURN_S, what=f"steps with {self.arm.name}")
        self.next += count
        self.records = list(told.values())
        self.seconds.append(statistics.median(self.records[0]["seconds"]))
        self.parts.append(parts_of(self.records[0]))

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of every trainer and return rank 0's answer."""
        refs = {f"trainer-{i}": getattr(one, method).remote(*args) for i, one in enumerate(self.trainers)}
        return get(refs, timeout=TURN_S, what=method)["trainer-0"]

    def summary(self) -> dict[str, Any]:
        """Return medians over rounds with the least and the largest."""
        names = self.parts[0]
        return {
            "actors": self.arm.actors,
            "trainers": self.arm.trainers,
            "batch": self.arm.batch,
            "step_s": statistics.median(self.seconds),
            "spread_s": [min(self.seconds), max(self.seconds)],
            "parts_s": {name: statistics.median(one[name] for one in self.parts) for name in names},
            "label": "MEASURED",
        }


def parts_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of each part of a rank's step, and of the slowest group's judging."""
    timeline = merged([record | {"rank": 0}])
    assert timeline is not None
    sums: dict[str, dict[int, float]] = {"forward": {}, "wire": {}, "waiting": {}, "backward": {}}
    names = {
        "student forward": "forward",
        "packing": "wire",
        "unpacking": "wire",
        "waiting for critics": "waiting",
    }
    for span in timeline.spans:
        if span.step >= 0:
            part = sums[names.get(span.what, "backward")]
            part[span.step] = part.get(span.step, 0.0) + span.end - span.begin
    parts = {name: statistics.median(part.values()) for name, part in sums.items() if part}
    return parts | {"judging": statistics.median(s.end - s.begin for s in timeline.spans if s.step < 0)}


def start(arm: Arm, recipe: PanelRecipe, data: DataConfig, bands: int, folder: Path, steps: int) -> Cast:
    """Start an arm's hosts and trainers, without waiting for them."""
    place = folder / f"{arm.actors}-{arm.trainers}-{arm.batch}"
    place.mkdir()
    light: dict[str, Any] = {"num_cpus": 0.01, "runtime_env": {"env_vars": thread_env(1)}}
    hosts = []
    for index, groups in enumerate(shares(bands, arm.actors)):
        settings = HostSettings(f"critics-{index}", groups, f"{place}/snapshots", 1 << 30, TURN_S)
        actor = critic_actor(len(groups), arm.trainers).options(**light).remote(recipe, settings)
        hosts.append(HostHandle(settings.name, groups, actor))
    student = StudentRecipe(
        recipe, tuple(hosts), data, PairsConfig(count=256, steps=4, chunk=256), StudentConfig(),
        WarmupConfig(steps=0), AdversarialConfig(steps=steps, heads_alone=0, batch_size=arm.batch), 0,
        patience=TURN_S,
    )  # fmt: skip
    kind = ray.remote(StepTaker).options(**light)
    trainers = [
        kind.remote(student, str(folder / "pairs"), rank, arm.trainers, str(place / "meeting"))
        for rank in range(arm.trainers)
    ]
    return Cast(arm, trainers, hosts)


def await_start(casts: Sequence[Cast]) -> None:
    """Wait until all actors of all arms answer."""
    for cast in casts:
        named = {host.name: host.actor for host in cast.hosts}
        named |= {f"trainer-{rank}": one for rank, one in enumerate(cast.trainers)}
        ready(named, timeout=START_S, what=f"start of {cast.arm.name}")


def components(one: Cast, two: Cast | None, sizes: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Return medians of what calibrates the simulation, each measured with nothing else under way.

    One group's judging of either number of samples in `sizes` and the message's way there and back, the
    student's passes over twice as many, and gradient averaging over the trainers of `two`.
    """
    told: dict[str, Any] = {"judge_s": {}, "forward_s": {}, "backward_s": {}, "label": "MEASURED"}
    waits: list[float] = []
    for size in sizes:
        judged = [one.ask("alone", one.next + i, size) for i in range(repeats + 1)][1:]
        one.next += repeats + 1
        passed = [one.ask("network", 2 * size) for _ in range(repeats + 1)][1:]
        told["judge_s"][size] = statistics.median(seconds for seconds, _ in judged)
        waits += [wait for _, wait in judged]
        for position, name in enumerate(("forward_s", "backward_s")):
            told[name][2 * size] = statistics.median(pair[position] for pair in passed)
    told["message_s"] = statistics.median(waits)
    if two is not None:
        told["averaging_s"] = statistics.median([two.ask("averaging") for _ in range(repeats + 1)][1:])
    return told
