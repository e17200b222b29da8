"""What a crashed or killed run left behind, and its removal: `python -m jobs.reap RUN [--yes]`.

Without --yes nothing is changed. A run that lives is left alone, and checkpoints always are.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from pydantic import Field

from cluster import identity, leftovers
from cluster.checkpoint_names import FOLDER as CHECKPOINTS
from cluster.observe import Unreachable, actor_table, observing
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.section import Section
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.run_state import half_written
from jobs.watched import bare

logger = logging.getLogger(__name__)

TRAIN, SNAPSHOTS = "ray_train", "snapshots"
ANSWER_SECONDS = 5.0


class ReapConfig(Section):
    """Which run, and whether anything is removed."""

    run: RunUri
    """URI of the run's storage."""
    yes: bool = Field(default=False)
    """Remove what is listed; without it nothing is changed."""
    force: bool = False
    """Remove what belongs to a run that lives, too, which ends it."""


@dataclass(frozen=True)
class Leftover:
    """Something of a run that need not be there any more."""

    kind: str
    what: str
    remove: Callable[[], None]


def main(config: ReapConfig) -> dict[str, Any]:
    """List what the run left on standard error, and remove it if so asked; return what was found and removed.

    Raises ValueError, in one line, if the run lives and `force` is off.
    """
    store = RunStore(config.run)
    facts = identity.known_facts(store)
    found: list[Leftover] = []
    removed: list[str] = []
    failed: list[str] = []
    try:
        with observing(facts):
            _check_dead(config, facts, on_cluster=True)
            found += on_cluster(facts)
            _remove(config, found, removed, failed)
    except Unreachable as error:
        _check_dead(config, facts, on_cluster=False)
        sys.stderr.write(f"its cluster is not looked at: {error}\n")
    # The cluster goes before the files that it may be writing.
    here = [*on_machine(facts), *in_storage(store)]
    _remove(config, here, removed, failed)
    found += here
    if not found:
        sys.stderr.write("nothing is left of it but what is meant to stay\n")
    elif not config.yes:
        sys.stderr.write("nothing was removed: add --yes\n")
    listed = [f"{one.kind}: {one.what}" for one in found]
    return {"run": config.run, "id": facts["id"], "found": listed, "removed": removed, "failed": failed}


def _remove(config: ReapConfig, found: list[Leftover], removed: list[str], failed: list[str]) -> None:
    for one in found:
        line = f"{one.kind}: {one.what}"
        sys.stderr.write(f"{line}\n")
        if not config.yes:
            continue
        try:
            one.remove()
            removed.append(line)
        except Exception as error:
            logger.warning("%s is not removed: %s", line, error)
            failed.append(line)


def _check_dead(config: ReapConfig, facts: dict[str, Any], on_cluster: bool) -> None:
    """Raise ValueError if the run lives, as far as its machine, its cluster and its conductor tell."""
    if config.force:
        return
    signs = []
    alive = identity.driver_alive(facts)
    if alive:
        # Even if this run has ended: the process may be at its next one, on the same cluster.
        signs.append(f"its driver, process {facts['pid']}, runs on this machine")
    if on_cluster and not alive and leftovers.job_lives(facts.get("job", "")):
        # Machines may have the same name.
        signs.append("its driver is connected to the cluster")
        if _conductor_answers(facts["id"]):
            signs.append("its conductor answers")
    if not on_cluster and alive is None and "ended" not in facts:
        signs.append(
            f"its driver was on {facts['host']}, and neither that nor its cluster can be asked from here"
        )
    if signs:
        raise ValueError(f"run={config.run} may be alive ({'; '.join(signs)}): end it first, or add --force")


def _conductor_answers(run: str) -> bool:
    for name in ray.util.list_named_actors():
        if name.startswith(f"{run}/conductor-"):
            try:
                get(ray.get_actor(name).table.remote(), timeout=ANSWER_SECONDS, what="the run's conductor")
            except Exception:
                logger.debug("%s does not answer", name)
            else:
                return True
    return False


def on_cluster(facts: dict[str, Any]) -> Iterator[Leftover]:
    """Yield what a run still has on the cluster that this process is connected to."""
    if facts.get("submission") and leftovers.job_lives(facts.get("job", "")):
        yield Leftover("submitted job", facts["submission"], partial(_stop_job, facts))
    for actor in leftovers.living_actors(actor_table(), facts["id"], facts.get("job", "")):
        yield Leftover(
            "actor", f"{actor['Name'] or actor['ActorClassName']} (process {actor['Pid']}, {actor['State']})",
            partial(leftovers.end_actor, actor),
        )  # fmt: skip
    for group in leftovers.held_groups(facts["id"]):
        yield Leftover(
            "placement group", f"{group['name']} ({group['state']})",
            partial(leftovers.end_group, group),
        )  # fmt: skip


def _stop_job(facts: dict[str, Any]) -> None:
    from ray.job_submission import JobSubmissionClient

    JobSubmissionClient(f"http://{facts['dashboard']}").stop_job(facts["submission"])


def on_machine(facts: dict[str, Any]) -> Iterator[Leftover]:
    """Yield what is left of the private cluster that a run started on this machine."""
    root, session = facts.get("private_root") or "", facts.get("session") or ""
    if identity.driver_alive(facts) is None or not root or not session.startswith(f"{root}/session_"):
        return
    since = facts["process_started"]
    processes = leftovers.session_processes(root, since)
    if leftovers.is_session_root(root):
        told = f"{root} with {len(processes)} processes"
        yield Leftover("private Ray cluster", told, partial(leftovers.end_session, root, since))


def in_storage(store: RunStore) -> Iterator[Leftover]:
    """Yield the files of a run that are of no use without it; never one of a checkpoint that counts."""
    for name in half_written(store):
        yield Leftover("half-written file", name, partial(store.delete, name))
    if store.exists(TRAIN):
        yield Leftover("Ray Train's files", TRAIN, partial(store.delete, TRAIN))
    # What critics go back to when they are restarted within a run; a resumed run takes its checkpoint's.
    if store.exists(SNAPSHOTS) and store.exists(CHECKPOINTS):
        yield Leftover("critics' snapshots", SNAPSHOTS, partial(store.delete, SNAPSHOTS))


if __name__ == "__main__":
    run_job(main, ReapConfig, bare(sys.argv[1:], "run"))
