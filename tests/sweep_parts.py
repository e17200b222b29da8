"""Sweeps made up on paper: a ledger with trials in every state, as the engine would have written it."""

import math
from pathlib import Path
from typing import Any

from cluster.storage import RunStore
from jobs.config import dump_config
from jobs.runs import write_results
from jobs.tune_ledger import Ledger, Report, Segment, TrialRecord
from jobs.tune_settings import AshaConfig, ObjectiveConfig, PbtConfig, TuneConfig

RATE, REFRESH, REDUCTION = "critics.learning_rate", "critics.refresh_rate", "critics.reduction"
BASE = {
    "teacher": "/runs/teacher",
    "warmup": {"steps": 0},
    "adversarial": {"steps": 800, "heads_alone": 100},
}
SPACE: dict[str, Any] = {
    RATE: {"loguniform": [1e-5, 1e-2]},
    REFRESH: {"uniform": [0.0, 0.2]},
    REDUCTION: {"choice": ["mean", "sum"]},
}


def configured(run: Path | str, **changes: Any) -> TuneConfig:
    """A sweep of a distillation of 900 steps with ASHA and three seeds a trial."""
    given: dict[str, Any] = {
        "run": str(run),
        "job": "distill",
        "base": BASE,
        "space": SPACE,
        "trials": 16,
        "objective": ObjectiveConfig(progress="steps_1.fd", seeds=3),
        "scheduler": AshaConfig(grace_steps=100),
    }
    return TuneConfig.model_validate(given | changes)


def worth(params: dict[str, Any], step: int) -> float:
    """A made-up distance: least at a rate of 1e-3, falling over steps."""
    off = (math.log10(params[RATE]) + 3.0) ** 2 + 40.0 * (params[REFRESH] - 0.05) ** 2
    return 2.0 + off + 30.0 * math.exp(-step / 150.0)


def params_of(index: int) -> dict[str, Any]:
    """Values spread over the space."""
    return {
        RATE: 10.0 ** (-5.0 + 3.0 * ((index * 0.618) % 1.0)),
        REFRESH: 0.2 * ((index * 0.414) % 1.0),
        REDUCTION: ("mean", "sum")[index % 2],
    }


def trial(index: int, state: str = "done", last: int = 900, **changes: Any) -> TrialRecord:
    """A trial that reported every 100 steps up to `last`."""
    params = dict(changes.pop("params", params_of(index)))
    reports = []
    for step in range(100, last + 1, 100):
        values = tuple(worth(params, step) * (1.0 + 0.03 * seed) for seed in range(3))
        reports.append(Report(step, sum(values) / 3, values))
    facts: dict[str, Any] = {
        "index": index, "params": params, "state": state, "reports": tuple(reports), "steps": 3 * last,
        "seconds": 0.2 * last, "cpu_hours": 0.2 * last * 2.0 / 3600.0, "lives": 1,
    }  # fmt: skip
    if state == "done":
        facts |= {"values": reports[-1].values, "value": reports[-1].value}
    return TrialRecord(**(facts | changes))


def asha_trials(run: Path | str) -> list[TrialRecord]:
    """Sixteen trials: five done, nine stopped, one failed, one that still runs."""
    found = []
    for index in range(16):
        state, last = ("done", 900) if index % 3 == 0 else ("stopped", 100 if index % 2 else 300)
        if index == 9:
            state, last = "failed", 200
        if index == 14:
            state, last = "running", 200
        runs = tuple(f"{run}/trials/{index:04d}/seed-{seed}" for seed in range(3))
        error = "Traceback (most recent call last):\n  File 'x'\nValueError: loss is nan\n"
        found.append(trial(index, state, last, runs=runs, error=error if state == "failed" else ""))
    return found


def only(params: dict[str, Any]) -> dict[str, Any]:
    """What a population may change."""
    return {key: params[key] for key in (RATE, REFRESH)}


def bred(index: int, donors: list[tuple[int, int]]) -> TrialRecord:
    """A member of a population whose weights passed through (step, donor) in turn."""
    first = donors[0][1] if donors else index
    parts = [Segment(0, only(params_of(first)), first)]
    for turn, (step, donor) in enumerate(donors):
        factor = 1.25 if (turn + index) % 2 else 0.8
        before = dict(parts[-1].params)
        parts.append(
            Segment(step, before | {RATE: before[RATE] * factor, REFRESH: before[REFRESH] * factor}, donor)
        )
    now = dict(parts[-1].params)
    return trial(index, params=only(params_of(index)), segments=tuple(parts), value=worth(now, 900))


def population() -> list[TrialRecord]:
    """Six members, of which four took over others' weights, one of them twice."""
    donors = {1: [(300, 0)], 2: [(300, 0), (600, 3)], 4: [(600, 3)], 5: [(300, 3)]}
    return [bred(index, donors.get(index, [])) for index in range(6)]


def stored(run: Path | str, config: TuneConfig, trials: list[TrialRecord], **results: Any) -> RunStore:
    """A sweep's storage."""
    store = RunStore(str(run))
    store.write_text("config.yaml", dump_config(config))
    ledger = Ledger(store)
    for record in trials:
        ledger.put(record)
    if results:
        write_results(store, results)
    return store


def pbt_configured(run: Path | str) -> TuneConfig:
    """A sweep of six members."""
    space = {key: SPACE[key] for key in (RATE, REFRESH)}
    return configured(run, space=space, scheduler=PbtConfig(interval=300), trials=6)
