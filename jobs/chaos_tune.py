"""Kills the driver of a sweep at random moments, goes on each time, and compares what its trials found.

    python -m jobs.chaos_tune configs/digits/chaos_tune.yaml

The same sweep runs twice: in peace, and in a war in which its driver dies by SIGKILL, its cluster with it.
"""

import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from cluster.metrics_log import read_metrics
from cluster.storage import RunStore
from counterpoint.section import Section
from jobs.config import run_job
from jobs.processes import TAIL, environment, module
from jobs.run_names import CONFIG, RunUri
from jobs.table import text_table
from jobs.tune_ledger import Ledger, TrialRecord
from jobs.tune_settings import TuneConfig

logger = logging.getLogger(__name__)

LATEST = 0.9
"""Share of all steps before which the driver is killed, so that there is a sweep left to kill."""
LOOK_S = 0.3
COLUMNS = ("state", "peace", "war", "lives", "same")


class TuneChaosConfig(Section):
    """Which sweep is disturbed, and how often."""

    run: RunUri = "runs/chaos_tune"
    """Local folder of both sweeps, their logs, and the outcome; a used one is refused."""
    sweep: dict[str, Any] = {}
    """The sweep, a configuration of jobs.tune; may extend a file."""
    kills: int = Field(default=5, ge=1)
    """How often its driver is killed."""
    delay_s: tuple[float, float] = (0.0, 5.0)
    """Shortest and longest time from the step that is drawn for a kill, or a start after it, to the kill."""
    seed: int = 0
    """Seed of the moments."""
    limit_s: float = Field(default=1800.0, gt=0.0)
    """Seconds after which a life of the sweep counts as hanging."""

    @model_validator(mode="after")
    def _check(self) -> "TuneChaosConfig":
        sweep = self.of("peace")
        if sweep.scheduler.kind != "none" or sweep.searcher.kind != "random":
            raise ValueError(
                f"sweep.scheduler.kind={sweep.scheduler.kind} and sweep.searcher.kind={sweep.searcher.kind}: "
                "what a trial becomes then depends on which one reports first; set none and random"
            )
        return self

    def of(self, name: str) -> TuneConfig:
        """Return the sweep that is kept as `name` below `run`."""
        return TuneConfig.model_validate(self.sweep | {"run": f"{self.run.rstrip('/')}/{name}"})


def main(config: TuneChaosConfig) -> dict[str, Any]:
    """Run the sweep in peace and in war, store the outcome, and return how many trials ended the same.

    Raises ValueError if `run` is used, RuntimeError if a life of a sweep fails or hangs by itself.
    """
    peace, war = config.of("peace"), config.of("war")
    for sweep in (peace, war):
        if RunStore(sweep.run).exists(CONFIG):
            raise ValueError(f"run={config.run} has a drill already: name another run, or delete it")
    finish(begin(peace), peace, config.limit_s)
    chance = random.Random(config.seed)
    latest = LATEST * reached(peace)
    moments = sorted(chance.uniform(0.0, latest) for _ in range(config.kills))
    kills = [kill for kill in (disturb(config, war, moment, chance) for moment in moments) if kill]
    finish(begin(war), war, config.limit_s)
    records = trials(war)
    rows = compared(trials(peace), records)
    repeated = {
        index for kill in kills for index, lives in kill["ended"].items() if records[index].lives != lives
    }
    told = {
        "kills": len(kills), "trials": len(rows), "same": sum(row["same"] for row in rows),
        "repeated": len(repeated), "lives": sum(record.lives for record in records),
    }  # fmt: skip
    text, store = text_table(rows, COLUMNS), RunStore(config.run)
    store.write_text("chaos.txt", text + "\n")
    store.write_text("chaos.json", json.dumps({"headline": told, "kills": kills, "trials": rows}, indent=1))
    sys.stderr.write(text + "\n")
    return {"run": config.run, **told}


def begin(sweep: TuneConfig) -> subprocess.Popen[str]:
    """Start a life of a sweep, with a cluster of its own; its output goes to a log beside it."""
    folder = Path(sweep.run).parent
    command = [*module("jobs.tune", sweep, folder / "lives"), "resume=true"]
    with log_of(sweep).open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment(1))


def finish(process: subprocess.Popen[str], sweep: TuneConfig, limit_s: float) -> None:
    """Wait for a life that ends by itself; RuntimeError with the end of its log if it fails or hangs."""
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    if code != 0:
        end = log_of(sweep).read_text(encoding="utf-8")[-TAIL:]
        what = f"took more than {limit_s:.0f} s" if code is None else f"ended with code {code}"
        raise RuntimeError(f"a sweep that nobody disturbed {what}: {end}")


def disturb(
    config: TuneChaosConfig, sweep: TuneConfig, moment: float, chance: random.Random
) -> dict[str, Any] | None:
    """Start a life of the sweep and kill it a little after its trials have taken `moment` steps in all.

    Returns when it was killed and the lives of the trials that had ended; None if the sweep was over before.
    Raises RuntimeError if it failed or hung before that.
    """
    begun, process = time.monotonic(), begin(sweep)
    while process.poll() is None and reached(sweep) < moment:
        time.sleep(LOOK_S)
        if time.monotonic() > begun + config.limit_s:
            finish(process, sweep, 0.0)
    time.sleep(chance.uniform(*config.delay_s))
    if process.poll() is not None:
        finish(process, sweep, 0.0)
        return None
    process.kill()
    process.wait()
    records = trials(sweep)
    kill = {
        "after_s": round(time.monotonic() - begun, 1), "steps": reached(sweep),
        "running": [record.index for record in records if not record.ended],
        "ended": {record.index: record.lives for record in records if record.ended},
    }  # fmt: skip
    logger.info("killed the driver: %s", kill)
    return kill


def reached(sweep: TuneConfig) -> int:
    """Return how many steps the runs of all trials have logged."""
    rows = [read_metrics(RunStore(run)) for record in trials(sweep) for run in runs_of(sweep, record)]
    return sum(int(one[-1]["step"]) for one in rows if one)


def runs_of(sweep: TuneConfig, record: TrialRecord) -> list[str]:
    """Return the URIs of a trial's runs, which its record has only after its first report."""
    seeds = range(sweep.objective.seeds)
    return [f"{sweep.run}/trials/{record.index:04d}/seed-{seed}" for seed in seeds]


def compared(peace: list[TrialRecord], war: list[TrialRecord]) -> list[dict[str, Any]]:
    """Return a row for each trial: its value in both sweeps, and whether all that it found is the same."""
    if [record.index for record in peace] != [record.index for record in war]:
        raise RuntimeError(f"in peace there are {len(peace)} trials, in war {len(war)}")
    return [
        {
            "name": f"trial {one.index}", "state": other.state, "peace": one.value, "war": other.value,
            "lives": other.lives, "same": found(one) == found(other),
        }
        for one, other in zip(peace, war, strict=True)
    ]  # fmt: skip


def found(record: TrialRecord) -> tuple[Any, ...]:
    """Return what a trial tried and found, without what it took."""
    return record.params, record.state, record.reports, record.values, record.value


def trials(sweep: TuneConfig) -> list[TrialRecord]:
    """Return the records of a sweep as its storage has them now."""
    return Ledger(RunStore(sweep.run)).in_order()


def log_of(sweep: TuneConfig) -> Path:
    """Return the file that all lives of a sweep write to."""
    return Path(f"{sweep.run}.log")


if __name__ == "__main__":
    run_job(main, TuneChaosConfig)
