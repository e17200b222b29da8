"""What a sweep knows of its trials, on storage: the truth that resuming, its table and its report read.

Each trial has a folder `trials/0003/` with `trial.json`, which only the sweep's driver writes, and beside it
the trial's runs, which are ordinary runs of the job.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from cluster.storage import RunStore

TRIALS = "trials"
State = Literal["running", "done", "stopped", "failed"]
Params = Mapping[str, Any]
"""Values by dotted key of the job's configuration."""


@dataclass(frozen=True)
class Report:
    """What a trial had reached at one step."""

    step: int
    value: float
    """The objective's progress metric, the mean over the trial's seeds."""
    values: tuple[float, ...]
    """The same by seed."""


@dataclass(frozen=True)
class Segment:
    """From `step` on the trial ran with `params`; population-based training adds segments."""

    step: int
    params: Params
    source: int
    """The trial whose weights this segment began with: the trial itself unless it took another's."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep."""

    index: int
    """Its number, from 0; what it tries depends on it, the sweep's seed and, for TPE, on earlier trials."""
    params: Params
    """What it began with."""
    state: State = "running"
    """running: not ended yet; stopped: ended early by the scheduler."""
    runs: tuple[str, ...] = ()
    """URIs of its runs, one a seed; of the newest generation."""
    reports: tuple[Report, ...] = ()
    """In the order in which they came."""
    value: float | None = None
    """The objective: the mean of `values`; of a stopped trial None, and of a failed one."""
    values: tuple[float, ...] = ()
    """The objective's metric at the end of each run, by seed."""
    headline: Mapping[str, Any] = field(default_factory=dict)
    """The headline figures of the first seed's run."""
    steps: int = 0
    """Training steps that it took, over all seeds, repeated ones of later lives included."""
    seconds: float = 0.0
    """Wall seconds that it held its resources, over all lives."""
    cpu_hours: float = 0.0
    """Logical CPUs reserved, times hours."""
    gpu_hours: float = 0.0
    """GPUs reserved, times hours."""
    lives: int = 0
    """How often it was begun: more than once after a killed driver or actor."""
    error: str = ""
    """The traceback of a failed trial."""
    segments: tuple[Segment, ...] = ()
    """The lineage of its weights under population-based training, from step 0; else empty."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.state != "running"

    @property
    def last(self) -> Report | None:
        """Return its newest report."""
        return self.reports[-1] if self.reports else None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record that `to_json` wrote."""
        found = dict(data)
        found["reports"] = tuple(Report(r["step"], r["value"], tuple(r["values"])) for r in data["reports"])
        found["segments"] = tuple(Segment(**segment) for segment in data["segments"])
        for name in ("runs", "values"):
            found[name] = tuple(data[name])
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)


class Ledger:
    """The records of a sweep, as its storage has them."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.trials: dict[int, TrialRecord] = {}
        for name in sorted(store.children(TRIALS)):
            file = f"{TRIALS}/{name}/trial.json"
            if store.exists(file):
                record = TrialRecord.from_json(json.loads(store.read_text(file)))
                self.trials[record.index] = record

    def put(self, record: TrialRecord) -> TrialRecord:
        """Write a record, in place of the one with the same index."""
        self.trials[record.index] = record
        text = json.dumps(record.to_json(), indent=1)
        self.store.write_text(f"{folder(record.index)}/trial.json", text)
        return record

    def change(self, index: int, **changes: Any) -> TrialRecord:
        """Write a record with some of its fields changed."""
        return self.put(replace(self.trials[index], **changes))

    def in_order(self) -> list[TrialRecord]:
        """Return all records by index."""
        return [self.trials[index] for index in sorted(self.trials)]


def folder(index: int) -> str:
    """Return the folder of a trial within the sweep's storage."""
    return f"{TRIALS}/{index:04d}"


def ranked(records: Sequence[TrialRecord], mode: str) -> list[TrialRecord]:
    """Return the finished trials whose value is a number, the best first; equals by index."""
    sign = 1.0 if mode == "min" else -1.0
    done = [
        (sign * record.value, record.index, record)
        for record in records
        if record.state == "done" and record.value is not None and math.isfinite(record.value)
    ]
    return [record for _, _, record in sorted(done, key=lambda one: one[:2])]
