"""Replicas of a critic group that judge a share of the samples each are one group that judges them all."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tiny import double, group, samples

from counterpoint.critics.group import CriticGroup, Samples, Verdict
from counterpoint.critics.replicas import Contribution, added_up

Exact = dict[str, Any]
EXACT: Exact = {"atol": 1e-10, "rtol": 1e-9}


@dataclass
class Table:
    """Where the replicas of one group, each in a thread, put down what they learned."""

    count: int
    parts: dict[tuple[tuple[int, int], int], Contribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=240)


@dataclass
class Seat:
    """One replica's place at the table."""

    table: Table
    index: int

    @property
    def count(self) -> int:
        return self.table.count

    def exchange(self, key: tuple[int, int], mine: Contribution) -> Contribution:
        # Copied, as a message is: the lesson goes on adding to its tensors.
        self.table.parts[key, self.index] = replace(mine, gradients=tuple(g.clone() for g in mine.gradients))
        self.table.barrier.wait()
        return added_up([self.table.parts[key, index] for index in range(self.count)])


def replicas(count: int, precise: bool = True, **options: Any) -> list[CriticGroup]:
    """Replicas of one group, seated."""
    table, groups = Table(count), []
    for index in range(count):
        one = group(**options)
        one.replication = Seat(table, index)
        groups.append(double(one) if precise else one)
    return groups


def cut(whole: Samples, part: int, parts: int) -> Samples:
    size = len(whole.labels) // parts
    here = slice(part * size, (part + 1) * size)
    return replace(whole, fake=whole.fake[here], real=whole.real[here], labels=whole.labels[here])


def judged(groups: list[CriticGroup], micro: Samples) -> list[Verdict]:
    """Each replica's verdict on its contiguous share of one micro-batch."""
    with ThreadPoolExecutor(len(groups)) as threads:
        shares = [cut(micro, index, len(groups)) for index in range(len(groups))]
        return list(threads.map(lambda one, share: one.judge(share), groups, shares))


def step_of(number: int, micros: int, precise: bool) -> list[Samples]:
    whole = samples(number, n=12)
    if precise:
        whole = replace(whole, fake=whole.fake.double(), real=whole.real.double())
    return [replace(cut(whole, micro, micros), micro=micro, micros=micros) for micro in range(micros)]


CASES: list[tuple[int, int, dict[str, Any]]] = [
    (2, 1, {}),
    (3, 1, {"share_noise": True, "same_window": False, "shuffled_negatives": True, "panel": "all"}),
    (2, 3, {"order": "student_first", "refresh_clock": "micro_step", "refresh_rate": 0.05}),
]


@pytest.mark.parametrize(("count", "micros", "options"), CASES)
def test_replicas_judge_and_learn_as_the_one_group_they_stand_for(
    count: int, micros: int, options: dict[str, Any]
) -> None:
    options = {"refresh_rate": 0.02} | options
    alone, several = double(group(**options)), replicas(count, **options)
    for step in range(4):
        for micro in step_of(step, micros, precise=True):
            expected, verdicts = alone.judge(micro), judged(several, micro)
            assert expected.gradient is not None
            gradients = [v.gradient for v in verdicts if v.gradient is not None]
            torch.testing.assert_close(torch.cat(gradients), expected.gradient, **EXACT)
            assert sum(v.loss for v in verdicts) == pytest.approx(expected.loss, rel=1e-9)
            for verdict in verdicts:
                assert verdict.critic_loss == pytest.approx(expected.critic_loss, rel=1e-9)
                torch.testing.assert_close(
                    verdict.real_logits, expected.real_logits, atol=1e-6, rtol=1e-5, equal_nan=True
                )
                assert (verdict.refreshed, verdict.voting) == (expected.refreshed, expected.voting)
        for name, tensor in alone.state().items():
            torch.testing.assert_close(several[0].state()[name], tensor, **EXACT)


def test_replicas_hold_the_same_heads_bit_for_bit_and_near_those_of_one_group() -> None:
    alone, several = group(refresh_rate=0.02), replicas(3, precise=False, refresh_rate=0.02)
    for step in range(20):
        (micro,) = step_of(step, 1, precise=False)
        alone.judge(micro)
        judged(several, micro)
        assert len({one.digest() for one in several}) == 1
    states = [one.state() for one in several]
    for name, tensor in alone.state().items():
        assert all(torch.equal(state[name], states[0][name]) for state in states)
        # Sums of three parts round otherwise than one sum, and AdamW enlarges that where gradients are tiny.
        apart = (states[0][name].double() - tensor.double()).abs()
        assert float(apart.double().mean()) < 1e-5, name


def test_a_replica_that_misses_the_others_differs() -> None:
    """The comparison above can fail: without an exchange the heads drift apart."""
    several = replicas(2, precise=False)
    for one in several:
        one.replication = None
    (micro,) = step_of(0, 1, precise=False)
    judged(several, micro)
    assert several[0].digest() != several[1].digest()


def test_contributions_are_weighted_by_their_samples() -> None:
    nan = float("nan")
    parts = [
        Contribution(
            n, 2 * n, loss, torch.tensor([loss, nan]), torch.tensor([-loss, nan]), (torch.ones(2) * n,)
        )
        for n, loss in ((1, 4.0), (3, 8.0))
    ]
    told = added_up(parts)
    assert (told.samples, told.learned, told.critic_loss) == (4, 8, 7.0)
    torch.testing.assert_close(told.real_logits, torch.tensor([7.0, nan]), equal_nan=True)
    torch.testing.assert_close(told.fake_logits, torch.tensor([-7.0, nan]), equal_nan=True)
    assert torch.equal(told.gradients[0], torch.full((2,), 4.0))
    assert torch.equal(parts[0].gradients[0], torch.ones(2))
