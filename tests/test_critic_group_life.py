"""A group over time: accumulated steps, refreshes, missed steps, restored states."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import double, group, rows_of, samples
from torch import Tensor

from counterpoint.critics.group import CriticGroup, Samples, Verdict
from counterpoint.critics.lesson import Lesson
from counterpoint.critics.pool import Pool


def cut(whole: Samples, micros: int) -> list[Samples]:
    """The same step in micro-batches."""
    fakes, reals, labels = (x.chunk(micros) for x in (whole.fake, whole.real, whole.labels))
    return [
        replace(whole, fake=fakes[m], real=reals[m], labels=labels[m], micro=m, micros=micros)
        for m in range(micros)
    ]


def run(critics: CriticGroup, steps: range, micros: int = 1, **options: Any) -> list[Verdict]:
    return [critics.judge(part) for step in steps for part in cut(samples(step, **options), micros)]


def same_state(a: CriticGroup, b: CriticGroup) -> bool:
    return all(torch.equal(x, b.state()[name]) for name, x in a.state().items())


def generations(critics: CriticGroup) -> dict[int, int]:
    """Generation of each head by its number in the pool."""
    spares, found = critics.pool.config.heads_per_slot, {}
    for bank in critics.banks:
        for row, generation in enumerate(bank.generations.tolist()):
            found[critics.pool.head_id(critics.index, bank.slots[row // spares], row % spares)] = generation
    return found


def renewals(pool: Pool, ticks: int) -> Counter[int]:
    return Counter(head for tick in range(ticks) for head in pool.refreshed(tick))


@pytest.mark.parametrize(
    "options", [{}, {"shuffled_negatives": True, "patch_windows": 2, "share_noise": True}]
)
@pytest.mark.parametrize("micros", [2, 3])
def test_accumulated_micro_batches_are_the_large_batch(micros: int, options: dict[str, Any]) -> None:
    whole, parts = (
        double(group(order="student_first", refresh_rate=0.05, betas=(0.9, 0.99), **options))
        for _ in range(2)
    )
    for step in range(3):
        s = samples(step)
        s = replace(s, fake=s.fake.double(), real=s.real.double())
        expected = whole.judge(s)
        verdicts = [parts.judge(part) for part in cut(s, micros)]
        gradients = [v.gradient for v in verdicts if v.gradient is not None]
        torch.testing.assert_close(torch.cat(gradients), expected.gradient)
        assert sum(v.loss for v in verdicts) == pytest.approx(expected.loss, rel=1e-9)
        assert sum(v.critic_loss for v in verdicts) / micros == pytest.approx(expected.critic_loss)
        assert sum(v.refreshed for v in verdicts) == expected.refreshed
        torch.testing.assert_close(rows_of(parts), rows_of(whole))
        for mine, theirs in zip(parts.banks, whole.banks, strict=True):
            torch.testing.assert_close(mine.exp_avg, theirs.exp_avg)
            assert torch.equal(mine.updates, theirs.updates)


def test_heads_rest_until_the_last_micro_batch() -> None:
    critics = group(order="student_first", refresh_rate=1.0)
    before = rows_of(critics)
    first, last = cut(samples(0), 2)
    critics.judge(first)
    assert torch.equal(rows_of(critics), before)
    assert critics.judge(last).refreshed == critics.pool.heads_per_group
    assert not torch.equal(rows_of(critics), before)


def test_micro_batches_that_do_not_fit_their_step_are_refused() -> None:
    first, last = cut(samples(0), 2)
    with pytest.raises(
        ValueError, match="micro-batch 1 of step 0 brings 3 samples, but 0 of step 0 came before"
    ):
        group(order="student_first").judge(last)
    critics = group(order="student_first")
    critics.judge(first)
    uneven = replace(last, fake=last.fake[:2], real=last.real[:2], labels=last.labels[:2])
    with pytest.raises(ValueError, match=r"let critics\.levels_per_step divide"):
        critics.judge(uneven)
    with pytest.raises(ValueError, match="of step 4"):
        critics.judge(replace(last, step=4))
    critics.judge(first)  # the step begins again
    critics.judge(last)


def test_critics_first_cannot_judge_before_heads_have_learned() -> None:
    first, last = cut(samples(0), 2)
    critics = group(order="critics_first")
    with pytest.raises(ValueError, match=r"set critics\.order=student_first or trainer\.accumulate=1"):
        critics.judge(first)
    critics.judge(replace(first, judge=False))
    critics.judge(replace(last, judge=False))


@pytest.mark.parametrize("clock", ["optimizer_step", "micro_step"])
@pytest.mark.parametrize("draw", ["without_replacement", "bernoulli"])
def test_heads_are_renewed_when_the_clock_says(clock: str, draw: str) -> None:
    critics = group(refresh_rate=0.07, refresh_clock=clock, refresh_draw=draw, order="student_first")
    verdicts = run(critics, range(5), micros=2)
    ticks = 10 if clock == "micro_step" else 5
    expected = renewals(critics.pool, ticks)
    found = generations(critics)
    assert found == {head: expected[head] for head in found}
    assert sum(v.refreshed for v in verdicts) == sum(found.values()) > 0
    assert critics.ticks == ticks
    assert critics.ages().max() <= ticks


@pytest.mark.parametrize("policy", ["dropped", "kept"])
def test_refreshed_heads_are_new_and_have_empty_moments_or_their_predecessors(policy: str) -> None:
    critics = group(refresh_rate=1.0, refresh_optimizer_state=policy, panel="all")
    run(critics, range(2))
    for bank in critics.banks:
        assert (bank.generations == 2).all()
        assert (bank.updates == 0).all()
        assert (bank.born == 2).all()
        steps, moments = bank.optimizer_steps, bank.exp_avg_sq.abs().amax(1)
        assert (steps == (2 if policy == "kept" else 0)).all()
        assert ((moments > 0) == (policy == "kept")).all()
        for row in range(len(bank.rows)):
            head = critics.pool.head_id(critics.index, bank.slots[row // 2], row % 2)
            assert torch.equal(bank.rows[row], critics.pool.initial_head(head, 2))
            assert not torch.equal(bank.rows[row], critics.pool.initial_head(head, 1))


def test_a_head_renewed_within_a_step_forgets_what_it_learned_in_it() -> None:
    critics = group()
    seats = critics._panel(0)
    parts = [critics._views(s, s.fake) for s in cut(samples(0), 2)]

    def gradients(*heard: int, forget: bool = False) -> list[Tensor]:
        lesson = Lesson(seats, 0, critics.pool.levels)
        for number in heard:
            if forget and number == 1:
                lesson.forget(seats[0].bank, seats[0].rows[1])
            lesson.add("hinge", *parts[number])
        return lesson.gradients

    both, late, mixed = gradients(0, 1), gradients(1), gradients(0, 1, forget=True)
    torch.testing.assert_close(mixed[0][1], late[0][1])
    assert not torch.equal(both[0][1], late[0][1])
    for seat, (found, expected) in enumerate(zip(mixed, both, strict=True)):
        others = [row for row in range(len(found)) if (seat, row) != (0, 1)]
        assert torch.equal(found[others], expected[others])


def test_a_group_makes_good_for_steps_it_was_not_asked_in() -> None:
    options: dict[str, Any] = {"refresh_rate": 0.1, "panel": "all"}
    rare = group(**options)
    rare.judge(samples(0))
    verdict = rare.judge(samples(9))
    expected = renewals(rare.pool, 10)
    found = generations(rare)
    assert found == {head: expected[head] for head in found}
    assert rare.ticks == 10
    # The first verdict told of tick 0, the second of the nine ticks since.
    mine = Counter({head: count for head, count in expected.items() if head in found})
    assert verdict.refreshed == sum(mine.values()) - sum(head in found for head in rare.pool.refreshed(0))
    # Heads renewed since step 0 learned in step 9 alone, others in both; those of tick 9 not yet.
    late = {head for tick in range(1, 9) for head in rare.pool.refreshed(tick)}
    for bank in rare.banks:
        for row, updates in enumerate(bank.updates.tolist()):
            head = rare.pool.head_id(rare.index, bank.slots[row // 2], row % 2)
            once = head in late or head in rare.pool.refreshed(0)
            assert updates == (0 if head in rare.pool.refreshed(9) else 1 if once else 2)


@pytest.mark.parametrize(
    ("options", "micros"),
    [
        ({}, 1),
        ({"refresh_draw": "bernoulli", "panel": "uniform", "refresh_optimizer_state": "kept"}, 1),
        ({"refresh_clock": "micro_step", "order": "student_first", "probation": 1}, 3),
    ],
)
def test_a_restored_group_goes_on_bit_for_bit(options: dict[str, Any], micros: int) -> None:
    options = {"refresh_rate": 0.1, **options}
    unbroken, restored = group(**options), group(**options)
    run(unbroken, range(3), micros)
    state = {name: tensor.clone() for name, tensor in unbroken.state().items()}
    run(restored, range(1), micros)
    restored.judge(replace(cut(samples(1), micros)[0], judge=False))
    restored.load(state)
    assert same_state(unbroken, restored)
    a, b = run(unbroken, range(3, 6), micros), run(restored, range(3, 6), micros)
    assert same_state(unbroken, restored)
    assert unbroken.digest() == restored.digest()
    for x, y in zip(a, b, strict=True):
        assert x.gradient is not None
        assert y.gradient is not None
        assert torch.equal(x.gradient, y.gradient)
        assert (x.loss, x.critic_loss, x.refreshed, x.voting) == (
            y.loss,
            y.critic_loss,
            y.refreshed,
            y.voting,
        )


def test_the_state_is_a_copy() -> None:
    critics = group()
    state = critics.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    run(critics, range(2))
    assert all(torch.equal(x, before[name]) for name, x in state.items())


def test_another_pools_state_is_refused() -> None:
    with pytest.raises(ValueError, match="resume with the configuration of the stored run"):
        group(heads_per_slot=2).load(group(heads_per_slot=3).state())


def test_the_digest_is_of_weights_and_generations() -> None:
    critics, other = group(refresh_rate=0.0), group(refresh_rate=0.0)
    seen = {critics.digest()}
    assert seen == {other.digest()}
    critics.judge(samples(0))
    assert critics.digest() not in seen
    other.judge(samples(0))
    assert critics.digest() == other.digest()
    other.banks[0].generations[0] += 1
    assert critics.digest() != other.digest()
    assert group(index=0).digest() != group(index=1).digest()


def test_wrong_classes_need_a_second_class() -> None:
    from tiny import ABAR, pool

    from counterpoint.critics.config import CriticsConfig
    from counterpoint.critics.encoder import FrozenEncoder
    from counterpoint.unet import UNetConfig, build_unet

    encoder = FrozenEncoder(build_unet(UNetConfig(block_out_channels=(16, 16)), 1, 8, num_classes=1, seed=0))
    with pytest.raises(ValueError, match="shuffled_negatives=true needs a second class"):
        CriticGroup(pool(CriticsConfig(shuffled_negatives=True), encoder), 0, encoder, ABAR)
