"""The table of what runs where: a row an actor or rank, from what they report and what the cluster knows."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

STATES = {
    "DEPENDENCIES_UNREADY": "starting",
    "PENDING_CREATION": "starting",
    "ALIVE": "running",
    "RESTARTING": "restarting",
}
DIED = (
    "WORKER_DIED",
    "NODE_DIED",
    "creation_task_failure_context",
    "runtime_env_failed_context",
    "oom_context",
)
"""What Ray writes into the cause of a death that nobody asked for."""
COLUMNS = ("role", "rank", "node", "device", "pid", "version", "state", "for", "restarts")


@dataclass(frozen=True)
class Row:
    """One actor of a run, or one rank of its trainer."""

    role: str
    rank: int
    node: str = ""
    """The machine, and the beginning of Ray's id of the node."""
    device: str = "cpu"
    pid: int = 0
    version: int | None = None
    """Step of the newest checkpoint that it has written or returned to; None where it has none."""
    state: str = "starting"
    """starting, running, restarting, done or failed."""
    since: float = 0.0
    """When it took up that state, in seconds since the epoch."""
    restarts: int = 0

    @property
    def label(self) -> str:
        """Role and rank in one word, such as "critics-0"."""
        return f"{self.role}-{self.rank}"

    def plain(self) -> dict[str, Any]:
        """Return the row as a dict that JSON can hold."""
        return asdict(self)


def row_of(plain: Mapping[str, Any]) -> Row:
    """Return the row that `Row.plain` gave, of this version or another one."""
    return Row(**{name: value for name, value in plain.items() if name in Row.__dataclass_fields__})


def split_label(label: str) -> tuple[str, int]:
    """Return role and rank of a label such as "critics-0" or "critics-0~2"; rank 0 if it has none."""
    role, dash, rank = label.partition("~")[0].rpartition("-")
    return (role, int(rank)) if dash and rank.isdigit() else (label, 0)


def actor_rows(
    actors: Iterable[Mapping[str, Any]], run: str, nodes: Mapping[str, str], devices: Mapping[str, str]
) -> list[Row]:
    """Return the rows of a run's named actors; of several that took the same place, that of the last.

    Args:
        actors: records of Ray's actor table.
        run: the run's id.
        nodes: the nodes' names by Ray's id.
        devices: GPUs by label; an actor that is not in there has none.
    """
    found: dict[str, Row] = {}
    for actor in sorted(actors, key=lambda actor: actor["StartTime"] or actor["Timestamp"]):
        if not actor["Name"].startswith(f"{run}/"):
            continue
        role, rank = split_label(actor["Name"].removeprefix(f"{run}/"))
        node = actor["Address"]["NodeID"]
        row = Row(
            role, rank, nodes.get(node, ""), devices.get(f"{role}-{rank}") or "cpu", actor["Pid"], None,
            state_of(actor), max(actor["StartTime"], actor["EndTime"]) / 1000.0, actor["NumRestarts"],
        )  # fmt: skip
        found[row.label] = row
    return sorted(found.values(), key=lambda row: (row.role, row.rank))


def state_of(actor: Mapping[str, Any]) -> str:
    """Return the state of a record of Ray's actor table in a word."""
    if actor["State"] != "DEAD":
        return STATES.get(actor["State"], actor["State"].lower())
    return "failed" if any(word in str(actor["DeathCause"]) for word in DIED) else "done"


def with_deaths(rows: Iterable[Row], actors: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return reported rows, those marked failed whose process the cluster knows to be dead."""
    dead = {actor["Pid"]: actor for actor in actors if actor["State"] == "DEAD"}
    return [
        replace(row, state="failed", since=dead[row.pid]["EndTime"] / 1000.0)
        if row.pid in dead and row.state in ("starting", "running")
        else row
        for row in rows
    ]


def table(rows: Sequence[Row], now: float | None = None) -> str:
    """Return rows as aligned text, a line each below a line of headings."""
    now = time.time() if now is None else now
    lines = [COLUMNS, *(_cells(row, now) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: Row, now: float) -> tuple[str, ...]:
    version = "-" if row.version is None else str(row.version)
    return (
        row.role, str(row.rank), row.node or "-", row.device, str(row.pid or "-"), version, row.state,
        _age(now - row.since) if row.since else "-", str(row.restarts),
    )  # fmt: skip


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
