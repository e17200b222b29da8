"""Rollouts are the same wherever they run, and no simulator's or sampler's end costs more than it must."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import ray
from toy_environment import OBSERVATION_SPACE, SPACE, ToyEnvironment, ToySampler, toy
from toy_policy import save_toy_policy

from actors.crew import Ledger, LocalCrew, unwatched
from actors.rollouts import CollectJob, RolloutJob, RolloutWorker, WorkersConfig, WorkerSettings
from actors.sampler import SamplersConfig
from actors.watchdog import Watchdog
from cluster.failures import Failure
from cluster.reserve import PlacementError
from cluster.waiting import get
from counterpoint.environments.running import Unfinished
from counterpoint.selection.config import SelectionConfig
from jobs.crew import crew_on_stage

RANDOM = SelectionConfig(rule="random", candidates=2)
SEEDS = range(100, 130)
HERE = WorkersConfig(count=0, environments=4)
THERE = WorkersConfig(
    count=2, cpus_per_worker=0.1, environments=4, episodes_at_once=6, step_deadline=3.0, reset_deadline=20.0
)
ONE_SAMPLER = SamplersConfig(count=1, cpus_per_actor=0.1, max_wait=0.001)


def same(found, expected):
    """Whether two rollouts found the same."""
    return [replace(e, trace=(), frames=None) for e in found] == [
        replace(e, trace=(), frames=None) for e in expected
    ]


@pytest.fixture(scope="module")
def undisturbed():
    """The episodes of `SEEDS` in one process."""
    with crew_on_stage(toy(), HERE) as stage:
        return stage.crew.run(RolloutJob(ToySampler(), RANDOM, traced=frozenset(SEEDS)), SEEDS).results


def test_results_are_ordered_by_seed_whatever_the_number_of_environments(undisturbed):
    assert [episode.seed for episode in undisturbed] == list(SEEDS)
    for workers in (WorkersConfig(count=0, environments=1), WorkersConfig(count=0, episodes_at_once=7)):
        with crew_on_stage(toy(), workers) as stage:
            shuffled = np.random.default_rng(0).permutation(SEEDS).tolist()
            assert same(stage.crew.run(RolloutJob(ToySampler(), RANDOM), shuffled).results, undisturbed)


def test_a_seed_that_fails_twice_is_set_aside_with_its_reason(undisturbed, tmp_path):
    faults = {103: ("raise", 2), 110: ("raise once", 1), 120: ("nan", 2), 125: ("raise", "start")}
    watched = []
    with crew_on_stage(toy(faults, marker=tmp_path / "mark"), HERE) as stage:
        haul = stage.crew.run(RolloutJob(ToySampler(), RANDOM), SEEDS, watched.append)
    assert haul.set_aside.keys() == {103, 120, 125}
    assert haul.set_aside[103] == "RuntimeError at step 2: the motor is stuck"
    assert haul.set_aside[120].startswith("ValueError at step 2: observation.state is not finite")
    assert haul.set_aside[125] == "RuntimeError: the motor is stuck"
    assert same(haul.results, [e for e in undisturbed if e.seed not in haul.set_aside])
    assert sorted(episode.seed for episode in watched) == [episode.seed for episode in haul.results]


def test_the_oracle_is_no_worse_than_the_first_candidate(undisturbed):
    with crew_on_stage(toy(), HERE) as stage:
        oracle = SelectionConfig(rule="oracle", candidates=2)
        haul = stage.crew.run(RolloutJob(ToySampler(), oracle, traced=frozenset(SEEDS)), SEEDS)
    assert sum(e.success for e in haul.results) > sum(e.success for e in undisturbed)
    assert {made.chosen for e in haul.results for made in e.trace} == {0, 1}


def test_the_policy_says_how_much_of_a_chunk_is_executed():
    sampler = ToySampler(SPACE.model_copy(update={"execute": 3}))
    with crew_on_stage(toy(), HERE) as stage:
        (episode,) = stage.crew.run(RolloutJob(sampler, RANDOM), [7]).results
    assert episode.decisions == -(-episode.steps // 3)


def test_the_expert_and_random_actions_roll_out_too():
    with crew_on_stage(toy(), HERE) as stage:
        expert = stage.crew.run(RolloutJob(scripted="expert", filmed=frozenset([101])), SEEDS).results
        chance = stage.crew.run(RolloutJob(scripted="random"), SEEDS).results
    assert all(episode.success for episode in expert)
    assert sum(episode.success for episode in chance) < len(SEEDS) / 2
    assert [episode.seed for episode in expert if episode.frames is not None] == [101]


def test_a_sampler_that_fails_ends_the_rollout():
    class Broken(ToySampler):
        def act(self, *_):
            raise ConnectionError("gone")

    with (
        crew_on_stage(toy(), HERE) as stage,
        pytest.raises(Failure, match=r"worker-0 failed \(infrastructure\): ConnectionError: gone"),
    ):
        stage.crew.run(RolloutJob(Broken(), RANDOM), SEEDS)


def test_jobs_and_seeds_are_checked():
    with pytest.raises(ValueError, match="either a sampler with a selection, or something scripted"):
        RolloutJob(ToySampler())
    with pytest.raises(ValueError, match="either a sampler"):
        RolloutJob(ToySampler(), RANDOM, scripted="expert")
    with pytest.raises(ValueError, match="a seed is given twice"):
        LocalCrew(RolloutWorker(toy(), WorkerSettings())).run(CollectJob("scene"), [1, 2, 1])


def test_a_ledger_tries_what_was_in_flight_once_more_alone():
    ledger = Ledger(range(5), unwatched)
    first = ledger.take(3)
    assert first == [0, 1, 2]
    ledger.fail(first, "crashed", second=False)
    assert [ledger.take(3) for _ in range(3)] == [[0], [1], [2]]
    ledger.fail([1], "hung at step 3", second=True)
    ledger.land([2], [Unfinished(2, "stuck")], second=True)
    assert ledger.take(3) == [3, 4]
    ledger.land([3, 4], [Unfinished(3, "stuck")], second=False)
    assert ledger.take(3) == [3]
    assert ledger.take(3) == []
    assert ledger.haul(2).set_aside == {1: "hung at step 3", 2: "stuck"}
    assert ledger.haul(2).restarts == 2


def test_a_watchdog_leaves_no_note_of_what_went_well(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        watchdog = Watchdog("worker", {"build": 60.0, "start": 60.0, "act": 60.0})
        assert watchdog.last_words is None
        with watchdog.guard("act", 3, 12):
            assert watchdog.path.read_text().split("\n")[0].strip() == "at step 12"
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_toy_policy(tmp_path_factory.mktemp("rollouts"))


def test_a_policy_of_another_environment_is_refused_before_anything_is_played(policy):
    class Renamed(ToyEnvironment):
        def __init__(self):
            super().__init__()
            self.action_space = SPACE.model_copy(update={"names": ("a", "b")})

    with (
        crew_on_stage(Renamed, HERE) as stage,
        pytest.raises(ValueError, match=r"action space: the policy has names=.*'dx'"),
        stage.policy(policy),
    ):
        pass


@pytest.fixture(scope="module")
def there(ray_cluster, tmp_path_factory):
    """Two workers whose simulators hang in Python, hang in C with the lock held, crash once, crash, raise."""
    faults = {
        100: ("exit once", "start"), 101: ("sleep", 3), 102: ("hold", 1), 103: ("exit", "start"),
        115: ("raise", 0),
    }  # fmt: skip
    marker = tmp_path_factory.mktemp("faults") / "mark"
    with crew_on_stage(toy(faults, marker=marker), THERE, ONE_SAMPLER) as stage:
        yield stage


def test_hung_and_crashed_simulators_cost_nothing_but_their_seeds(there, undisturbed):
    haul = there.crew.run(RolloutJob(ToySampler(), RANDOM), SEEDS)
    assert haul.set_aside == {
        101: "hung at step 3",
        102: "hung at step 1",
        103: "the simulator crashed at its start",
        115: "RuntimeError at step 0: the motor is stuck",
    }
    assert haul.restarts == 4
    assert same(haul.results, [e for e in undisturbed if e.seed not in haul.set_aside])
    assert there.crew.spaces() == (OBSERVATION_SPACE, SPACE)


def test_a_sampler_killed_in_mid_run_changes_nothing(there, policy):
    seeds = range(200, 230)
    job = {"selection": SelectionConfig(rule="likelihood", candidates=2), "traced": frozenset(seeds)}
    with crew_on_stage(toy(), HERE) as stage, stage.policy(policy, seed=4) as sampler:
        expected = stage.crew.run(RolloutJob(sampler, **job), seeds).results
    with there.policy(policy, seed=4) as sampler:
        (actor,) = sampler.actors
        pid = get(actor.pid.remote(), timeout=240.0, what="pid")
        finished = []

        def kill_once(episode):
            finished.append(episode)
            if len(finished) == 3:
                os.kill(pid, signal.SIGKILL)

        haul = there.crew.run(RolloutJob(sampler, **job), seeds, kill_once)
        assert haul.set_aside == {}
        assert haul.restarts == 0
        assert get(actor.pid.remote(), timeout=240.0, what="pid") != pid
        assert 0 < sampler.statistics().observations < sum(e.decisions for e in expected)
    assert same(haul.results, expected)
    for one, other in zip(haul.results, expected, strict=True):
        assert [made.tokens for made in one.trace] == [made.tokens for made in other.trace]


def test_a_worker_that_does_not_return_is_started_again(there, undisturbed, monkeypatch):
    """A hang outside of any deed, which only the outer deadline sees."""
    monkeypatch.setattr(there.crew, "job_deadline", 1.0)
    haul = there.crew.run(RolloutJob(ToySampler(pause=60.0), RANDOM), [110])
    assert haul.set_aside == {110: "not done within 1 s"}
    monkeypatch.undo()
    again = there.crew.run(RolloutJob(ToySampler(), RANDOM), [110]).results
    assert same(again, [e for e in undisturbed if e.seed == 110])


def crowded():
    """An environment that its configuration makes impossible."""
    raise ValueError("9 blocks do not fit")


def test_an_environment_that_cannot_be_built_says_so_itself():
    with pytest.raises(ValueError, match="9 blocks do not fit"), crew_on_stage(crowded, HERE):
        pass


def test_what_cannot_be_placed_is_said(ray_cluster):
    with (
        pytest.raises(PlacementError, match=r"workers\.count"),
        crew_on_stage(toy(), WorkersConfig(count=90, cpus_per_worker=1.0)),
    ):
        pass
    assert ray.is_initialized()
