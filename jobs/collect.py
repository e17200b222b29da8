"""Collect demonstrations: `python -m jobs.collect configs/vla/demos.yaml`."""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import Field

from actors.crew import Crew, Haul
from actors.rollouts import CollectJob, WorkersConfig
from cluster.progress import ProgressLine
from cluster.storage import RunStore
from counterpoint.data.demonstrations import to_table
from counterpoint.environments.config import EnvironmentConfig, build_environment
from counterpoint.environments.demonstrating import Recording
from counterpoint.environments.running import Build
from counterpoint.section import Section
from jobs.config import run_job
from jobs.crew import crew_on_stage
from jobs.run_names import RunUri
from jobs.runs import open_run, write_results

Kind = Literal["demonstration", "scene"]
FOLDER = "demonstrations"


class CollectConfig(Section):
    """Let the scripted expert play, and keep what it saw and did as Parquet shards."""

    run: RunUri = "runs/vla/demos"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    resume: bool = False
    """Go on with the run that is there, keeping its shards; without it a used `run` is refused."""
    episodes: int = Field(default=300, ge=0)
    """Episodes that the expert plays; those in which it fails are left out."""
    first_seed: int = Field(default=0, ge=0)
    """Seed of the first episode; the others follow one by one."""
    scenes: int = Field(default=1000, ge=0)
    """Single images after a few random actions, to learn to see from."""
    first_scene_seed: int = Field(default=1_000_000, ge=0)
    """Seed of the first scene; the others follow one by one."""
    noise: float = Field(default=0.12, ge=0.0)
    """Standard deviation of the Gaussian noise on executed actions, in units of half an action's range;
    recorded actions are without."""
    episodes_per_shard: int = Field(default=50, ge=1)
    """Episodes, or scenes, of a Parquet shard."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """The environment."""
    workers: WorkersConfig = WorkersConfig()
    """Rollout workers and their deadlines."""


def main(config: CollectConfig) -> dict[str, Any]:
    """Collect what is missing, store the results, and return the headline figures."""
    store = open_run(config.run, config, config.resume, in_process=config.workers.count == 0)
    build: Build = functools.partial(build_environment, config.environment)
    begun = time.monotonic()
    collect(config, store, build)
    return conclude(config, store, round(time.monotonic() - begun, 1))


def collect(config: CollectConfig, store: RunStore, build: Build) -> None:
    """Write the shards that are not there."""
    missing = [shard for shard in shards(config) if not store.exists(_figures_of(*shard))]
    if not missing:
        return
    total = sum(len(seeds) for _, seeds in missing)
    with (
        crew_on_stage(build, config.workers) as stage,
        ProgressLine(total, "collect", unit="episodes") as line,
    ):
        for kind in ("demonstration", "scene"):
            gather(config, store, stage.crew, [seeds for k, seeds in missing if k == kind], kind, line)


def shards(config: CollectConfig) -> Iterator[tuple[Kind, range]]:
    """Yield kind and seeds of every shard."""
    of: dict[Kind, tuple[int, int]] = {
        "demonstration": (config.first_seed, config.episodes),
        "scene": (config.first_scene_seed, config.scenes),
    }
    for kind, (first, count) in of.items():
        for start in range(first, first + count, config.episodes_per_shard):
            yield kind, range(start, min(start + config.episodes_per_shard, first + count))


def gather(
    config: CollectConfig, store: RunStore, crew: Crew, parts: Sequence[range], kind: Kind, line: ProgressLine
) -> None:
    """Have the seeds of `parts` recorded, and write each shard as soon as all of it is there."""
    here: dict[int, Recording] = {}
    missing = list(parts)

    def watch(recording: Recording) -> None:
        here[recording.seed] = recording
        line.update(line.step + 1, 1)
        for seeds in [part for part in missing if recording.seed in part]:
            if all(seed in here for seed in seeds):
                write_shard(store, kind, seeds, [here.pop(seed) for seed in seeds], {})
                missing.remove(seeds)

    haul: Haul[Recording] = crew.run(
        CollectJob(kind, config.noise), [seed for part in parts for seed in part], watch
    )
    for seeds in missing:
        aside = {seed: why for seed, why in haul.set_aside.items() if seed in seeds}
        write_shard(store, kind, seeds, [here[seed] for seed in seeds if seed in here], aside)


def write_shard(
    store: RunStore, kind: Kind, seeds: range, recordings: Sequence[Recording], set_aside: dict[int, str]
) -> None:
    """Write a shard of the recordings worth keeping, then its figures, by which a resumed run knows it."""
    kept = [recording for recording in recordings if recording.success or kind == "scene"]
    frames = [frame for recording in kept for frame in recording.frames]
    if frames:
        with store.staged(f"{_stem(kind, seeds)}.parquet") as path:
            pq.write_table(to_table(frames), path)
    figures = {
        "played": len(recordings),
        "kept": len(kept),
        "frames": len(frames),
        "failed": [recording.seed for recording in recordings if not (recording.success or kind == "scene")],
        "set_aside": {str(seed): why for seed, why in set_aside.items()},
    }
    store.write_text(_figures_of(kind, seeds), json.dumps(figures, indent=1))


def conclude(config: CollectConfig, store: RunStore, seconds: float) -> dict[str, Any]:
    """Add up the figures of all shards, store the results, and return the headline."""
    by_kind: dict[Kind, list[dict[str, Any]]] = {"demonstration": [], "scene": []}
    for kind, seeds in shards(config):
        by_kind[kind].append(json.loads(store.read_text(_figures_of(kind, seeds))))
    episodes, scenes = by_kind["demonstration"], by_kind["scene"]
    played, kept = (sum(shard[name] for shard in episodes) for name in ("played", "kept"))
    frames = sum(shard["frames"] for shard in episodes)
    aside = {seed: why for shard in episodes + scenes for seed, why in shard["set_aside"].items()}
    headline = {
        "episodes": kept,
        "frames": frames,
        "scenes": sum(shard["frames"] for shard in scenes),
        "expert_success_rate": round(kept / played, 4) if played else None,
        "mean_steps": round(frames / kept, 2) if kept else None,
        "seconds": seconds,
        "set_aside": len(aside),
    }
    failed = [seed for shard in episodes for seed in shard["failed"]]
    write_results(store, {"headline": headline, "failed_seeds": failed, "set_aside": aside})
    return {"run": config.run} | headline


def _stem(kind: Kind, seeds: range) -> str:
    return f"{FOLDER}/{kind}s-{seeds.start:08d}-{seeds.stop - 1:08d}"


def _figures_of(kind: Kind, seeds: range) -> str:
    return f"{_stem(kind, seeds)}.json"


if __name__ == "__main__":
    run_job(main, CollectConfig)
