"""What storage alone says about a run: its last step, its newest checkpoint, what a crash left half done."""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checkpoint_names import NEVER_FINISHED, checkpoint_steps, step_folder
from cluster.identity import FAILURE_FILE, PLACEMENT_FILE
from cluster.manifest import DamagedCheckpointError, read_manifest, verify_file
from cluster.metrics_log import read_metrics
from cluster.roster import Row, row_of
from cluster.storage import RunStore
from jobs.run_names import CONFIG, RESULTS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest whole checkpoint of a run.

    Attributes:
        step: its step; None where there is no whole one.
        verified: whether the checksums of all its bytes were compared, and not only sizes.
        skipped: what is wrong with newer ones, a line each.
    """

    step: int | None
    verified: bool
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        if self.step is None:
            text = "no whole checkpoint"
        else:
            text = (
                f"step {self.step}, whole ({'checksums agree' if self.verified else 'all files are there'})"
            )
        return "; ".join([text, *(f"skipped: {reason}" for reason in self.skipped)])


def newest_checkpoint(store: RunStore, verify: bool = False) -> NewestCheckpoint:
    """Return the newest whole checkpoint: manifest intact, every file there with its size.

    Args:
        store: the run's.
        verify: compare the checksums of all bytes too, which reads them all.
    """
    skipped: list[str] = []
    for step in reversed(checkpoint_steps(store)):
        try:
            _check(store, step_folder(step), verify)
            return NewestCheckpoint(step, verify, tuple(skipped))
        except DamagedCheckpointError as damage:
            skipped.append(str(damage))
        except Exception as error:  # a storage that fails says nothing about the checkpoint
            skipped.append(f"step {step} cannot be read: {error}")
    return NewestCheckpoint(None, verify, tuple(skipped))


def _check(store: RunStore, folder: str, verify: bool) -> None:
    manifest = read_manifest(store, folder, NEVER_FINISHED)
    for entry in manifest["files"].values():
        if verify:
            verify_file(store, folder, entry["file"], entry)
            continue
        path = f"{folder}/{entry['file']}"
        size = store.fs.size(store.path(path)) if store.exists(path) else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise DamagedCheckpointError(f"{store.location(path)} {found}", entry["file"], found)


def last_step(store: RunStore, figures: Mapping[str, Any]) -> int | None:
    """Return the last step that the newest figures, the stored metrics or a failure tell of, or None."""
    told = (figures.get("step"), kept_failure(store).get("last_step"))
    steps = [step for step in told if isinstance(step, int)]
    with contextlib.suppress(Exception):
        steps += [row["step"] for row in read_metrics(store)[-1:]]
    return max(steps, default=None)


def kept_rows(store: RunStore) -> list[Row]:
    """Return the placement table as the driver wrote it last; nothing where there is none."""
    try:
        return [row_of(row) for row in json.loads(store.read_text(PLACEMENT_FILE))]
    except (FileNotFoundError, ValueError, TypeError):
        return []


def kept_failure(store: RunStore) -> dict[str, Any]:
    """Return what a failed run said last (see `jobs.failure_card`); nothing where it did not fail."""
    try:
        found = json.loads(store.read_text(FAILURE_FILE))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stage_of(store: RunStore, facts: Mapping[str, Any], alive: bool | None) -> str:
    """Return in a word how a run stands: running, done, stopped, failed, refused, crashed or unknown."""
    if facts.get("outcome"):
        return str(facts["outcome"])
    if alive is None:
        return "done" if store.exists(RESULTS) else "unknown"
    return "running" if alive else "crashed"


def half_written(store: RunStore) -> Sequence[str]:
    """Return the files that a killed writer left beside those that count."""
    return sorted(set(store.list(unfinished=True)) - set(store.list()))


def is_run(store: RunStore) -> bool:
    """Whether a job has opened this storage."""
    return store.exists(CONFIG)
