"""What arms over seeds say about a claim: means, paired differences with intervals, a verdict in words."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from jobs.claim import CompareConfig

Verdict = Literal["holds", "does not show here", "reversed"]
LEVEL = 0.95
RESAMPLES = 9999


def arm_summary(values: Sequence[float]) -> dict[str, Any]:
    """Return an arm's values, their mean, and the standard error of the mean (None for one seed)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "seeds": list(values)}


def compared(pair: CompareConfig, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the paired difference arm - to, its intervals and the verdict on `arm` being better than `to`.

    The 95 % interval that judges is the percentile bootstrap of the mean difference over seeds (Efron 1979).
    With three seeds it is little more than the range of the three differences, so that it is narrower than
    its level says; Student's t interval stands beside it.
    """
    differences = [a - b for a, b in zip(values[pair.arm], values[pair.to], strict=True)]
    found: dict[str, Any] = {
        "arm": pair.arm, "to": pair.to, "metric": pair.metric, "better": pair.better, "margin": pair.margin,
        "difference": statistics.fmean(differences), "differences": differences,
    }  # fmt: skip
    if len(differences) < 2:
        return found | {"interval": None, "students_t": None, "verdict": "does not show here"}
    interval = bootstrap_interval(differences)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(differences) - 1)) * float(stats.sem(differences))
    mean = found["difference"]
    return found | {
        "interval": list(interval), "students_t": [mean - half, mean + half],
        "verdict": verdict(interval, pair),
    }  # fmt: skip


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the percentile bootstrap's 95 % interval of the mean; the same for the same differences."""
    if max(differences) == min(differences):
        return differences[0], differences[0]
    found = stats.bootstrap(
        (np.asarray(differences),), np.mean, n_resamples=RESAMPLES, method="percentile",
        confidence_level=LEVEL, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def verdict(interval: tuple[float, float], pair: CompareConfig) -> Verdict:
    """Return `holds` if the whole interval is better by more than the margin, `reversed` if it is worse."""
    low, high = interval if pair.better == "higher" else (-interval[1], -interval[0])
    if low > pair.margin:
        return "holds"
    return "reversed" if high < 0.0 else "does not show here"
