"""Scores of snapshots while training goes on: by workers, which lag behind and never stall it, or at once."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from actors.feature_space import stored_feature_network
from actors.recipe import load_unet
from actors.telemetry import Telemetry, run_tag
from actors.wire import unpack_state
from cluster.dumpable import dumpable
from cluster.failures import reporting
from cluster.storage import RunStore
from cluster.waiting import done, get
from counterpoint.evaluation import EvaluationConfig, generate, score_shard
from counterpoint.metrics.features import FeatureConfig
from counterpoint.metrics.score import Reference, Scores
from counterpoint.optimization import load_weights
from counterpoint.pipeline import ClassConditionalPipeline

logger = logging.getLogger(__name__)

PREVIEW = 50


@dataclass(frozen=True)
class EvaluationRecipe:
    """What an evaluation worker is made of."""

    run: str
    """URI of the run whose network is scored, or whose shape snapshots have."""
    features: FeatureConfig
    scheduler: Any
    """The diffusers scheduler that samples from a snapshot."""
    steps: tuple[int, ...]
    """Numbers of steps to score."""
    config: EvaluationConfig
    feature_space: str | None = None
    """URI of the teacher's run, which stores the feature space; `run` itself unless given."""
    scored: str | None = None
    """URI of the run whose snapshots are scored, by which metrics name it; `run` itself unless given."""
    network: Callable[[], Any] | None = None
    """Makes the network of whose weights snapshots are; the saved one of `run` unless given."""


@dataclass(frozen=True)
class Shard:
    """What one worker found out about a snapshot."""

    scores: dict[int, dict[str, np.ndarray]]
    """`Scores` as arrays, by number of steps."""
    preview: np.ndarray | None
    """A few images, uint8 [n,C,H,W]."""


class Evaluator:
    """Scores shards of snapshots; an ordinary class, to which `ray.remote` adds only transport."""

    def __init__(self, recipe: EvaluationRecipe) -> None:
        dumpable()
        self.recipe = recipe
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = stored_feature_network(RunStore(recipe.feature_space or recipe.run), recipe.features)
        network = load_unet(recipe.run) if recipe.network is None else recipe.network().eval()
        self.pipeline = ClassConditionalPipeline(network.to(device), recipe.scheduler)

    @reporting("evaluator")
    def score(self, weights: dict[str, np.ndarray] | None, shard: int, shards: int) -> Shard:
        """Return one shard's scores by number of steps; None scores the weights of the recipe's own run.

        Shard 0 brings a few images along, made in the fewest steps, for people to look at.
        """
        if weights is not None:
            load_weights(self.pipeline.unet, unpack_state(weights))
        begun, scores = time.perf_counter(), {}
        for steps in self.recipe.steps:
            part = score_shard(self.pipeline, self.network, steps, self.recipe.config, shard, shards)
            scores[steps] = part.as_arrays()
        preview = None
        if shard == 0:
            images, _ = generate(self.pipeline, range(PREVIEW), min(self.recipe.steps), self.recipe.config)
            preview = ((images + 1.0) * 127.5).round().to(torch.uint8).numpy()
        telemetry = Telemetry(run_tag(self.recipe.scored or self.recipe.run), "evaluator", shard)
        telemetry.count("counterpoint_shards_scored_total")
        telemetry.count("counterpoint_score_seconds_total", time.perf_counter() - begun)
        return Shard(scores, preview)


@dataclass
class _Flight:
    step: int
    refs: list[Any]


class EvaluationPool:
    """Rank 0's end of the evaluation workers."""

    def __init__(self, workers: Sequence[Any], reference: Reference, patience: float = 300.0) -> None:
        self.workers, self.reference, self.patience = list(workers), reference, patience
        self.skipped = 0
        """Snapshots that were not scored because the workers were still busy with an earlier one."""
        self._flight: _Flight | None = None

    def offer(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Have a snapshot scored if the workers are free; returns at once either way."""
        if not self.workers:
            return
        if self._flight is not None:
            self.skipped += 1
            return
        arrays = ray.put({name: tensor.numpy() for name, tensor in weights.items()})
        shards = len(self.workers)
        self._flight = _Flight(step, [w.score.remote(arrays, i, shards) for i, w in enumerate(self.workers)])

    def poll(self) -> dict[str, Any] | None:
        """Return the row of a snapshot that has been scored since, or None."""
        if self._flight is None or done(self._flight.refs)[1]:
            return None
        return self._land()

    def finish(self) -> dict[str, Any] | None:
        """Wait for what is still in flight and return its row."""
        return None if self._flight is None else self._land()

    def _land(self) -> dict[str, Any] | None:
        assert self._flight is not None
        flight, self._flight = self._flight, None
        try:
            shards = get(flight.refs, timeout=self.patience, what=f"scores of step {flight.step}")
        except Exception as error:
            # A lost evaluation is a missing point on a curve, not a reason to stop.
            logger.warning("the snapshot of step %d was not scored: %s", flight.step, error)
            return None
        return {"step": flight.step, "preview": shards[0].preview} | merged_table(shards, self.reference)


class LocalEvaluation:
    """Scores snapshots in rank 0's own process, which waits meanwhile: none is left out."""

    def __init__(self, recipe: EvaluationRecipe, reference: Reference) -> None:
        self.recipe, self.reference = recipe, reference
        self._evaluator: Evaluator | None = None
        self._row: dict[str, Any] | None = None

    def offer(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Score a snapshot; `poll` returns its row."""
        if self._evaluator is None:
            self._evaluator = Evaluator(self.recipe)
        shard = self._evaluator.score({name: tensor.numpy() for name, tensor in weights.items()}, 0, 1)
        self._row = {"step": step, "preview": shard.preview} | merged_table([shard], self.reference)

    def poll(self) -> dict[str, Any] | None:
        """Return the row of a snapshot that has been scored since, or None."""
        row, self._row = self._row, None
        return row

    def finish(self) -> dict[str, Any] | None:
        """Return what `poll` has not; nothing is in flight."""
        return self.poll()


def merged_table(shards: Sequence[Shard], reference: Reference) -> dict[str, Any]:
    """Merge the shards and return the table of figures by number of steps, as "steps_1", "steps_2" ..."""
    table: dict[str, Any] = {}
    for steps in shards[0].scores:
        scores = [Scores.from_arrays(shard.scores[steps]) for shard in shards]
        whole = scores[0]
        for other in scores[1:]:
            whole = whole.merge(other)
        table[f"steps_{steps}"] = dict(whole.compute(reference))
    return table
