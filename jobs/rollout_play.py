"""Playing the cells of a comparison: what is missing, one policy after the other, kept as it comes."""

import contextlib
import functools
import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.batching import BatchStatistics
from actors.rollouts import RolloutJob
from actors.sampler import RemoteSamplers, Sampler
from cluster.progress import ProgressLine
from cluster.storage import RunStore
from counterpoint.environments.config import build_environment
from counterpoint.environments.episode import Episode
from jobs.crew import Stage, crew_on_stage
from jobs.rollout_cells import Cell, CellLog, Session
from jobs.rollout_policies import fingerprint
from jobs.rollout_settings import RolloutConfig
from jobs.rollout_trace import save_trace
from jobs.rollout_videos import save_video, wanted


def play(config: RolloutConfig, store: RunStore) -> list[CellLog]:
    """Play every cell's missing episodes, one policy after the other, and return all cells."""
    cells = config.cells()
    policies = {uri: fingerprint(uri) for uri in dict.fromkeys(cell.uri for cell in cells) if uri}
    logs = [CellLog(store, cell, made_with(config, cell, policies)) for cell in cells]
    missing = sum(len(log.result.missing(config.seeds)) for log in logs)
    if not missing:
        return logs
    build = functools.partial(build_environment, config.environment)
    total = config.episodes * len(logs)
    with (
        crew_on_stage(build, config.workers, config.samplers) as stage,
        ProgressLine(total, "rollout", start=total - missing, unit="episodes") as line,
    ):
        for uri, group in itertools.groupby(logs, lambda log: log.cell.uri):
            waiting = [log for log in group if log.result.missing(config.seeds)]
            if not waiting:
                continue
            with stage.policy(uri, config.seed) if uri else contextlib.nullcontext() as sampler:
                for log in waiting:
                    play_cell(config, stage, sampler, log, line)
    return logs


def made_with(config: RolloutConfig, cell: Cell, policies: Mapping[str, str]) -> dict[str, Any]:
    """Return all that a cell's episodes follow from besides their seeds; `policies` are digests by URI."""
    row: dict[str, Any] = {"environment": config.environment.model_dump(mode="json")}
    if cell.selection is None or cell.uri is None:
        return row
    return row | {
        "selection": cell.selection.model_dump(mode="json"),
        "seed": config.seed,
        "policy": policies[cell.uri],
    }


def play_cell(
    config: RolloutConfig, stage: Stage, sampler: Sampler | None, log: CellLog, line: ProgressLine
) -> None:
    """Play the episodes that a cell lacks; what has been played is kept even if this is interrupted."""
    cell, seeds = log.cell, log.result.missing(config.seeds)
    shown = config.is_shown(cell)
    filmed, traced = (config.filmed, config.traced) if shown else (frozenset[int](), frozenset[int]())
    if cell.selection is None:
        job = RolloutJob(scripted=cell.scripted, filmed=filmed)
    else:
        job = RolloutJob(sampler, cell.selection, traced=traced, filmed=filmed)
    already = line.step
    space = config.environment.action_space()
    played: list[Episode] = []

    def watch(episode: Episode) -> None:
        plain = replace(episode, trace=(), frames=None)
        log.add([plain])
        played.append(plain)
        if wanted(config.videos, log.store, cell, episode):
            save_video(config.videos, log.store, cell, episode)
        if episode.trace:
            save_trace(log.store, cell, episode, space)
        won = sum(e.success for e in played) / len(played)
        line.update(already + len(played), units=1, cell=f"{cell.replica} {cell.rule}", success=won)

    log.begin()
    before, begun, finished = batches_of(sampler), time.monotonic(), False
    try:
        haul = stage.crew.run(job, seeds, watch)
        log.add([], haul.set_aside)
        finished = True
    finally:
        spent = difference(before, batches_of(sampler)) if finished else BatchStatistics()
        decisions = sum(episode.decisions for episode in played) if sampler is not None else 0
        session = Session(
            time.monotonic() - begun, len(played), decisions, spent.batches, spent.observations, spent.seconds
        )
        log.end(session, finished)
    line.update(already + len(seeds))


def batches_of(sampler: Sampler | None) -> BatchStatistics:
    """Return what the sampler actors have computed so far; nothing where there are none."""
    return sampler.statistics() if isinstance(sampler, RemoteSamplers) else BatchStatistics()


def difference(before: BatchStatistics, after: BatchStatistics) -> BatchStatistics:
    """Return what came after `before`; a sampler that was started again has counted from nothing."""
    if after.batches < before.batches:
        return after
    return BatchStatistics(
        after.batches - before.batches,
        after.requests - before.requests,
        after.observations - before.observations,
        after.seconds - before.seconds,
    )
