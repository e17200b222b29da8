"""What episodes amount to: success by policy, rule and instruction, and what changes from one to another."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy import stats

from counterpoint.environments.episode import Episode
from counterpoint.metrics.proportions import PairedDifference, holm, paired_difference, wilson
from counterpoint.selection.config import Rule, SelectionConfig
from jobs.rollout_cells import CellResult, Session

Row = dict[str, Any]
Results = Mapping[tuple[str, str], Sequence[CellResult]]
"""Cells by (policy, rule), one per training seed in the same order everywhere."""


def rate_figures(episodes: Iterable[Episode]) -> Row:
    """Return successes of how many episodes, their share and its Wilson 95 % interval; None without any."""
    played = list(episodes)
    successes = sum(episode.success for episode in played)
    row: Row = {"successes": successes, "episodes": len(played), "rate": None, "low": None, "high": None}
    if played:
        row["low"], row["high"] = wilson(successes, len(played))
        row["rate"] = successes / len(played)
    return row


def cell_figures(results: Sequence[CellResult]) -> Row:
    """Return the figures of one policy under one rule, pooled over training seeds and, in `seeds`, of each.

    Pooled intervals take all episodes for independent, and they are not: training seeds share initial states.
    So `mean` is given too, over training seeds, with Student's 95 % interval between them.
    """
    cell = results[0].cell
    seeds = [{"training_seed": result.cell.training_seed, **_pooled([result])} for result in results]
    mean, low, high = mean_interval([seed["rate"] for seed in seeds if seed["rate"] is not None])
    between = {"mean": mean, "mean_low": low, "mean_high": high}
    return {"policy": cell.policy, "rule": cell.rule, **_pooled(results), **between, "seeds": seeds}


def _pooled(results: Sequence[CellResult]) -> Row:
    episodes = [episode for result in results for episode in result.episodes.values()]
    return {
        **rate_figures(episodes),
        "mean_steps": statistics.fmean(e.steps for e in episodes) if episodes else None,
        "outcomes": dict(Counter(e.outcome for e in episodes if not e.success).most_common()),
        "decisions": sum(e.decisions for e in episodes),
        "rejected": sum(e.rejected for e in episodes),
        "fallbacks": sum(e.fallbacks for e in episodes),
        "clipped": sum(e.clipped for e in episodes),
        "tied_share": _ratio(sum(e.tied for e in episodes), sum(e.decisions for e in episodes)),
        "set_aside": sum(len(result.set_aside) for result in results),
        **speed_figures(sum((result.session for result in results), Session())),
    }


def speed_figures(session: Session) -> Row:
    """Return what a session's time went to; figures that it does not have are None."""
    return {
        "seconds": round(session.seconds, 2),
        "episodes_per_second": _ratio(session.episodes, session.seconds),
        "ms_per_decision": _ratio(1000.0 * session.seconds, session.decisions),
        "sampler_ms_per_decision": _ratio(1000.0 * session.sampling_seconds, session.observations),
        "mean_batch_size": _ratio(session.observations, session.batches),
    }


def instruction_figures(results: Sequence[CellResult]) -> list[Row]:
    """Return success by instruction, pooled over training seeds."""
    cell = results[0].cell
    episodes = [episode for result in results for episode in result.episodes.values()]
    return [
        {"policy": cell.policy, "rule": cell.rule, "instruction": instruction}
        | rate_figures(e for e in episodes if e.instruction == instruction)
        for instruction in sorted({e.instruction for e in episodes})
    ]


def comparison(ours: Sequence[CellResult], theirs: Sequence[CellResult]) -> Row | None:
    """Return the paired difference in success of `ours` over `theirs`; None where nothing can be paired.

    Pairs have the same training seed and the same environment seed. Interval and `p` (McNemar's, exact) are
    over all pairs; `mean` is that of the training seeds' differences, with Student's 95 % interval.
    """
    others = {result.cell.training_seed: result for result in theirs}
    pairs = [
        _outcomes(one, others[one.cell.training_seed]) for one in ours if one.cell.training_seed in others
    ]
    pairs = [outcomes for outcomes in pairs if outcomes]
    if not pairs:
        return None
    by_seed = [_paired(outcomes).difference for outcomes in pairs]
    pooled = _paired(list(itertools.chain.from_iterable(pairs)))
    mean, mean_low, mean_high = mean_interval(by_seed)
    return {
        "pairs": pooled.trials,
        "gained": pooled.gained,
        "lost": pooled.lost,
        "difference": pooled.difference,
        "low": pooled.low,
        "high": pooled.high,
        "p": pooled.p,
        "by_seed": by_seed,
        "mean": mean,
        "mean_low": mean_low,
        "mean_high": mean_high,
    }


def comparisons(results: Results, baseline: str, rules: Mapping[str, SelectionConfig]) -> list[Row]:
    """Return every comparison that is shown, with `p_holm` over all of them.

    Each rule against the baseline of the same policy and against random choice among as many candidates;
    masked conditions against likelihood, too; each policy after the first against the first under the same
    rule.
    """
    policies = list(dict.fromkeys(policy for policy, _ in results))
    wanted: list[tuple[str, tuple[str, str], tuple[str, str]]] = []
    for policy, rule in results:
        if rule not in rules:
            continue
        rivals = {"baseline": (policy, baseline)}
        if control := control_of(rules[rule], "random", rules):
            rivals["random"] = (policy, control)
        if rules[rule].rule == "masked_condition" and (
            likeliest := control_of(rules[rule], "likelihood", rules)
        ):
            rivals["likelihood"] = (policy, likeliest)
        if policy != policies[0]:
            rivals["policy"] = (policies[0], rule)
        wanted += [(kind, (policy, rule), rival) for kind, rival in rivals.items() if rival in results]
    found = []
    seen: set[tuple[tuple[str, str], tuple[str, str]]] = set()
    for kind, ours, theirs in wanted:
        if ours == theirs or (ours, theirs) in seen or (theirs, ours) in seen:
            continue
        seen.add((ours, theirs))
        row = comparison(results[ours], results[theirs])
        if row is not None:
            names = {
                "policy": ours[0],
                "rule": ours[1],
                "against_policy": theirs[0],
                "against_rule": theirs[1],
            }
            found.append({"kind": kind, **names, **row})
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = float(adjusted)
    return found


def control_of(selection: SelectionConfig, rule: Rule, rules: Mapping[str, SelectionConfig]) -> str | None:
    """Return the name of the `rule` that chooses among candidates like those of `selection`, if any."""
    if selection.rule in ("greedy", "random"):
        return None
    same = ("candidates", "temperature")
    return next(
        (
            name
            for name, other in rules.items()
            if other.rule == rule and all(getattr(other, key) == getattr(selection, key) for key in same)
        ),
        None,
    )


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the mean and its two-sided 95 % interval by Student's t; None where there are too few values."""
    if not values:
        return None, None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def _outcomes(ours: CellResult, theirs: CellResult) -> list[tuple[bool, bool]]:
    """Return whether we and they succeeded, for each seed that both played."""
    shared = sorted(ours.episodes.keys() & theirs.episodes.keys())
    return [(ours.episodes[seed].success, theirs.episodes[seed].success) for seed in shared]


def _paired(outcomes: Sequence[tuple[bool, bool]]) -> PairedDifference:
    return paired_difference([ours for ours, _ in outcomes], [theirs for _, theirs in outcomes])


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
