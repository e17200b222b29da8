"""Who a run is: an id that its actors, placement groups and Ray Train runs carry, and its `run.json`.

One process works on one run at a time; `begin` says on which. What starts things on a cluster asks here for
their names, so that whatever a crash leaves behind can be traced to the run that made it.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray

from cluster.storage import RunStore

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
PLACEMENT_FILE = "placement.json"
FAILURE_FILE = "failure.json"
SLUG = 24
"""Characters of a run's own name within its id."""


@dataclass
class Identity:
    """The run that this process works on.

    Attributes:
        id: the name that everything of the run carries.
        store: where its `run.json` lies; None for work that has no storage, such as a bench.
        facts: what `run.json` holds.
        devices: the GPUs of actors by label ("critics-0"), as the reservation measured them.
        figures: the newest figures of its loop.
        rows: the newest placement table, as dicts.
    """

    id: str
    store: RunStore | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Process:
    run: Identity | None = None
    private_root: str | None = None
    """Root of the session directory of a cluster that this process started."""


_process = _Process()


def run_id(name: str) -> str:
    """Return a new id: the run's own name, the minute (UTC) and four random hex digits."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-SLUG:].strip("-") or "run"
    return f"{slug}-{time.strftime('%m%d-%H%M', time.gmtime())}-{secrets.token_hex(2)}"


def begin(store: RunStore) -> Identity:
    """Make the run in `store` the one that this process works on, under a new id; write its `run.json`.

    The ids under which it was worked on before are kept in the list `before`.
    """
    earlier = read_facts(store)
    before = [*earlier.get("before", []), earlier["id"]] if "id" in earlier else []
    parts = [part for part in store.root.split("/") if part]
    mine = run_id("-".join(parts[-2:]))
    facts = {
        "id": mine, "started": time.time(), "before": before,
        "host": socket.gethostname(), "pid": os.getpid(), "process_started": started(os.getpid()),
    }  # fmt: skip
    run = Identity(mine, store, facts)
    use(run)
    _write(run)
    with _harmless("the run's cluster"):
        store.delete(PLACEMENT_FILE)
        store.delete(FAILURE_FILE)
        if ray.is_initialized():
            attached()
    return run


def use(run: Identity) -> None:
    """Go on with a run that this process began, after it has worked on another one."""
    _process.run = run


def current() -> Identity:
    """Return the run that this process works on; one without storage if none was begun."""
    if _process.run is None:
        _process.run = Identity(run_id("adhoc"))
    return _process.run


def begun() -> Identity | None:
    """Return the run with storage that this process works on, or None."""
    run = _process.run
    return run if run is not None and run.store is not None else None


def attached(private_root: str | None = None) -> None:
    """Write into `run.json` which cluster the run is on, and never a token; called once connected.

    Args:
        private_root: the root of the session directory, of a cluster that this process has started.
    """
    _process.private_root = private_root or _process.private_root
    run = begun()
    if run is None:
        return
    with _harmless("the run's cluster"):
        run.facts |= cluster_facts() | {"private_root": _process.private_root}
        _write(run)


def detached() -> None:
    """Forget the cluster that this process had started."""
    _process.private_root = None


def kept_logs(root: str) -> None:
    """Write into `run.json` that Ray's files of the run were kept, and where."""
    run = begun()
    if run is not None:
        with _harmless("where logs are kept"):
            run.facts["kept_logs"] = root
            _write(run)


def ended(outcome: str, store: RunStore | None = None) -> None:
    """Write into `run.json` that the work on the run ended, and how: "done", "stopped" or "failed".

    With a `store`, only if that is where the run of this process lies; an end that is known is not changed.
    """
    run = begun()
    if run is None or "ended" in run.facts:
        return
    if store is None or (run.store is not None and run.store.uri == store.uri):
        with _harmless("the run's end"):
            run.facts |= {"ended": time.time(), "outcome": outcome}
            _write(run)


def cluster_facts() -> dict[str, Any]:
    """Return where this process is connected: addresses, namespace, job and authentication mode.

    Nothing where it is not: merely asking Ray would start a cluster.
    """
    if not ray.is_initialized():
        return {}
    import ray._private.worker as worker
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    node: Any = worker._global_node
    now = ray.get_runtime_context()
    return {
        "address": now.gcs_address,
        "namespace": now.namespace,
        "job": now.get_job_id(),
        "submission": _submission(),
        "session": node.get_session_dir_path() if node else None,
        "dashboard": node.address_info.get("webui_url") if node else None,
        "auth_mode": "token" if is_token_auth_enabled() else "disabled",
    }


def _submission() -> str | None:
    """The id under which `ray job submit` started this process; Ray tells it in the job's metadata."""
    with contextlib.suppress(ValueError, AttributeError):
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        found = (config.get("metadata") or {}).get("job_submission_id")
        return str(found) if found else None
    return None


def read_facts(store: RunStore) -> dict[str, Any]:
    """Return what `run.json` of a run says; nothing where there is none."""
    try:
        found = json.loads(store.read_text(RUN_FILE))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def known_facts(store: RunStore) -> dict[str, Any]:
    """Return what `run.json` of a run says; raises ValueError, in one line, if there is none."""
    facts = read_facts(store)
    if "id" not in facts:
        raise ValueError(
            f"run={store.uri} has no {RUN_FILE}: give the URI of a run that a job here has begun"
        )
    return facts


def driver_alive(facts: dict[str, Any]) -> bool | None:
    """Say whether the process that works on a run still lives; None if it runs on another machine.

    A process id that was given to another process since is told by the moment at which that one started.
    """
    if facts.get("host") != socket.gethostname():
        return None
    then, now = facts.get("process_started"), started(int(facts["pid"]))
    return now is not None and then is not None and abs(now - then) < 1.0


def started(pid: int) -> float | None:
    """Return when a process of this machine started, in seconds since boot; None if there is none.

    Seconds since the epoch would shift whenever the clock is set, and make a living process another one.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        with contextlib.suppress(FileNotFoundError):
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                # The name, in brackets, may have blanks in it; the start is the 20th field behind it.
                ticks = int(file.read().rpartition(")")[2].split()[19])
            return ticks / os.sysconf("SC_CLK_TCK")
        return float(process.create_time() - psutil.boot_time())
    except (psutil.Error, OSError):
        return None


def actor_name(label: str, device: str = "") -> str:
    """Return a free name for an actor, "<id>/<label>"; a taken one gets "~2" behind it, and so on.

    A name is still taken while an earlier attempt's actor of the same place is on its way out.
    """
    run = current()
    run.devices[label] = device
    name = base = f"{run.id}/{label}"
    for number in range(2, 1000):
        try:
            ray.get_actor(name)
        except ValueError:
            break
        name = f"{base}~{number}"
    return name


def group_name() -> str:
    """Return a new name for a placement group; Ray wants each to be different."""
    return f"{current().id}/group-{secrets.token_hex(3)}"


def fit_name() -> str:
    """Return a new name for a run of Ray Train, which would resume one that it knows."""
    return f"{current().id}-{time.time_ns():x}"


def _write(run: Identity) -> None:
    if run.store is not None:
        run.store.write_text(RUN_FILE, json.dumps(run.facts, indent=1))


@contextlib.contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Log what goes wrong: being told of a run must not end it."""
    try:
        yield
    except Exception as error:
        logger.warning("%s could not be written down: %s", what, error)
