"""A student that asks a step ahead: against a plain loop, cut anywhere, by any number of ranks."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_distillation import ADVERSARIAL, Listening, Shared, distiller, precise, weights
from tiny import panel
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.ahead import verdict_tensors, verdicts_of
from counterpoint.critics.messages import Samples, Verdict
from counterpoint.critics.panel import PanelVerdict, Pending
from counterpoint.distillation import AHEAD, Distiller
from counterpoint.place import Place
from counterpoint.student import student_x0

LAST = 7
FIRST_ASKED, FIRST_MOVE = 2, 4


def stale(critics: Any, **options: Any) -> Distiller:
    return distiller(critics, staleness=1, **options)


def test_the_stale_student_is_the_one_of_a_plain_loop() -> None:
    """The loop is written out for the heads' two steps and the student's three, from the warm-up's end on."""
    student, critics = stale(panel(levels_per_step=4)), panel(levels_per_step=4)
    for step in range(FIRST_ASKED):
        student.step(step)
    average, taken = student.weights(), [student.step(step) for step in range(FIRST_ASKED, LAST)]

    plain = distiller(panel(levels_per_step=4))
    network, config = plain.unet, plain.adversarial.optimizer
    network.load_state_dict(average, strict=False)
    adam = torch.optim.AdamW(
        network.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay
    )

    def sample(batch: Any) -> Tensor:
        shift = plain.student.timestep_shift
        return student_x0(network, batch.x_t, batch.timesteps, batch.labels, plain.noise, shift)

    def ask(step: int) -> PanelVerdict:
        batch = plain.batches.draw(step, 8, 4, data=True)
        with torch.no_grad():
            fake = sample(batch)
        s = Samples(step - 2, fake, batch.real, batch.labels, judge=step >= FIRST_MOVE)
        return critics.ask(s, critics.pool.assign_groups(step - 2, 8)).result()

    coming = ask(FIRST_ASKED)
    for step in range(FIRST_ASKED, LAST):
        verdict = coming
        if step + 1 < LAST:
            coming = ask(step + 1)
        assert taken[step - FIRST_ASKED]["adversarial_loss"] == pytest.approx(verdict.loss, rel=1e-4)
        if step >= FIRST_MOVE:
            batch = plain.batches.draw(step, 8, 4, data=True)
            fake = sample(batch)
            weight = ADVERSARIAL["adversarial_weight"]
            (F.mse_loss(fake, batch.target) + weight * (fake * verdict.gradient).sum()).backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.max_gradient_norm)
            adam.step()
            adam.zero_grad()
    for name, p in network.named_parameters():
        torch.testing.assert_close(weights(student)[name], p.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(heads_of(student.panel), heads_of(critics), atol=1e-5, rtol=1e-4)


def heads_of(critics: Any) -> Tensor:
    return torch.cat([bank.rows.flatten() for group in critics.groups for bank in group.banks])


def test_staleness_changes_the_student_and_0_stores_nothing_ahead() -> None:
    students = [distiller(panel()), stale(panel())]
    for step in range(LAST):
        for student in students:
            student.step(step)
        assert AHEAD not in students[0].state()
    assert any(not torch.equal(a, weights(students[1])[name]) for name, a in weights(students[0]).items())


@dataclass
class Diary(Listening):
    """A panel that writes down when it is asked and when its answers are waited for."""

    lines: list[str] = field(default_factory=list)

    def ask(self, samples: Samples, groups: Tensor) -> Pending:
        name = f"{samples.step}.{samples.micro}"
        self.lines.append(f"ask {name}")
        answer, lines = super().ask(samples, groups).result(), self.lines

        class Waited:
            def result(self) -> PanelVerdict:
                lines.append(f"wait {name}")
                return answer

        return Waited()


def test_the_next_batch_is_asked_about_before_this_ones_verdict_is_waited_for() -> None:
    critics = Diary(panel())
    student = stale(critics)
    for step in range(LAST):
        student.step(step)
    asked = [line for step in range(2, 5) for line in (f"ask {step}.0", f"wait {step - 1}.0")]
    assert critics.lines == ["ask 0.0", "ask 1.0", "wait 0.0", *asked, "wait 4.0"]


def test_every_micro_batch_of_the_next_step_is_asked_about_first() -> None:
    critics = Diary(panel(order="student_first", levels_per_step=2))
    student = stale(critics, accumulate=2, steps=1, heads_alone=1)
    for step in range(4):
        student.step(step)
    both = [f"{what} {step}.{micro}" for step in (0, 1) for what in ("ask", "wait") for micro in (0, 1)]
    assert critics.lines == both[:2] + both[4:6] + both[2:4] + both[6:]


@pytest.mark.parametrize(
    ("critics", "options"),
    [
        ({"critic_steps": 2, "levels_per_step": 2}, {}),
        ({"order": "student_first", "levels_per_step": 2}, {"accumulate": 2}),
    ],
    ids=["critic_steps", "accumulated"],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit_wherever_it_was_cut(
    critics: dict[str, Any], options: dict[str, Any]
) -> None:
    def make() -> Distiller:
        return stale(panel(refresh_rate=0.05, **critics), dropout=0.1, **options)

    unbroken, states, figures = make(), [], []
    for step in range(LAST):
        states.append(unbroken.state())
        figures.append(unbroken.step(step))
    states.append(unbroken.state())
    assert [AHEAD in state for state in states] == [False] * 3 + [True] * 4 + [False]
    for cut in (FIRST_ASKED, FIRST_ASKED + 1, FIRST_MOVE, LAST - 1):
        end, resumed = min(cut + 2, LAST), make()
        resumed.load(states[cut], cut)
        torch.rand(3)
        assert str([resumed.step(step) for step in range(cut, end)]) == str(figures[cut:end])
        for name, part in resumed.state().items():
            assert all(torch.equal(x, states[end][name][key]) for key, x in part.items()), (cut, name)


def verdict(start: int, size: int, judge: bool = True) -> PanelVerdict:
    """The mean over samples `start` to `start + size` of a verdict that is the sample's number in each."""
    numbers = torch.arange(start, start + size, dtype=torch.float32)
    gradient = (numbers / size)[:, None, None, None].expand(-1, 1, 2, 2).clone() if judge else None
    nan = torch.tensor([[1.5, float("nan")]])
    groups = {g: Verdict(9, 0.1 * start + g, None, 0.3, nan, -nan, size // 2, g, 15) for g in (0, 2)}
    return PanelVerdict(float(numbers.mean()), gradient, groups)


@pytest.mark.parametrize("judge", [True, False])
@pytest.mark.parametrize(("before", "after"), [(6, 6), (6, 12), (12, 6), (4, 6), (3, 12)])
def test_stored_verdicts_are_taken_up_by_any_parts_of_the_batch(before: int, after: int, judge: bool) -> None:
    stored = {}
    for start in reversed(range(0, 12, before)):
        stored |= verdict_tensors([verdict(start, before, judge)], [slice(start, start + before)])
    parts = [slice(start, start + after) for start in range(0, 12, after)]
    taken_up = verdicts_of(stored, parts)
    assert sum(one.loss for one in taken_up) * after == pytest.approx(sum(range(12)))
    for part, found in zip(parts, taken_up, strict=True):
        expected = verdict(part.start, after, judge)
        if after % before == 0:
            # Of a part that is cut only the mean is known.
            assert found.loss == pytest.approx(expected.loss)
        assert (found.gradient is not None) is judge
        if found.gradient is not None and expected.gradient is not None:
            exact = {"atol": 0.0, "rtol": 0.0 if before == after else 1e-6}
            torch.testing.assert_close(found.gradient, expected.gradient, **exact)
        assert sorted(found.groups) == [0, 2]
        for group, one in found.groups.items():
            assert (one.step, one.critic_loss, one.refreshed, one.voting) == (9, 0.3, group, 15)
            assert torch.equal(one.fake_logits.nan_to_num(9.0), -torch.tensor([[1.5, -9.0]]))
        if before == after:
            assert str(found.groups) == str(expected.groups)


def test_two_ranks_checkpoint_is_taken_up_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two ranks had asked ahead is what one rank would have asked, to the rounding of the sums."""
    import threading

    precision: dict[str, Any] = {"dtype": torch.float64, "real": "teacher"}
    critics: dict[str, Any] = {"order": "student_first", "levels_per_step": 2}
    shared, single = Shared(precise(**critics)), stale(precise(**critics), **precision)
    monkeypatch.setattr("counterpoint.distillation.Distiller._student_moves", lambda self, step: step > 3)
    monkeypatch.setattr("counterpoint.strategies.learner.Learner.step", lambda self, step: (0.0, 0.0))
    ranks = [stale(shared.of_rank(r), place=Place(r, 2), **precision) for r in range(2)]
    threads = [threading.Thread(target=rank.step, args=(FIRST_MOVE,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    single.step(FIRST_MOVE)
    parts = [rank.state()[AHEAD] for rank in ranks]
    assert not set(parts[0]) & set(parts[1])
    (found,) = verdicts_of(parts[0] | parts[1], [slice(0, 8)])
    (expected,) = verdicts_of(single.state()[AHEAD], [slice(0, 8)])
    assert found.gradient is not None
    assert expected.gradient is not None
    torch.testing.assert_close(found.gradient, expected.gradient)
    assert found.loss == pytest.approx(expected.loss)
