"""Episodes that nobody played, for tests of what is made of them."""

from collections.abc import Sequence

import numpy as np

from counterpoint.environments.config import EnvironmentConfig
from counterpoint.environments.episode import Episode
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision
from jobs.rollout_cells import Cell, CellResult, Session

INSTRUCTIONS = EnvironmentConfig().instructions
SPACE = EnvironmentConfig().action_space()
GREEDY = SelectionConfig()
RANDOM = SelectionConfig(rule="random")
TEXT = SelectionConfig(rule="masked_condition", mask="text")


def episode(seed: int, success: bool, **changes: object) -> Episode:
    """An episode of 22 steps if it succeeds, else of 48."""
    fields: dict[str, object] = {
        "seed": seed,
        "instruction": INSTRUCTIONS[seed % len(INSTRUCTIONS)],
        "success": success,
        "outcome": "success" if success else ("wrong block", "time is up")[seed % 2],
        "steps": 22 if success else 48,
        "decisions": 6 if success else 12,
        "rejected": 1,
        "fallbacks": 0,
        "clipped": 2,
    }
    return Episode(**(fields | changes))  # type: ignore[arg-type]


def played(cell: Cell, successes: Sequence[bool], first: int = 100, **aside: str) -> CellResult:
    """The result of a cell with these successes on consecutive seeds; `aside` names others by s<seed>."""
    episodes = {first + i: episode(first + i, success) for i, success in enumerate(successes)}
    decisions = sum(e.decisions for e in episodes.values())
    session = Session(len(episodes) * 0.1, len(episodes), decisions, max(1, decisions // 12), decisions, 0.9)
    return CellResult(cell, episodes, {int(key[1:]): why for key, why in aside.items()}, session)


def decision(seed: int, candidates: int = 4, lost: Sequence[int] = (), chosen: int | None = None) -> Decision:
    """A decision among candidates of which those in `lost` could not be decoded."""
    random = np.random.default_rng(seed)
    base = random.uniform(-0.6, 0.6, (1, SPACE.horizon, SPACE.dimensions))
    noise = random.normal(0, 0.15, (candidates, SPACE.horizon, SPACE.dimensions))
    chunks = np.clip(base + noise, -1, 1).astype(np.float32)
    confidences = random.uniform(14, 18, candidates)
    chunks[list(lost)], confidences[list(lost)] = np.nan, -np.inf
    best = int(confidences.argmax()) if chosen is None else chosen
    return Decision(
        chunks[max(best, 0)], best, chunks, tuple((1, 2, 3) for _ in range(candidates)), confidences,
        random.uniform(0, 4, (candidates, 5)).astype(np.float32), len(lost), 0,
    )  # fmt: skip


def frames(count: int, side: int = 16) -> np.ndarray:
    """A white square on its way across a dark image, uint8 [count,side,side,3]."""
    shots = np.full((count, side, side, 3), 30, np.uint8)
    for t in range(count):
        at = t * (side - 4) // max(1, count - 1)
        shots[t, 4:8, at : at + 4] = 255
    return shots
