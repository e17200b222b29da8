"""Doing the runs of a claim over the cluster: what is done is used again, what a run needs comes first."""

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch

from cluster.connect import thread_env
from cluster.progress import ProgressLine
from cluster.storage import RunStore
from cluster.waiting import first_of, get
from jobs.claim_plan import Run, entry
from jobs.run_names import CONFIG

logger = logging.getLogger(__name__)

DONE = "claim.json"
LONGEST_RUN = 6 * 3600.0

Headline = dict[str, Any]


def do(run: Run) -> Headline:
    """Do a run in this process, unless it is done, and return its headline with its processor `seconds`."""
    torch.set_num_threads(1)
    store = RunStore(run.uri)
    if store.exists(DONE):
        return headline_of(run)
    main, model = entry(run.job)
    config = model.model_validate(run.config)
    if "resume" in model.model_fields:
        config = config.model_copy(update={"resume": store.exists(CONFIG)})
    begun = time.process_time()
    found = main(config)
    seconds = round(time.process_time() - begun, 1)
    plain = {key: value for key, value in found.items() if isinstance(value, int | float | str | None)}
    kept = {"name": run.name, "job": run.job, "config": run.config, "seconds": seconds, "headline": plain}
    store.write_text(DONE, json.dumps(kept, indent=1))
    return plain | {"seconds": seconds}


def headline_of(run: Run) -> Headline:
    """Return the headline of a run that is done, with its `seconds`."""
    kept = json.loads(RunStore(run.uri).read_text(DONE))
    return dict(kept["headline"]) | {"seconds": kept["seconds"]}


def do_all(runs: Sequence[Run], at_once: int, gpus: float) -> dict[str, Headline]:
    """Do runs as Ray tasks of one CPU each, `at_once` at a time, and return their headlines by URI.

    A run that fails is done again after the loss of its process only; else it ends the claim, with its
    traceback, and what had finished is there when it is started again.
    """
    found = {run.uri: headline_of(run) for run in runs if RunStore(run.uri).exists(DONE)}
    waiting = [run for run in runs if run.uri not in found]
    if found:
        logger.info("%d of %d runs are there already", len(found), len(runs))
    if not waiting:
        return found
    task: Any = ray.remote(do).options(
        num_cpus=1, num_gpus=gpus, max_retries=2, runtime_env={"env_vars": thread_env(1)}
    )
    running: dict[Any, Run] = {}
    line = ProgressLine(len(runs), "runs", unit="runs", start=len(found))
    with line:
        while waiting or running:
            due = [run for run in waiting if all(uri in found for uri in run.needs)]
            for run in due[: at_once - len(running)]:
                waiting.remove(run)
                running[task.remote(run)] = run
            ready, _ = first_of(list(running), timeout=LONGEST_RUN, what="a run of the claim")
            for ref in ready:
                run = running.pop(ref)
                found[run.uri] = get(ref, timeout=60.0, what=run.name)
                logger.info("%s is done (%s)", run.name, run.uri)
                line.update(len(found))
    return found
