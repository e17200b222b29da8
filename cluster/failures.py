"""Report failures of three kinds from where they happen, and retry by kind.

The kind is found inside the actor, because an exception that crosses processes may lose its type. A `Failure`
carries the kind and the story in plain strings, so it survives any pickling.
"""

import functools
import inspect
import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from cluster.kinds import ErrorTypes, Failure, Kind, classify, root_cause
from cluster.observe import this_node

__all__ = [
    *("Failure", "Kind", "classify", "failure", "located", "reported", "reporting", "retrying", "root_cause"),
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def failure(error: BaseException, role: str, step: int | None = None, data: ErrorTypes = ()) -> Failure:
    """`error` as a `Failure` of `role`; one that is a `Failure` already keeps who failed first."""
    cause = root_cause(error, data)
    if isinstance(cause, Failure):
        return cause
    module = type(cause).__module__
    name = type(cause).__qualname__ if module == "builtins" else f"{module}.{type(cause).__qualname__}"
    details = "".join(traceback.format_exception(error))
    return Failure(classify(error, data), str(cause), role, step, name, details, _node())


def located(error: BaseException, role: str, rank: int, node: str) -> None:
    """Write on an exception where and when it was raised, and its traceback, which Ray Train loses.

    Pickling keeps it, unless the exception's type forbids that.
    """
    story = "".join(traceback.format_exception(error)).rstrip() if error.__traceback__ else ""
    with suppress(AttributeError):
        error.place = {  # type: ignore[attr-defined]
            "role": role, "rank": rank, "node": node, "pid": os.getpid(), "time": time.time(), "story": story,
        }  # fmt: skip


def _node() -> str:
    try:
        return this_node()
    except Exception:  # a failure is reported even where Ray cannot say where
        return ""


@contextmanager
def reported(role: str | Callable[[], str], step: int | None = None, data: ErrorTypes = ()) -> Iterator[None]:
    """A block whose exceptions leave as `Failure` of `role`; KeyboardInterrupt and SystemExit pass."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        raise failure(error, role if isinstance(role, str) else role(), step, data) from error


def reporting(role: str | Callable[[Any], str], data: ErrorTypes = ()) -> Callable[[F], F]:
    """Decorate a method of an actor, so that its exceptions are classified inside the actor.

    The step is taken from the method's `step` argument, or from an argument that has an integer `step`.

    Args:
        role: who failed, or a function of the instance that tells, such as ``lambda self: self.name``; it is
            asked only after a failure, so this may decorate a constructor that sets the name first.
        data: further types that mean bad data in this role.
    """

    def decorate(method: F) -> F:
        parameters = inspect.signature(method)

        def watched(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            who = role if isinstance(role, str) else functools.partial(role, self)
            return reported(who, _step(parameters, self, args, kwargs), data)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with watched(self, args, kwargs):
                return method(self, *args, **kwargs)

        @functools.wraps(method)
        async def call_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            with watched(self, args, kwargs):
                return await method(self, *args, **kwargs)

        return call_async if inspect.iscoroutinefunction(method) else call  # type: ignore[return-value]

    return decorate


def retrying(
    call: Callable[[], T],
    what: str,
    attempts: int = 3,
    backoff: float = 1.0,
    budget: float = math.inf,
    kinds: Collection[Kind] = frozenset({"infrastructure"}),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Call until it succeeds, fails with a kind that is not retried, or the budget is spent.

    Args:
        call: what to do; it must be safe to repeat.
        what: the subject of the log lines.
        attempts: how often to call at most, at least 1.
        backoff: seconds before the second attempt, doubled before each further one.
        budget: seconds in which the last attempt must have begun.
        kinds: the kinds worth another attempt.

    Raises:
        Exception: the last attempt's, unchanged but for a note on the attempts made.
    """
    if attempts < 1:
        raise ValueError(f"{what}: attempts={attempts}; pass at least 1")
    start, pause = clock(), backoff
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            kind, spent = classify(error), clock() - start
            if kind not in kinds or attempt == attempts or spent + pause > budget:
                if attempt > 1:
                    error.add_note(f"{what}: gave up after {attempt} attempts in {spent:.1f} s")
                raise
            told = f"attempt {attempt} of {attempts} failed ({kind})"
            logger.warning("%s: %s: %s; again in %.1f s", what, told, error, pause)
        sleep(pause)
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


def _step(parameters: inspect.Signature, instance: Any, args: tuple, kwargs: dict[str, Any]) -> int | None:
    try:
        given = parameters.bind(instance, *args, **kwargs).arguments
    except TypeError:
        return None
    if isinstance(given.get("step"), int):
        return given["step"]
    carried = (getattr(value, "step", None) for value in list(given.values())[1:])
    return next((step for step in carried if isinstance(step, int)), None)
