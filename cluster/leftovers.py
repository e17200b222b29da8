"""What a dead driver leaves on machines and clusters, found by the run's id and by its session directory."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster import identity

logger = logging.getLogger(__name__)

SERVICES = ("gcs_server", "raylet")
"""Programs of a Ray cluster, by the name of their file; its others are scripts of Ray's package."""
END_SECONDS = 5.0


def session_processes(root: str, since: float = 0.0) -> list[psutil.Process]:
    """Return this machine's processes of the private cluster whose session directory lies below `root`.

    They are Ray's own services that name the directory on their command lines, workers, which write their
    errors there, and what descends from these; never one that merely reads there, such as a `tail`, nor one
    that has ended and only waits for its parent to notice.

    Args:
        root: the directory, of a cluster that a run has started.
        since: the start of that run's driver, as `identity.started` gives it: no process of the cluster is
            older.
    """
    if not root:
        return []
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = process.cmdline()
            belongs = _is_service(words, root) or _writes_as_worker(process, words, root)
            if belongs and (identity.started(process.pid) or 0.0) >= since:
                found |= {child.pid: child for child in (process, *process.children(recursive=True))}
    for mine in (psutil.Process(), *psutil.Process().parents()):
        found.pop(mine.pid, None)
    return [process for process in found.values() if identity.started(process.pid) is not None]


def _is_service(words: list[str], root: str) -> bool:
    """Whether a command line is that of one of Ray's services, for a session below `root`."""
    if not any(
        word.partition("=")[2].startswith(f"{root}/") or word.startswith(f"{root}/") for word in words
    ):
        return False
    package = f"{Path(ray.__file__).parent}/"
    script = any(word.startswith(package) and word.endswith(".py") for word in words[:4])
    return script or Path(words[0]).name in SERVICES


def _writes_as_worker(process: psutil.Process, words: list[str], root: str) -> bool:
    """Whether a process's standard error, or a log that a worker or agent by title has, is below `root`."""
    try:
        errors = os.readlink(f"/proc/{process.pid}/fd/2")
    except OSError:
        return False
    mine = [errors]
    if words and words[0].startswith("ray::"):
        # Agents of a raylet that is dead have no parent to be found by.
        mine += [file.path for file in process.open_files()]
    return any(path.startswith(f"{root}/session_") and Path(path).parent.name == "logs" for path in mine)


def end_session(root: str, since: float = 0.0) -> None:
    """End the processes of a private cluster (see `session_processes`), and delete its files."""
    processes = session_processes(root, since)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=END_SECONDS)
    shutil.rmtree(root, ignore_errors=True)


def is_session_root(root: str) -> bool:
    """Whether a directory is one that Ray has made a session in: nothing else is ever deleted."""
    return bool(root) and Path(root).name.startswith("ray-") and any(Path(root).glob("session_*"))


def living_actors(records: list[dict[str, Any]], run: str, job: str) -> list[dict[str, Any]]:
    """Return the records of actors that carry a run's id, or were started by its job, and are not dead."""
    return [
        actor for actor in records
        if actor["State"] != "DEAD" and (actor["Name"].startswith(f"{run}/") or actor["JobID"] == job)
    ]  # fmt: skip


def held_groups(run: str) -> list[dict[str, Any]]:
    """Return the records of placement groups that carry a run's id and still hold or want something."""
    return [
        group for group in placement_group_table().values()
        if group["name"].startswith(f"{run}/") and group["state"] != "REMOVED"
    ]  # fmt: skip


def job_lives(job: str) -> bool | None:
    """Say whether the driver of a job is connected to the cluster; None if that knows no such job."""
    import ray._private.state as state

    found = [one for one in state.jobs() if one["JobID"] == job]
    return not found[0]["IsDead"] if found else None


def end_actor(record: Mapping[str, Any]) -> None:
    """End an actor for good."""
    from ray._raylet import ActorID

    name = record["Name"]
    if name:
        ray.kill(ray.get_actor(name), no_restart=True)
        return
    import ray._private.worker as worker

    process: Any = worker.global_worker
    process.core_worker.kill_actor(ActorID.from_hex(record["ActorID"]), True)


def end_group(record: Mapping[str, Any]) -> None:
    """Remove a placement group, and wait until it is gone."""
    group = PlacementGroup(ray.PlacementGroupID.from_hex(record["placement_group_id"]))
    remove_placement_group(group)
    deadline = time.monotonic() + END_SECONDS
    while placement_group_table(group)["state"] != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.05)
