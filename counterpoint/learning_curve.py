"""How soon a training is good enough, from the scores of its snapshots."""

import math
from collections.abc import Sequence


def steps_to_reach(curve: Sequence[tuple[int, float]], target: float, unreached: float) -> float:
    """Return after how many training steps a distance first falls to `target`; `unreached` if it never does.

    `curve` has (training step, distance > 0) in order. Between the last point above the target and the first
    at or below it the distance's logarithm is taken to be linear. Later rises do not count. A curve that
    begins below the target reached it by its first point, which is returned.
    """
    before: tuple[int, float] | None = None
    for step, distance in curve:
        if distance <= target:
            if before is None:
                return float(step)
            start, above = before
            share = math.log(above / target) / math.log(above / max(distance, 1e-12))
            return start + share * (step - start)
        before = step, distance
    return unreached
