"""Alarms for what silently ruins adversarial runs, from the figures of each step and of each snapshot.

Where the thresholds come from: on 8x8 digits and 16x16 textures the largest gap of a healthy run, averaged
over 20 steps, stays below 0.3; with 100 real images and no refresh it passes 2 within 250 steps. The heads'
loss stays below that of blind heads in healthy runs and lies 0.02 to 0.15 above it at 30 times the learning
rate.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from counterpoint.section import Section


class AlarmsConfig(Section):
    """When to raise an alarm; each is raised once, when its condition first holds."""

    window: int = Field(default=20, ge=1)
    """Steps over which figures are averaged."""
    max_gap: float = Field(default=2.0, gt=0.0)
    """Mean gap between real and fake logits of a noise group, kind and level; at 2 hinge heads are certain of
    both and have nothing left to learn."""
    max_critic_excess: float = Field(default=0.02, gt=0.0)
    """By how much the heads' mean loss may exceed that of heads that see nothing (hinge and softplus)."""
    std_ratio: tuple[float, float] = (0.5, 1.5)
    """Allowed range of the fake samples' standard deviation over the real ones'."""
    min_recall_share: float = Field(default=0.7, ge=0.0, le=1.0)
    """Recall of a snapshot, on a fixed set, as a share of the first snapshot's."""


class Watcher:
    """Looks at every row of figures of a run, in order, and says what is wrong."""

    def __init__(self, config: AlarmsConfig) -> None:
        self.config = config
        self._windows: dict[str, deque[float]] = {}
        self._first_recall: dict[str, float] = {}
        self._raised: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """Take the row of one step and return the alarms that it raises, each once in a run."""
        found: dict[str, str] = {}
        if row.get("stage") in ("heads", "panel"):
            self._check_gaps(row, found)
            self._check_losses(row, found)
        if row.get("stage") == "panel":
            self._check_gradients(row, found)
            self._check_spread(row, found)
        return self._new(found)

    def see_snapshot(self, row: Mapping[str, Any]) -> list[str]:
        """Take the row of an evaluated snapshot and return the alarms that it raises."""
        found: dict[str, str] = {}
        for name, table in row.items():
            if not isinstance(table, Mapping) or "recall" not in table:
                continue
            first = self._first_recall.setdefault(name, table["recall"])
            if table["recall"] < self.config.min_recall_share * first:
                found[f"recall/{name}"] = (
                    f"recall at {name} fell from {first:.2f} to {table['recall']:.2f}: the student is losing "
                    "modes; lower adversarial.adversarial_weight or raise critics.refresh_rate"
                )
        return self._new(found)

    def _check_gaps(self, row: Mapping[str, Any], found: dict[str, str]) -> None:
        for group, kinds in row.get("gap", {}).items():
            means = {}
            for kind, levels in kinds.items():
                for level, gap in enumerate(levels):
                    # NaN where no head judged; None where the row has been through JSON.
                    if gap is not None and not math.isnan(gap):
                        means[f"{kind}, level {level}"] = self._mean(f"gap/{group}/{kind}/{level}", gap)
            wide = {place: mean for place, mean in means.items() if mean and mean > self.config.max_gap}
            if wide:
                worst = max(wide, key=lambda place: wide[place])
                found[f"gap/{group}"] = (
                    f"{group}: real and fake logits are {wide[worst]:.1f} apart at {worst} (and too far at "
                    f"{len(wide)} of {len(means)} places) over {self.config.window} steps: heads know the "
                    "real images by heart, or the student is far behind; raise critics.refresh_rate, lower "
                    "critics.learning_rate or show more images"
                )

    def _check_losses(self, row: Mapping[str, Any], found: dict[str, str]) -> None:
        loss, excess = row.get("critic_loss", 0.0), row.get("critic_excess", 0.0)
        mean = self._mean("critic_excess", excess)
        if not math.isfinite(loss):
            found["critic_loss"] = f"the heads' loss is {loss}: they diverge; lower critics.learning_rate"
        elif mean is not None and mean > self.config.max_critic_excess:
            found["critic_excess"] = (
                f"the heads' loss is {mean:.3f} above that of heads that see nothing, over "
                f"{self.config.window} steps: they overshoot; lower critics.learning_rate"
            )

    def _check_gradients(self, row: Mapping[str, Any], found: dict[str, str]) -> None:
        if row.get("voting", 0) > 0 and row.get("verdict_gradient_norm") == 0.0:
            found["verdict"] = "the panel votes but its gradient is zero: the path through the encoder is cut"
        norm = row.get("gradient_norm", 1.0)
        if norm == 0.0:
            found["gradient"] = (
                "the student's gradient is zero: what the panel says does not reach its weights"
            )
        elif not math.isfinite(norm):
            found["divergence"] = (
                f"the student's gradient norm is {norm}: it diverges; lower its learning_rate"
            )

    def _check_spread(self, row: Mapping[str, Any], found: dict[str, str]) -> None:
        if "sample_std_ratio" not in row:
            return
        mean, (low, high) = self._mean("spread", row["sample_std_ratio"]), self.config.std_ratio
        if mean is not None and not low <= mean <= high:
            found["std"] = (
                f"the student's samples have {mean:.2f} times the real ones' standard deviation: it "
                "collapses or diverges; lower adversarial.adversarial_weight or the learning rate"
            )

    def _mean(self, name: str, value: float) -> float | None:
        """Add a value to a window of its own and return the mean of a full one, None before."""
        window = self._windows.setdefault(name, deque(maxlen=self.config.window))
        window.append(value)
        return sum(window) / len(window) if len(window) == window.maxlen else None

    def _new(self, found: dict[str, str]) -> list[str]:
        fresh = {key: text for key, text in found.items() if key not in self._raised}
        self._raised.update(fresh)
        return list(fresh.values())
