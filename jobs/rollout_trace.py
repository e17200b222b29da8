"""One episode's decisions, kept in the store and drawn: what was seen, the candidates, which one was kept."""

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import imageio.v3 as iio
import numpy as np
from markupsafe import Markup

from cluster.storage import RunStore
from counterpoint.actions.space import ActionSpace
from counterpoint.environments.episode import Episode
from counterpoint.selection.decision import Decision
from jobs.report_page import data_uri
from jobs.rollout_cells import Cell

TRACES = "traces"
PANEL_WIDTH, PANEL_HEIGHT, GAP, TITLE = 92, 62, 14, 13
MOST_COLOURS = 6


def save_trace(store: RunStore, cell: Cell, episode: Episode, space: ActionSpace) -> None:
    """Write the decisions as JSON and, beside it, the images at which they were made as one row in a PNG.

    Numbers that are not finite become null.
    """
    name = f"{TRACES}/{cell.path}-{episode.seed}"
    if episode.frames is not None:
        last = len(episode.frames) - 1
        seen = [episode.frames[min(k * space.execute, last)] for k in range(len(episode.trace))]
        if seen:
            store.write_bytes(f"{name}.png", _png(np.concatenate(seen, axis=1)))
    told = {
        "policy": cell.policy,
        "training_seed": cell.training_seed,
        "rule": cell.rule,
        "seed": episode.seed,
        "instruction": episode.instruction,
        "success": episode.success,
        "outcome": episode.outcome,
        "steps": episode.steps,
        "action_space": space.model_dump(mode="json"),
        "decisions": [_told(decision) for decision in episode.trace],
    }
    store.write_text(f"{name}.json", json.dumps(told))


def read_traces(store: RunStore) -> list[dict[str, Any]]:
    """Return every stored trace with its `images`, one per decision as a PNG's address, or none."""
    found = []
    for name in store.list(TRACES):
        if name.endswith(".json"):
            trace = json.loads(store.read_text(name))
            strip = name.removesuffix(".json") + ".png"
            trace["images"] = (
                _cut(store.read_bytes(strip), len(trace["decisions"])) if store.exists(strip) else []
            )
            found.append(trace)
    return found


def draw_candidates(decision: Mapping[str, Any], space: ActionSpace) -> Markup:
    """Return an <svg> with a panel per action dimension: each candidate's chunk, the kept one drawn thick."""
    width = space.dimensions * (PANEL_WIDTH + GAP) - GAP
    parts = [_panel(decision, space, d, d * (PANEL_WIDTH + GAP)) for d in range(space.dimensions)]
    opening = Markup('<svg class="chunks" role="img" aria-label="{}" viewBox="0 0 {} {}">').format(
        f"Chunks of {len(decision['candidates'])} candidates in {', '.join(space.names)}", width,
        PANEL_HEIGHT + TITLE,
    )  # fmt: skip
    return opening + Markup("").join(parts) + Markup("</svg>")


def confidence_bars(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each candidate's confidence with the width of its bar, in percent from lowest to highest."""
    values = [value for value in decision["confidences"] if value is not None]
    low, span = min(values, default=0.0), (max(values, default=0.0) - min(values, default=0.0)) or 1.0
    return [
        {
            "number": i + 1,
            "value": value,
            "width": 8 + 92 * (value - low) / span if value is not None else 0,
            "chosen": i == decision["chosen"],
            "decoded": _whole(decision["candidates"][i]),
            "colour": _colour(i, len(decision["candidates"])),
        }
        for i, value in enumerate(decision["confidences"])
    ]


def _panel(decision: Mapping[str, Any], space: ActionSpace, dimension: int, left: float) -> Markup:
    low, high = space.low[dimension], space.high[dimension]
    chunks: list[tuple[str, Any]] = [
        (_colour(i, len(decision["candidates"])), chunk) for i, chunk in enumerate(decision["candidates"])
    ]
    kept = chunks.pop(decision["chosen"]) if decision["chosen"] >= 0 else ("ink", decision["actions"])
    drawn = [
        Markup('<text x="{}" y="9">{}</text><rect x="{}" y="{}" width="{}" height="{}"/>').format(
            left, space.names[dimension], left, TITLE, PANEL_WIDTH, PANEL_HEIGHT
        )
    ]
    for kind, (colour, chunk) in [*(("other", other) for other in chunks), ("kept", kept)]:
        if _whole(chunk):
            points = " ".join(
                f"{left + PANEL_WIDTH * (t + 0.5) / len(chunk):.1f},"
                f"{TITLE + PANEL_HEIGHT * (0.95 - 0.9 * (step[dimension] - low) / (high - low)):.1f}"
                for t, step in enumerate(chunk)
            )
            line = '<polyline class="{}" style="stroke: var(--{})" points="{}"/>'
            drawn.append(Markup(line).format(kind, colour, points))
    return Markup("").join(drawn)


def _colour(candidate: int, candidates: int) -> str:
    return f"series-{candidate + 1}" if candidates <= MOST_COLOURS else "muted"


def _whole(chunk: Any) -> bool:
    return all(value is not None for step in chunk for value in step)


def _told(decision: Decision) -> dict[str, Any]:
    return {
        "chosen": decision.chosen,
        "actions": _finite(decision.actions),
        "candidates": _finite(decision.candidates),
        "tokens": [list(map(int, tokens)) for tokens in decision.tokens],
        "confidences": _finite(decision.confidences),
        "token_confidences": _finite(decision.token_confidences),
        "rejected": decision.rejected,
        "clipped": decision.clipped,
    }


def _finite(values: np.ndarray) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return round(value, 6) if math.isfinite(value) else None

    return plain(np.asarray(values).tolist())


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    iio.imwrite(buffer, image, extension=".png")
    return buffer.getvalue()


def _cut(strip: bytes, parts: int) -> list[str]:
    return [data_uri(_png(image)) for image in np.split(iio.imread(strip), parts, axis=1)] if parts else []
