"""Kills replicas of a service under steady load, then swaps its weights under load: what clients notice.

    python -m jobs.chaos_serve configs/serve/chaos.yaml

The load is open and its client sends nothing twice, so each failure is one that a client would have seen.
"""

import json
import logging
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
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
from counterpoint.section import Section
from counterpoint.unet import UNetConfig, null_class
from jobs.bench_serve import difference, save_untrained
from jobs.chaos_figures import headline, outages, rows_of, swap_headline
from jobs.config import run_job
from jobs.load import LoadConfig
from jobs.load_figures import read_outcomes
from jobs.processes import Load, environment, free_port, module, result_from, run_load, server
from jobs.run_names import RunUri
from jobs.runs import load_pipeline
from jobs.table import text_table

logger = logging.getLogger(__name__)

MODEL, DEPLOYMENT = "student", "ImageServer"
PATIENCE_S = 120.0
COLUMNS = (
    "at_s", "pid", "alive", "recovery_s", "requests", "failed", "wrong", "p50_ms", "p99_ms", "max_ms",
)  # fmt: skip


class ServeChaosConfig(Section):
    """What is served, what is asked of it, and what is done to it."""

    run: RunUri = "runs/chaos_serve"
    """Local folder for the outcome, every request's fate, the service's log, and models made here."""
    root: RunUri | None = None
    """URI below which the runs `before` and `after` lie; none makes both, with random weights."""
    before: str = "before"
    """RUN or RUN@STEP that is served."""
    after: str = "after"
    """RUN or RUN@STEP that is promoted."""
    unet: UNetConfig = UNetConfig()
    """The network with random weights."""
    image_shape: tuple[int, int] = (3, 16)
    """Its channels and its pixels a side."""
    classes: int = Field(default=10, ge=1)
    """Classes to ask for: 0 to classes - 1."""
    replicas: ReplicasConfig = ReplicasConfig(count=2)
    """Those that are killed."""
    batching: BatchingConfig = BatchingConfig()
    """How they batch."""
    limits: LimitsConfig = LimitsConfig(max_queue=1024)
    """What the service lets in; all of an outage's requests may have to wait."""
    steps: tuple[int, ...] = Field(default=(4,), min_length=1)
    """Numbers of steps that requests take turns in asking for."""
    rate: float | None = Field(default=None, gt=0.0)
    """Requests a second; none takes a share of what a short closed load gets answered."""
    share: float = Field(default=0.4, gt=0.0)
    """That share. One replica has to carry it, while its sibling's successor starts on the same cores."""
    probe_s: float = Field(default=6.0, gt=0.0)
    """Seconds of the closed load."""
    concurrency: int = Field(default=32, ge=1)
    """Its clients."""
    warmup_s: float = Field(default=2.0, ge=0.0)
    """Seconds of each load that are not measured."""
    kills: int = Field(default=6, ge=1)
    """Replicas to kill."""
    every_s: float = Field(default=10.0, gt=0.0)
    """Seconds from the load's start to the first kill, and from each kill to the next."""
    settle_s: float = Field(default=20.0, gt=0.0)
    """Seconds of load after the last kill."""
    swap_s: float = Field(default=30.0, gt=0.0)
    """Seconds of the second load; a third of the way through it the promotion begins."""
    seed: int = 0
    """Seed of victims, weights and loads."""


@dataclass(frozen=True)
class _Service:
    """A running service."""

    config: ServeChaosConfig
    url: str
    root: str
    folder: Path
    process: subprocess.Popen[str]

    @property
    def log(self) -> Path:
        return self.folder / "service.log"

    def load(self, **options: Any) -> LoadConfig:
        """Return a load on it; all loads compare with the pictures that earlier ones got."""
        every: dict[str, Any] = {
            "url": self.url, "model": MODEL, "steps": self.config.steps,
            "labels": tuple(range(self.config.classes)), "warmup_s": self.config.warmup_s,
            "timeout_s": 2 * self.config.limits.deadline_s, "seed": self.config.seed,
            "known": str(self.folder / "known.json"),
        }  # fmt: skip
        return LoadConfig.model_validate(every | options)


def main(config: ServeChaosConfig) -> dict[str, Any]:
    """Return how many requests failed or were answered wrongly in both loads, and how soon kills healed."""
    folder = Path(config.run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "known.json").unlink(missing_ok=True)
    root = config.root or str(folder / "models")
    if config.root is None:
        for seed, name in enumerate((config.before, config.after), start=config.seed):
            save_untrained(f"{root}/{name}", config.unet, config.image_shape, config.classes, seed)
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", folder / "service.log"
    command = service_command(service_config(config, root, port), folder)
    with server(command, url, log, env=environment(config.replicas.threads)) as process:
        service = _Service(config, url, root, folder, process)
        before = _grey_levels(service, config.before)
        rate = config.rate or _share_of_saturation(service)
        killed = kill_phase(service, rate)
        _full_strength(service)
        swapped = swap_phase(service, rate)
        after = _grey_levels(service, config.after)
    told = killed | swapped
    return told | {"rate": round(rate, 2), "grey_levels_before": before, "grey_levels_after": after}


