"""One trial as Tune sees it: it starts the trial's runs, reports what they reached, and ends them."""

import json
import logging
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.storage import RunStore
from cluster.waiting import WaitTimeout, done, get
from jobs.tune_ledger import Ledger, Segment, folder
from jobs.tune_run import RunHost

logger = logging.getLogger(__name__)

POLL_S = 0.5
ANSWER_S = 60.0
STOP_S = 7.0
"""Seconds that the runs of a trial that is stopped have to end in good order; Tune itself waits ten."""
POINTER = "pointer.json"
OBJECTIVE, STEP, OUTCOME = "objective", "step", "outcome"


class SweepTrial(tune.Trainable):
    """Tune's side of a trial; it computes nothing and has almost no CPU of its own.

    Its checkpoint is a pointer to the checkpoint of its runs. One that points to another trial's, as in
    population-based training, begins a new generation of runs from there.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Look up what is known of this trial."""
        self.order: dict[str, Any] = config["sweep"]
        self.params: dict[str, Any] = config["params"]
        self.index = config.get("index", -1)
        if self.index < 0:
            # Tune numbers the members of a population in the order in which they were listed.
            self.index = self.order["indices"][int(self.trial_id.rsplit("_", 1)[1])]
        self.record = Ledger(RunStore(self.order["run"])).trials[self.index]
        self.segments = list(self.record.segments) or [Segment(0, self.params, self.index)]
        self.runs = list(self.record.runs) or [self._uri(f"seed-{k}") for k in range(self.order["seeds"])]
        self.source: dict[str, Any] = {}
        self.told = self.record.last.step if self.record.last else 0
        self.begun = time.monotonic()
        self.hosts: list[Any] = []
        self.answers: list[Any] = []
        self.results: dict[int, dict[str, Any]] = {}
        self.seen: list[dict[int, float]] = [{} for _ in self.runs]
        self.taken = self.counted = 0

    def step(self) -> dict[str, Any]:
        """Wait until all seeds have reached a step that was not reported yet, or the end."""
        while True:
            self._start_next()
            self._collect()
            steps = sorted(set.intersection(*(set(seen) for seen in self.seen)))
            due = [s for s in steps if s > self.told and s < self.order["total"]]
            if due:
                return self._report(due[0])
            if len(self.results) == len(self.runs) or any("error" in one for one in self.results.values()):
                return self._end()
            time.sleep(POLL_S)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Point to the runs' checkpoints of the newest step that was reported."""
        pointer = {
            "index": self.index, "step": self.told, "runs": self.runs, "segments": self._segments(),
        }  # fmt: skip
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from another trial's state, if that is what the pointer points to; the own one is found."""
        pointer = json.loads((Path(checkpoint) / POINTER).read_text())
        if pointer["index"] == self.index:
            return
        step, donor = pointer["step"], pointer["index"]
        self.source = {"runs": pointer["runs"], "step": step}
        kept = [Segment(**one) for one in pointer["segments"] if one["step"] < step]
        self.segments = [*kept, Segment(step, self.params, donor)]
        self.runs = [self._uri(f"seed-{k}-from-{donor:04d}-{step:06d}") for k in range(self.order["seeds"])]
        self.told = step

    def cleanup(self) -> None:
        """End the runs: asked first, so that they leave nothing reserved, and killed if that takes long."""
        pending = done(self.answers)[1]
        for host in self.hosts:
            host.stop.remote()
        deadline = time.monotonic() + STOP_S
        while pending and time.monotonic() < deadline:
            time.sleep(0.1)
            pending = done(pending)[1]
        for host in self.hosts:
            ray.kill(host)

    def _start_next(self) -> None:
        """Start the runs: all at once where trials are compared as they go, else one when one has ended."""
        while len(self.hosts) < len(self.runs) and (
            self.order["side_by_side"] or len(self.results) == len(self.hosts)
        ):
            seed = len(self.hosts)
            order = {
                "job": self.order["job"],
                "base": self.order["base"],
                "segments": [(segment.step, dict(segment.params)) for segment in self.segments],
                "run": self.runs[seed],
                "changes": self.order["changes"] | {"seed": self.order["seed"] + seed},
                "source": self.source["runs"][seed] if self.source else "",
                "source_step": self.source.get("step", 0),
            }
            host = _host(self.order["host_options"])
            self.hosts.append(host)
            self.answers.append(host.run.remote(order))

    def _collect(self) -> None:
        """Take in new rows and ended runs; raises what Ray says of a host that was lost."""
        for seed, host in enumerate(self.hosts):
            if seed in self.results:
                continue
            finished = not done([self.answers[seed]])[1]
            result = get(self.answers[seed], ANSWER_S, "a run") if finished else None
            if self.order["progress"] and (result is None or "error" not in result):
                rows = host.rows.remote(self.runs[seed], self.order["progress"], self.told)
                try:
                    new = dict(get(rows, ANSWER_S, "rows of a run"))
                    self.seen[seed] |= {s: value for s, value in new.items() if s % self.order["every"] == 0}
                except WaitTimeout as late:
                    logger.warning("%s; asking again", late)
            if result is not None:
                self.results[seed] = result
        self.taken = self._steps_taken()

    def _steps_taken(self) -> int:
        """Training steps of this life, over all seeds."""
        asked = [host.progress.remote() for host in self.hosts]
        try:
            return sum(newest - first for first, newest in get(asked, ANSWER_S, "progress of the runs"))
        except WaitTimeout:
            return self.taken

    def _report(self, step: int) -> dict[str, Any]:
        self.told = step
        values = [seen[step] for seen in self.seen]
        return self._told(step, statistics.fmean(values), {"values": values})

    def _end(self) -> dict[str, Any]:
        """Return the last result, which says what became of the trial."""
        results = [self.results[seed] for seed in sorted(self.results)]
        errors = [one["error"] for one in results if "error" in one]
        if any("stopped" in one for one in results) and not errors:
            errors = ["the run was asked to stop from outside the sweep"]
        metric = self.order["metric"]
        missing = [one for one in results if metric not in one] if not errors else []
        if missing:
            named = ", ".join(sorted(k for k, v in missing[0].items() if isinstance(v, int | float)))
            errors = [f"objective.metric={metric} is no headline figure of {self.order['job']}: {named}"]
        worst = math.inf if self.order["mode"] == "min" else -math.inf
        if errors:
            return self._told(max(self.told, 1), worst, {"error": errors[0]}) | {"done": True}
        values = [float(one[metric]) for one in results]
        end = {"final": values, "headline": _plain(results[0])}
        return self._told(self.order["total"], statistics.fmean(values), end) | {"done": True}

    def _told(self, step: int, value: float, outcome: dict[str, Any]) -> dict[str, Any]:
        """Return a result for Tune; what the ledger wants goes as one text, which Tune's tables pass over."""
        seconds, self.begun = time.monotonic() - self.begun, time.monotonic()
        taken, self.counted = self.taken - self.counted, self.taken
        facts = {
            "runs": self.runs, "segments": self._segments(), "seconds": seconds, "steps": taken,
            "cpus": self.order["cpus"], "gpus": self.order["gpus"],
        }  # fmt: skip
        return {STEP: step, OBJECTIVE: value, OUTCOME: json.dumps(outcome | facts)}

    def _segments(self) -> list[dict[str, Any]]:
        if not self.order["pbt"]:
            return []
        return [{"step": s.step, "params": dict(s.params), "source": s.source} for s in self.segments]

    def _uri(self, name: str) -> str:
        return f"{self.order['run'].rstrip('/')}/{folder(self.index)}/{name}"


def _host(options: Mapping[str, Any]) -> Any:
    """Start the actor of a run."""
    # Out of the placement group of the trial, which has no room for the actors of a run.
    nowhere: Any = None
    outside = PlacementGroupSchedulingStrategy(nowhere)
    return ray.remote(RunHost).options(max_concurrency=4, scheduling_strategy=outside, **options).remote()


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if isinstance(v, int | float | str | bool)}
