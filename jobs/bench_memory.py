"""What the planner says a process holds against what it then held.

python -m jobs.bench memory configs/bench/memory.yaml
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.connect import thread_env
from cluster.environment import describe_environment
from cluster.storage import RunStore
from counterpoint.section import Section
from counterpoint.strategies.config import StrategyConfig
from jobs.memory_probe import MemoryCase, estimate

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""glibc gives freed blocks back at once, so that resident memory is what is in use, not what once was."""
TIMEOUT = 600.0


class MemoryBenchConfig(Section):
    """Cases that are estimated on paper and run as processes; the ratio is measured / estimated."""

    cases: dict[str, MemoryCase] = Field(
        default={
            "trainer": MemoryCase(),
            "trainer_small_batch": MemoryCase(samples=4),
            "trainer_checkpointing": MemoryCase(strategy=StrategyConfig(activation_checkpointing=True)),
            "trainer_accumulating": MemoryCase(samples=8, accumulate=2),
            "trainers_ddp": MemoryCase(samples=4, ranks=2),
            "trainers_fsdp": MemoryCase(samples=4, ranks=2, strategy=StrategyConfig(name="fsdp")),
            "critics": MemoryCase(role="critics"),
            "critics_large_batch": MemoryCase(role="critics", samples=48),
        }
    )
    """The cases by name."""
    out: str | None = None
    """File for the results (JSON); none is written unless set."""


def main(config: MemoryBenchConfig) -> dict[str, Any]:
    """Return megabytes estimated and measured for each case, and the ratio that is farthest from 1."""
    result: dict[str, Any] = {}
    for name, case in config.cases.items():
        expected, found = estimate(case), measure(case)
        result[name] = {
            "estimated_mb": round(expected / 1e6, 1),
            "measured_mb": round(found / 1e6, 1),
            "ratio": round(found / expected, 3),
        }
    worst = max(abs(one["ratio"] - 1.0) for one in result.values())
    line = {"worst_error": round(worst, 3)} | result
    if config.out is not None:
        path = Path(config.out).absolute()
        told = {"environment": describe_environment(), "cores": os.cpu_count()} | line
        RunStore(str(path.parent)).write_text(path.name, json.dumps(told, indent=1) + "\n")
    return line


def measure(case: MemoryCase) -> int:
    """Run a case in processes of its own and return the most that any of them held, in bytes."""
    environment = os.environ | ALLOCATOR | thread_env(1)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'meeting'}"
        probe = [sys.executable, "-m", "jobs.memory_probe", case.model_dump_json(exclude_unset=True)]
        processes = [
            subprocess.Popen(
                [*probe, str(rank), rendezvous], env=environment, stdout=subprocess.PIPE, text=True
            )
            for rank in range(case.ranks)
        ]
        try:
            lines = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    failed = [process.returncode for process in processes if process.returncode]
    if failed:
        raise RuntimeError(f"the measured process ended with {failed[0]}: its own message is above")
    return max(int(json.loads(line.splitlines()[-1])["peak"]) for line in lines)
