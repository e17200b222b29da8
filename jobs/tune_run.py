"""The actor that does one run of a trial; a light module, which whoever watches a trial loads too."""

import importlib
import logging
import sys
import threading
from typing import Any


class RunHost:
    """Runs a job in one thread and answers in others; what jobs need is loaded in its own process."""

    def __init__(self) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        self._work: Any = importlib.import_module("jobs.tune_work")
        self._training: Any = importlib.import_module("actors.training")
        self._identity: Any = importlib.import_module("cluster.identity")
        self._began_at: int | None = None
        self._stop = threading.Event()

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do a run; see `jobs.tune_work.work`."""
        result: dict[str, Any] = self._work.work(self._work.RunOrder(**order), self._began)
        return result

    def stop(self) -> None:
        """Ask the run to save a checkpoint and return."""
        self._stop.set()
        self._training.ask_to_stop()

    def rows(self, uri: str, key: str, after: int) -> list[tuple[int, float]]:
        """Return what a run has reached; see `jobs.tune_work.rows`."""
        found: list[tuple[int, float]] = self._work.rows(uri, key, after)
        return found

    def progress(self) -> tuple[int, int]:
        """Return the step at which this life of the run began, and the newest one."""
        if self._began_at is None:
            return 0, 0
        figures = self._identity.current().figures
        newest = 0 if figures.get("stage") == "pairs" else int(figures.get("step", 0))
        return self._began_at, max(newest, self._began_at)

    def _began(self, step: int) -> bool:
        self._began_at = step
        return self._stop.is_set()
