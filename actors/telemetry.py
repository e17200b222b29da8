"""What the cast tells Prometheus, through `ray.util.metrics`: one table of names, and one way to report.

Ray exports every metric from each node under its name with `ray_` before it; `cluster/files/grafana` holds a
dashboard of them. A process without Ray reports nothing, and no metric ever ends a run.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge, Histogram

logger = logging.getLogger(__name__)

Role = Literal["trainer", "critics", "sampler", "evaluator"]
Kind = Literal["counter", "gauge", "histogram"]
BASE_TAGS = ("run", "role", "rank")
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Metric:
    """A metric: its name ends in its unit, or in `_total` where it only grows."""

    name: str
    kind: Kind
    role: Role
    """Who reports it."""
    description: str
    tags: tuple[str, ...] = ()
    """Tags beside run, role and rank."""


METRICS: tuple[Metric, ...] = (
    Metric("counterpoint_step", "gauge", "trainer", "Optimizer steps that are done."),
    Metric("counterpoint_steps_wanted", "gauge", "trainer", "Optimizer steps of the whole run."),
    Metric("counterpoint_samples_total", "counter", "trainer", "Samples learned from, over all ranks."),
    Metric("counterpoint_step_seconds", "histogram", "trainer", "Duration of an optimizer step."),
    Metric("counterpoint_step_seconds_total", "counter", "trainer", "Time spent in optimizer steps."),
    Metric("counterpoint_loss", "gauge", "trainer", "Newest losses.", ("part",)),
    Metric("counterpoint_gradient_norm", "gauge", "trainer", "Norm of the gradient before clipping."),
    Metric("counterpoint_learning_rate", "gauge", "trainer", "Newest learning rate."),
    Metric("counterpoint_alarms_total", "counter", "trainer", "Alarms raised about the run's figures."),
    Metric("counterpoint_checkpoint_step", "gauge", "trainer", "Step of the newest whole checkpoint."),
    Metric("counterpoint_checkpoint_seconds_total", "counter", "trainer", "Time spent saving checkpoints."),
    Metric(
        "counterpoint_panel_seconds_total", "counter", "trainer",
        "Time of asking the panel: the slowest host's judging (compute), packing (wire), the rest (wait).",
        ("part",),
    ),
    Metric("counterpoint_panel_recoveries_total", "counter", "trainer", "Times that a host was caught up."),
    Metric("counterpoint_judged_total", "counter", "critics", "Samples judged, by critic group.", ("group",)),
    Metric("counterpoint_judge_seconds", "histogram", "critics", "Duration of a judgement.", ("group",)),
    Metric("counterpoint_judge_seconds_total", "counter", "critics", "Time spent judging.", ("group",)),
    Metric("counterpoint_heads_refreshed_total", "counter", "critics", "Heads made anew.", ("group",)),
    Metric("counterpoint_snapshot_step", "gauge", "critics", "Panel step of the last snapshot.", ("group",)),
    Metric("counterpoint_decisions_total", "counter", "sampler", "Observations that got an action."),
    Metric("counterpoint_decision_batches_total", "counter", "sampler", "Batches that they were decided in."),
    Metric("counterpoint_decision_seconds_total", "counter", "sampler", "Time spent deciding."),
    Metric("counterpoint_shards_scored_total", "counter", "evaluator", "Shards of snapshots scored."),
    Metric("counterpoint_score_seconds_total", "counter", "evaluator", "Time spent scoring."),
)  # fmt: skip
"""Every metric. Ray guesses a histogram's sum from its buckets: for means divide the counters."""
BY_NAME = {metric.name: metric for metric in METRICS}


