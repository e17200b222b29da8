"""Routing samples to groups and merging their verdicts, whatever the order."""

from dataclasses import replace

import pytest
import torch
from tiny import panel, rows_of, samples

from counterpoint.critics.group import Samples, Verdict
from counterpoint.critics.panel import LocalPanel, group_name, merge, route

GROUPS = torch.tensor([2, 0, 2, 3, 0, 2])


def verdict_on(part: Samples, group: int) -> Verdict:
    """A verdict whose gradient names the group and repeats the samples."""
    empty = torch.zeros(3, 1)
    loss = float(part.fake.sum()) * (group + 1)
    return Verdict(part.step, loss, part.fake * (group + 1), 1.0, empty, empty, len(part.fake), 0, 3)


def test_each_sample_goes_to_its_group_and_its_gradient_comes_back() -> None:
    s = samples(5, n=6)
    routed = route(s, GROUPS)
    assert list(routed) == [0, 2, 3]
    for group, (where, part) in routed.items():
        assert where.tolist() == [i for i, g in enumerate(GROUPS.tolist()) if g == group]
        assert torch.equal(part.fake, s.fake[where])
        assert torch.equal(part.real, s.real[where])
        assert torch.equal(part.labels, s.labels[where])
        assert (part.step, part.judge, part.micro, part.micros) == (5, True, 0, 1)
    positions = {group: where for group, (where, _) in routed.items()}
    verdicts = {group: verdict_on(part, group) for group, (_, part) in routed.items()}
    merged = merge(s, positions, verdicts)
    weight = (GROUPS + 1)[:, None, None, None]
    torch.testing.assert_close(merged.gradient, s.fake * weight / 6)
    assert merged.loss == pytest.approx(float((s.fake * weight).sum()) / 6, rel=1e-5)
    assert all(said.gradient is None for said in merged.groups.values())
    assert all(verdict.gradient is not None for verdict in verdicts.values())
    # Answers may come in any order.
    late = merge(s, dict(reversed(positions.items())), dict(reversed(verdicts.items())))
    torch.testing.assert_close(late.gradient, merged.gradient, rtol=0, atol=0)


def test_a_question_keeps_its_place_in_an_accumulated_step() -> None:
    s = replace(samples(5, n=6), judge=False, micro=1, micros=3)
    for _, part in route(s, GROUPS).values():
        assert (part.judge, part.micro, part.micros) == (False, 1, 3)
    parts = route(s, GROUPS)
    verdicts = {g: replace(verdict_on(part, g), gradient=None) for g, (_, part) in parts.items()}
    assert merge(s, {g: where for g, (where, _) in parts.items()}, verdicts).gradient is None


def test_the_panels_gradient_is_of_the_mean_over_samples() -> None:
    together = panel(levels_per_step=4)
    alone = panel(levels_per_step=4)
    s, groups = samples(0, n=8), together.pool.assign_groups(0, 8)
    verdict = together.ask(s, groups).result()
    loss, gradient = 0.0, torch.zeros_like(s.fake)
    for index, critics in enumerate(alone.groups):
        mine = torch.nonzero(groups == index).flatten()
        part = critics.judge(Samples(0, s.fake[mine], s.real[mine], s.labels[mine]))
        assert part.gradient is not None
        gradient[mine] = part.gradient / 8
        loss += part.loss / 8
    torch.testing.assert_close(verdict.gradient, gradient)
    assert verdict.loss == pytest.approx(loss, rel=1e-6)
    assert sorted(verdict.groups) == [0, 1, 2, 3]


def test_only_the_groups_asked_learn() -> None:
    critics = panel(refresh_rate=0.0)
    before = [rows_of(group) for group in critics.groups]
    verdict = critics.ask(samples(0), torch.full((6,), 2)).result()
    assert list(verdict.groups) == [2]
    same = [torch.equal(rows_of(group), rows) for group, rows in zip(critics.groups, before, strict=True)]
    assert same == [True, True, False, True]


def test_groups_see_different_noise_levels_and_own_different_heads() -> None:
    critics = panel()
    assert len({group.timestep for group in critics.groups}) == 4
    assert len(set(critics.digests().values())) == 4
    assert list(critics.digests()) == [group_name(i) for i in range(4)]


def test_a_restored_panel_goes_on_bit_for_bit() -> None:
    def run(critics: LocalPanel, steps: range) -> None:
        for step in steps:
            critics.ask(samples(step), critics.pool.assign_groups(step, 6)).result()

    unbroken, restored = (panel(refresh_rate=0.1, levels_per_step=2) for _ in range(2))
    run(unbroken, range(4))
    state = unbroken.state()
    assert sorted(state) == sorted(unbroken.digests())
    restored.load(state, 4)
    run(unbroken, range(4, 8))
    run(restored, range(4, 8))
    assert unbroken.digests() == restored.digests()
    for name, part in unbroken.state().items():
        assert all(torch.equal(tensor, restored.state()[name][key]) for key, tensor in part.items())
