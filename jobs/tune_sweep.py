"""Running a sweep with Ray Tune: what it tries comes from the ledger, and what it finds goes there."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from cluster.identity import current
from cluster.progress import ProgressLine
from cluster.storage import RunStore
from jobs.tune_ledger import Ledger, Report, Segment, TrialRecord, ranked
from jobs.tune_schedulers import ResumedASHA, scheduler_of
from jobs.tune_search import propose
from jobs.tune_settings import PbtConfig, TuneConfig
from jobs.tune_space import Space
from jobs.tune_trial import OBJECTIVE, OUTCOME, STEP, SweepTrial

logger = logging.getLogger(__name__)

TUNE_FOLDER = "tune"
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    # Seconds that a trial which ends its runs may take before it is killed.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def sweep(config: TuneConfig, ledger: Ledger, space: Space, order: Mapping[str, Any], at_once: int) -> bool:
    """Run what is left of a sweep, and say whether all its trials have ended.

    Args:
        config: the sweep.
        ledger: what is known so far; it is kept up to date.
        space: the settled search space.
        order: what every trial is told; see `SweepTrial`.
        at_once: most trials at once.
    """
    os.environ.update(TUNE_SETTINGS)
    # It looks for tables of Tune's own, which the ledger replaces.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    records = ledger.in_order()
    pbt = isinstance(config.scheduler, PbtConfig)
    scheduler = scheduler_of(
        config.scheduler, space, config.objective.mode, order["total"], config.seed, records
    )
    queue = Queue(config, ledger, space)
    settings: dict[str, Any] = {"scheduler": scheduler, "max_concurrent_trials": at_once}
    shared: dict[str, Any] = {"sweep": dict(order)}
    if pbt:
        # Tune takes no searcher beside PBT: the whole population is listed.
        members = [queue.next() for _ in range(queue.left)]
        shared["sweep"]["indices"] = [member["index"] for member in members]
        shared["params"] = tune.grid_search([member["params"] for member in members])
    else:
        settings |= {"search_alg": queue, "num_samples": max(1, queue.left)}
    if queue.left == 0 and not pbt:
        return True
    if pbt and not members:
        return True
    tuner = tune.Tuner(
        tune.with_resources(SweepTrial, {"cpu": order["trial_cpus"]}),
        param_space=shared,
        tune_config=tune.TuneConfig(reuse_actors=False, **settings),
        run_config=tune.RunConfig(
            name=f"{current().id}-{time.time_ns():x}",
            storage_path=ledger.store.path(TUNE_FOLDER),
            storage_filesystem=_filesystem(ledger.store),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[Scribe(ledger, scheduler, config)],
            verbose=0,
        ),
    )
    tuner.fit()
    ledger.store.delete(TUNE_FOLDER)
    return all(record.ended for record in ledger.trials.values()) and len(ledger.trials) >= config.trials


class Queue(Searcher):
    """Unfinished trials first, then new ones, each written into the ledger before it begins."""

    def __init__(self, config: TuneConfig, ledger: Ledger, space: Space) -> None:
        super().__init__(metric=OBJECTIVE, mode=config.objective.mode)
        self.config, self.ledger, self.space = config, ledger, space
        self.waiting = [record.index for record in ledger.in_order() if not record.ended]
        self.waiting += [index for index in range(config.trials) if index not in ledger.trials]

    @property
    def left(self) -> int:
        """How many trials are still to be begun."""
        return len(self.waiting)

    def next(self) -> dict[str, Any]:
        """Take the next trial: its index and its parameters."""
        index = self.waiting.pop(0)
        record = self.ledger.trials.get(index)
        if record is None:
            records, mode = self.ledger.in_order(), self.config.objective.mode
            params = propose(self.space, self.config.searcher, self.config.seed, index, records, mode)
            record = self.ledger.put(TrialRecord(index, params))
        self.ledger.change(index, lives=record.lives + 1)
        newest = record.segments[-1].params if record.segments else record.params
        return {"index": index, "params": dict(newest)}

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial for Tune."""
        return self.next() if self.waiting else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing to remember: the ledger knows."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is on storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Scribe(tune.Callback):
    """Writes what trials report into the ledger, and draws the sweep's progress."""

    def __init__(self, ledger: Ledger, scheduler: Any, config: TuneConfig) -> None:
        self.ledger, self.scheduler, self.config = ledger, scheduler, config
        done = sum(record.ended for record in ledger.trials.values())
        self.line = ProgressLine(max(1, config.trials), "sweep", start=done, unit="trials")

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune keeps a copy on storage, which the ledger makes needless."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take in a report, or a trial's end."""
        index, told = _index(trial), json.loads(result[OUTCOME])
        record = self.ledger.trials[index]
        hours = told["seconds"] / 3600.0
        record = replace(
            record, runs=tuple(told["runs"]), segments=tuple(Segment(**one) for one in told["segments"]),
            steps=record.steps + told["steps"], seconds=record.seconds + told["seconds"],
            cpu_hours=record.cpu_hours + hours * told["cpus"],
            gpu_hours=record.gpu_hours + hours * told["gpus"],
        )  # fmt: skip
        if "error" in told:
            record = replace(record, state="failed", error=told["error"])
        elif "final" in told:
            values = tuple(told["final"])
            record = replace(
                record, state="done", values=values, value=result[OBJECTIVE], headline=told["headline"]
            )
        else:
            report = Report(result[STEP], result[OBJECTIVE], tuple(told["values"]))
            # A member that took over another's state goes back to that one's step.
            kept = tuple(one for one in record.reports if one.step < report.step)
            record = replace(record, reports=(*kept, report))
        self.ledger.put(record)
        self._draw()

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Note whom the scheduler has stopped; a trial that an interrupted sweep leaves is not one."""
        index = _index(trial)
        if isinstance(self.scheduler, ResumedASHA) and trial.trial_id in self.scheduler.stopped:
            self.ledger.change(index, state="stopped")
        self._draw()

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Note a trial that could not be brought back."""
        error = trial.get_error() if hasattr(trial, "get_error") else None
        self.ledger.change(_index(trial), state="failed", error=str(error or "the trial's actor was lost"))
        self._draw()

    def on_experiment_end(self, trials: Sequence[Any], **info: Any) -> None:
        """Leave the line of progress as it stands."""
        self.line.close("")

    def _draw(self) -> None:
        records = self.ledger.in_order()
        ended = [record for record in records if record.ended]
        fields: dict[str, Any] = {
            state: sum(record.state == state for record in records)
            for state in ("running", "stopped", "failed")
        }
        best = ranked(records, self.config.objective.mode)
        if best:
            fields |= {"best": best[0].value, "trial": best[0].index}
        self.line.update(len(ended), **fields)


def _index(trial: Any) -> int:
    """Return the ledger's index of one of Tune's trials."""
    index = trial.config.get("index", -1)
    return index if index >= 0 else trial.config["sweep"]["indices"][int(trial.trial_id.rsplit("_", 1)[1])]


def _filesystem(store: RunStore) -> Any:
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(store.fs))
