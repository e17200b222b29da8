"""One function on every node of a cluster at once, with a limit: who answered, who failed, who did not."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import waiting
from cluster.placement import NodeView

T = TypeVar("T")
COLLECT_SECONDS = 10.0


@dataclass(frozen=True)
class Answers(Generic[T]):
    """What became of a call on every node, by the node's name."""

    values: dict[str, T]
    """What it returned where it ended in time."""
    failures: dict[str, BaseException]
    """What it raised elsewhere; a `waiting.WaitTimeout` where nothing came."""


def pinned(node_id: str) -> dict[str, Any]:
    """Options of a task or an actor that asks for nothing and runs on one node or not at all."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def on_every_node(
    function: Callable[..., T],
    nodes: Sequence[NodeView],
    timeout: float,
    what: str,
    arguments: Mapping[str, tuple[Any, ...]] | None = None,
) -> Answers[T]:
    """Call `function` once on each of `nodes`, side by side; a node that hangs costs `timeout` and no more.

    Args:
        function: of a module that workers can import.
        nodes: where to call it; each needs its `id`.
        timeout: seconds for all of them together.
        what: the subject of the message about a silent node.
        arguments: positional arguments by the node's name; none for no arguments.
    """
    remote = _remote(function)
    given = arguments or {}
    pending = {
        remote.options(max_retries=0, **pinned(node.id)).remote(*given.get(node.name, ())): node.name
        for node in nodes
    }
    answers = Answers[T]({}, {})
    deadline = time.monotonic() + timeout
    while pending:
        left = deadline - time.monotonic()
        with suppress(waiting.WaitTimeout):
            waiting.first_of(list(pending), max(0.0, left), what)
        finished, _ = waiting.done(list(pending))
        for ref in finished:
            _collect(ref, pending.pop(ref), what, answers)
        if not finished and left <= 0:
            break
    for ref, name in pending.items():
        answers.failures[name] = waiting.WaitTimeout(what, timeout, 0, 1, [name])
        ray.cancel(ref, force=True)
    return answers


@functools.cache
def _remote(function: Callable[..., Any]) -> Any:
    """The remote function of a function, sent to the cluster once however often it is called."""
    return ray.remote(function)


def _collect(ref: ObjectRef, name: str, what: str, answers: Answers[Any]) -> None:
    try:
        answers.values[name] = waiting.get(ref, COLLECT_SECONDS, what)
    except Exception as error:
        answers.failures[name] = error
