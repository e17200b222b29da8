"""What runs where, how far it is, and whether its checkpoint is whole: `python -m jobs.status RUN`.

Works from another process, while the run goes on or when nothing of it runs any more.
"""

import sys
import time
from typing import Any

from pydantic import Field

from cluster.progress import duration
from cluster.roster import table
from jobs.config import run_job
from jobs.run_state import last_step, newest_checkpoint
from jobs.watched import Watched, WatchedConfig, bare, watching


class StatusConfig(WatchedConfig):
    """Which run, and how closely to look at it."""

    verify: bool = False
    """Compare the checksums of the newest checkpoint's bytes too, which reads all of them."""
    watch: float = Field(default=0.0, ge=0.0)
    """Seconds between looks, until the run ends or Ctrl-C; 0 looks once."""


def main(config: StatusConfig) -> dict[str, Any]:
    """Write the placement table and progress to standard error; return the same as figures."""
    while True:
        with watching(config.run) as run:
            told = describe(run, config)
            sys.stderr.write(f"{text(run, told, config)}\n")
            going = run.stage == "running"
        if not config.watch or not going:
            return told
        time.sleep(config.watch)


def describe(run: Watched, config: StatusConfig) -> dict[str, Any]:
    """Return all that is known of a run as one dict."""
    figures = run.progress.get("figures", {})
    step = last_step(run.store, figures)
    checkpoint = newest_checkpoint(run.store, config.verify)
    left = run.progress.get("seconds_left")
    return {
        "run": run.store.uri, "id": run.facts["id"], "state": run.stage, "step": step,
        "total": figures.get("total"), "seconds_left": None if left is None else round(left, 1),
        "checkpoint": checkpoint.step, "checkpoint_verified": checkpoint.verified,
        "skipped_checkpoints": list(checkpoint.skipped), "cluster": run.facts.get("address"),
        "cluster_answers": not run.why_not, "rows": [row.plain() for row in run.chosen(config.role)],
    }  # fmt: skip


def text(run: Watched, told: dict[str, Any], config: StatusConfig) -> str:
    """Return what a person reads."""
    lines = [f"run {told['id']} at {told['run']}: {told['state']}", table(run.chosen(config.role))]
    if run.why_not:
        lines.append(f"the table is from the run's storage: {run.why_not}")
    step, total = told["step"], told["total"]
    taken = "no step yet" if step is None else f"step {step}" + (f" of {total}" if total else "")
    if told["seconds_left"] is not None and told["state"] == "running":
        taken += f", about {duration(told['seconds_left'])} left"
    lines += [f"progress: {taken}", f"checkpoint: {newest_checkpoint(run.store, config.verify)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main, StatusConfig, bare(sys.argv[1:], "run", "role"))
