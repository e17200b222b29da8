"""Tables of figures on held-out images, by evaluation workers or in this process."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.evaluation import EvaluationRecipe, Evaluator, merged_table
from actors.training import TrainerConfig
from cluster.failures import retrying
from cluster.waiting import get
from counterpoint.data import Split
from counterpoint.evaluation import EvaluationConfig
from counterpoint.metrics.extractor import FeatureNetwork
from counterpoint.metrics.score import Reference, Scores
from jobs.settings import EvaluatorsConfig
from jobs.stage import evaluators_on_stage

Row = dict[str, Any]
PATIENCE = 3600.0
FIGURES = ("fd", "kid", "precision", "recall", "accuracy")


def score(
    recipe: EvaluationRecipe, weights: Mapping[str, Tensor] | None, references: Mapping[str, Reference],
    workers: Sequence[Any] = (),
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return {reference name: {"steps_n": figures}} for a network's weights, or for its own with None.

    `workers` are evaluation actors made with `recipe`; without any, everything is scored here.
    """
    arrays = None if weights is None else {name: tensor.numpy() for name, tensor in weights.items()}
    if workers:
        refs = [w.score.remote(arrays, i, len(workers)) for i, w in enumerate(workers)]
        shards = get(refs, timeout=PATIENCE, what="scores")
    else:
        shards = [Evaluator(recipe).score(arrays, 0, 1)]
    return {name: merged_table(shards, reference) for name, reference in references.items()}


def score_on_stage(
    recipe: EvaluationRecipe, weights: Mapping[str, Tensor] | None, references: Mapping[str, Reference],
    evaluators: EvaluatorsConfig, trainer: TrainerConfig,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Start evaluation workers, `score` with them and end them; again, if one is lost."""

    def attempt() -> dict[str, dict[str, Any]]:
        with evaluators_on_stage(recipe, evaluators, trainer) as workers:
            return score(recipe, weights, references, workers)

    return retrying(attempt, what="scoring", attempts=trainer.max_failures + 1)


def references(data: Split, network: FeatureNetwork) -> dict[str, Reference]:
    """Return the real images that figures compare with: the held-out test split, and train beside it."""
    return {
        "test": Reference.from_images(data.test.images, network),
        "train": Reference.from_images(data.train.images, network),
    }


def floor_row(
    data: Split, network: FeatureNetwork, config: EvaluationConfig, real: Mapping[str, Reference]
) -> Row:
    """Return the figures of real training images against held-out ones: a perfect generator's."""
    count = min(config.samples, len(data.train))
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.seed))[:count]
    scores = Scores(network.extractor)
    scores.update(data.train.images[chosen], data.train.labels[chosen], network)
    return row("real vs real (floor)", scores.compute(real["test"]))


def row(name: str, table: Mapping[str, Any], train: Mapping[str, Any] | None = None) -> Row:
    """Return a line of the results table; `train_fd` beside `fd` shows memorising."""
    line: Row = (
        {"name": name} | {figure: table.get(figure) for figure in FIGURES} | {"samples": table["samples"]}
    )
    return line if train is None else line | {"train_fd": train["fd"]}


def rows(who: str, tables: Mapping[str, Mapping[str, Any]], steps: Sequence[int]) -> list[Row]:
    """Return the lines of one model at its numbers of steps."""
    return [
        row(
            f"{who}, {n} step{'s' if n > 1 else ''}",
            tables["test"][f"steps_{n}"],
            tables["train"][f"steps_{n}"],
        )
        for n in steps
    ]


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that a block takes to `seconds` under `name`."""
    begun = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - begun, 1)
