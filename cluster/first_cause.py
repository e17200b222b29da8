"""The first cause of a failed run, out of what Ray and Ray Train put around it: who, where, and its story."""

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayTaskError

from cluster.kinds import WORST_FIRST, Failure, Kind, classify, peeled
from cluster.roster import split_label

REMOTE = re.compile(r"ray::(?P<what>[\w.]+)\(\) \(pid=(?P<pid>\d+), ip=(?P<ip>[\w.:]+)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ERROR_LINE = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception|Failure|Interrupt|Exit)\b")


@dataclass(frozen=True)
class FirstCause:
    """What ended a run."""

    kind: Kind
    original: str
    """The exception's type, with its module unless built in."""
    message: str
    role: str
    """Who failed: trainer, critics, evaluators, ... or driver."""
    rank: int | None
    node: str
    """Where; empty where unknown."""
    pid: int | None
    step: int | None
    """The step it failed at, where the exception says so."""
    story: str
    """The whole traceback of where it was raised, as text."""
    notes: tuple[str, ...] = ()
    """What was added on the way: attempts, and failures before."""
    others: tuple[str, ...] = ()
    """Ranks that failed too, a line each; mostly because a peer was gone."""
    names: frozenset[str] = frozenset()
    """The names of the exception's type and of its bases."""


def first_cause(error: BaseException) -> FirstCause:
    """Take the wrappers off an exception, and return what is inside.

    Of several ranks that failed it is the one of the worst kind (code, then data), and of those the first.
    """
    rank: int | None = None
    story, notes, others = "", list(getattr(error, "__notes__", ())), []
    while True:
        workers = getattr(error, "worker_failures", None)
        if isinstance(workers, dict) and workers:
            rank = _first_rank(workers)
            others += [f"rank {r}: {_line(e)}" for r, e in sorted(workers.items()) if r != rank]
            error = workers[rank]
        else:
            inner = peeled(error)
            # The innermost wrapper that tells a story has seen the most of it.
            story = _story_of(error) or story
            if inner is error:
                break
            error = inner
        notes += [note for note in getattr(error, "__notes__", ()) if note not in notes]
    return _cause(error, rank, story, tuple(notes), tuple(others))


def _cause(
    error: BaseException, rank: int | None, story: str, notes: tuple[str, ...], others: tuple[str, ...]
) -> FirstCause:
    names = frozenset(cls.__name__ for cls in type(error).__mro__)
    if isinstance(error, Failure):
        role, index = split_label(error.role)
        names = names | {error.original.rpartition(".")[2]}
        return FirstCause(
            error.kind, error.original, error.message, role, index, error.node, None, error.step,
            (error.details or story).rstrip(), notes, others, names,
        )  # fmt: skip
    place: dict[str, Any] = getattr(error, "place", None) or {}
    story = place.get("story") or story or _local_story(error)
    remote = REMOTE.search(story)
    role = place.get("role") or ("trainer" if rank is not None else "driver")
    if remote and role == "driver":
        role = remote["what"].partition(".")[0]
    return FirstCause(
        classify(error), _type_name(error), str(error), role, place.get("rank", rank),
        place.get("node") or (remote["ip"] if remote else ""),
        place.get("pid") or (int(remote["pid"]) if remote else None),
        getattr(error, "step", None) if isinstance(getattr(error, "step", None), int) else None,
        story, notes, others, names,
    )  # fmt: skip


def _first_rank(workers: dict[int, BaseException]) -> int:
    def order(rank: int) -> tuple[int, float, int]:
        inside = workers[rank]
        while (inner := peeled(inside)) is not inside:
            inside = inner
        place: dict[str, Any] = getattr(inside, "place", None) or {}
        return WORST_FIRST.index(classify(inside)), place.get("time", float("inf")), rank

    return min(workers, key=order)


def _story_of(error: BaseException) -> str:
    """The remote traceback that a wrapper carries, or that the exception was raised from."""
    for carrier in (error, error.__cause__):
        told = getattr(carrier, "_traceback_str", None)
        if carrier is not None and isinstance(carrier, RayTaskError):
            # What `ray.get` raises has kept the traceback as its text only, without Ray's own frames.
            told = str(carrier)
        if isinstance(told, str) and told.strip():
            return COLOUR.sub("", told).rstrip()
    return ""


def _local_story(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _type_name(error: BaseException) -> str:
    module = type(error).__module__
    return type(error).__qualname__ if module == "builtins" else f"{module}.{type(error).__qualname__}"


def _line(error: BaseException) -> str:
    """An exception's last line that names it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = next((line for line in reversed(lines) if ERROR_LINE.match(line)), None)
    text = named or (lines[0] if lines else "")
    return text if named else f"{type(error).__name__}: {text}"


def frames(story: str) -> Iterator[tuple[str, int, str]]:
    """Yield file, line and function of each frame in the text of a traceback, outermost first."""
    for match in re.finditer(r'File "([^"]+)", line (\d+), in (\S+)', story):
        yield match[1], int(match[2]), match[3]
