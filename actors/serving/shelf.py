"""Which checkpoint each name stands for, and the models in memory: loaded beside the old, tried, swapped."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

logger = logging.getLogger(__name__)

M = TypeVar("M")
REMEMBERED = 4
"""Earlier checkpoints of a name that are kept in mind, to fall back on."""
LONGEST_REASON = 400


class Slot(Generic[M]):
    """A name's place in memory: whoever keeps it keeps the model, and sees each new version of it."""

    def __init__(self, name: str, model: M, checkpoint: str) -> None:
        self.name = name
        self._current = (model, checkpoint)  # one attribute, so that readers need no lock

    @property
    def model(self) -> M:
        """The version in force."""
        return self._current[0]

    @property
    def checkpoint(self) -> str:
        """The checkpoint in force."""
        return self._current[1]

    def swap(self, model: M, checkpoint: str) -> None:
        """Put another version in force; those who hold the old one keep it until they let go."""
        self._current = (model, checkpoint)


class Shelf(Generic[M]):
    """Current versions of named models; every method may be called from any thread.

    A model is in memory while somebody keeps its `Slot`, such as a cache of the most recently used: the shelf
    itself does not. Loading one name waits for nothing but another load of the same name, and nobody who asks
    for a model in memory waits for a load at all.

    Args:
        load: from a checkpoint's name to a model; raises ValueError if there is none or it is damaged.
        canary: raises if a loaded model is unfit to serve.
        unlisted: from a name that was not assigned to its checkpoint, or raises ValueError; none refuses all.
    """

    def __init__(
        self,
        load: Callable[[str], M],
        canary: Callable[[M], None],
        unlisted: Callable[[str], str] | None = None,
    ) -> None:
        self._load, self._canary, self._unlisted = load, canary, unlisted
        self._lock = threading.Lock()
        """Held for moments only, and never while loading."""
        self._records: dict[str, _Record] = {}
        self._slots: WeakValueDictionary[str, Slot[M]] = WeakValueDictionary()
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()

    def assign(self, targets: Mapping[str, str]) -> None:
        """Let each name stand for a checkpoint; names that are no longer given are forgotten.

        Names in memory are brought to their checkpoint before this returns; others when they are opened. One
        that does not load or pass the canary leaves the old version in force (see `refused`), and is tried
        again when it is assigned again. A later call overtakes an earlier one that is still loading.
        """
        with self._lock:
            for name in self._records.keys() - targets.keys():
                del self._records[name]
                self._slots.pop(name, None)
            for name, checkpoint in targets.items():
                if name in self._records:
                    self._records[name].aim(checkpoint)
                else:
                    self._records[name] = _Record(checkpoint)
        for name in targets:
            if self.resident(name) is not None:
                with self._turn(name):
                    self._promote(name)

    def open(self, name: str) -> Slot[M]:
        """Return the name's slot, loading its model unless it is in memory.

        If its checkpoint does not load, those that it stood for before are tried, the latest first. Raises
        ValueError, in one line, if the name is unknown or none of them loads; an error of `load` or `canary`
        that is no ValueError, such as a store that cannot be reached, is raised as it is.
        """
        slot = self.resident(name)
        if slot is not None:
            return slot
        with self._turn(name):
            slot = self.resident(name)  # whoever had the turn before may have loaded it
            while slot is None:
                slot = self._place(name)
        return slot

    def resident(self, name: str) -> Slot[M] | None:
        """Return the name's slot if its model is in memory; never waits for a load."""
        with self._lock:
            return self._slots.get(name)

    def refused(self, name: str) -> str | None:
        """Return, in one line, why the checkpoint last assigned to `name` was refused; None if it was not."""
        with self._lock:
            record = self._records.get(name)
            return None if record is None else record.refused

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return for each name assigned, or in memory, its `checkpoint`, and which is `in_force`.

        `in_force` is None and `resident` false where no model is in memory; `refused` is as in `refused`.
        """
        with self._lock:
            slots = dict(self._slots.items())
            told = {name: (record.wanted, record.refused) for name, record in self._records.items()}
        told |= {name: (slot.checkpoint, None) for name, slot in slots.items() if name not in told}
        return {
            name: {
                "checkpoint": wanted,
                "in_force": slots[name].checkpoint if name in slots else None,
                "resident": name in slots,
                "refused": refused,
            }
            for name, (wanted, refused) in told.items()
        }

    def _turn(self, name: str) -> "_Turn":
        """Return the turn of those who load `name`, one at a time; it lives while somebody waits for it."""
        with self._lock:
            return self._turns.setdefault(name, _Turn())

    def _promote(self, name: str) -> None:
        """Bring the slot of `name` to the checkpoint that is wanted; called in the name's turn."""
        while True:
            with self._lock:
                record, slot = self._records.get(name), self._slots.get(name)
                if record is None or slot is None:
                    return
                wanted = record.wanted
                if slot.checkpoint == wanted:
                    record.refused = None
                    return
            del slot  # while loading, a cache may want to give the old version up
            try:
                model = self._tried(wanted)
            except Exception as error:
                reason = self._refuse(record, wanted, error)
                logger.warning("%s stays as it is: %s", name, reason)
                with self._lock:
                    if record.wanted == wanted:
                        return
                continue
            with self._lock:
                slot = self._slots.get(name)
                if slot is not None and self._records.get(name) is record and record.wanted == wanted:
                    slot.swap(model, wanted)
                    logger.info("%s is now %s", name, wanted)
            del model, slot

    def _place(self, name: str) -> Slot[M] | None:
        """Load `name` into a new slot; None if another checkpoint was assigned meanwhile."""
        with self._lock:
            record = self._records.get(name)
            checkpoints = () if record is None else (record.wanted, *reversed(record.earlier))
        if record is None:
            checkpoint = self._unlisted_checkpoint(name)
            slot = Slot(name, self._tried(checkpoint), checkpoint)
        else:
            slot = self._first_good(name, record, checkpoints)
        with self._lock:
            now = self._records.get(name)
            if now is not record or (record is not None and record.wanted != checkpoints[0]):
                return None
            self._slots[name] = slot
        return slot

    def _first_good(self, name: str, record: "_Record", checkpoints: tuple[str, ...]) -> Slot[M]:
        """Return a slot with the first of `checkpoints` that is good, or raise what the first one did."""
        first: Exception | None = None
        for checkpoint in checkpoints:
            try:
                slot = Slot(name, self._tried(checkpoint), checkpoint)
            except Exception as error:
                reason = self._refuse(record, checkpoint, error)
                logger.warning("%s cannot be %s: %s", name, checkpoint, reason)
                first = first or error.with_traceback(None)  # whose frames hold what was loaded
                continue
            if checkpoint == checkpoints[0]:
                with self._lock:
                    record.refused = None if record.wanted == checkpoint else record.refused
            else:
                logger.warning("%s falls back to %s", name, checkpoint)
            return slot
        assert first is not None
        raise first

    def _tried(self, checkpoint: str) -> M:
        model = self._load(checkpoint)
        self._canary(model)
        return model

    def _refuse(self, record: "_Record", checkpoint: str, error: Exception) -> str:
        reason = _told(checkpoint, error)
        with self._lock:
            if checkpoint == record.wanted:
                record.refused = reason
            elif isinstance(error, ValueError):  # nothing that passes, such as a lost connection
                record.earlier = [name for name in record.earlier if name != checkpoint]
        return reason

    def _unlisted_checkpoint(self, name: str) -> str:
        if self._unlisted is None:
            with self._lock:
                listed = ", ".join(self._records) or "none"
            raise ValueError(f"model {name[:80]!r} is not served: give one of {listed}")
        return self._unlisted(name)


def _told(checkpoint: str, error: Exception) -> str:
    """Return in one line why a checkpoint was refused; what is no ValueError goes to the log instead."""
    if not isinstance(error, ValueError):
        logger.warning("checkpoint %s", checkpoint, exc_info=error)
        return f"checkpoint {checkpoint[:80]!r} could not be loaded or tried: the service's log says why"
    reason = " ".join(str(error).split())
    return reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 3]}..."


@dataclass
class _Record:
    """What was assigned to a name; changed only under the shelf's lock."""

    wanted: str
    earlier: list[str] = field(default_factory=list)
    """What it stood for before, the latest last, without what was refused."""
    refused: str | None = None

    def aim(self, checkpoint: str) -> None:
        """Want another checkpoint."""
        if checkpoint == self.wanted:
            return
        if self.refused is None:
            self.earlier.append(self.wanted)
        self.earlier = [name for name in self.earlier if name != checkpoint][-REMEMBERED:]
        self.wanted, self.refused = checkpoint, None


class _Turn:
    """A lock of which the shelf keeps no count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
