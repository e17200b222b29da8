"""Statistics of actions: against numpy and closed form, and what bad ones are answered with."""

import numpy as np
import pytest
from pydantic import ValidationError

from counterpoint.actions.statistics import ActionStatistics

RNG = np.random.default_rng(0)
ACTIONS = RNG.normal([0.0, 5.0, -1.0], [1.0, 0.1, 30.0], (2000, 3))


def test_they_are_what_numpy_measures_and_survive_json() -> None:
    statistics = ActionStatistics.from_actions(ACTIONS, "demos-1")
    assert statistics.mean is not None
    assert statistics.std is not None
    for column in range(3):
        ordered = np.sort(ACTIONS[:, column])
        assert statistics.low[column] == pytest.approx(np.interp(0.01 * 1999, np.arange(2000), ordered))
        assert statistics.high[column] == pytest.approx(np.interp(0.99 * 1999, np.arange(2000), ordered))
        assert statistics.mean[column] == pytest.approx(sum(ordered) / 2000)
        assert statistics.std[column] == pytest.approx(np.sqrt(np.mean((ordered - ordered.mean()) ** 2)))
    assert (statistics.count, statistics.fingerprint) == (2000, "demos-1")
    assert ActionStatistics.model_validate_json(statistics.model_dump_json()) == statistics


def test_the_quantile_range_becomes_minus_one_to_one_and_back() -> None:
    statistics = ActionStatistics.from_actions(ACTIONS, "demos-1", (0.05, 0.9))
    np.testing.assert_allclose(statistics.normalise(np.array(statistics.low)), -1)
    np.testing.assert_allclose(statistics.normalise(np.array(statistics.high)), 1)
    middle = (np.array(statistics.low) + np.array(statistics.high)) / 2
    np.testing.assert_allclose(statistics.normalise(middle), 0, atol=1e-12)
    chunks = ACTIONS.reshape(500, 4, 3)
    np.testing.assert_allclose(statistics.unnormalise(statistics.normalise(chunks)), chunks, atol=1e-9)


def test_a_constant_dimension_is_its_value_and_nothing_is_divided_by_zero() -> None:
    actions = np.column_stack([ACTIONS[:, 0], np.full(2000, 7.0)])
    statistics = ActionStatistics.from_actions(actions, "demos-1")
    with np.errstate(all="raise"):
        normal = statistics.normalise(np.array([[0.5, 7.0], [0.5, 9.0]]))
    assert normal[:, 1].tolist() == [0.0, 0.0]
    assert statistics.unnormalise(np.array([0.3, -0.8]))[1] == 7.0


def test_dimensions_that_are_not_scaled_pass_unchanged() -> None:
    statistics = ActionStatistics.from_actions(ACTIONS, "demos-1").model_copy(
        update={"scaled": (True, False, True)}
    )
    assert statistics.normalise(ACTIONS)[:, 1].tolist() == ACTIONS[:, 1].tolist()
    assert statistics.unnormalise(ACTIONS)[:, 1].tolist() == ACTIONS[:, 1].tolist()
    assert statistics.clipping(ACTIONS + 1000).shares.tolist() == [1.0, 0.0, 1.0]


def test_clipping_is_the_share_outside_and_warns_of_statistics_of_other_data() -> None:
    statistics = ActionStatistics.from_actions(ACTIONS, "demos-1")
    own = statistics.clipping(ACTIONS)
    outside = (np.array(statistics.low) > ACTIONS) | (np.array(statistics.high) < ACTIONS)
    expected = [sum(column) / 2000 for column in outside.T]
    np.testing.assert_allclose(own.shares, expected)
    assert own.warning is None
    # A few actions that happen to lie outside are no evidence.
    assert statistics.clipping(ACTIONS[:3] + 100).warning is None
    other = statistics.clipping(ACTIONS * [1, 1, 3])
    assert other.warning is not None
    assert "\n" not in other.warning
    assert "of dimension 2" in other.warning
    assert "dimension 0" not in other.warning
    assert "'demos-1'" in other.warning


def test_actions_as_float32_do_not_leave_the_range_of_their_own_extremes() -> None:
    actions = RNG.uniform(-0.1, 0.1, (500, 2)).astype(np.float32).astype(np.float64) * 1.1
    statistics = ActionStatistics.from_actions(actions, "x", (0.0, 1.0))
    assert statistics.clipping(actions.astype(np.float32)).shares.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(4), r"shape \[4\]"),
        (np.zeros((0, 3)), "not empty"),
        (np.array([[0.0, np.nan], [np.inf, 0.0]]), r"not finite in dimensions \[0, 1\]"),
    ],
)
def test_actions_that_cannot_be_measured_are_refused(actions: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActionStatistics.from_actions(actions, "demos-1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high": [1.0]}, r"statistics.high has 1 entries"),
        ({"low": [0.0, 9.0, 0.0]}, "exceeds"),
        ({"mean": [0.0, float("nan"), 0.0]}, "statistics.mean=.* not finite"),
        ({"std": [0.0, -1.0, 0.0]}, "negative"),
        ({"quantiles": [0.9, 0.1]}, "must rise"),
        ({"scaled": [True]}, "statistics.scaled has 1"),
    ],
)
def test_statistics_that_contradict_themselves_are_refused(change: dict[str, object], message: str) -> None:
    zeros, ones = [0.0] * 3, [1.0] * 3
    good = {"low": zeros, "high": ones, "mean": zeros, "std": ones, "count": 5, "fingerprint": "x"}
    ActionStatistics.model_validate(good)
    with pytest.raises(ValidationError, match=message):
        ActionStatistics.model_validate(good | change)


def test_actions_of_another_robot_are_refused() -> None:
    statistics = ActionStatistics.from_actions(ACTIONS, "demos-1")
    for use in (statistics.normalise, statistics.unnormalise, statistics.clipping):
        with pytest.raises(ValueError, match="the statistics 3 dimensions"):
            use(np.zeros((5, 7)))
        with pytest.raises(ValueError, match=r"not finite in dimensions \[2\]"):
            use(np.array([0.0, 0.0, np.inf]))
