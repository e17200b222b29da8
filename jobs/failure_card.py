"""What a failed run says last: the whole traceback of its first cause, and a card of what to do."""

import contextlib
import json
import logging
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster import identity
from cluster.first_cause import FirstCause, first_cause, frames
from jobs.run_state import last_step, newest_checkpoint

logger = logging.getLogger(__name__)

WIDTH = 100
LONGEST_CAUSE = 600
OWN = ("/counterpoint/", "/actors/", "/jobs/")
"""Folders whose frames say where in this project something happened."""
NO_NUMBER = re.compile(r"\bnan\b|not finite|non-finite", re.IGNORECASE)

Remedy = Callable[[FirstCause, str], str]


@dataclass(frozen=True)
class Card:
    """What a failed run says at its end.

    Attributes:
        cause: the first cause.
        run: the run's id; empty for work without one.
        uri: where the run is stored; empty for work without one.
        last_step: the last step that is known to have been taken; None before the first.
        checkpoint: step of the newest whole checkpoint; None if there is none.
        remedy: what to do.
        logs: where to look further.
    """

    cause: FirstCause
    run: str
    uri: str
    last_step: int | None
    checkpoint: int | None
    remedy: str
    logs: str

    def plain(self) -> dict[str, Any]:
        """Return the card as a dict that JSON can hold."""
        cause = self.cause
        return {
            "run": self.run or None, "uri": self.uri or None, "kind": cause.kind, "error": cause.original,
            "message": cause.message, "role": cause.role, "rank": cause.rank, "node": cause.node or None,
            "pid": cause.pid, "step": cause.step, "last_step": self.last_step, "checkpoint": self.checkpoint,
            "what_to_do": self.remedy, "logs": self.logs, "also": list(cause.others),
            "notes": list(cause.notes), "traceback": cause.story, "time": time.time(),
        }  # fmt: skip

    def __str__(self) -> str:
        cause = self.cause
        message = textwrap.shorten(cause.message, LONGEST_CAUSE, placeholder=" ...")
        lines = [
            ("first cause", f"{cause.original}: {message} ({cause.kind})"),
            ("role", cause.role if cause.rank is None else f"{cause.role}, rank {cause.rank}"),
            ("node", (cause.node or "unknown") + (f", process {cause.pid}" if cause.pid else "")),
        ]
        if self.uri:
            lines += [("last step", _steps(self)), ("run", f"{self.run} at {self.uri}")]
        lines += [("also", other) for other in cause.others[:3]]
        lines += [("note", note) for note in cause.notes[:3]]
        lines += [("what to do", self.remedy), ("logs", self.logs)]
        return "\n".join(
            ["-- the run failed ".ljust(WIDTH, "-"), *(_line(*line) for line in lines), "-" * WIDTH]
        )


def tell_failure(error: BaseException) -> None:
    """Write the traceback of an exception's first cause and the card to standard error and `failure.json`.

    Whatever goes wrong with that, the exception itself is told.
    """
    try:
        card = card_of(error)
    except Exception:
        logger.exception("the card of a failure could not be made")
        sys.excepthook(type(error), error, error.__traceback__)
        return
    sys.stderr.write(f"{card.cause.story}\n\n{card}\n")
    run = identity.begun()
    with contextlib.suppress(Exception):
        if run is not None and run.store is not None:
            run.store.write_text(identity.FAILURE_FILE, json.dumps(card.plain(), indent=1))


def card_of(error: BaseException) -> Card:
    """Return the card of an exception that ended the work of this process."""
    cause = first_cause(error)
    run = identity.begun()
    if run is None or run.store is None:
        return Card(cause, "", "", None, None, remedy(cause, ""), _logs({}, ""))
    cause = _placed(cause, run.rows)
    last, whole = last_step(run.store, run.figures), newest_checkpoint(run.store).step
    uri = run.store.uri
    return Card(cause, run.id, uri, last, whole, remedy(cause, uri), _logs(run.facts, uri))


def _placed(cause: FirstCause, rows: list[dict[str, Any]]) -> FirstCause:
    """The cause with the node that the placement table has for its role and rank, where it has none."""
    for row in rows:
        if (row["role"], row["rank"]) == (cause.role, cause.rank):
            return replace(cause, node=cause.node or row["node"], pid=cause.pid or row["pid"] or None)
    return cause


def remedy(cause: FirstCause, uri: str) -> str:
    """Return what to do about a cause, in one or two sentences."""
    for holds, words in REMEDIES:
        if holds(cause):
            return words(cause, uri)
    return _by_kind(cause, uri)


def _by_kind(cause: FirstCause, uri: str) -> str:
    if cause.kind == "infrastructure":
        return f"another place or moment may do: {_resume(uri)}"
    if cause.kind == "data":
        return f"the data is broken: mend or leave out what the message names, then {_resume(uri)}"
    own = [(path, line) for path, line, _ in frames(cause.story) if any(part in path for part in OWN)]
    where = f" at {own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""
    return f"mend the code{where} (the traceback is above), then {_resume(uri)}"


def _resume(uri: str) -> str:
    return (
        f"start the same command again with run={uri} resume=true" if uri else "start the same command again"
    )