def kill_phase(service: _Service, rate: float) -> dict[str, Any]:
    """Put the load on, kill replicas on time, store everything, and return the figures."""
    config, out = service.config, service.folder / "kills.jsonl"
    seconds = config.kills * config.every_s + config.settle_s
    with Load(service.load(rate=rate, seconds=seconds), out, service.folder) as load:
        kills = disturb(service, load.zero)
        figures = load.result()
    outcomes = [one for one in read_outcomes(out) if one.due_s >= 0]
    found = outages(outcomes, [kill["at_s"] for kill in kills], config.replicas.count, seconds)
    rows = rows_of(kills, found, outcomes)
    text = text_table(rows, COLUMNS)
    store = RunStore(config.run)
    store.write_text("chaos.txt", text + "\n")
    store.write_text("kills.json", json.dumps({"load": figures, "rows": rows}, indent=1))
    sys.stderr.write(text + "\n")
    return headline(figures, kills, found, rows)


def swap_phase(service: _Service, rate: float) -> dict[str, Any]:
    """Put the load on, promote the other checkpoint meanwhile, store everything, and return the figures."""
    config, out = service.config, service.folder / "swap.jsonl"
    with Load(service.load(rate=rate, seconds=config.swap_s), out, service.folder) as load:
        _sleep_until(load.zero + config.swap_s / 3)
        begun = time.monotonic() - load.zero
        promoted = result_from(promote_command(service.log, config.after), PATIENCE_S, environment(1))
        ended = time.monotonic() - load.zero
        figures = load.result()
    told = {"begun_s": round(begun, 2), "ended_s": round(ended, 2), "promoted": promoted, "load": figures}
    RunStore(config.run).write_text("swap.json", json.dumps(told, indent=1))
    return swap_headline(figures, read_outcomes(out), promoted["version"], begun, ended)


def disturb(service: _Service, zero: float) -> list[dict[str, Any]]:
    """Kill a random replica every `every_s` seconds after `zero`; return when, whom, and how many there were.

    `alive` counts processes before the kill, a successor that is still starting included; a kill that finds
    no replica at all waits for one.
    """
    chance = random.Random(service.config.seed)
    kills = []
    for number in range(1, service.config.kills + 1):
        _sleep_until(zero + number * service.config.every_s)
        until = time.monotonic() + PATIENCE_S
        while not (alive := replicas(service.process.pid)):
            if time.monotonic() > until:
                raise RuntimeError(f"no replica of {DEPLOYMENT} was there to kill for {PATIENCE_S:.0f} s")
            time.sleep(0.1)
        victim = chance.choice(sorted(alive, key=lambda process: process.pid))
        at = time.monotonic() - zero
        victim.kill()
        kills.append({"at_s": round(at, 3), "pid": victim.pid, "alive": len(alive)})
        logger.info("killed %s", kills[-1])
    return kills


def replicas(pid: int, deployment: str = DEPLOYMENT) -> list[psutil.Process]:
    """Return the processes of a deployment's replicas among the descendants of process `pid`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0]
        except psutil.Error:
            continue
        if title.startswith("ray::ServeReplica") and deployment in title:
            found.append(process)
    return found


def service_config(config: ServeChaosConfig, root: str, port: int) -> ServiceConfig:
    """Return the service that is disturbed."""
    model = ImageModelConfig(name=MODEL, checkpoint=config.before, max_steps=max(config.steps))
    images = ImagesConfig(models=(model,), replicas=config.replicas, batching=config.batching)
    return ServiceConfig(root=root, port=port, images=images, limits=config.limits)


def service_command(config: ServiceConfig, folder: Path) -> list[str]:
    """Return the command that serves."""
    return module("jobs.serve", config, folder)


def promote_command(log: Path, checkpoint: str) -> list[str]:
    """Return the command that swaps the weights of the service with this log."""
    where = f"dashboard={dashboard_of(log)}"
    return [sys.executable, "-m", "jobs.serve", "promote", checkpoint, f"model={MODEL}", where]


def dashboard_of(log: Path) -> str:
    """Return the address of the dashboard, which a service names in its log once it is ready."""
    prefix, until = "dashboard: ", time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith(prefix):
                return line.removeprefix(prefix)
        time.sleep(0.1)
    raise RuntimeError("the service's log does not name its dashboard")


def _share_of_saturation(service: _Service) -> float:
    config = service.config
    probe = service.load(concurrency=config.concurrency, seconds=config.probe_s)
    told = run_load(probe, service.folder)
    if not told["rps"]:
        raise RuntimeError(f"the service answered nothing before it was disturbed: {told['failures']}")
    return config.share * float(told["rps"])


def _grey_levels(service: _Service, name: str) -> int | None:
    """Return how far the service's pictures are from those of the run itself; None for a step's weights."""
    if "@" in name:
        return None
    pipeline = load_pipeline(RunStore(f"{service.root}/{name}"))
    if null_class(pipeline.unet) < service.config.classes:
        raise ValueError(f"classes={service.config.classes} is more than {name} knows: lower it")
    return difference(service.url, pipeline, max(service.config.steps))


def _full_strength(service: _Service) -> None:
    """Wait until as many different replicas answer as there should be."""
    until = time.monotonic() + PATIENCE_S
    out = service.folder / "settled.jsonl"
    while time.monotonic() < until:
        load = service.load(concurrency=8, seconds=1.0, warmup_s=0.0, out=str(out))
        run_load(load, service.folder)
        if len({one.replica for one in read_outcomes(out) if one.right}) >= service.config.replicas.count:
            return
    raise RuntimeError(f"not all replicas answered again within {PATIENCE_S:.0f} s")


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


if __name__ == "__main__":
    run_job(main, ServeChaosConfig)
