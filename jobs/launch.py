"""Running a training loop where the configuration says, with progress on the terminal and a tidy stop."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from actors.training import TrainerConfig, stopping_on_signals, train_here, train_on_ray
from actors.worker import LoopResult, LoopSpec
from cluster.connect import connected
from cluster.failures import retrying
from cluster.identity import begun, ended
from cluster.preflight import check_nodes
from cluster.progress import ProgressLine
from cluster.reserve import PlacementError, PlacementTimeout
from counterpoint.strategies.config import check_installed
from jobs.stage import Cast, check_room

SHOWN = ("loss", "regression_loss", "adversarial_loss", "critic_loss", "samples_per_second")
NOBODY = Cast((), ())
Stage = Callable[[], contextlib.AbstractContextManager[Cast]]
Run = Callable[[Callable[[Cast], LoopSpec]], LoopResult]


@contextlib.contextmanager
def launch(label: str, trainer: TrainerConfig, stage: Stage | None = None, heads: int = 0) -> Iterator[Run]:
    """Connect to Ray if the trainer needs it, and yield a function that runs a loop to its end.

    `stage` makes the run's cast, once connected; it is ended before Ray is. What fails for reasons of the
    infrastructure, the cast's start included, is taken up again with a new cast from the last checkpoint. The
    first Ctrl-C or SIGTERM makes the loop save a checkpoint and return; see `LoopResult.finished`.
    """
    check_installed(trainer.strategy)
    alone = trainer.workers == 0
    with contextlib.ExitStack() as stack:
        if not alone:
            stack.enter_context(connected())
            if (here := begun()) and here.store:
                check_nodes(here.store.uri)
            if stage is None:
                check_room(trainer)
        wish = stack.enter_context(stopping_on_signals())

        def run(spec: Callable[[Cast], LoopSpec]) -> LoopResult:
            if alone:
                with Shown(label, heads) as shown:
                    return train_here(spec(NOBODY), trainer, shown.watch, wish)

            placed = False

            def attempt() -> LoopResult:
                nonlocal placed
                try:
                    with (
                        stage() if stage else contextlib.nullcontext(NOBODY) as cast,
                        Shown(label, heads) as shown,
                    ):
                        placed = True
                        return train_on_ray(spec(cast), trainer, shown.watch, wish)
                except PlacementTimeout as error:
                    if placed:
                        raise
                    # Room that was never there is the user's to make, and not worth further attempts.
                    raise PlacementError(str(error), error.explanation) from error

            return retrying(attempt, what=label, attempts=trainer.max_failures + 1)

        yield run


class Shown:
    """Draws the newest figures of a loop as one line; a stage of its own gets a line of its own."""

    def __init__(self, label: str, heads: int) -> None:
        self.label, self.heads = label, heads
        self._line: ProgressLine | None = None
        self._key: tuple[str, int] | None = None

    def watch(self, figures: dict[str, Any]) -> None:
        """Show `figures`, which must have `step` and `total`; others are left out."""
        if "total" not in figures:
            return
        step, total, stage = figures["step"], figures["total"], str(figures.get("stage", ""))
        if self._key != ("pairs" if stage == "pairs" else "train", total):
            self.close()
            self._key = ("pairs" if stage == "pairs" else "train", total)
            self._line = ProgressLine(
                total, f"{self.label} {'pairs' if stage == 'pairs' else ''}".strip(), start=step
            )
        assert self._line is not None
        fields: dict[str, Any] = {name: figures[name] for name in SHOWN if name in figures}
        if "voting" in figures:
            fields |= {"refreshes": figures["refreshes"], "live_heads": self.heads}
        if stage:
            fields["stage"] = stage
        self._line.update(step, **fields)

    def close(self) -> None:
        """Leave the line as it stands."""
        if self._line is not None:
            self._line.close("")
            self._line = None

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stopped(uri: str, result: LoopResult) -> dict[str, Any]:
    """Return the headline of a run that was asked to stop."""
    ended("stopped")
    return {"run": uri, "stopped_at_step": result.steps, "go_on_with": "resume=true"}
