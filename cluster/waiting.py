"""Waiting for remote results, always with a limit: the only callers of `ray.get` and `ray.wait`."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar, overload

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

T = TypeVar("T")


class WaitTimeout(TimeoutError):  # noqa: N818 - it is a TimeoutError by name too
    """What was waited for did not arrive in time.

    Attributes:
        what: what was waited for, in the caller's words.
        seconds: the limit that passed, in seconds.
        finished: how many of `total` had arrived.
        missing: names of those that had not, where the caller gave names.
    """

    def __init__(
        self, what: str, seconds: float, finished: int, total: int, missing: Sequence[str] = ()
    ) -> None:
        self.what, self.seconds, self.finished, self.total = what, seconds, finished, total
        self.missing = tuple(missing)
        names = f" (missing: {_shortened(self.missing)})" if self.missing else ""
        super().__init__(f"{what}: {finished} of {total} finished within {seconds:g} s{names}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.seconds, self.finished, self.total, self.missing)


class NotReady(RuntimeError):  # noqa: N818 - reads as what `ready` found
    """An actor failed before it was ready; `cause` is what it, or Ray, raised.

    Attributes:
        what: what was being started, in the caller's words.
        name: the name of the actor that failed first.
        cause: the exception, unwrapped as `get` does.
    """

    def __init__(self, what: str, name: str, cause: BaseException) -> None:
        self.what, self.name, self.cause = what, name, cause
        super().__init__(f"{what}: {name} failed to start: {_last_line(cause)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.name, self.cause)


@overload
def get(refs: ObjectRef, timeout: float, what: str) -> Any: ...
@overload
def get(refs: Sequence[ObjectRef], timeout: float, what: str) -> list[Any]: ...
@overload
def get(refs: Mapping[str, ObjectRef], timeout: float, what: str) -> dict[str, Any]: ...
def get(refs: Any, timeout: float, what: str) -> Any:
    """Values of one reference, a sequence (as a list) or a mapping (as a dict, same keys).

    An error of the remote code is raised as itself, with Ray's wrapper and its remote traceback as its cause;
    the first failure ends the wait even while others still run.

    Args:
        refs: what to wait for.
        timeout: limit in seconds for all of them together, at least 0.
        what: the subject of the error message, such as "verdicts of step 12".

    Raises:
        WaitTimeout: when the limit passes; names the missing keys of a mapping.
        ValueError: when `timeout` is no finite number of seconds.
    """
    if isinstance(refs, ObjectRef):
        return _values([refs], (), timeout, what)[0]
    if isinstance(refs, Mapping):
        return dict(zip(refs, _values(list(refs.values()), tuple(refs), timeout, what), strict=True))
    return _values(list(refs), (), timeout, what)


def ready(actors: Mapping[str, Any], timeout: float, what: str) -> None:
    """Wait until the constructors of all `actors` (name to handle) have returned.

    Raises:
        NotReady: as soon as one has failed; names it and carries its cause.
        WaitTimeout: when the limit passes; names the actors that are not up.
    """
    names = {actor.__ray_ready__.remote(): name for name, actor in actors.items()}
    deadline = time.monotonic() + _checked(timeout)
    pending = list(names)
    while pending:
        left = max(0.0, deadline - time.monotonic())
        finished, pending = ray.wait(pending, timeout=left, fetch_local=False)
        for ref in finished:
            try:
                ray.get(ref, timeout=timeout)
            except RayError as error:
                cause = unwrapped(error)
                raise NotReady(what, names[ref], cause) from cause
        if pending and time.monotonic() >= deadline:
            raise WaitTimeout(
                what, timeout, len(names) - len(pending), len(names), [names[ref] for ref in pending]
            )


def done(refs: Sequence[ObjectRef]) -> tuple[list[ObjectRef], list[ObjectRef]]:
    """Split `refs` into (finished, pending) without waiting; a failed call counts as finished."""
    if not refs:
        return [], []
    return ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)


def first_of(
    refs: Sequence[ObjectRef], timeout: float, what: str, count: int = 1
) -> tuple[list[ObjectRef], list[ObjectRef]]:
    """Wait until `count` of `refs` have finished, and split them into (finished, pending).

    All that have finished by then are in the first list, so it may be longer than `count`.

    Raises:
        WaitTimeout: when fewer than `count` finish within `timeout` seconds.
        ValueError: when `count` is not within 1 and the number of references.
    """
    if not 1 <= count <= len(refs):
        raise ValueError(f"{what}: count={count} of {len(refs)} references; pass 1 to {len(refs)}")
    finished, _ = ray.wait(list(refs), num_returns=count, timeout=_checked(timeout), fetch_local=False)
    if len(finished) < count:
        raise WaitTimeout(what, timeout, len(finished), len(refs))
    return done(refs)


def unwrapped(error: BaseException) -> BaseException:
    """The error that remote code raised, out of the wrappers that Ray put around it on each hop.

    The constructor's error is found inside `ActorDiedError` too; an error of Ray itself comes back as it is.
    """
    while True:
        inner = error if isinstance(error, RayTaskError) else _constructor_error(error)
        cause = inner.cause if inner is not None else None
        if not isinstance(cause, BaseException):
            return error
        error = cause


def _constructor_error(error: BaseException) -> RayTaskError | None:
    if getattr(error, "actor_init_failed", False) and error.args and isinstance(error.args[0], RayTaskError):
        return error.args[0]
    return None


def _values(refs: list[ObjectRef], names: Sequence[str], timeout: float, what: str) -> list[Any]:
    try:
        return ray.get(refs, timeout=_checked(timeout))
    except RayTaskError as error:
        _raise_cause(error)
    except GetTimeoutError:
        pending = set(done(list(dict.fromkeys(refs)))[1])
        missing = [name for name, ref in zip(names, refs, strict=False) if ref in pending]
        finished = sum(ref not in pending for ref in refs)
        raise WaitTimeout(what, timeout, finished, len(refs), missing) from None


def _raise_cause(error: RayTaskError) -> NoReturn:
    cause = unwrapped(error)
    if cause is error:
        raise error
    raise cause from error


def _checked(timeout: float) -> float:
    if not isinstance(timeout, int | float) or not 0 <= timeout < math.inf:
        raise ValueError(f"timeout={timeout!r}: pass a finite number of seconds, 0 or more")
    return float(timeout)


def _shortened(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
