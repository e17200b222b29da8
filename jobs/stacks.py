"""Where each process of a run is right now, and its stacks: `python -m jobs.stacks RUN [ROLE]`."""

import sys
from typing import Any

from cluster.node_tasks import dump_stacks
from cluster.observe import on_nodes
from cluster.roster import Row
from jobs.config import run_job
from jobs.watched import Watched, WatchedConfig, bare, is_here, watching

LONGEST_S = 60.0
OURS = ("/counterpoint/", "/actors/", "/jobs/", "/cluster/")
WAITS = frozenset(
    (
        *(
            "wait",
            "get",
            "acquire",
            "select",
            "poll",
            "accept",
            "join",
            "sleep",
            "flock",
            "futex",
            "__enter__",
        ),
        *("recv", "recv_into", "recv_bytes", "read", "readinto", "synchronize", "barrier", "broadcast"),
        *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    )
)
"""Functions in which a thread waits for somebody else."""


class StacksConfig(WatchedConfig):
    """Which run, and whose stacks."""

    every_thread: bool = False
    """Show threads of libraries too, in which none of this project's code runs."""


def main(config: StacksConfig) -> dict[str, Any]:
    """Write a line and the stacks of each process to standard error; return the lines."""
    with watching(config.run) as run:
        rows = [row for row in run.chosen(config.role) if row.pid and row.state in ("running", "restarting")]
        answers = ask(run, rows)
    if not rows:
        sys.stderr.write(f"nobody of the run is running{': ' + run.why_not if run.why_not else ''}\n")
    doing = {}
    for row in rows:
        answer = answers[row.label]
        doing[row.label] = summary(answer)
        sys.stderr.write(f"{row.label} (process {row.pid} on {row.node}): {doing[row.label]}\n")
        if "threads" in answer:
            sys.stderr.writelines(f"    {line}\n" for line in stack_lines(answer, config.every_thread))
    return {"run": config.run, "doing": doing}


def ask(run: Watched, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Return the stacks of rows by label: asked on their nodes, or here where they are on this machine."""
    here = {row.label: row for row in rows if is_here(row) and (row.role == "driver" or run.why_not)}
    calls = {
        row.label: (run.nodes[row.label], dump_stacks, (row.pid,))
        for row in rows
        if row.label not in here and row.label in run.nodes
    }
    folder = f"{run.facts.get('session')}/logs"
    answers = {label: dump_stacks(row.pid, folder) for label, row in here.items()}
    answers |= on_nodes(calls, LONGEST_S, "stacks") if calls else {}
    missing = {"error": f"its node cannot be reached ({run.why_not or 'the cluster does not know it'})"}
    return {row.label: _plain(answers.get(row.label, missing)) for row in rows}


def _plain(answer: Any) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    return {"error": " ".join(str(answer).split())[:300]}


def summary(answer: dict[str, Any]) -> str:
    """Return in one line what a process does in those threads that run this project's code."""
    if "error" in answer:
        return f"no stacks: {answer['error']}"
    said = [one for thread in answer["threads"] if (one := doing(thread)) is not None]
    # A thread that computes says more than those that wait for it.
    said.sort(key=lambda one: one.startswith("waiting"))
    return "; ".join(dict.fromkeys(said)) or "idle, waits to be called"


def doing(thread: dict[str, Any]) -> str | None:
    """Return what a thread does, by the innermost frame of this project; None if there is no such frame."""
    frames = thread["frames"]
    own = next((frame for frame in frames if any(part in frame[1] for part in OURS)), None)
    if own is None:
        return None
    name, path, line = own
    at = f"{name} ({'/'.join(path.split('/')[-2:])}:{line})"
    innermost = frames[0][0].rpartition(".")[2]
    waiting = innermost in WAITS or name in WAITS
    if thread["active"] and not waiting:
        return f"computing in {at}"
    return f"waiting in {at}" if waiting else f"in {at}, in {innermost}"


def stack_lines(answer: dict[str, Any], every_thread: bool) -> list[str]:
    """Return the stacks as text, outermost frame first; libraries' threads only if all are wanted."""
    lines = [f"(from {answer['how']})"]
    for thread in answer["threads"]:
        if not every_thread and doing(thread) is None:
            continue
        lines.append(f"thread {thread['name']}{' (on the CPU)' if thread['active'] else ''}")
        lines += [f"  {path}:{line} {name}" for name, path, line in reversed(thread["frames"])]
    return lines


if __name__ == "__main__":
    run_job(main, StacksConfig, bare(sys.argv[1:], "run", "role"))
