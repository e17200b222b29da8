"""Figures of a comparison, against scipy and against counting by hand."""

import numpy as np
import pytest
from rollout_parts import GREEDY, RANDOM, TEXT, episode, played
from scipy import stats

from counterpoint.selection.config import SelectionConfig
from jobs.rollout_cells import Cell, CellResult
from jobs.rollout_figures import (
    cell_figures,
    comparison,
    comparisons,
    control_of,
    instruction_figures,
    mean_interval,
)

RULES = {"greedy": GREEDY, "random-of-4": RANDOM, "text": TEXT}
N = 40


def cell(policy: str, seed: int, rule: str) -> Cell:
    return Cell(policy, seed, rule, f"/runs/{policy}-{seed}", RULES[rule])


def flips(seed: int, rate: float) -> list[bool]:
    return (np.random.default_rng(seed).random(N) < rate).tolist()


def two_policies() -> dict[tuple[str, str], list[CellResult]]:
    return {
        (policy, rule): [
            played(cell(policy, s, rule), flips(100 * s + i + 7 * (policy == "joint"), 0.4 + 0.1 * i))
            for s in (0, 1, 2)
        ]
        for policy in ("base", "joint")
        for i, rule in enumerate(RULES)
    }


def test_pooled_figures_are_counted() -> None:
    results = [
        played(cell("base", 0, "text"), [True, True, False], s9="hung"),
        played(cell("base", 1, "text"), [True, False, False]),
    ]
    row = cell_figures(results)
    assert (row["successes"], row["episodes"], row["set_aside"]) == (3, 6, 1)
    interval = stats.binomtest(3, 6).proportion_ci(method="wilson")
    assert (row["rate"], row["low"], row["high"]) == pytest.approx((0.5, interval.low, interval.high))
    assert row["outcomes"] == {"wrong block": 2, "time is up": 1}
    assert row["mean_steps"] == pytest.approx((3 * 22 + 3 * 48) / 6)
    assert (row["decisions"], row["rejected"], row["clipped"]) == (3 * 6 + 3 * 12, 6, 12)
    assert row["ms_per_decision"] == pytest.approx(600.0 / 54)
    assert row["sampler_ms_per_decision"] == pytest.approx(1800.0 / 54)
    assert row["mean_batch_size"] == pytest.approx(54 / (24 // 12 + 30 // 12))
    each = [(seed["training_seed"], seed["successes"], seed["mean_steps"]) for seed in row["seeds"]]
    assert each == [(0, 2, (2 * 22 + 48) / 3), (1, 1, (22 + 2 * 48) / 3)]
    spread = stats.t.interval(0.95, 1, loc=0.5, scale=stats.sem([2 / 3, 1 / 3]))
    assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx((0.5, *spread))


def test_a_cell_without_episodes_has_no_rate() -> None:
    row = cell_figures([CellResult(cell("base", 0, "text"), {}, {5: "crashed"})])
    assert (row["rate"], row["low"], row["mean"], row["mean_steps"], row["ms_per_decision"]) == (None,) * 5
    assert row["set_aside"] == 1


def test_instructions_are_counted_apart() -> None:
    rows = instruction_figures([played(cell("base", 0, "text"), flips(0, 0.5), first=3)])
    made = [episode(3 + i, success) for i, success in enumerate(flips(0, 0.5))]
    for row in rows:
        own = [e.success for e in made if e.instruction == row["instruction"]]
        assert (row["successes"], row["episodes"]) == (sum(own), len(own))
    assert sum(row["episodes"] for row in rows) == N


def test_pairs_have_the_same_training_seed_and_the_same_environment_seed() -> None:
    ours = [
        played(cell("base", 0, "text"), [True, True, False, True]),
        played(cell("base", 5, "text"), [True]),
    ]
    theirs = [
        played(cell("base", 1, "greedy"), [False] * 4),
        CellResult(
            cell("base", 0, "greedy"),
            {
                s: e
                for s, e in played(cell("base", 0, "greedy"), [False, True, True, False]).episodes.items()
                if s != 103
            },
            {103: "hung"},
        ),
    ]
    row = comparison(ours, theirs)
    assert row is not None
    assert (row["pairs"], row["gained"], row["lost"], row["by_seed"]) == (3, 1, 1, [0.0])
    assert comparison(ours, theirs[:1]) is None


def test_p_and_differences_are_mcnemars() -> None:
    results = two_policies()
    row = comparison(results["base", "text"], results["base", "greedy"])
    assert row is not None
    ours = np.array([[e.success for e in r.episodes.values()] for r in results["base", "text"]])
    theirs = np.array([[e.success for e in r.episodes.values()] for r in results["base", "greedy"]])
    gained, lost = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    assert (row["gained"], row["lost"], row["pairs"]) == (gained, lost, 3 * N)
    assert row["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    by_seed = ours.mean(1) - theirs.mean(1)
    assert row["by_seed"] == pytest.approx(by_seed)
    assert row["difference"] == pytest.approx(by_seed.mean())
    assert (row["mean_low"], row["mean_high"]) == pytest.approx(
        stats.t.interval(0.95, 2, loc=by_seed.mean(), scale=stats.sem(by_seed))
    )


def test_the_family_is_what_is_shown_and_nothing_is_shown_twice() -> None:
    rows = comparisons(two_policies(), "greedy", RULES)
    shown = [(r["kind"], r["policy"], r["rule"], r["against_policy"], r["against_rule"]) for r in rows]
    wanted = []
    for policy in ("base", "joint"):
        for rule in RULES:
            wanted += [("baseline", policy, rule, policy, "greedy")] if rule != "greedy" else []
            wanted += [("random", policy, rule, policy, "random-of-4")] if rule == "text" else []
            wanted += [("policy", policy, rule, "base", rule)] if policy == "joint" else []
    assert shown == wanted
    p = sorted(row["p"] for row in rows)
    holm = np.maximum.accumulate([min(1.0, value * (len(p) - i)) for i, value in enumerate(p)])
    assert sorted(row["p_holm"] for row in rows) == pytest.approx(holm)


def test_masked_conditions_are_compared_with_likelihood_too() -> None:
    rules = {"greedy": GREEDY, "text": TEXT, "likely": SelectionConfig(rule="likelihood")}
    results = {
        ("base", rule): [played(cell("base", 0, "text"), [True, False, index > 0])]
        for index, rule in enumerate(rules)
    }
    kinds = {(row["kind"], row["rule"], row["against_rule"]) for row in comparisons(results, "greedy", rules)}
    assert ("likelihood", "text", "likely") in kinds
    assert len(kinds) == 3


def test_random_as_the_baseline_is_not_compared_with_itself() -> None:
    rows = comparisons(two_policies(), "random-of-4", RULES)
    keys = [(r["policy"], r["rule"], r["against_policy"], r["against_rule"]) for r in rows]
    assert len(keys) == len(set(keys))
    assert all(key[:2] != key[2:] for key in keys)


@pytest.mark.parametrize(
    ("selection", "control"),
    [
        (TEXT, "random-of-4"),
        (GREEDY, None),
        (RANDOM, None),
        (SelectionConfig(rule="likelihood", candidates=16), None),
        (SelectionConfig(rule="likelihood", temperature=1.0), None),
    ],
)
def test_the_control_draws_the_same_candidates(selection: SelectionConfig, control: str | None) -> None:
    assert control_of(selection, "random", RULES) == control


def test_one_training_seed_has_no_interval() -> None:
    assert mean_interval([0.5]) == (0.5, None, None)
    assert mean_interval([]) == (None, None, None)
