"""Compare policies and rules on the same episodes: `python -m jobs.rollout configs/vla/compare.yaml`."""

import contextlib
import json
import sys
import time
from typing import Any

from cluster.connect import connected
from cluster.environment import describe_environment
from cluster.identity import begin, current, use
from cluster.storage import RunStore
from jobs.config import dump_config, run_job
from jobs.report_record import CONFIG, ENVIRONMENT
from jobs.rollout_play import play
from jobs.rollout_policies import train_missing
from jobs.rollout_report import write_rollout_report
from jobs.rollout_results import compare, table
from jobs.rollout_settings import RolloutConfig
from jobs.runs import write_results


def main(config: RolloutConfig) -> dict[str, Any]:
    """Train what is missing, play what is missing, compare, write the report and return the headline."""
    begun = time.monotonic()
    store = open_comparison(config)
    with contextlib.ExitStack() as stack:
        if config.workers.count or config.samplers.count:
            stack.enter_context(connected())
        mine = current()
        train_missing(config)
        use(mine)
        logs = play(config, store)
    results = compare(config, [log.result.of(config.seeds) for log in logs])
    write_results(store, results)
    sys.stderr.write(table(results) + "\n")
    headline = results["headline"] | {"seconds": round(time.monotonic() - begun, 1)}
    return {"run": config.run, "report": write_rollout_report(store), **headline}


def open_comparison(config: RolloutConfig) -> RunStore:
    """Open the run's storage and write configuration and environment there.

    Raises ValueError if the storage is used and `resume` is off, or in the memory of this process while
    others need it.
    """
    if config.run.startswith("memory:") and config.workers.count + config.samplers.count > 0:
        raise ValueError(f"run={config.run} lives in this process's memory: use a path or an object store")
    store = RunStore(config.run)
    if store.exists(CONFIG) and not config.resume:
        raise ValueError(
            f"run={config.run} is a run already: add resume=true to go on with it, or choose another run"
        )
    store.write_text(CONFIG, dump_config(config))
    store.write_text(ENVIRONMENT, json.dumps(describe_environment(), indent=1))
    begin(store)
    return store


if __name__ == "__main__":
    run_job(main, RolloutConfig)
