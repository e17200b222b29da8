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

logger = logging.getLogger(__name__)

RAY_PARTS = ("gcs_server", "raylet", "ray::", "ray/_private", "ray/dashboard", "ray-dashboard")
"""What the command lines of a Ray cluster's processes have in them."""
END_SECONDS = 5.0


def session_processes(root: str) -> list[psutil.Process]:
    """Return this machine's processes of the private cluster whose session directory lies below `root`.

    They name the directory on their command lines, write their errors there, or descend from one that does.
    """
    if not root:
        return []
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = process.cmdline()
            belongs = any(root in word for word in words) and any(
                part in " ".join(words) for part in RAY_PARTS
            )
            if belongs or _writes_below(process.pid, root):
                found |= {child.pid: child for child in (process, *process.children(recursive=True))}
    found.pop(os.getpid(), None)
    return list(found.values())


def _writes_below(pid: int, root: str) -> bool:
    """Whether the standard error of a process is a file below `root`: so it is with Ray's workers."""
    try:
        return os.readlink(f"/proc/{pid}/fd/2").startswith(f"{root}/")
    except OSError:
        return False


def end_session(root: str) -> None:
    """End the processes of a private cluster, and delete its files."""
    processes = session_processes(root)
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
