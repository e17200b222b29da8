"""What the actor of a trial's run does: the job's `main`, as `python -m jobs.<verb>` would call it."""

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checkpoints import FOLDER, latest_checkpoint
from cluster.identity import ended
from cluster.metrics_log import METRICS_FILE, read_metrics
from cluster.storage import RunStore
from jobs.config import dump_config
from jobs.failure_card import tell_failure
from jobs.runs import CONFIG, RESULTS, read_results
from jobs.tune_learned import learned
from jobs.tune_room import await_room, run_pools
from jobs.tune_space import job_config, laid_over, resolved

ROOM_PATIENCE = 120.0
EVALUATIONS = "evaluations.jsonl"
NOT_TAKEN_OVER = ("run.json", "placement.json", "failure.json", RESULTS, "report.html", CONFIG)
"""Files of a run that say what became of it, and not where it stands."""


@dataclass(frozen=True)
class RunOrder:
    """What one run of a trial is to do; plain values, as it crosses processes."""

    job: str
    base: Mapping[str, Any]
    """The job's configuration before the trial's parameters."""
    segments: Sequence[tuple[int, Mapping[str, Any]]]
    """Parameters by the step from which they hold; the first from step 0."""
    run: str
    """URI of the run."""
    changes: Mapping[str, Any]
    """What the sweep itself sets, by dotted key, such as the seed."""
    source: str = ""
    """URI of the run whose checkpoint it begins with; "" begins its own."""
    source_step: int = 0


def work(order: RunOrder, began: Callable[[int], bool]) -> dict[str, Any]:
    """Do the whole run, or what is left of it, and return its headline.

    `began` is told the step from which it goes on, once there is room, and says whether to stop at once. A
    failure comes back as {"error": traceback}: it is the trial's end, not the sweep's. A run that was asked
    to stop returns {"stopped": True}.
    """
    try:
        return _work(order, began)
    except Exception as error:
        ended("failed")
        tell_failure(error)
        return {"error": "".join(traceback.format_exception(error))}


def _work(order: RunOrder, began: Callable[[int], bool]) -> dict[str, Any]:
    store = RunStore(order.run)
    data = laid_over(learned(order.job, order.base, order.segments), {**order.changes, "run": order.run})
    config = resolved(order.job, data)
    if order.source and latest_checkpoint(store) is None:
        take_over(RunStore(order.source), order.source_step, store, dump_config(config))
    if store.exists(RESULTS):
        return dict(read_results(store)["headline"])
    config = resolved(order.job, data | {"resume": store.exists(CONFIG)})
    await_room(run_pools(order.job, config), ROOM_PATIENCE)
    newest = latest_checkpoint(store)
    if began(newest.step if newest else 0):
        return {"stopped": True}
    result = dict(entry(order.job, config)(config))
    return {"stopped": True} if "stopped_at_step" in result else result


def rows(uri: str, key: str, after: int) -> list[tuple[int, float]]:
    """Return (step, figure) for the rows of a run behind step `after` that have the dotted `key`.

    Snapshots' scores are looked at first; a key that they lack is taken from the rows of the metrics.
    """
    store = RunStore(uri)
    for name in (EVALUATIONS, METRICS_FILE):
        found = [(row["step"], figure(row, key)) for row in read_metrics(store, name)]
        known = [(step, value) for step, value in found if value is not None]
        if known:
            return [(step, value) for step, value in known if step > after]
    return []


def entry(job: str, config: Any) -> Any:
    """Return the `main` of a verb that takes `config`."""
    for name in (job, f"{job}_policy"):
        module = importlib.import_module(f"jobs.{name}")
        if isinstance(config, job_config(name)):
            return module.main
    raise ValueError(f"job={job} takes no {type(config).__name__}")


def figure(row: Mapping[str, Any], key: str) -> float | None:
    """Return the number under a dotted key of a row; None if there is none."""
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def take_over(source: RunStore, step: int, target: RunStore, config: str) -> None:
    """Begin `target` with what `source` was at `step`: its checkpoint with the panel's state, and its rows.

    The manifest comes last: before it, there is no checkpoint to go on from.

    Raises:
        ValueError: if the source's checkpoint of that step is gone.
    """
    folder = f"{FOLDER}/step-{step:08d}"
    files = source.list(folder)
    if f"{folder}/manifest.json" not in files:
        raise ValueError(
            f"{source.uri} has no checkpoint of step {step} any more: raise base.trainer.keep_checkpoints"
        )
    skipped = (FOLDER, "snapshots", "ray_train", "tensorboard", "timeline")
    for name in source.list():
        if name not in NOT_TAKEN_OVER and name.split("/")[0] not in skipped:
            target.write_bytes(name, source.read_bytes(name))
    target.write_text(CONFIG, config)
    for name in sorted(files, key=lambda name: name.endswith("manifest.json")):
        target.write_bytes(name, source.read_bytes(name))
