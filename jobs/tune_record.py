"""What a sweep has left in its store, read in one go; parts that are not there are empty."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote

from cluster.storage import RunStore
from jobs.config_yaml import read_yaml
from jobs.report_record import CONFIG, ENVIRONMENT, RESULTS
from jobs.report_svg import MUTED, RANKS
from jobs.tune_ledger import Ledger, TrialRecord
from jobs.tune_settings import TuneConfig
from jobs.tune_table import finished, short_names

logger = logging.getLogger(__name__)

BEST = "best.yaml"
SPAN = 20.0
"""Figures whose largest is so many times the smallest are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class SweepRecord:
    """Everything the report of a sweep says comes from here."""

    uri: str
    config_text: str
    trials: Sequence[TrialRecord] = ()
    """By index."""
    results: Mapping[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    best_file: str = ""
    """Where the best trial's configuration is, once it is written."""
    links: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    """By trial: the name of each of its runs that has a report, and the report's address from here."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The sweep's configuration as it stands in the file; empty where that is no mapping."""
        try:
            found = read_yaml(self.config_text)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def checked(self) -> TuneConfig | None:
        """The same as its model; None where it does not hold any more, such as when its base was moved."""
        try:
            return TuneConfig.model_validate(dict(self.config))
        except (ValueError, OSError):
            logger.info("the configuration of %s is refused today", self.uri, exc_info=True)
            return None

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section of the configuration; empty where there is none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def job(self) -> str:
        """The verb that is swept."""
        return str(self.config.get("job", "distill"))

    @property
    def metric(self) -> str:
        """What trials are ranked by."""
        return str(self.section("objective").get("metric") or "value")

    @property
    def progress(self) -> str:
        """What trials are compared by while they run."""
        return str(self.section("objective").get("progress") or "progress")

    @property
    def mode(self) -> str:
        """Whether less of it is better, min, or more, max."""
        return "max" if self.section("objective").get("mode") == "max" else "min"

    @property
    def scheduler(self) -> str:
        """Its kind."""
        return str(self.section("scheduler").get("kind", "none"))

    @cached_property
    def names(self) -> dict[str, str]:
        """A short name for each swept key, in the order of the space."""
        keys = dict.fromkeys(map(str, self.section("space")))
        keys |= dict.fromkeys(key for record in self.trials for key in record.params)
        return short_names(list(keys))

    @cached_property
    def ranked(self) -> list[TrialRecord]:
        """The finished trials with a finite value, the best first."""
        return finished(self.trials, self.mode)

    @property
    def best(self) -> TrialRecord | None:
        """The best of these."""
        return self.ranked[0] if self.ranked else None

    @cached_property
    def colours(self) -> dict[int, str]:
        """The colour of each trial in every chart: by rank for finished ones, muted for the others."""
        last = max(1, len(self.ranked) - 1)
        of_rank = [RANKS[round(rank * (len(RANKS) - 1) / last)] for rank in range(len(self.ranked))]
        found = dict.fromkeys((record.index for record in self.trials), MUTED)
        return found | {r.index: colour for r, colour in zip(self.ranked, of_rank, strict=True)}


def read_sweep(store: RunStore) -> SweepRecord:
    """Return what the store holds of a sweep; ValueError when it holds none."""
    if not store.exists(CONFIG):
        raise ValueError(f"run={store.uri} has no {CONFIG}: give the storage of a sweep")
    trials = Ledger(store).in_order()
    return SweepRecord(
        store.uri,
        store.read_text(CONFIG),
        trials,
        _mapping(store, RESULTS),
        _mapping(store, ENVIRONMENT),
        store.location(BEST) if store.exists(BEST) else "",
        {record.index: _links(store, record) for record in trials},
    )


def finite(value: Any) -> bool:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_log(values: Sequence[float]) -> bool:
    """Return whether figures span so much that they want a logarithmic axis."""
    return bool(values) and min(values) > 0.0 and max(values) > SPAN * min(values)


def _links(store: RunStore, record: TrialRecord) -> list[tuple[str, str]]:
    """Return the reports of a trial's runs that lie within the sweep's own storage."""
    found = []
    for uri in record.runs:
        try:
            run = RunStore(uri)
        except ValueError:
            continue
        name = run.root.removeprefix(f"{store.root}/")
        if name != run.root and type(run.fs) is type(store.fs) and store.exists(f"{name}/report.html"):
            found.append((name.rpartition("/")[2], f"{quote(name)}/report.html"))
    return found


def _mapping(store: RunStore, name: str) -> dict[str, Any]:
    if not store.exists(name):
        return {}
    try:
        found = json.loads(store.read_text(name))
    except ValueError:
        logger.warning("%s of %s is not JSON and is left out", name, store.uri)
        return {}
    return found if isinstance(found, dict) else {}
