"""The event engine and the step's graph against closed forms."""

import math
from dataclasses import replace

import pytest
import simpy

from jobs.scale_engine import (
    Cores,
    Meeting,
    Port,
    at,
    fair_shares,
    hierarchical_seconds,
    ring_seconds,
    send,
)
from jobs.scale_step import Cost, Costs, Seat, Setup, Stage, play


def finish_times(capacity, jobs):
    """When jobs (arrival, seconds, process, limit) end on shared cores."""
    env, ends = simpy.Environment(), {}
    cores = Cores(env, capacity)

    def job(number, arrival, seconds, process=None, limit=math.inf):
        yield env.timeout(arrival)
        yield cores.work(seconds, process, limit)
        ends[number] = env.now

    for number, spec in enumerate(jobs):
        env.process(job(number, *spec))
    env.run()
    return [ends[i] for i in range(len(jobs))], cores.busy


def test_two_jobs_share_one_core():
    # Alone until 1; then both at half speed: the second needs 1 s of work and ends at 3, the first at 4.
    ends, busy = finish_times(1.0, [(0.0, 3.0), (1.0, 1.0)])
    assert ends == pytest.approx([4.0, 3.0])
    assert busy == pytest.approx(4.0)


@pytest.mark.parametrize(("capacity", "jobs"), [(2.0, 4), (1.6, 4), (2.0, 1), (3.0, 2)])
def test_equal_jobs_take_the_longer_of_their_own_time_and_the_capacity(capacity, jobs):
    ends, _ = finish_times(capacity, [(0.0, 1.0)] * jobs)
    assert ends == pytest.approx([max(1.0, jobs / capacity)] * jobs)


def test_threads_of_one_process_have_a_limit_of_their_own():
    locked = [(0.0, 1.0, "a", 1.0), (0.0, 1.0, "a", 1.0)]
    assert finish_times(2.0, locked)[0] == pytest.approx([2.0, 2.0])
    assert finish_times(2.0, [*locked, (0.0, 1.0, "b", 1.0)])[0] == pytest.approx([2.0, 2.0, 1.0])


def test_shares_are_max_min_fair():
    assert fair_shares([1.0, 1.0, 0.2], 1.0) == pytest.approx([0.4, 0.4, 0.2])
    assert fair_shares([0.5, 0.5], 2.0) == [0.5, 0.5]


def test_a_pipeline_of_ports_has_the_makespan_of_a_pipeline():
    # n messages through two ports of s seconds each, streaming: n * s + latency.
    env = simpy.Environment()
    outward, inward = Port(env), Port(env)
    arrived = [send(env, outward, inward, 0.5, 0.1) for _ in range(4)]
    assert arrived == pytest.approx([0.6, 1.1, 1.6, 2.1])
    # Many senders into one port queue there.
    target = Port(env)
    assert [send(env, Port(env), target, 0.5, 0.1) for _ in range(3)] == pytest.approx([0.6, 1.1, 1.6])


@pytest.mark.parametrize("parties", [2, 3, 8])
def test_ring_all_reduce_takes_what_its_messages_take(parties):
    # Every party sends a part to its neighbour, 2 (n - 1) times, each time when all have received.
    size, rate, latency = 64.0, 10.0, 0.25
    env = simpy.Environment()
    ports = [(Port(env), Port(env)) for _ in range(parties)]
    barrier = Meeting(env, parties)

    def party(rank):
        for _ in range(2 * (parties - 1)):
            there = ports[(rank + 1) % parties][1]
            yield at(env, send(env, ports[rank][0], there, size / parties / rate, latency))
            yield barrier.join()

    for rank in range(parties):
        env.process(party(rank))
    env.run()
    assert env.now == pytest.approx(ring_seconds(parties, size, rate, latency))


def test_hierarchical_all_reduce_is_a_ring_where_there_is_one_level():
    inner, outer = (10.0, 0.1), (2.0, 0.3)
    assert hierarchical_seconds(1, 8, 64.0, inner, outer) == ring_seconds(8, 64.0, *inner)
    assert hierarchical_seconds(4, 1, 64.0, inner, outer) == ring_seconds(4, 64.0, *outer)
    assert ring_seconds(1, 64.0, 1.0, 1.0) == 0.0


