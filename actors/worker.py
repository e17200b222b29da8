"""The training loop that every trainer runs in, alone or as one of several Ray Train workers."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from actors.telemetry import TrainerTelemetry
from actors.timeline import Recorder, timed
from cluster.checkpoints import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from cluster.metrics_log import MetricsLog
from cluster.storage import RunStore, save_image
from counterpoint.alarms import Watcher
from counterpoint.grids import image_grid
from counterpoint.place import Place

if TYPE_CHECKING:
    # Ray Train's controller imports this module too, and need not load what scores images.
    from actors.evaluation import EvaluationPool, LocalEvaluation

logger = logging.getLogger(__name__)

State = Mapping[str, Mapping[str, Tensor]]
WEIGHTS = "weights"
EVALUATIONS = "evaluations.jsonl"
"""Scores of snapshots, a row each."""
PREVIEW_COLUMNS = 10


class Trainer(Protocol):
    """What the loop trains; see `counterpoint.teacher` and `counterpoint.distillation`."""

    total_steps: int

    def step(self, step: int) -> dict[str, Any]:
        """Take optimizer step `step` and return its figures."""
        ...

    def samples_per_step(self, step: int) -> int:
        """Return the samples that all ranks together learn from in a step."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the weights worth evaluating and keeping, complete on rank 0; every rank must call."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's share of all that the future depends on, besides the step number.

        Every rank must call.
        """
        ...

    def load(self, state: State, step: int) -> None:
        """Return to a stored state, after which `step` comes next."""
        ...


Report = Callable[[dict[str, Any]], bool]


def silent(figures: dict[str, Any]) -> bool:
    """Report to nobody, and never stop."""
    return False


@dataclass(frozen=True)
class LoopSpec:
    """What a worker needs to run the loop."""

    uri: str
    """The run's storage URI."""
    build: Callable[[Place, RunStore, Report], Trainer]
    """Makes this rank's trainer; long preparations report their progress."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the first comes before step 0, the last after the last step."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    evaluate_every: int = 0
    """Steps between snapshots that are offered for scoring; 0 offers none."""
    report: Report = silent
    """Takes the newest figures to whoever watches, and says whether to stop; asked on rank 0."""
    evaluation: "EvaluationPool | LocalEvaluation | None" = None
    """Where snapshots are scored."""
    watch: Callable[[], Watcher] | None = None
    """Makes the watcher that looks at rank 0's figures after each step."""

    def offers(self, step: int) -> bool:
        """Whether the weights after `step` steps are offered for scoring."""
        return self.evaluation is not None and self.evaluate_every > 0 and step % self.evaluate_every == 0


@dataclass(frozen=True)
class LoopResult:
    """How a loop ended."""

    steps: int
    """Steps that are done, over all lives of the run."""
    finished: bool
    """False if it was asked to stop before the last step."""
    started_at: int
    """Step at which this life of the loop began."""
    alarms: tuple[str, ...] = ()


def run_loop(spec: LoopSpec, place: Place) -> LoopResult:
    """Resume from the newest whole checkpoint, or begin, and train to the end or until asked to stop.

    Every rank calls it and writes its share of each checkpoint; rank 0 writes metrics and commits. Whatever
    ends the loop early, an error included, a later call with the same store goes on from the last checkpoint
    as if nothing had happened.
    """
    store = RunStore(spec.uri)
    trainer = spec.build(place, store, spec.report if place.rank == 0 else silent)
    recorder = Recorder(place.rank)
    timed(trainer, recorder)
    start, samples = _resume(trainer, store, place)
    _barrier(place)
    chief = _Chief(spec, store, start or 0) if place.rank == 0 else None
    if start is None:
        # Critics in actors outlive a trainer that dies early: this is what they are set back to then.
        start = 0
        _save(trainer, store, start, samples, place, chief)
    step = start
    try:
        while step < trainer.total_steps:
            begun = time.perf_counter()
            recorder.begin(step)
            figures = trainer.step(step)
            recorder.end()
            seconds = time.perf_counter() - begun
            samples += trainer.samples_per_step(step)
            step += 1
            snapshot = trainer.weights() if spec.offers(step) else None
            stop = chief.after(trainer, step, figures, seconds, snapshot) if chief else False
            stop = _agree(stop, place)
            if stop or step == trainer.total_steps or step % spec.checkpoint_every == 0:
                _save(trainer, store, step, samples, place, chief)
                recorder.save(store)
            if stop:
                break
        if chief:
            chief.finish()
    finally:
        if chief:
            chief.close()
    alarms = tuple(chief.alarms) if chief else ()
    return LoopResult(step, step >= trainer.total_steps, start, alarms)


def _resume(trainer: Trainer, store: RunStore, place: Place) -> tuple[int | None, int]:
    """Go on from the checkpoint that rank 0 finds; each rank reads what it needs of it.

    Returns its step, None if there is none, and the samples that were learned from until then.
    """
    newest = latest_checkpoint(store) if place.rank == 0 else None
    step = _told(-1 if newest is None else newest.step, place)
    if step < 0:
        return None, 0
    checkpoint = newest or load_checkpoint(store, step)
    trainer.load({name: checkpoint.stored(name) for name in checkpoint.files if name != WEIGHTS}, step)
    written = {"samples": sum(map(trainer.samples_per_step, range(step)))} | checkpoint.meta
    if place.rank == 0:
        logger.info(
            "resumed from step %d (%d samples), written by %s under %s, now %s under %s",
            step, written["samples"], _workers(written.get("workers", "unknown")),
            written.get("strategy", "an unknown strategy"), _workers(place.ranks), place.strategy.in_words,
        )  # fmt: skip
    return step, written["samples"]


