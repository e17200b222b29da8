"""The last lines of a run's actors, ranks and driver, by name: `python -m jobs.logs RUN [ROLE]`."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.node_tasks import log_tails
from cluster.observe import on_nodes
from cluster.roster import Row
from jobs.config import run_job
from jobs.watched import Watched, WatchedConfig, bare, is_here, watching

ERROR = re.compile(
    r"\b(ERROR|CRITICAL|FATAL|Traceback|Killed|Segmentation fault)\b|\b\w*(Error|Exception):|SIG[A-Z]{3,}"
)
LONGEST_S = 60.0
BYTES_PER_LINE = 400


class LogsConfig(WatchedConfig):
    """Which run, whose logs, and how much of them."""

    lines: int = Field(default=40, ge=1)
    """Last lines of each log."""
    errors: bool = False
    """Only logs with errors, each from its first error on."""


def main(config: LogsConfig) -> dict[str, Any]:
    """Write logs to standard error, those with errors first; return whose there were."""
    with watching(config.run) as run:
        rows = [row for row in run.chosen(config.role) if row.pid]
        # An error is looked for in more than is shown.
        size = config.lines * BYTES_PER_LINE * (50 if config.errors else 1)
        found, where = collect(run, rows, size)
    logs = {name: tail(text, config.lines, config.errors) for name, text in found.items()}
    logs = {name: lines for name, lines in logs.items() if lines}
    for name in sorted(logs, key=lambda name: (not any(map(ERROR.search, logs[name])), name)):
        sys.stderr.writelines(f"[{name}] {line}\n" for line in logs[name])
    if not found:
        sys.stderr.write(f"no logs: {where}\n")
    erring = sorted(name for name, lines in logs.items() if any(map(ERROR.search, lines)))
    return {"run": config.run, "logs": sorted(logs), "with_errors": erring, "from": where}


def collect(run: Watched, rows: Iterable[Row], size: int) -> tuple[dict[str, str], str]:
    """Return the ends of logs by label and stream, and where they came from (or why there are none).

    From the nodes where the cluster answers, else from the session's directory where it is on this machine.
    """
    rows = list(rows)
    driver = (f"job-driver-{run.facts['submission']}.log",) if run.facts.get("submission") else ()
    if not run.why_not:
        calls = {
            row.label: (run.nodes[row.label], log_tails, ("", [row.pid], size, _others(row, driver)))
            for row in rows
            if row.label in run.nodes
        }
        answers = on_nodes(calls, LONGEST_S, "logs")
        return _named(answers), f"the nodes of {run.facts['address']}"
    folders = [Path(run.facts["session"]) / "logs"] if run.facts.get("session") else []
    folder = next((str(folder) for folder in folders if folder.is_dir()), "")
    if not folder:
        return {}, _gone(run)
    answers = {
        row.label: log_tails(folder, [row.pid], size, _others(row, driver))
        for row in rows
        if row.role == "driver" or is_here(row)
    }
    return _named(answers), folder


def _others(row: Row, driver: tuple[str, ...]) -> tuple[str, ...]:
    return driver if row.role == "driver" else ()


def _named(answers: dict[str, Any]) -> dict[str, str]:
    """The texts by label and stream; a log that could not be had says so in its place."""
    named: dict[str, str] = {}
    for label, answer in answers.items():
        if isinstance(answer, Exception):
            named[label] = f"ERROR: this log is not to be had: {answer}"
            continue
        for file, text in answer.items():
            if text.strip():
                stream = file.rpartition(".")[2]
                named[label if stream == "log" else f"{label} {stream}"] = text
    return named


def _gone(run: Watched) -> str:
    if not run.facts.get("address"):
        return "the run used no cluster: its driver's terminal had all there was"
    if kept := run.facts.get("kept_logs"):
        return f"{run.why_not}; its logs were kept in {kept} on {run.facts['host']}"
    if run.facts.get("private_root"):
        return (
            f"{run.why_not}; its files in {run.facts['private_root']} on {run.facts['host']} are gone: they "
            "are kept only after a failure of the infrastructure; failure.json in the run's storage has the "
            "traceback of a failed run"
        )
    return f"{run.why_not}; its logs are below {run.facts.get('session')} on its nodes"


def tail(text: str, lines: int, errors: bool) -> list[str]:
    """Return the last lines of a text; with `errors`, those from its first error on, and none without one."""
    every = text.splitlines()
    if not errors:
        return every[-lines:]
    first = next((i for i, line in enumerate(every) if ERROR.search(line)), None)
    return [] if first is None else every[first : first + lines]


if __name__ == "__main__":
    run_job(main, LogsConfig, bare(sys.argv[1:], "run", "role"))