COSTS = Costs(
    sampling=Cost(), forward=Cost(0.0, 0.01), backward=Cost(0.0, 0.02), optimizer=0.05, learn=Cost(0.0, 0.03),
    judge=Cost(0.0, 0.01), pack=Cost(), call=0.0, copy_rate=math.inf, sample_bytes=0.0, answer_bytes=0.0,
)  # fmt: skip


def outcome(setup, costs=COSTS, averaging=0.0, exchange=0.0, latency=0.0, steps=8):
    """Play a step in which every actor has a device of its own."""
    env = simpy.Environment()

    def seat():
        return Seat(Cores(env, 1.0), Port(env), Port(env), Port(env))

    stage = Stage(
        env, [seat() for _ in range(setup.trainers)],
        [[seat() for _ in range(setup.replicas)] for _ in range(setup.hosts)],
        lambda source, target: (1e9, latency), lambda backward: averaging, exchange,
    )  # fmt: skip
    return play(setup, costs, stage, steps)


def test_a_step_is_the_sum_of_its_parts():
    # forward 0.4 + way 0.1 + (learn 0.3 + exchange 0.2 + judge 0.1) + way 0.1 + backward 0.8 + 0.07 + 0.05
    setup = Setup(2, 80.0, 4, 4, replicas=2)
    made = outcome(setup, averaging=0.07, exchange=0.2, latency=0.1)
    assert made.step == pytest.approx(0.4 + 0.1 + 0.6 + 0.1 + 0.8 + 0.07 + 0.05)
    assert made.parts["waiting"] == pytest.approx(0.8)
    assert made.judging == pytest.approx(0.6)
    assert sum(made.parts.values()) == pytest.approx(made.step)
    # Judged first, heads average while the student learns.
    late = outcome(replace(setup, critics_first=False), averaging=0.07, exchange=0.2, latency=0.1)
    assert late.step == pytest.approx(made.step - 0.2)


@pytest.mark.parametrize("judge", [0.001, 0.5])
def test_staleness_takes_the_longer_instead_of_the_sum(judge):
    costs = replace(COSTS, learn=Cost(), judge=Cost(0.0, judge))
    setup = Setup(1, 40.0, 4, 4)
    band, forward, rest = 10 * judge, 0.4, 0.8 + 0.05
    assert outcome(setup, costs).step == pytest.approx(forward + band + rest)
    # The graph is made again: forward twice; the critics have the rest of the step for themselves.
    stale = outcome(replace(setup, staleness=1), costs, steps=40).step
    assert stale == pytest.approx(max(2 * forward + rest, band), rel=1e-6)


def test_more_trainers_are_bounded_by_what_critics_cost():
    # Amdahl: the critics' part of a step stays while the trainers' shrinks.
    steps = [outcome(Setup(n, 64.0, 4, 4)).step - 0.05 for n in (1, 2, 4, 64)]
    serial, parallel = 16 * 0.04, 64 * 0.03
    assert steps == pytest.approx([serial + parallel / n for n in (1, 2, 4, 64)])


def test_bands_on_fewer_hosts_take_turns():
    assert outcome(Setup(1, 40.0, 4, 1)).judging == pytest.approx(4 * outcome(Setup(1, 40.0, 4, 4)).judging)


def test_message_handling_is_serial_at_the_host():
    costs = replace(COSTS, learn=Cost(), judge=Cost(), call=0.01)
    # 8 trainers' calls queue at each host, there and back; each trainer's own four queue, too.
    few, many = (outcome(Setup(n, 8.0, 4, 4), costs).parts["waiting"] for n in (1, 8))
    assert few == pytest.approx(4 * 0.01 + 0.01 + 0.01 + 0.01, abs=0.02)
    assert many > few + 6 * 0.01


def test_jitter_is_drawn_from_the_seed_and_slows_all_down():
    setup = Setup(8, 80.0, 4, 4, jitter=0.2, seed=3)
    assert outcome(setup) == outcome(setup)
    assert outcome(replace(setup, seed=4)).step != outcome(setup).step
    calm = outcome(replace(setup, jitter=0.0)).step
    assert outcome(setup, steps=30).step > calm


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="steps=2: a simulation needs at least 3"):
        outcome(Setup(1, 4.0, 4, 4), steps=2)