def _workers(count: Any) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _save(
    trainer: Trainer, store: RunStore, step: int, samples: int, place: Place, chief: "_Chief | None"
) -> None:
    """Write the checkpoint of `step` and who wrote it; metrics up to it are on storage before it counts."""
    if chief:
        chief.metrics.flush()
    begun = time.perf_counter()
    weights, files = trainer.weights(), trainer.state()
    if chief:
        files = files | {WEIGHTS: weights}
    meta = {"samples": samples, "workers": place.ranks, "strategy": place.strategy.in_words}
    save_checkpoint(store, step, files, meta, place.rank, _meet if place.ranks > 1 else _alone)
    if chief:
        prune_checkpoints(store, chief.spec.keep_checkpoints)
        chief.saved = step
        chief.telemetry.saved(step, time.perf_counter() - begun)
    _barrier(place)


def _alone(mine: dict[str, Any]) -> list[dict[str, Any]]:
    return [mine]


def _meet(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what every rank gives."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


class _Chief:
    """What rank 0 does beside training."""

    def __init__(self, spec: LoopSpec, store: RunStore, start: int) -> None:
        self.spec, self.store = spec, store
        self.telemetry = TrainerTelemetry(spec.uri)
        self.metrics = MetricsLog(store)
        self.metrics.truncate(start)
        self.evaluations = MetricsLog(store, EVALUATIONS, tensorboard=False, flush_rows=1)
        self.evaluations.truncate(start)
        self.watcher = spec.watch() if spec.watch else None
        if self.watcher is not None:
            # What the alarms look back on is not in the checkpoint: the rows that were kept bring it back.
            for row in self.metrics.read():
                self.watcher.see(row)
            for row in self.evaluations.read():
                self.watcher.see_snapshot(row)
        self.alarms: list[str] = []
        self.saved = start
        """Step of the newest checkpoint."""
        self.refreshes = sum(row.get("refreshed", 0) for row in self.metrics.read())

    def after(
        self,
        trainer: Trainer,
        step: int,
        figures: dict[str, Any],
        seconds: float,
        snapshot: dict[str, Tensor] | None,
    ) -> bool:
        """Log a step, offer its `snapshot`, and return whether the driver wants to stop."""
        samples = trainer.samples_per_step(step - 1)
        row = figures | {"seconds": seconds, "samples_per_second": samples / seconds}
        self.telemetry.stepped(step, trainer.total_steps, samples, seconds, figures)
        self.telemetry.asked(getattr(trainer, "panel", None))
        if self.watcher is not None:
            self._raise(row, self.watcher.see({"step": step} | row))
        self.refreshes += figures.get("refreshed", 0)
        self.metrics.log(step, **row)
        pool = self.spec.evaluation
        if pool is not None:
            self._log_evaluation(pool.poll())
            if snapshot is not None:
                pool.offer(step, snapshot)
                self._log_evaluation(pool.poll())
        progress = {
            "step": step, "total": trainer.total_steps, "refreshes": self.refreshes, "checkpoint": self.saved,
            "snapshot": getattr(getattr(trainer, "panel", None), "durable", None),
        }  # fmt: skip
        return self.spec.report(progress | row)

    def finish(self) -> None:
        """Take in the evaluation that is still under way."""
        if self.spec.evaluation is not None:
            self._log_evaluation(self.spec.evaluation.finish())

    def close(self) -> None:
        """Put everything logged on storage."""
        self.metrics.close()
        self.evaluations.close()

    def _log_evaluation(self, row: dict[str, Any] | None) -> None:
        if row is None:
            return
        preview = row.pop("preview", None)
        if preview is not None:
            images = torch.from_numpy(preview).float() / 127.5 - 1.0
            fewest = min(int(name.removeprefix("steps_")) for name in row if name.startswith("steps_"))
            name = f"grids/step-{row['step']:08d}-{fewest}.png"
            save_image(self.store, name, image_grid(images, PREVIEW_COLUMNS))
        if self.watcher is not None:
            self._raise(row, self.watcher.see_snapshot(row))
        self.evaluations.log(**row)

    def _raise(self, row: dict[str, Any], alarms: list[str]) -> None:
        for alarm in alarms:
            logger.warning("alarm: %s", alarm)
        if alarms:
            self.telemetry.count("counterpoint_alarms_total", len(alarms))
            row["alarms"] = alarms
            self.alarms.extend(alarms)


def _barrier(place: Place) -> None:
    if place.ranks > 1:
        dist.barrier()


def _agree(stop: bool, place: Place) -> bool:
    """Return rank 0's `stop` on every rank."""
    return bool(_told(int(stop), place))


def _told(number: int, place: Place) -> int:
    """Return rank 0's `number` on every rank."""
    if place.ranks == 1:
        return number
    told = torch.tensor([number], device=place.device)
    dist.broadcast(told, src=0)
    return int(told.item())
