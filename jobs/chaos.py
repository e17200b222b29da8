"""Kills actors of running demos, at random moments with SIGKILL, and tells what became of each run.

python -m jobs.chaos configs/digits/chaos.yaml
"""

import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from cluster.metrics_log import read_metrics
from cluster.storage import RunStore
from counterpoint.section import Section
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.table import text_table

logger = logging.getLogger(__name__)

NO_ACTORS = ("IDLE", "Agent", "log_monitor")
COMPARED = ("student_1_fd", "student_4_fd", "teacher_1_fd")


class ChaosConfig(Section):
    """How often and when."""

    demo: str = "configs/digits/chaos_demo.yaml"
    """Configuration of the demo that is disturbed."""
    run: RunUri = "runs/chaos"
    """Where the demos run and the outcome is stored."""
    kills: int = Field(default=10, ge=1)
    """Actors to kill; demos are run until that many are."""
    pause_s: tuple[float, float] = (4.0, 25.0)
    """Shortest and longest time from one kill (or the start of a demo) to the next."""
    seed: int = 0
    """Seed of moments and victims."""
    limit_s: float = 1800.0
    """Seconds after which a demo counts as lost."""


def main(config: ChaosConfig) -> dict[str, Any]:
    """Run one demo in peace, then disturbed ones, and return how many kills the runs survived."""
    chance = random.Random(config.seed)
    peaceful = demo(config, "peace", 0, chance)
    if peaceful["code"] != 0:
        raise RuntimeError(
            f"the undisturbed demo itself ended with code {peaceful['code']}: {peaceful['error']}"
        )
    outcomes: list[dict[str, Any]] = []
    number = 0
    while len(outcomes) < config.kills:
        number += 1
        disturbed = demo(config, f"war-{number}", config.kills - len(outcomes), chance)
        if not disturbed["kills"] and disturbed["code"] != 0:
            raise RuntimeError(f"a demo ended before anything was killed: {disturbed['error']}")
        same = disturbed["figures"] == peaceful["figures"]
        for kill in disturbed["kills"]:
            survived = disturbed["code"] == 0
            outcomes.append(kill | {"demo": number, "survived": survived, "same_result": survived and same})
    rows = [{"name": f"kill {i}"} | outcome for i, outcome in enumerate(outcomes, start=1)]
    text = text_table(rows, ("victim", "at_s", "stage", "step", "demo", "survived", "same_result"))
    RunStore(config.run).write_text("chaos.txt", text + "\n")
    sys.stderr.write(text + "\n")
    survived = sum(outcome["survived"] for outcome in outcomes)
    same_result = sum(outcome["same_result"] for outcome in outcomes)
    return {"kills": len(outcomes), "survived": survived, "same_result": same_result, "demos": number}


def demo(config: ChaosConfig, name: str, kills: int, chance: random.Random) -> dict[str, Any]:
    """Run one demo, killing at most `kills` of its actors, and return how it ended."""
    root = Path(config.run) / name
    places = [f"teacher.run={root}/teacher", f"student.run={root}/student", f"student.teacher={root}/teacher"]
    logger.info("demo %s", name)
    with open_log(root) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.demo", config.demo, *places],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        done = disturb(config, process, root, kills, chance)
        output = process.communicate()[0]
    lines = output.strip().splitlines()
    result = json.loads(lines[-1]) if process.returncode == 0 and lines else {}
    return {
        "code": process.returncode,
        "kills": done,
        "figures": {key: result.get(key) for key in COMPARED},
        "error": (root / "log.txt").read_text()[-300:],
    }


def open_log(root: Path) -> Any:
    """Return the open log file of a demo."""
    root.mkdir(parents=True, exist_ok=True)
    return (root / "log.txt").open("w")


def disturb(
    config: ChaosConfig, process: subprocess.Popen[str], root: Path, kills: int, chance: random.Random
) -> list[dict[str, Any]]:
    """Kill actors below `process` at random moments until it ends; return what was killed and when."""
    begun = time.monotonic()
    done: list[dict[str, Any]] = []
    due = begun + chance.uniform(*config.pause_s)
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        if now - begun > config.limit_s:
            process.kill()
        if len(done) < kills and now >= due:
            victim = kill_one(process.pid, chance)
            if victim is not None:
                done.append({"victim": victim, "at_s": round(now - begun, 1)} | where(root))
                logger.info("killed %s", done[-1])
                due = now + chance.uniform(*config.pause_s)
    return done


def kill_one(pid: int, chance: random.Random) -> str | None:
    """Kill a random actor among the descendants of process `pid`; return its title, None if there is none."""
    actors = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = process.cmdline()[0] if process.cmdline() else ""
        except psutil.Error:
            continue
        if title.startswith("ray::") and not any(other in title for other in NO_ACTORS):
            actors.append((title, process))
    if not actors:
        return None
    title, victim = chance.choice(sorted(actors, key=lambda pair: (pair[0], pair[1].pid)))
    try:
        victim.kill()
    except psutil.NoSuchProcess:  # it ended by itself meanwhile
        return None
    return title.removeprefix("ray::")


def where(root: Path) -> dict[str, Any]:
    """Return which stage and step the demo has logged last."""
    for part in ("student", "teacher"):
        rows = read_metrics(RunStore(str(root / part)))
        if rows:
            return {"stage": f"{part} {rows[-1].get('stage', '')}".strip(), "step": rows[-1]["step"]}
    return {"stage": "start", "step": 0}


if __name__ == "__main__":
    run_job(main, ChaosConfig)
