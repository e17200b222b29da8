"""Ray Tune's schedulers, as a sweep that may have been interrupted needs them."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from jobs.tune_ledger import TrialRecord
from jobs.tune_search import clamped, mutations
from jobs.tune_settings import AshaConfig, Mode, PbtConfig, Scheduler
from jobs.tune_space import Space
from jobs.tune_trial import OBJECTIVE, STEP


class ResumedASHA(ASHAScheduler):
    """ASHA that knows what the trials of the ledger have reached, so that a resumed sweep decides alike.

    Tune stores no scheduler's state; the rungs are filled again from the reports in the ledger, and an
    unfinished trial finds its own under its new id.
    """

    def __init__(self, config: AshaConfig, mode: Mode, total: int, records: Sequence[TrialRecord]) -> None:
        super().__init__(
            time_attr=STEP, metric=OBJECTIVE, mode=mode, max_t=max(total - 1, config.grace_steps),
            grace_period=config.grace_steps, reduction_factor=config.reduction_factor, stop_last_trials=False,
        )  # fmt: skip
        self.stopped: set[str] = set()
        """Ids of the trials that it has ended."""
        (bracket,), sign = self._brackets, 1.0 if mode == "max" else -1.0
        for record in records:
            known: Any = SimpleNamespace(trial_id=_known(record.index))
            for report in record.reports:
                bracket.on_result(known, report.step, sign * report.value)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in, with what it had reported before."""
        super().on_trial_add(tune_controller, trial)
        for _, recorded in self._brackets[0]._rungs:
            known = _known(trial.config.get("index", -1))
            if known in recorded:
                recorded[trial.trial_id] = recorded.pop(known)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide, and remember whom it stops."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Forget a trial; its last result is the job's own figure, which no rung compares."""
        self._trial_info.pop(trial.trial_id, None)


def _known(index: int) -> str:
    """The id under which a trial of the ledger stands on the rungs until it is begun again."""
    return f"known-{index}"


def scheduler_of(
    config: Scheduler, space: Space, mode: Mode, total: int, seed: int, records: Sequence[TrialRecord]
) -> Any:
    """Return the scheduler that the configuration names; `space` must be settled."""
    if isinstance(config, AshaConfig):
        return ResumedASHA(config, mode, total, records)
    if not isinstance(config, PbtConfig):
        return FIFOScheduler()
    # It draws whom to copy, and by which factor, from the global stream.
    random.seed(seed + sum(record.lives for record in records))

    def within_bounds(new: dict[str, Any]) -> dict[str, Any]:
        new["params"] = clamped(space, new["params"])
        return new

    return PopulationBasedTraining(
        time_attr=STEP, metric=OBJECTIVE, mode=mode, perturbation_interval=config.interval,
        burn_in_period=config.burn_in,
        hyperparam_mutations={"params": mutations(space, seed)}, quantile_fraction=config.quantile,
        resample_probability=config.resample, perturbation_factors=config.factors,
        custom_explore_fn=within_bounds, log_config=False, synch=config.synchronous,
    )  # fmt: skip
