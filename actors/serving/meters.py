"""What the gateway counts, for Prometheus."""

from collections.abc import Collection
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from actors.serving.messages import Kind, Work

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS = (1, 2, 4, 8, 16, 32, 64)


class Meters:
    """Counters, gauges and histograms of one gateway replica, in a registry of their own.

    Args:
        models: names that may become labels; all others are counted under "", so that clients cannot make new
            time series. None takes every name.
    """

    def __init__(self, models: Collection[str] | None = None) -> None:
        self._models = None if models is None else frozenset(models)
        self.registry = CollectorRegistry()
        where, whose, own = ["endpoint", "model"], ["kind", "model"], self.registry
        self._requests = Counter(
            "counterpoint_requests_total", "Requests that were answered, or given up by their clients (499).",
            [*where, "status"], registry=own,
        )  # fmt: skip
        self._seconds = Histogram(
            "counterpoint_request_seconds", "Seconds from a request's arrival to the end of its answer.",
            where, buckets=SECONDS, registry=own,
        )  # fmt: skip
        self._rows = Histogram(
            "counterpoint_batch_size", "Mean rows of the evaluations that a request took part in.",
            whose, buckets=ROWS, registry=own,
        )  # fmt: skip
        self._queued = Histogram(
            "counterpoint_queue_seconds", "Seconds from arrival at a replica to the first evaluation.",
            whose, buckets=SECONDS, registry=own,
        )  # fmt: skip
        self._computed = Histogram(
            "counterpoint_compute_seconds", "Seconds from the first evaluation to the end of the last.",
            whose, buckets=SECONDS, registry=own,
        )  # fmt: skip
        self._steps = Histogram(
            "counterpoint_steps_per_request", "Evaluations of the network that a request took part in.",
            whose, buckets=STEPS, registry=own,
        )  # fmt: skip
        self._retries = Counter(
            "counterpoint_retries_total", "Times that a request was sent again because a replica died.",
            whose, registry=own,
        )  # fmt: skip
        self._dropped = Counter(
            "counterpoint_dropped_observations_total", "Observations that newer ones replaced.",
            ["model"], registry=own,
        )  # fmt: skip
        self._sessions = Gauge("counterpoint_sessions", "WebSocket sessions that are open.", registry=own)
        self._queue = Gauge("counterpoint_queue_length", "Requests under way.", ["kind"], registry=own)
        for kind in get_args(Kind):
            self.queue(kind, 0)

    def request(self, endpoint: str, model: str, status: int, seconds: float) -> None:
        """Count a request; `endpoint` is a route's template, never a path that a client has made up."""
        model = self._label(model)
        self._requests.labels(endpoint, model, str(status)).inc()
        self._seconds.labels(endpoint, model).observe(seconds)

    def work(self, kind: Kind, model: str, work: Work) -> None:
        """Count what an answer took."""
        labels = kind, self._label(model)
        self._rows.labels(*labels).observe(work.batch_size)
        self._queued.labels(*labels).observe(work.queued_s)
        self._computed.labels(*labels).observe(work.compute_s)
        self._steps.labels(*labels).observe(work.evaluations)
        self._retries.labels(*labels).inc(work.retries)

    def dropped(self, model: str, count: int) -> None:
        """Count observations that were not decided on because newer ones had come."""
        self._dropped.labels(self._label(model)).inc(count)

    def session(self, change: int) -> None:
        """Count sessions opened (+1) and closed (-1)."""
        self._sessions.inc(change)

    def queue(self, kind: Kind, length: int) -> None:
        """Set how many requests of a kind are under way."""
        self._queue.labels(kind).set(length)

    def render(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)

    def _label(self, model: str) -> str:
        return model if self._models is None or model in self._models else ""
