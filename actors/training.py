"""Starting the loop in Ray Train workers, watching it, stopping it in good order, and starting it again."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from pydantic import Field, model_validator

from actors.conductor import Baton, start_conductor
from actors.roll import Roll, enrolled
from actors.worker import LoopResult, LoopSpec, run_loop
from cluster.connect import thread_env
from cluster.failures import classify, root_cause
from cluster.identity import current, fit_name
from cluster.placement import Pool, plan
from cluster.reserve import PlacementError, groups_of_job, remove_groups, reserve
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.place import Place
from counterpoint.section import Section
from counterpoint.strategies.config import StrategyConfig

logger = logging.getLogger(__name__)


class TrainerConfig(Section):
    """Where the trainer's replicas run and how they fail."""

    workers: int = Field(default=1, ge=0)
    """Ray Train workers; 0 trains in the driver's own process, without Ray."""
    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    """Logical CPUs reserved for each."""
    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each."""
    threads: int = Field(default=0, ge=0)
    """Threads of each worker's maths; 0 shares the machine's cores out among the workers."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; older ones are deleted."""
    max_failures: int = Field(default=10, ge=0)
    """How often a run is taken up again from its last checkpoint after a failure of the infrastructure."""
    strategy: StrategyConfig = StrategyConfig()
    """How the workers share out weights, gradients and optimizer state, and their precision."""

    @model_validator(mode="after")
    def _check(self) -> "TrainerConfig":
        if self.strategy.sharded and self.workers == 0:
            raise ValueError(
                f"strategy.name={self.strategy.name} with workers=0: the driver alone shares nothing out; "
                "set workers to at least 1, or strategy.name=ddp"
            )
        return self

    room_wait_s: float = Field(default=600.0, ge=0.0)
    """Seconds to wait, after a failure, for room for all workers, such as a lost machine's replacement."""

    def torch_threads(self) -> int:
        """Return the threads of each worker's maths."""
        return self.threads or max(1, (os.cpu_count() or 1) // max(1, self.workers))


ROOM_POLL_S = 5.0
"""Seconds in which resources of workers that have just ended come back."""

Watch = Callable[[dict[str, Any]], None]


@dataclass
class StopSignal:
    """Whether somebody asked the run to stop (Ctrl-C, SIGTERM)."""

    asked: bool = False


_wishes: list[StopSignal] = []


def ask_to_stop() -> None:
    """Ask the loops that this process runs or watches to save a checkpoint and return, as a signal would."""
    for wish in _wishes:
        wish.asked = True


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[StopSignal]:
    """Turn the first SIGINT or SIGTERM into a wish to stop; the second SIGINT interrupts as usual.

    Signals reach only the main thread of a process; `ask_to_stop` reaches every thread.
    """
    wish = StopSignal()
    _wishes.append(wish)
    try:
        with _on_signals(wish):
            yield wish
    finally:
        _wishes.remove(wish)


@contextlib.contextmanager
def _on_signals(wish: StopSignal) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, _frame: Any) -> None:
        if wish.asked:
            raise KeyboardInterrupt
        wish.asked = True
        logger.warning("asked to stop: saving a checkpoint first (once more to stop at once)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_here(spec: LoopSpec, config: TrainerConfig, watch: Watch, wish: StopSignal) -> LoopResult:
    """Run the loop in this process, alone and without Ray."""
    torch.set_num_threads(config.torch_threads())
    device = torch.device("cuda" if torch.cuda.is_available() and config.gpus_per_worker else "cpu")

    def report(figures: dict[str, Any]) -> bool:
        current().figures = figures
        watch(figures)
        return wish.asked

    return run_loop(replace(spec, report=report), Place(device=device, strategy=config.strategy))


def train_on_ray(spec: LoopSpec, config: TrainerConfig, watch: Watch, wish: StopSignal) -> LoopResult:
    """Run the loop in Ray Train workers, and again from the last checkpoint whenever infrastructure fails.

    `watch` is shown the newest figures about twice a second. A wish to stop reaches the workers through the
    conductor; they save a checkpoint and return. Raises what ended the run for good.
    """
    conductor = start_conductor()
    spec = replace(spec, report=Baton(conductor))
    failures, first = 0, ""
    while True:
        held = groups_of_job()
        try:
            return _fit_watched(spec, conductor, config, watch, wish)
        except Exception as error:
            failures += 1
            if classify(error) != "infrastructure" or failures > config.max_failures or wish.asked:
                if first:
                    error.add_note(f"the worker group had failed {failures - 1} times before; first: {first}")
                raise
            first = first or " ".join(str(root_cause(error)).split())[:300]
            logger.warning(
                "the worker group failed (%d of %d): %s; going on from the last checkpoint",
                failures, config.max_failures, error,
            )  # fmt: skip
            remove_groups(groups_of_job() - held)
            await_room(config)


def await_room(config: TrainerConfig) -> None:
    """Return once the cluster has room for all workers; Ray Train alone would try for hours.

    A cluster that cannot hold them now may get another machine. Raises PlacementError after `room_wait_s`.
    """
    pool = Pool(
        "trainer", config.workers, config.cpus_per_worker, config.gpus_per_worker,
        setting="trainer.workers", reserved_by="train",
    )  # fmt: skip
    deadline, told = time.monotonic() + config.room_wait_s, False
    while True:
        try:
            with reserve(plan([pool]), timeout=ROOM_POLL_S):
                return
        except PlacementError as error:
            if time.monotonic() > deadline:
                raise PlacementError(str(error), error.explanation) from error
            if not told:
                logger.warning("waiting up to %g s for room: %s", config.room_wait_s, error.in_one_line)
                told = True
            time.sleep(1.0)


def _fit_watched(
    spec: LoopSpec, conductor: Any, config: TrainerConfig, watch: Watch, wish: StopSignal
) -> LoopResult:
    """Run one `TorchTrainer.fit` in a thread, and poll the conductor meanwhile."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = _fit(spec, config)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True, name="fit")
    thread.start()
    roll = Roll(conductor, config.workers)
    while thread.is_alive():
        thread.join(timeout=0.5)
        with contextlib.suppress(Exception):
            # A conductor that is being restarted misses one poll; the wish to stop is sent with every one.
            figures = get(conductor.poll.remote(wish.asked), timeout=2.0, what="the conductor")
            current().figures = figures
            watch(figures)
        roll.call()
    if "error" in outcome:
        raise outcome["error"]
    result: LoopResult = outcome["result"]
    return result


def _fit(spec: LoopSpec, config: TrainerConfig) -> LoopResult:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from actors.process_group import ProcessGroupConfig

    store = RunStore(spec.uri)
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    trainer = TorchTrainer(
        # Not in `train_loop_config`, which Ray Train's controller reads: it would load all that trainers are
        # made of.
        partial(work, spec, config.torch_threads(), config.strategy),
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=ProcessGroupConfig(timeout_s=300),
        run_config=RunConfig(
            # A name of its own each time: Ray Train must not resume by itself what our checkpoints resume.
            name=fit_name(),
            storage_path=store.path("ray_train"),
            storage_filesystem=PyFileSystem(FSSpecHandler(store.fs)),
            # Ray Train retries whatever fails; `train_on_ray` retries only what another machine may mend.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            worker_runtime_env={"env_vars": thread_env(config.torch_threads())},
        ),
    )
    result: LoopResult = trainer.fit().return_value
    store.delete("ray_train")
    return result


def work(spec: LoopSpec, threads: int, strategy: StrategyConfig) -> LoopResult:
    """Run the loop as one Ray Train worker."""
    from ray import train

    from actors.process_group import worker_device

    torch.set_num_threads(threads)
    context = train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), worker_device(), strategy)
    # What takes rank 0's figures takes the ranks' places too, where it is a conductor's.
    conductor = getattr(spec.report, "actor", None)
    with enrolled(conductor, place.rank, str(place.device)):
        return run_loop(spec, place)
