"""Whether every node can write to a storage URI, and read what the others wrote there."""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import waiting
from cluster.doctor_findings import reason
from cluster.everywhere import Answers, on_every_node
from cluster.placement import NodeView
from cluster.storage import RunStore

DRIVER = "driver"
ALL_READERS = 16
"""Up to so many nodes each reads what every other wrote; of more, each reads the first ones'."""
FEW = 4
PIECE = b"0123456789abcdef" * 4096


@dataclass(frozen=True)
class Sharing:
    """What nodes found at a storage URI."""

    uri: str
    refusals: dict[str, str] = field(default_factory=dict)
    """Why a node could not write there, by its name."""
    unseen: dict[str, dict[str, str]] = field(default_factory=dict)
    """By the reader's name, whose file it could not read, and why."""
    silent: dict[str, str] = field(default_factory=dict)
    """Nodes that gave no answer in time, with what they were asked."""
    asked: int = 0
    """How many took part, the driver included."""
    write_seconds: float = 0.0
    """The slowest node's time for one small file, an append and a replacement."""

    @property
    def shared(self) -> bool:
        """True when everyone wrote, and read what it should."""
        return not (self.refusals or self.unseen or self.silent)


def share(uri: str, nodes: Sequence[NodeView], timeout: float) -> Sharing:
    """Let the driver and each of `nodes` write a file below `uri`, then read the others'; nothing is left.

    Args:
        uri: what a job is given as `run`.
        nodes: the nodes to ask.
        timeout: seconds for each of the three rounds (write, read, remove).

    Raises:
        ValueError: when no process could use the URI: unknown protocol, missing driver.
    """
    store = RunStore(uri)
    uri = os.path.abspath(uri) if store.is_local and "://" not in uri else uri  # tasks have another directory
    made = store.is_local and not os.path.isdir(store.root)
    folder = f".doctor-{secrets.token_hex(8)}"
    names = [DRIVER, *(node.name for node in nodes)]
    marks = {name: f"{index}" for index, name in enumerate(names)}
    try:
        wrote = _ask(
            nodes, timeout, "write to", put_mark, {name: (uri, folder, mark) for name, mark in marks.items()}
        )
        refusals = {name: told for name, (told, _) in wrote.values.items() if told}
        there = {name: marks[name] for name in wrote.values if name not in refusals}
        wanted = {name: (uri, folder, _others(name, there)) for name in names if name in wrote.values}
        read = _ask(nodes, timeout, "read from", missing_marks, wanted)
    finally:
        _ask(nodes, timeout, "clean up", remove_marks, dict.fromkeys(names, (uri, folder, made)))
    unseen = {
        reader: {name: told[mark] for name, mark in marks.items() if mark in told}
        for reader, told in read.values.items()
        if told
    }
    silent = {name: reason(error) for one in (wrote, read) for name, error in one.failures.items()}
    slowest = max((seconds for _, seconds in wrote.values.values()), default=0.0)
    return Sharing(uri, refusals, unseen, silent, len(names), slowest)


def put_mark(uri: str, folder: str, mark: str) -> tuple[str, float]:
    """Write, append to and replace the file of one node; return why not ("" if it went) and the seconds."""
    begun = time.monotonic()
    try:
        store = RunStore(uri)
        name = f"{folder}/{mark}"
        store.write_bytes(name, PIECE)
        store.append(name, b"appended")
        if store.read_bytes(name) != PIECE + b"appended":
            return "what was appended is not there", time.monotonic() - begun
        store.write_text(name, mark)
        if store.read_text(name) != mark:
            return "an old content is read after a new one was put in its place", time.monotonic() - begun
    except Exception as error:
        return reason(error), time.monotonic() - begun
    return "", time.monotonic() - begun


def missing_marks(uri: str, folder: str, marks: Sequence[str]) -> dict[str, str]:
    """Return which of the files of others cannot be read here, and why."""
    store, missing = RunStore(uri), {}
    for mark in marks:
        try:
            text = store.read_text(f"{folder}/{mark}")
            if text != mark:
                missing[mark] = f"{text[:20]!r} is there in place of {mark!r}"
        except FileNotFoundError:
            missing[mark] = "no such file"
        except Exception as error:
            missing[mark] = reason(error)
    return missing


def remove_marks(uri: str, folder: str, made: bool) -> None:
    """Remove what the check wrote, as far as this process may, and the store's folder if it was `made`."""
    with contextlib.suppress(Exception):
        store = RunStore(uri)
        store.delete(folder)
        if made:
            os.rmdir(store.root)


def _ask(
    nodes: Sequence[NodeView],
    timeout: float,
    verb: str,
    function: Callable[..., Any],
    arguments: Mapping[str, tuple[Any, ...]],
) -> Answers[Any]:
    """Call `function` on the nodes and in this process, for whichever of them there are arguments."""
    what = f"an attempt to {verb} the storage"
    among = [node for node in nodes if node.name in arguments]
    answers = on_every_node(function, among, timeout, what, arguments)
    if DRIVER in arguments:
        _call_here(function, arguments[DRIVER], timeout, what, answers)
    return answers


def _call_here(
    function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float, what: str, answers: Answers[Any]
) -> None:
    """The driver's turn, in a thread that is left behind if its storage hangs."""
    told: list[Any] = []
    thread = threading.Thread(target=lambda: told.append(function(*arguments)), daemon=True)
    thread.start()
    thread.join(timeout)
    if told:
        answers.values[DRIVER] = told[0]
    else:
        answers.failures[DRIVER] = waiting.WaitTimeout(what, timeout, 0, 1, [DRIVER])


def _others(name: str, there: Mapping[str, str]) -> list[str]:
    """The marks that a node reads: everyone else's, or the first ones' of many; the driver reads all."""
    marks = [mark for other, mark in there.items() if other != name]
    return marks if len(there) <= ALL_READERS or name == DRIVER else marks[:FEW]