class Telemetry:
    """One process's reports, tagged with its run, role and rank.

    Args:
        run: the run's name, see `run_tag`.
        role: who reports; only metrics of this role may be reported.
        rank: which of its kind.
    """

    def __init__(self, run: str, role: Role, rank: int = 0) -> None:
        self.role: Role = role
        self._tags = {"run": run, "role": role, "rank": str(rank)}
        self._made: dict[str, Any] = {}

    def count(self, name: str, value: float = 1.0, **tags: Any) -> None:
        """Add `value`, which must not be negative, to a counter."""
        if value > 0:
            self._send(name, "counter", value, tags)

    def gauge(self, name: str, value: float | None, **tags: Any) -> None:
        """Set a gauge; None and what is not finite leave it as it was."""
        if value is not None:
            self._send(name, "gauge", value, tags)

    def observe(self, name: str, value: float, **tags: Any) -> None:
        """Add an observation to a histogram."""
        self._send(name, "histogram", value, tags)

    def _send(self, name: str, kind: Kind, value: float, tags: dict[str, Any]) -> None:
        metric = BY_NAME[name]
        assert (metric.kind, metric.role) == (kind, self.role), f"{name} is a {metric.kind} of {metric.role}"
        assert set(tags) == set(metric.tags), f"{name} has the tags {metric.tags}"
        if not ray.is_initialized() or not math.isfinite(value):
            return
        try:
            made = self._made.get(name) or self._make(metric)
            told = {**self._tags, **{key: str(tag) for key, tag in tags.items()}}
            if kind == "counter":
                made.inc(value, tags=told)
            elif kind == "gauge":
                made.set(value, tags=told)
            else:
                made.observe(value, tags=told)
        except Exception:
            logger.warning("the metric %s could not be reported", name, exc_info=True)

    def _make(self, metric: Metric) -> Any:
        keys = (*BASE_TAGS, *metric.tags)
        if metric.kind == "histogram":
            made: Any = Histogram(metric.name, metric.description, boundaries=list(SECONDS), tag_keys=keys)
        else:
            made = (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, keys)
        self._made[metric.name] = made
        return made


class TrainerTelemetry(Telemetry):
    """What rank 0 of the trainers of the run stored at `uri` reports."""

    def __init__(self, uri: str) -> None:
        super().__init__(run_tag(uri), "trainer")
        self._asked: dict[str, float] = {}
        """What had been reported of the panel."""

    def stepped(self, step: int, total: int, samples: int, seconds: float, row: Mapping[str, Any]) -> None:
        """Report a step of `samples` samples over all ranks; `row` has its figures, losses among them."""
        self.gauge("counterpoint_step", step)
        self.gauge("counterpoint_steps_wanted", total)
        self.count("counterpoint_samples_total", samples)
        self.observe("counterpoint_step_seconds", seconds)
        self.count("counterpoint_step_seconds_total", seconds)
        for name, value in row.items():
            if name == "loss" or name.endswith("_loss"):
                self.gauge("counterpoint_loss", value, part=name.removesuffix("loss").rstrip("_") or "total")
        self.gauge("counterpoint_gradient_norm", row.get("gradient_norm"))
        self.gauge("counterpoint_learning_rate", row.get("learning_rate"))

    def saved(self, step: int, seconds: float) -> None:
        """Report a checkpoint that counts."""
        self.gauge("counterpoint_checkpoint_step", step)
        self.count("counterpoint_checkpoint_seconds_total", seconds)

    def asked(self, panel: Any) -> None:
        """Report what a `RemotePanel` has done since the last report; of any other panel nothing."""
        timings = getattr(panel, "timings", None)
        if timings is None:
            return
        for part in ("compute", "wire", "wait"):
            seconds = self._since(part, getattr(timings, f"{part}_s"))
            self.count("counterpoint_panel_seconds_total", seconds, part=part)
        self.count("counterpoint_panel_recoveries_total", self._since("recoveries", panel.recoveries))

    def _since(self, name: str, now: float) -> float:
        before, self._asked[name] = self._asked.get(name, 0.0), now
        return now - before


def run_tag(uri: str) -> str:
    """Return the tag of the run stored at `uri`: its last two folders, without what might be a secret."""
    path = uri.partition("://")[2] or uri
    return "/".join(path.partition("?")[0].strip("/").split("/")[-2:])


def table() -> str:
    """Return the metrics as a Markdown table, for the documentation."""
    rows = ["| metric | kind | from | tags | |", "|---|---|---|---|---|"]
    for metric in METRICS:
        tags = ", ".join(metric.tags)
        rows.append(
            f"| `ray_{metric.name}` | {metric.kind} | {metric.role} | {tags} | {metric.description} |"
        )
    return "\n".join(rows)
