"""Intervals and tests of success rates against closed forms, published figures and simulation."""

from math import comb, sqrt

import numpy as np
import pytest
from scipy.stats import norm

from counterpoint.metrics.proportions import holm, mcnemar, paired_difference, wilson


def outcomes(both, gained, lost, neither):
    """Return two rules' outcomes with these numbers of pairs."""
    first = [True] * (both + gained) + [False] * (lost + neither)
    second = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return first, second


@pytest.mark.parametrize(("successes", "trials", "level"), [(0, 20, 0.95), (7, 20, 0.95), (200, 200, 0.9)])
def test_wilson_is_the_closed_form(successes, trials, level):
    z, rate = norm.ppf((1 + level) / 2), successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    assert wilson(successes, trials, level) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 5), (1, 7), (9, 2), (0, 6)])
def test_mcnemar_is_the_binomial_tail_doubled(gained, lost):
    pairs = gained + lost
    tail = sum(comb(pairs, k) for k in range(min(gained, lost) + 1)) / 2**pairs
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))


def test_paired_interval_is_the_published_one():
    # Airway hyper-responsiveness before and after transplantation, Fagerland, Lydersen and Laake (2014,
    # Statistics in Medicine 33:2850): 1, 1, 7, 12 pairs, -0.286 (-0.507 to -0.026), exact McNemar 0.070.
    found = paired_difference(*outcomes(1, 1, 7, 12))
    assert (found.trials, found.gained, found.lost) == (21, 1, 7)
    assert found.difference == pytest.approx(-0.286, abs=5e-4)
    assert (found.low, found.high) == pytest.approx((-0.507, -0.026), abs=5e-4)
    assert found.p == pytest.approx(0.070, abs=5e-4)


def test_paired_interval_of_many_pairs_is_walds():
    found = paired_difference(*outcomes(7940, 1500, 860, 5700))
    variance = (1500 + 860) / 16000 - found.difference**2
    half = norm.ppf(0.975) * sqrt(variance / 16000)
    assert (found.low, found.high) == pytest.approx(
        (found.difference - half, found.difference + half), abs=1e-4
    )


def test_paired_interval_covers_the_truth_about_as_often_as_it_says():
    stream = np.random.default_rng(0)
    shares, trials = [0.35, 0.2, 0.1, 0.35], 60
    covered = 0
    for counts in stream.multinomial(trials, shares, size=600):
        found = paired_difference(*outcomes(*counts))
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 600 <= 0.985


def test_swapping_the_rules_mirrors_the_comparison():
    first, second = outcomes(20, 9, 3, 8)
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert (one.gained, one.lost) == (other.lost, other.gained)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert one.p == other.p


@pytest.mark.parametrize(
    "counts", [(30, 0, 0, 0), (0, 30, 0, 0), (0, 0, 30, 0), (0, 15, 15, 0), (15, 0, 0, 15)]
)
def test_extreme_outcomes_have_sound_intervals(counts):
    found = paired_difference(*outcomes(*counts))
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert found.low < found.high


def test_outcomes_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[3\] and \[2\] are not paired"):
        paired_difference([True] * 3, [True] * 2)
    with pytest.raises(ValueError, match="are not paired"):
        paired_difference([], [])


def test_holm_is_the_step_down_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1, none below the one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    assert len(holm([])) == 0
