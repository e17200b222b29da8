"""Starting the loop in Ray Train workers, watching it, stopping it in good order, and starting it again."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from pydantic import Field

from actors.conductor import Baton, start_conductor
from actors.worker import LoopResult, LoopSpec, run_loop
from cluster.connect import thread_env
from cluster.failures import classify
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.place import Place
from counterpoint.section import Section

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
    max_failures: int = Field(default=10, ge=0)
    """How often a run is taken up again from its last checkpoint after a failure of the infrastructure."""

    def torch_threads(self) -> int:
        """Return the threads of each worker's maths."""
        return self.threads or max(1, (os.cpu_count() or 1) // max(1, self.workers))


Watch = Callable[[dict[str, Any]], None]


@dataclass
class StopSignal:
    """Whether somebody asked the run to stop (Ctrl-C, SIGTERM)."""

    asked: bool = False


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[StopSignal]:
    """Turn the first SIGINT or SIGTERM into a wish to stop; the second SIGINT interrupts as usual."""
    wish = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def on_signal(number: int, _frame: Any) -> None:
        if wish.asked:
            raise KeyboardInterrupt
        wish.asked = True
        logger.warning("asked to stop: saving a checkpoint first (once more to stop at once)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_here(spec: LoopSpec, config: TrainerConfig, watch: Watch, wish: StopSignal) -> LoopResult:
    """Run the loop in this process, alone and without Ray."""
    torch.set_num_threads(config.torch_threads())
    device = torch.device("cuda" if torch.cuda.is_available() and config.gpus_per_worker else "cpu")

    def report(figures: dict[str, Any]) -> bool:
        watch(figures)
        return wish.asked

    return run_loop(replace(spec, report=report), Place(device=device))


def train_on_ray(spec: LoopSpec, config: TrainerConfig, watch: Watch, wish: StopSignal) -> LoopResult:
    """Run the loop in Ray Train workers, and again from the last checkpoint whenever infrastructure fails.

    `watch` is shown the newest figures about twice a second. A wish to stop reaches the workers through the
    conductor; they save a checkpoint and return. Raises what ended the run for good.
    """
    conductor = start_conductor()
    spec = replace(spec, report=Baton(conductor))
    failures = 0
    while True:
        try:
            return _fit_watched(spec, conductor, config, watch, wish)
        except Exception as error:
            failures += 1
            if classify(error) != "infrastructure" or failures > config.max_failures or wish.asked:
                raise
            logger.warning(
                "the worker group failed (%d of %d): %s; going on from the last checkpoint",
                failures, config.max_failures, error,
            )  # fmt: skip


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
    while thread.is_alive():
        thread.join(timeout=0.5)
        with contextlib.suppress(Exception):
            # A conductor that is being restarted misses one poll; the wish to stop is sent with every one.
            figures = get(conductor.poll.remote(wish.asked), timeout=2.0, what="the conductor")
            watch(figures)
    if "error" in outcome:
        raise outcome["error"]
    result: LoopResult = outcome["result"]
    return result


def _fit(spec: LoopSpec, config: TrainerConfig) -> LoopResult:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    store = RunStore(spec.uri)
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    trainer = TorchTrainer(
        work,
        train_loop_config={"spec": spec, "threads": config.torch_threads()},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(timeout_s=300),
        run_config=RunConfig(
            # A name of its own each time: Ray Train must not resume by itself what our checkpoints resume.
            name=f"{time.time_ns():x}",
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


def work(config: dict[str, Any]) -> LoopResult:
    """Run the loop as one Ray Train worker."""
    from ray import train
    from ray.train.torch import get_device, prepare_model

    torch.set_num_threads(config["threads"])
    context = train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), get_device(), prepare_model)
    return run_loop(config["spec"], place)
