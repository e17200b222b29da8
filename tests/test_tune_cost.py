"""What a sweep cost and would cost: packing and list scheduling against simulations made here."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.placement import ClusterView, NodeView, Pool
from jobs.tune_cost import Saving, cost, estimate, makespan, saving, slots, view_of
from jobs.tune_ledger import TrialRecord
from jobs.tune_settings import PricedClusterConfig


def record(index: int, seconds: float = 0.0, **changes: object) -> TrialRecord:
    return replace(TrialRecord(index, {}, "done", seconds=seconds), **changes)  # type: ignore[arg-type]


def simulated(durations: list[int], slots: int) -> int:
    """The clock, second by second: free slots take the next trial, all that run lose a second."""
    waiting, left, clock = list(durations), [0] * slots, 0
    while waiting or any(left):
        for slot in range(slots):
            while not left[slot] and waiting:
                left[slot] = waiting.pop(0)
        clock += any(left)
        left = [max(0, one - 1) for one in left]
    return clock


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 40])
def test_the_makespan_is_that_of_a_clock(slots: int) -> None:
    generator = np.random.default_rng(slots)
    for _ in range(20):
        durations = generator.integers(0, 30, generator.integers(1, 25)).tolist()
        assert makespan(durations, slots) == simulated(durations, slots)


def test_no_trials_take_no_time_and_no_slots_are_refused() -> None:
    assert makespan([], 3) == 0.0
    with pytest.raises(ValueError, match="slots=0"):
        makespan([1.0], 0)


def in_nodes(cpus: int, each: int, nodes: int, most: int) -> int:
    """How many trials of one actor of `each` CPUs fit: node by node."""
    return min(most, nodes * (cpus // each))


@pytest.mark.parametrize("each", [1, 3, 5, 8, 9])
@pytest.mark.parametrize("most", [1, 4, 100])
def test_as_many_equal_trials_fit_as_counted_node_by_node(each: int, most: int) -> None:
    view = view_of(PricedClusterConfig(nodes=3, cpus=8))
    assert slots([Pool("one", 1, each)], view, most) == in_nodes(8, each, 3, most)


def test_a_trial_may_lie_across_machines_but_an_actor_may_not() -> None:
    view = view_of(PricedClusterConfig(nodes=2, cpus=3))
    assert slots([Pool("a", 2, 2.0)], view, 9) == 1
    assert slots([Pool("a", 1, 4.0)], view, 9) == 0
    assert slots([Pool("a", 2, 2.0), Pool("b", 2, 1.0)], view, 9) == 1


def test_parts_of_gpus_share_a_device() -> None:
    nodes = ClusterView((NodeView("n", {}, {"CPU": 64.0, "GPU": 2.0}),))
    trial = [Pool("trainer", 1, 1.0, 0.5), Pool("critics", 2, 1.0, 0.25)]
    assert slots(trial, nodes, 9) == 2


def test_an_estimate_is_worked_out_by_hand() -> None:
    trials = [record(i, seconds) for i, seconds in enumerate((7200.0, 3600.0, 3600.0, 3600.0))]
    cluster = PricedClusterConfig(nodes=2, cpus=4, price=3.0, speed=2.0)
    found = estimate(trials, [Pool("trainer", 1, 4.0)], cluster)
    assert found.slots == 2  # 1 h on one machine, then 0.5 h; 3 times 0.5 h on the other
    assert found.wall_hours == pytest.approx(1.5)
    assert found.machine_hours == pytest.approx(3.0)
    assert found.price == pytest.approx(9.0)


def test_what_never_fits_costs_nothing() -> None:
    found = estimate([record(0, 60.0)], [Pool("trainer", 1, 1.0, 1.0)], PricedClusterConfig(gpus=0))
    assert (found.slots, found.wall_hours, found.price) == (0, 0.0, 0.0)


def test_all_that_was_reserved_counts() -> None:
    trials = [
        record(0, 3600.0, cpu_hours=2.0),
        record(1, 1800.0, cpu_hours=1.0, gpu_hours=0.5, state="failed"),
    ]
    spent = cost(trials)
    assert (spent.cpu_hours, spent.gpu_hours, spent.trial_hours) == (3.0, 0.5, 1.5)


def test_steps_are_saved_by_stopped_trials_alone() -> None:
    trials = [
        record(0, steps=900),
        record(1, steps=950, lives=2),
        record(2, steps=100, state="stopped"),
        record(3, steps=400, state="failed"),
        record(4, steps=400, state="running"),
    ]
    found = saving(trials, dict.fromkeys(range(5), 900))
    assert found == Saving(1950, 2700)
    assert found.share == pytest.approx(1.0 - 1950 / 2700)


def test_an_unknown_length_makes_no_saving() -> None:
    trials = [record(0, steps=900), record(1, steps=100, state="stopped")]
    assert saving(trials, {0: 900}) is None
    assert saving(trials, {0: 0, 1: 0}) is None
    assert saving([], {}) is None
