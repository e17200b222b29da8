"""The three kinds of failure, and which exception is of which: infrastructure, data or code.

Infrastructure is retried elsewhere, data is reported, code stops the run. What nothing here knows is code.
"""

import errno
import gzip
import json
import zlib
from typing import Any, Literal

from ray import exceptions as rex

from cluster.waiting import NotReady, WaitTimeout, unwrapped

Kind = Literal["infrastructure", "data", "code"]
ErrorTypes = tuple[type[BaseException], ...]
WORST_FIRST: tuple[Kind, ...] = ("code", "data", "infrastructure")

INFRASTRUCTURE_ERRORS: ErrorTypes = (
    WaitTimeout,
    TimeoutError,
    ConnectionError,
    rex.GetTimeoutError,
    rex.RayActorError,
    rex.WorkerCrashedError,
    rex.LocalRayletDiedError,
    rex.NodeDiedError,
    rex.RaySystemError,
    rex.RpcError,
    rex.RuntimeEnvSetupError,
    rex.OutOfMemoryError,
    rex.OutOfDiskError,
    rex.ObjectStoreFullError,
    rex.ObjectLostError,
    rex.TaskPlacementGroupRemoved,
    rex.ActorPlacementGroupRemoved,
    rex.TaskUnschedulableError,
    rex.ActorUnschedulableError,
    rex.PendingCallsLimitExceeded,
)
"""Exceptions that say nothing about our code or data: another place or another moment may do."""

INFRASTRUCTURE_NAMES = frozenset(
    (
        *("DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"),
        *("PreemptionError", "NCCLHangError", "CollectiveTimeoutError", "WorkerHealthCheckTimeoutError"),
        *("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"),
    )
)
"""The same from packages that this one does not import (torch.distributed, Ray Train), by class name."""

LOST_PEER = ("gloo/transport", "Connection closed by peer", "Application timeout caused pair closure")
"""What gloo says when a process at the other end is gone; it has no exception type of its own."""

TRANSIENT_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EIO", "ESTALE", "EMFILE", "ENFILE", "EAGAIN", "EBUSY", "ENOMEM", "EREMOTEIO"),
        *("ETIMEDOUT", "EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH", "ENETDOWN", "ENETRESET", "EADDRINUSE"),
    )
    if hasattr(errno, name)
)
"""Codes of `OSError` that blame the machine; a missing file or permission is not among them."""

DATA_ERRORS: ErrorTypes = (
    UnicodeDecodeError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    json.JSONDecodeError,
)
"""Exceptions that decoders raise on broken bytes."""

DATA_NAMES = frozenset({"ArrowInvalid", "SafetensorError", "UnidentifiedImageError"})
"""The same from packages that this one does not import (pyarrow, safetensors, Pillow), by class name."""


TRAIN_WRAPPERS = {
    "ControllerError": "controller_failure",
    "WorkerHealthCheckFailedError": "health_check_failure",
    "UserExceptionWithTraceback": "_base_exc",
}
"""Ray Train's exceptions around another one, and the attribute that holds it."""


class Failure(Exception):  # noqa: N818 - the word of the whole house
    """An exception of a role, classified and in plain strings.

    Attributes:
        kind: "infrastructure", "data" or "code".
        message: the original exception's message.
        role: who failed, such as "critic/2"; empty where unknown.
        step: the step it failed at, or None.
        original: the original exception's type, with its module unless built in.
        details: the original traceback as text.
        node: the node it failed on; empty where unknown.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        role: str = "",
        step: int | None = None,
        original: str = "",
        details: str = "",
        node: str = "",
    ) -> None:
        self.kind, self.message, self.role, self.step = kind, message, role, step
        self.original, self.details, self.node = original, details, node
        super().__init__(kind, message, role, step, original, details, node)

    def __reduce__(self) -> tuple[Any, ...]:
        told = (self.kind, self.message, self.role, self.step, self.original, self.details, self.node)
        return type(self), told

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        cause = f"{self.original}: {self.message}" if self.original else self.message
        return f"{self.role or 'unnamed role'} failed{at} ({self.kind}): {cause}"


def classify(error: BaseException, data: ErrorTypes = ()) -> Kind:
    """The kind of a failure, which is that of its root cause; an exception that nothing here knows is "code".

    Args:
        error: the exception, in whatever Ray or Ray Train put around it.
        data: further types that mean bad data in the caller's role.
    """
    error = root_cause(error, data)
    if isinstance(error, Failure):
        return error.kind
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, (*data, *DATA_ERRORS)) or names & DATA_NAMES:
        return "data"
    return "infrastructure" if _is_infrastructure(error, names) else "code"


def root_cause(error: BaseException, data: ErrorTypes = ()) -> BaseException:
    """The exception inside the wrappers of Ray, Ray Train and `waiting`.

    Of a failed worker group that is the worst worker's (code, then data), as the others often fail only
    because a peer is gone.
    """
    while True:
        workers = getattr(error, "worker_failures", None)
        if isinstance(workers, dict) and workers:
            error = min(workers.values(), key=lambda one: WORST_FIRST.index(classify(one, data)))
            continue
        inner = peeled(error)
        if inner is error:
            return error
        error = inner


def peeled(error: BaseException) -> BaseException:
    """The exception inside one wrapper of Ray, Ray Train or `waiting`; itself where there is none."""
    if isinstance(error, NotReady):
        return error.cause
    inner = getattr(error, TRAIN_WRAPPERS.get(type(error).__name__, ""), None)
    return inner if isinstance(inner, BaseException) else unwrapped(error)


def _is_infrastructure(error: BaseException, names: set[str]) -> bool:
    if isinstance(error, rex.RayActorError) and error.actor_init_failed:
        return False
    if isinstance(error, INFRASTRUCTURE_ERRORS) or names & INFRASTRUCTURE_NAMES:
        return True
    if isinstance(error, OSError):
        return error.errno in TRANSIENT_ERRNOS
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)