def _memory_of_gpu(cause: FirstCause, uri: str) -> str:
    return (
        "the GPU's memory is full: lower the batch size (raise trainer.accumulate to keep its effect), turn "
        "on trainer.strategy.activation_checkpointing, or shard with trainer.strategy.name=fsdp; `python -m "
        f"jobs.plan CONFIG` says what fits; then {_resume(uri)}"
    )


def _memory_of_host(cause: FirstCause, uri: str) -> str:
    return (
        "the machine's memory is full: lower the batch size or the number of actors on a machine, or give "
        f"them more; `python -m jobs.plan CONFIG` says what each takes; then {_resume(uri)}"
    )


def _died(cause: FirstCause, uri: str) -> str:
    return (
        "its process ended without a word: killed (often by the kernel, for memory: look into `dmesg` on the "
        f"node) or crashed in native code; {_look(uri)}; then {_resume(uri)}"
    )


def _gone(cause: FirstCause, uri: str) -> str:
    return f"a machine left the cluster: check it (`ray status`), then {_resume(uri)}"


def _no_room(cause: FirstCause, uri: str) -> str:
    return f"ask for less, or add machines, as the message says; then {_resume(uri)}"


def _late(cause: FirstCause, uri: str) -> str:
    stacks = f" (`python -m jobs.stacks {uri}` shows where, while it runs)" if uri else ""
    return f"somebody did not answer in time: hung, starved of CPU, or gone{stacks}; then {_resume(uri)}"


def _storage(cause: FirstCause, uri: str) -> str:
    return (
        "the storage refused: check that there is space, that every node may write there and sees the same "
        f"files; then {_resume(uri)}"
    )


def _shape_of_checkpoint(cause: FirstCause, uri: str) -> str:
    return "delete the damaged checkpoint: the one before it is taken then; " + _resume(uri)


def _diverged(cause: FirstCause, uri: str) -> str:
    return (
        "the numbers went wrong: lower the learning rate or optimizer.max_gradient_norm, or use precision "
        "fp32; resuming repeats the same steps, so change that first"
    )


def _look(uri: str) -> str:
    return f"`python -m jobs.logs {uri} --errors` has its last words" if uri else "look into Ray's logs"


def _named(*names: str) -> Callable[[FirstCause], bool]:
    return lambda cause: bool(cause.names & set(names))


def _says(*words: str) -> Callable[[FirstCause], bool]:
    return lambda cause: any(word in cause.message for word in words)


def _from_memory_monitor(cause: FirstCause) -> bool:
    died = cause.kind == "infrastructure" and _says("memory monitor", "OOM", "out of memory")(cause)
    return (
        died
        or _named("MemoryError")(cause)
        or (_named("OutOfMemoryError")(cause) and "ray" in cause.original)
    )


REMEDIES: tuple[tuple[Callable[[FirstCause], bool], Remedy], ...] = (
    (_says("CUDA out of memory", "CUDA error: out of memory"), _memory_of_gpu),
    (lambda cause: _named("OutOfMemoryError")(cause) and "torch" in cause.original, _memory_of_gpu),
    (_named("NodeDiedError"), _gone),
    (lambda cause: _named("RayActorError", "ActorDiedError")(cause) and _says("node died")(cause), _gone),
    (_from_memory_monitor, _memory_of_host),
    (_named("PlacementError", "TaskUnschedulableError", "ActorUnschedulableError"), _no_room),
    (_named("RayActorError", "WorkerCrashedError", "LocalRayletDiedError"), _died),
    (_named("DamagedCheckpointError"), _shape_of_checkpoint),
    (_named("OutOfDiskError", "ObjectStoreFullError", "PermissionError", "FileNotFoundError"), _storage),
    (_says("No space left on device", "Read-only file system", "Disk quota exceeded"), _storage),
    (lambda cause: bool(NO_NUMBER.search(cause.message)) or _named("FloatingPointError")(cause), _diverged),
    (_named("WaitTimeout", "GetTimeoutError", "TimeoutError", "CollectiveTimeoutError"), _late),
)
"""What is known about causes, the most particular first."""


def _logs(facts: Mapping[str, Any], uri: str) -> str:
    if not uri or not facts.get("address"):
        return "above; nothing else was written"
    if facts.get("private_root"):
        return (
            f"`python -m jobs.logs {uri} --errors`; Ray's files in {facts['private_root']} are kept after a "
            "failure of the infrastructure, and deleted after any other"
        )
    return f"`python -m jobs.logs {uri} --errors`, while the cluster {facts['address']} is up"


def _steps(card: Card) -> str:
    last = "none was taken" if card.last_step is None else str(card.last_step)
    kept = (
        "no whole checkpoint"
        if card.checkpoint is None
        else f"newest whole checkpoint: step {card.checkpoint}"
    )
    return f"{last}; {kept}"


def _line(name: str, text: str) -> str:
    lead = f"{name}:".ljust(13)
    return textwrap.fill(
        " ".join(text.split()), WIDTH, initial_indent=lead, subsequent_indent=" " * 13,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
