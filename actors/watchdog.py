"""Deadlines that hold even while a simulator hangs in C with Python's lock, and what a process died of."""

import contextlib
import faulthandler
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterpoint.environments.running import Deed

PLACE_BYTES = 80
TIMEOUT = "Timeout ("
"""How the trace begins that faulthandler leaves."""
WORDS = {"build": "while it was built", "start": "at its start", "act": "at step {step}"}


class Watchdog:
    """Ends this process when a deed takes too long, and leaves a note that its successor reads.

    The note is a file on this machine: where the process was, and after a hang every thread's trace. It is
    written before each deed, so it also says where a process was that a crash ended.

    Args:
        name: names the note; a process and its successor give the same.
        deadlines: seconds by deed.
    """

    def __init__(self, name: str, deadlines: dict[Deed, float]) -> None:
        self.deadlines = deadlines
        self.path = Path(tempfile.gettempdir()) / f"{name}.note"
        self.last_words = _read(self.path)
        """How the predecessor ended, such as "hung at step 12"; None if it left no note."""
        # It must stay open: faulthandler writes to it when Python no longer runs.
        self._note: Any = self.path.open("wb", buffering=0)

    @contextlib.contextmanager
    def guard(self, deed: Deed, seed: int, step: int) -> Iterator[None]:
        """Return a context that ends the process unless it is left within the deed's deadline."""
        place = WORDS[deed].format(step=step).encode().ljust(PLACE_BYTES - 1) + b"\n"
        os.pwrite(self._note.fileno(), place, 0)
        self._note.seek(PLACE_BYTES)
        faulthandler.dump_traceback_later(self.deadlines[deed], exit=True, file=self._note)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.pwrite(self._note.fileno(), b" " * (PLACE_BYTES - 1), 0)

    def close(self) -> None:
        """Remove the note."""
        self._note.close()
        self.path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    """Return what a note says in a few words; None if there is none or its process was between deeds."""
    try:
        note = path.read_text(errors="replace")
    except OSError:
        return None
    place = note[:PLACE_BYTES].strip()
    if not place:
        return None
    return f"hung {place}" if note[PLACE_BYTES:].startswith(TIMEOUT) else f"the simulator crashed {place}"
