"""Batch arithmetic, written out and checked before anything starts.

batch_size (samples per optimizer step, over all workers) = workers x micro-batches x samples of a micro-batch
"""

from collections.abc import Mapping

from actors.training import TrainerConfig


def check_batch_sizes(sizes: Mapping[str, int], trainer: TrainerConfig, levels: int = 1) -> None:
    """Raise ValueError unless workers and micro-batches share out each batch evenly.

    Args:
        sizes: samples per optimizer step by the name of their field.
        trainer: how many workers, and how many micro-batches each.
        levels: noise levels among which each shared micro-batch is dealt out in turn.
    """
    workers, micros = max(1, trainer.workers), trainer.accumulate
    parts = workers * micros
    unit = parts * levels if parts > 1 else 1
    for field, size in sizes.items():
        if size % unit:
            dealt = f" x {levels} noise levels (critics.levels_per_step)" if unit > parts else ""
            nearest = [n for n in (size // unit * unit, (size // unit + 1) * unit) if n > 0]
            raise ValueError(
                f"{field}={size} is not shared out evenly by {workers} workers (trainer.workers) x {micros} "
                f"micro-batches (trainer.accumulate){dealt} = {unit} parts of {size / unit:.4g} samples: "
                f"use {' or '.join(map(str, nearest))}"
            )
