"""What trials try: draws that depend on their arguments alone, TPE, importance, a population's changes."""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from scipy import stats

from jobs.tune_ledger import Report, TrialRecord
from jobs.tune_parameter import Parameter
from jobs.tune_search import clamped, compared, importance, mutations, propose, study_of
from jobs.tune_settings import SearcherConfig

RANDOM, TPE = SearcherConfig(), SearcherConfig(kind="tpe", startup_trials=6)
SPACE: dict[str, Any] = {
    "lr": (
        Parameter(loguniform=(1e-4, 1e-2), when={"kind": "adam"}),
        Parameter(loguniform=(1e-2, 1.0), when={"kind": ["sgd", "plain"]}),
    ),
    "kind": Parameter(choice=("adam", "sgd", None)),
    "momentum": Parameter(uniform=(0.0, 1.0), when={"kind": "sgd", "heads": {"above": 2, "below": 8}}),
    "heads": Parameter(randint=(1, 8)),
    "steps": Parameter(choice=([1], [1, 4], {"kind": "linear", "start": 1})),
    "flag": Parameter(choice=(True, 1)),
}
FLAT: dict[str, Any] = {"x": Parameter(uniform=(-1.0, 1.0)), "y": Parameter(uniform=(-1.0, 1.0))}


def record(index: int, params: Mapping[str, Any], value: float | None, **more: Any) -> TrialRecord:
    """Return a finished trial."""
    return TrialRecord(index, params, **{"state": "done", "value": value, **more})


def searched(
    space: Mapping[str, Any], searcher: SearcherConfig, seed: int, trials: int,
    worth: Callable[[Mapping[str, Any]], float],
) -> list[TrialRecord]:  # fmt: skip
    """Return the records of trials one after the other."""
    found: list[TrialRecord] = []
    for index in range(trials):
        params = propose(space, searcher, seed, index, found, "min")
        found.append(record(index, params, worth(params)))
    return found


def quadratic(params: Mapping[str, Any]) -> float:
    """Return a bowl with its lowest point at (0.5, -0.3)."""
    return float((params["x"] - 0.5) ** 2 + 4.0 * (params["y"] + 0.3) ** 2)


