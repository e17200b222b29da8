"""Connect a driver to Ray: attach to the cluster that the environment names, or start a private one here."""

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cluster import identity
from cluster.kinds import classify

logger = logging.getLogger(__name__)

NAMESPACE = "counterpoint"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("counterpoint", "cluster", "actors", "jobs")
KNOCK_SECONDS = 5.0
LONGEST_SOCKET_ROOT = 36
"""Bytes for the root of Ray's session directory: a unix socket's path ends at 107, and Ray adds up to 68."""


@dataclass(frozen=True)
class Connection:
    """How this process is connected to Ray."""

    address: str
    """`host:port` of the cluster's control service."""
    opened: bool
    """True when this call connected the process, so that leaving disconnects it."""
    started: bool
    """True when this call started the cluster too, so that leaving ends it."""
    namespace: str
    """Where named actors live."""
    dashboard: str | None
    """The dashboard's URL; None without one, or where an older connection is kept."""
    logs: Path | None
    """Root of the session directory of a cluster started here, None otherwise."""


def connect(
    num_cpus: int | None = None,
    namespace: str = NAMESPACE,
    include_dashboard: bool = False,
    num_gpus: int | None = None,
    log_to_driver: bool | None = None,
) -> Connection:
    """Attach to the cluster of RAY_ADDRESS (set in a submitted job too), else start a local one.

    A process that is connected already keeps its connection. Workers find this project's packages wherever
    the driver was started, installed or not.

    Args:
        num_cpus: logical CPUs of a cluster started here, may exceed the machine's; None counts those.
        namespace: where named actors live.
        include_dashboard: start the dashboard too; Tune needs it, nothing else does.
        num_gpus: GPUs of a cluster started here; None counts the machine's.
        log_to_driver: repeat the output of workers on this process's standard error; None means only when
            this logger is at DEBUG.

    Raises:
        ConnectionError: when the cluster that RAY_ADDRESS names does not answer or refuses this client.
        ValueError: when RAY_ADDRESS is no address for a driver.
    """
    if ray.is_initialized():
        return _connection(None, opened=False, logs=None)
    address = os.environ.get("RAY_ADDRESS", "").strip()
    verbose = logger.isEnabledFor(logging.DEBUG) if log_to_driver is None else log_to_driver
    quiet: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.WARNING,
    }
    if address and address != "local":
        if num_cpus is not None or num_gpus is not None:
            logger.info("num_cpus and num_gpus do not apply to the cluster at RAY_ADDRESS=%s", address)
        return _attach(address, quiet)
    return _start(
        {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": include_dashboard, **quiet}
    )


def disconnect(connection: Connection, keep_logs: bool = False) -> None:
    """End what `connect` began: the connection, and a cluster started here with its files; nothing else."""
    if not connection.opened:
        return
    ray.shutdown()
    identity.detached()
    if connection.logs is not None and keep_logs:
        identity.kept_logs(str(connection.logs))
        logger.warning("Ray's logs of this run are kept in %s", connection.logs)
    elif connection.logs is not None:
        shutil.rmtree(connection.logs, ignore_errors=True)


@contextmanager
def connected(
    num_cpus: int | None = None,
    namespace: str = NAMESPACE,
    include_dashboard: bool = False,
    num_gpus: int | None = None,
    log_to_driver: bool | None = None,
) -> Iterator[Connection]:
    """`connect` for the length of a block; Ray's logs outlive a block that infrastructure ended."""
    connection = connect(num_cpus, namespace, include_dashboard, num_gpus, log_to_driver)
    keep_logs = False
    try:
        yield connection
    except Exception as error:
        keep_logs = classify(error) == "infrastructure"
        raise
    finally:
        disconnect(connection, keep_logs)


def thread_env(threads: int) -> dict[str, str]:
    """Environment variables for `runtime_env["env_vars"]` that give a worker `threads` threads for its maths.

    Ray sets one thread per logical CPU of an actor; a worker that asks for none of them needs this.
    """
    if threads < 1:
        raise ValueError(f"threads={threads}: pass at least 1")
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    # A thread that spins while it waits takes the core that another worker of the machine computes on.
    return counts | {"OMP_WAIT_POLICY": "PASSIVE"}


def _start(options: dict[str, Any]) -> Connection:
    """Start a cluster, once more if the first is too slow; TimeoutError if the second one is too."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        return _start_once(options)
    except Exception as error:
        if not _was_slow(error):
            raise
        logger.warning("Ray was not up after 30 s, as on a machine that is too busy; starting it once more")
    try:
        return _start_once(options)
    except Exception as error:
        if not _was_slow(error):
            raise
        raise TimeoutError(f"Ray did not start here, twice; the machine may be too busy: {error}") from error


def _was_slow(error: Exception) -> bool:
    # Ray gives its raylet 30 s, which nothing changes, and then raises an Exception of no type of its own.
    return "timed out during startup" in str(error)


def _start_once(options: dict[str, Any]) -> Connection:
    temp_dir = _session_root()
    try:
        with _importable():
            context = ray.init(address="local", _temp_dir=str(temp_dir), **options)
    except BaseException:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
        raise
    return _connection(context, opened=True, logs=temp_dir)


def _attach(address: str, options: dict[str, Any]) -> Connection:
    if address != "auto":
        _knock(address)
    try:
        context = ray.init(address=address, runtime_env=_shipped_packages(), **options)
    except (ConnectionError, RuntimeError, RayError) as error:
        ray.shutdown()
        raise ConnectionError(_why_not(address, error)) from error
    return _connection(context, opened=True, logs=None)


def _knock(address: str) -> None:
    """Raise unless something listens at `address`: Ray itself tries a dead one for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ValueError(
            f"RAY_ADDRESS={address}: a driver needs host:port of the cluster's control service (often port "
            "6379); an http:// address is for `ray job submit`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(_why_not(address, error)) from error


def _why_not(address: str, error: BaseException) -> str:
    if any("AuthenticationError" in f"{type(one).__name__} {one}" for one in _chain(error)):
        return (
            f"the Ray cluster at RAY_ADDRESS={address} wants its token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH unless it is in ~/.ray/auth_token"
        )
    mismatch = next((str(one) for one in _chain(error) if str(one).startswith("Version mismatch")), "")
    if mismatch:
        return (
            f"the Ray cluster at RAY_ADDRESS={address} runs other versions than this process: "
            f"{' '.join(mismatch.split())} Install the cluster's here, or submit the job to it"
        )
    return (
        f"no Ray cluster answers at RAY_ADDRESS={address} ({type(error).__name__}): start one with "
        "`ray start --head`, or unset RAY_ADDRESS to run on this machine"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _connection(context: Any, opened: bool, logs: Path | None) -> Connection:
    identity.attached(str(logs) if logs is not None else None)
    now = ray.get_runtime_context()
    url = context.dashboard_url if context is not None else None
    return Connection(
        address=now.gcs_address,
        opened=opened,
        started=logs is not None,
        namespace=now.namespace,
        dashboard=f"http://{url}" if url else None,
        logs=logs,
    )


def _session_root() -> Path:
    """A new private directory with a path short enough for the unix sockets that Ray makes below it."""
    asked = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    with suppress(OSError):
        root = Path(tempfile.mkdtemp(prefix="ray-", dir=asked))
        if len(os.fsencode(root)) <= LONGEST_SOCKET_ROOT:
            return root
        root.rmdir()
    return Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))


def _shipped_packages() -> dict[str, Any]:
    """The runtime environment by which workers on other machines get this project's packages."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    return {"py_modules": [str(ROOT / name) for name in PACKAGES if any((ROOT / name).glob("*.py"))]}


@contextmanager
def _importable() -> Iterator[None]:
    """PYTHONPATH with this project's root, for processes started meanwhile and for those that they start."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