def test_random_proposals_are_a_function_of_seed_and_index_alone() -> None:
    forwards = [propose(SPACE, RANDOM, 3, index, [], "min") for index in range(8)]
    others = [record(index, params, 1.0) for index, params in enumerate(forwards)]
    backwards = [propose(SPACE, RANDOM, 3, index, others, "max") for index in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert len({str(params) for params in forwards}) == 8
    assert propose(SPACE, RANDOM, 4, 0, [], "min") != forwards[0]
    # Before TPE begins to choose, its trials are those of the random searcher.
    assert [propose(SPACE, TPE, 3, index, others[:index], "min") for index in range(6)] == forwards[:6]


def test_tpe_is_a_function_of_the_records_in_any_order() -> None:
    records = searched(FLAT, TPE, 0, 10, quadratic)
    once = propose(FLAT, TPE, 0, 10, records, "min")
    assert propose(FLAT, TPE, 0, 10, records[::-1], "min") == once
    # A record of the trial itself, such as a killed driver leaves, changes nothing.
    assert propose(FLAT, TPE, 0, 10, [*records, TrialRecord(10, once)], "min") == once
    assert propose(FLAT, TPE, 0, 10, records, "max") != once


def test_values_are_plain_and_within_their_ranges_under_their_conditions() -> None:
    momentum = 0
    for index in range(200):
        params = propose(SPACE, RANDOM, 0, index, [], "min")
        assert list(params) == [key for key in SPACE if key in params]
        low, high = {"adam": (1e-4, 1e-2), "sgd": (1e-2, 1.0)}.get(params["kind"], (0.0, 0.0))
        assert ("lr" in params) == (params["kind"] is not None)
        if "lr" in params:
            assert type(params["lr"]) is float
            assert low <= params["lr"] <= high
        assert type(params["heads"]) is int
        assert 1 <= params["heads"] <= 8
        assert params["steps"] in ([1], [1, 4], {"kind": "linear", "start": 1})
        assert ("momentum" in params) == (params["kind"] == "sgd" and 2 < params["heads"] < 8)
        momentum += "momentum" in params
    assert momentum > 10


def test_draws_follow_their_distributions() -> None:
    space = {
        "a": Parameter(loguniform=(1e-5, 1e-1)), "b": Parameter(uniform=(-2.0, 3.0)),
        "n": Parameter(randint=(1, 4)), "c": Parameter(choice=("u", "v", "w")),
    }  # fmt: skip
    drawn = [propose(space, RANDOM, 2, index, [], "min") for index in range(400)]
    logs = [math.log(params["a"] / 1e-5) / math.log(1e4) for params in drawn]
    assert stats.kstest(logs, "uniform").pvalue > 0.01
    assert stats.kstest([(params["b"] + 2.0) / 5.0 for params in drawn], "uniform").pvalue > 0.01
    for key, options in (("n", (1, 2, 3, 4)), ("c", ("u", "v", "w"))):
        counts = [sum(params[key] == option for params in drawn) for option in options]
        assert stats.chisquare(counts).pvalue > 0.01
    ranks = stats.spearmanr(logs[:-1], logs[1:])
    assert ranks.pvalue > 0.01, "streams of neighbouring trials go together"


def test_grid_cells_go_round_while_other_keys_are_drawn() -> None:
    space = {"g": Parameter(grid=([1], [1, 4])), "h": Parameter(grid=("a", "b")), **FLAT}
    for searcher in (RANDOM, SearcherConfig(kind="tpe", startup_trials=2)):
        found = searched(space, searcher, 0, 9, quadratic)
        cells = [(r.params["g"], r.params["h"]) for r in found]
        assert cells[:5] == [([1], "a"), ([1], "b"), ([1, 4], "a"), ([1, 4], "b"), ([1], "a")]
        assert len({r.params["x"] for r in found}) == 9


def test_a_condition_outside_the_space_must_be_settled_first() -> None:
    space = {"x": Parameter(uniform=(0.0, 1.0), when={"elsewhere": 1})}
    with pytest.raises(ValueError, match=r"space.x: when names elsewhere"):
        propose(space, RANDOM, 0, 0, [], "min")


def test_tpe_finds_a_lower_point_than_random_draws() -> None:
    better = []
    for seed in range(5):
        bests = [
            min(r.value or 0.0 for r in searched(FLAT, searcher, seed, 25, quadratic))
            for searcher in (TPE, RANDOM)
        ]
        better.append(math.log10(bests[0]) - math.log10(bests[1]))
    assert statistics.median(better) < -0.3, better


def test_tpe_searches_conditional_spaces() -> None:
    def worth(params: Mapping[str, Any]) -> float:
        return abs(math.log10(params["lr"]) + 1.5) if "lr" in params else 3.0

    chosen = searched(SPACE, TPE, 0, 30, worth)
    assert statistics.fmean(r.params["kind"] == "sgd" for r in chosen[15:]) > 0.5
    assert min(r.value or 0.0 for r in chosen) < 0.2


def test_a_study_has_every_trial_in_its_state() -> None:
    reports = (Report(10, 3.0, (3.0,)), Report(20, 2.0, (2.0,)))
    params = propose(SPACE, RANDOM, 0, 0, [], "min")
    records = [
        record(4, params, None, state="running"), record(0, params, 1.5, reports=reports),
        record(1, params, None, state="stopped", reports=reports), record(2, params, None, state="failed"),
        record(3, params, math.nan),
    ]  # fmt: skip
    trials = study_of(SPACE, records, "min").trials
    states = [trial.state for trial in trials]
    assert states == [
        TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING,
    ]  # fmt: skip
    assert trials[0].value == 1.5
    assert trials[1].value == 2.0
    assert trials[1].intermediate_values == {10: 3.0, 20: 2.0}
    assert trials[0].params["flag"] == [True, 1].index(params["flag"]) or params["flag"] is True
    assert study_of(SPACE, [], "max").direction.name == "MAXIMIZE"


def test_trials_are_compared_at_the_last_step_that_all_have_reached() -> None:
    def reports(*steps: int) -> tuple[Report, ...]:
        return tuple(Report(step, float(step), (float(step),)) for step in steps)

    done = [record(i, {}, float(i), reports=reports(10, 20, 30)) for i in range(3)]
    assert compared(done) == (None, {0: 0.0, 1: 1.0, 2: 2.0})
    stopped = record(3, {}, None, state="stopped", reports=reports(10, 20))
    never = record(4, {}, None, state="failed", reports=reports(10))
    assert compared([*done, stopped, never]) == (20, dict.fromkeys(range(4), 20.0))


def test_importance_ranks_a_known_function_and_measures_log_ranges_by_their_logarithm() -> None:
    space = {
        "much": Parameter(uniform=(0.0, 1.0)), "some": Parameter(loguniform=(1e-6, 1.0)),
        "none": Parameter(choice=("a", "b", "c")), "fixed": Parameter(choice=(1,)),
    }  # fmt: skip

    def worth(params: Mapping[str, Any]) -> float:
        return float(3.0 * params["much"] + 1.5 * (math.log10(params["some"]) + 6.0) / 6.0)

    found = searched(space, RANDOM, 0, 60, worth)
    shares = importance(space, found, "min", 0)
    assert list(shares) == ["much", "some", "none"]
    # Var(3 u) = 4 Var(1.5 v) for even u and v in [0,1]: shares of 0.8 and 0.2.
    np.testing.assert_allclose([shares["much"], shares["some"]], [0.8, 0.2], atol=0.1)
    assert math.isclose(sum(shares.values()), 1.0)
    assert importance(space, found[::-1], "min", 0) == shares
    assert importance(space, found[:3], "min", 0) == {}
    assert importance(space, [record(r.index, r.params, 1.0) for r in found], "min", 0) == {}


def test_importance_of_a_conditional_key_is_its_share_where_it_is_set() -> None:
    def worth(params: Mapping[str, Any]) -> float:
        return 10.0 * (params["kind"] is None) + 5.0 * params.get("momentum", 0.0)

    space = {**SPACE, "momentum": Parameter(uniform=(0.0, 1.0), when={"kind": "sgd"})}
    shares = importance(space, searched(space, RANDOM, 0, 90, worth), "min", 0)
    always = {key: shares[key] for key in ("kind", "heads", "steps", "flag")}
    assert math.isclose(sum(always.values()), 1.0)
    assert max(always, key=lambda key: always[key]) == "kind"
    assert shares["momentum"] > 0.6
    assert shares["lr"] < 0.4


def test_mutations_draw_anew_from_streams_of_their_own() -> None:
    space = {
        "a": Parameter(loguniform=(1e-4, 1e-2)), "b": Parameter(randint=(2, 5)),
        "c": Parameter(choice=(0.1, 0.2, 0.4)), "d": Parameter(uniform=(0.0, 1.0)),
    }  # fmt: skip
    first, again, other = mutations(space, 0), mutations(space, 0), mutations(space, 1)
    drawn = {key: [draw() for _ in range(50)] for key, draw in first.items()}
    assert drawn == {key: [draw() for _ in range(50)] for key, draw in reversed(again.items())}
    assert drawn["d"] != [other["d"]() for _ in range(50)]
    assert all(1e-4 <= value <= 1e-2 for value in drawn["a"])
    assert set(drawn["b"]) == {2, 3, 4, 5}
    assert set(drawn["c"]) == {0.1, 0.2, 0.4}
    assert stats.kstest(drawn["d"], "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("parameter", "value", "back"),
    [
        (Parameter(uniform=(0.0, 1.0)), 1.25, 1.0),
        (Parameter(uniform=(0, 1)), -0.5, 0.0),
        (Parameter(loguniform=(1e-4, 1e-2)), 8e-5, 1e-4),
        (Parameter(randint=(1, 8)), 3.6, 4),
        (Parameter(randint=(1, 8)), 10.0, 8),
        (Parameter(choice=(0.1, 0.2, 0.4)), 0.25, 0.2),
        (Parameter(choice=("a", "b")), "b", "b"),
        (Parameter(choice=("a", "b")), 3.0, "a"),
    ],
)
def test_perturbed_values_are_brought_back(parameter: Parameter, value: Any, back: Any) -> None:
    found = clamped({"key": parameter}, {"key": value, "other": 7})
    assert found == {"key": back, "other": 7}
    assert type(found["key"]) is type(back)
