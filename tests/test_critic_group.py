"""A group's verdicts and its heads' updates against one head, one view and one optimizer at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import ABAR, double, group, rows_of, samples, single_head
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.critics.group import CriticGroup, Samples
from counterpoint.critics.views import Look, draw_looks, draw_wrong_labels

Head = tuple[int, int]
"""A slot and a spare."""

CRITIC_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "critic": lambda real, fake: fake - real,
    "hinge": lambda real, fake: (1 - real).clamp(min=0) + (1 + fake).clamp(min=0),
    "softplus": lambda real, fake: (1 + (-real).exp()).log() + (1 + fake.exp()).log(),
}
STUDENT_LOSS: dict[str, Callable[[Tensor], Tensor]] = {
    "critic": lambda fake: -fake,
    "hinge": lambda fake: -fake,
    "softplus": lambda fake: (1 + (-fake).exp()).log(),
}
NEGATIVE_LOSS: dict[str, Callable[[Tensor], Tensor]] = {
    "critic": lambda fake: fake,
    "hinge": lambda fake: (1 + fake).clamp(min=0),
    "softplus": lambda fake: (1 + fake.exp()).log(),
}


class Naive:
    """The same heads as separate modules, each with its own optimizer and pass through the encoder."""

    def __init__(self, critics: CriticGroup) -> None:
        self.critics, self.pool, self.config = critics, critics.pool, critics.pool.config
        self.heads: dict[Head, nn.Module] = {}
        for bank in critics.banks:
            for row, weights in enumerate(bank.rows):
                slot, spare = bank.slots[row // self.config.heads_per_slot], row % self.config.heads_per_slot
                stages = min(4, int(math.log2(bank.shape.side)))
                self.heads[slot, spare] = single_head(bank.shape, weights, stages)
        self.optimizers = {
            key: torch.optim.AdamW(
                head.parameters(),
                lr=self.config.learning_rate,
                betas=self.config.betas,
                weight_decay=self.config.weight_decay,
            )
            for key, head in self.heads.items()
        }
        self.updates = dict.fromkeys(self.heads, 0)

    def logits(self, key: Head, images: Tensor, labels: Tensor, look: Look) -> Tensor:
        """One head's logits [n], from a pass of its own."""
        slot, t = self.pool.slots[key[0]], self.critics.timestep
        x = ABAR[t].sqrt() * images + (1 - ABAR[t]).sqrt() * look.noise
        windows = 1
        if slot.kind > 0:
            windows, side = self.config.patch_windows, self.config.patch_side or 4
            corners = look.corners.tolist()
            x = torch.stack(
                [x[i // windows, :, a : a + side, b : b + side] for i, (a, b) in enumerate(corners)]
            )
            labels = labels.repeat_interleave(windows)
        if slot.kind == 2:
            labels = torch.full_like(labels, 10)
        maps = self.critics.encoder(x, torch.full((len(x),), t), labels)
        return self.heads[key](maps[slot.level]).reshape(-1, windows).mean(1)

    def judge(self, s: Samples) -> tuple[float, Tensor, dict[Head, float]]:
        """The student's loss and gradient, and each head's loss; heads learn."""
        panel = self.pool.panel(s.step, self.critics.index)
        fake_look, real_look = draw_looks(self.config, self.pool.seed, (s.step, self.critics.index), s.fake)
        answer = None
        if self.config.order == "student_first":
            answer = self.student(panel, s, fake_look)
        losses = {key: self.learn(key, s, fake_look, real_look) for key in panel}
        return *(answer or self.student(panel, s, fake_look)), losses

    def student(self, panel: list[Head], s: Samples, look: Look) -> tuple[float, Tensor]:
        images = s.fake.clone().requires_grad_()
        voters = [key for key in panel if self.updates[key] >= self.config.probation]
        losses = [
            STUDENT_LOSS[self.config.loss](self.logits(k, images, s.labels, look)).sum() for k in voters
        ]
        total = sum(losses) / (len(voters) if self.config.reduction == "mean" else 1)
        assert isinstance(total, Tensor)
        total.backward()
        assert images.grad is not None
        return float(total.detach()), images.grad

    def learn(self, key: Head, s: Samples, fake_look: Look, real_look: Look) -> float:
        fake = self.logits(key, s.fake, s.labels, fake_look)
        loss = CRITIC_LOSS[self.config.loss](self.logits(key, s.real, s.labels, real_look), fake)
        reported = float(loss.detach().mean())
        if self.config.shuffled_negatives and self.pool.slots[key[0]].kind < 2:
            wrong = draw_wrong_labels(self.pool.seed, (s.step, self.critics.index), s.labels, 10)
            loss = loss + NEGATIVE_LOSS[self.config.loss](self.logits(key, s.real, wrong, real_look))
        self.optimizers[key].zero_grad()
        loss.mean().backward()
        self.optimizers[key].step()
        self.updates[key] += 1
        return reported

    def rows(self) -> Tensor:
        """All weights, in the order of `rows_of`."""
        spares = range(self.config.heads_per_slot)
        keys = [(slot, spare) for bank in self.critics.banks for slot in bank.slots for spare in spares]
        return torch.cat(
            [nn.utils.parameters_to_vector(self.heads[key].parameters()) for key in keys]
        ).detach()


def doubled(s: Samples) -> Samples:
    return replace(s, fake=s.fake.double(), real=s.real.double())


@pytest.mark.parametrize("order", ["critics_first", "student_first"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "critic", "reduction": "mean"},
        {"loss": "hinge", "betas": (0.9, 0.99), "weight_decay": 0.1},
        {"loss": "softplus", "panel": "uniform", "reduction": "mean"},
        {"loss": "hinge", "panel": "all", "patch_windows": 2, "patch_side": 5},
        {"loss": "softplus", "shuffled_negatives": True, "same_window": False, "share_noise": True},
        {"loss": "critic", "kinds": ("local_unconditional",), "heads_per_slot": 1, "noise_levels": (10, 250)},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_group_equals_separate_heads(order: str, options: dict[str, Any]) -> None:
    critics = double(group(order=order, refresh_rate=0.0, **options))
    naive = Naive(critics)
    for step in range(3):
        s = doubled(samples(step, n=3))
        verdict = critics.judge(s)
        loss, gradient, losses = naive.judge(s)
        assert verdict.loss == pytest.approx(loss, rel=1e-9)
        assert verdict.gradient is not None
        torch.testing.assert_close(verdict.gradient, gradient)
        assert verdict.critic_loss == pytest.approx(sum(losses.values()) / len(losses), rel=1e-9)
        assert (verdict.voting, verdict.samples, verdict.step) == (len(losses), 3, step)
        torch.testing.assert_close(rows_of(critics), naive.rows())


@pytest.mark.parametrize("order", ["critics_first", "student_first"])
def test_heads_on_probation_learn_but_do_not_vote(order: str) -> None:
    critics = double(group(order=order, refresh_rate=0.0, probation=2))
    naive, voting = Naive(critics), []
    for step in range(7):
        s = doubled(samples(step, n=2))
        panel = critics.pool.panel(step, critics.index)
        had = 2 - (order == "critics_first")
        voters = sum(naive.updates[key] >= had for key in panel)
        verdict = critics.judge(s)
        assert verdict.voting == voters
        voting.append(voters)
        if voters:
            loss, gradient, _ = naive.judge(s)
            assert verdict.loss == pytest.approx(loss, rel=1e-9)
            torch.testing.assert_close(verdict.gradient, gradient)
        else:
            assert verdict.gradient is not None
            assert (verdict.loss, float(verdict.gradient.abs().max())) == (0.0, 0.0)
            for key in panel:
                naive.learn(key, s, *draw_looks(naive.config, 0, (step, critics.index), s.fake))
        torch.testing.assert_close(rows_of(critics), naive.rows())
    assert voting[0] == 0
    assert max(voting) > 5


@pytest.mark.parametrize("loss", ["critic", "hinge", "softplus"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_gradient_is_the_finite_difference(loss: str, reduction: str) -> None:
    critics = double(group(order="student_first", loss=loss, reduction=reduction))
    state, s = critics.state(), doubled(samples(0, n=2))

    def loss_at(fake: Tensor) -> float:
        critics.load(state)
        return critics.judge(replace(s, fake=fake)).loss

    gradient = critics.judge(s).gradient
    assert gradient is not None
    for pixel in ((0, 0, 3, 4), (0, 0, 0, 0), (1, 0, 5, 2)):
        step = torch.zeros_like(s.fake)
        step[pixel] = 1e-5
        estimate = (loss_at(s.fake + step) - loss_at(s.fake - step)) / 2e-5
        assert estimate != 0
        assert float(gradient[pixel]) == pytest.approx(estimate, rel=1e-5)


def test_orders_differ_by_the_heads_update_alone() -> None:
    """Students judged first are judged by the heads as they were; judged last, by the heads as they are."""
    s = samples(0)
    first, last = group(order="student_first", refresh_rate=0), group(order="critics_first", refresh_rate=0)
    before, after = first.judge(s), last.judge(s)
    assert torch.equal(rows_of(first), rows_of(last))
    assert (before.critic_loss, before.real_logits.nansum()) == (
        after.critic_loss,
        after.real_logits.nansum(),
    )
    assert before.loss != after.loss
    taught = group(order="student_first", refresh_rate=0)
    taught.load(last.state())
    again = taught.judge(s)
    torch.testing.assert_close(again.gradient, after.gradient)
    assert again.loss == pytest.approx(after.loss, rel=1e-6)


@pytest.mark.parametrize("order", ["critics_first", "student_first"])
def test_fakes_pass_the_encoder_once(order: str) -> None:
    critics, passes = group(order=order), []
    critics.encoder.register_forward_hook(lambda _m, inputs, _o: passes.append(inputs[0]))
    s = samples(0, n=6)
    critics.judge(s)
    # Whole images, and windows under both conditions at once: for fakes with a graph, for real ones without.
    assert [(len(x), x.requires_grad) for x in passes] == [(6, True), (12, True), (6, False), (12, False)]
    passes.clear()
    critics.judge(samples(1, n=6, judge=False))
    assert [x.requires_grad for x in passes] == [False] * 4


@pytest.mark.parametrize("order", ["critics_first", "student_first"])
def test_heads_learn_alike_whether_the_student_listens(order: str) -> None:
    listening, alone = group(order=order), group(order=order)
    for step in range(4):
        s = samples(step)
        with_gradient, without = listening.judge(s), alone.judge(replace(s, judge=False))
        assert with_gradient.gradient is not None
        assert (without.gradient, without.loss, without.voting) == (None, 0.0, 0)
        assert with_gradient.critic_loss == without.critic_loss
    assert torch.equal(rows_of(listening), rows_of(alone))
    assert not s.fake.requires_grad


@pytest.mark.parametrize("panel", ["one_per_slot", "uniform", "all"])
def test_heads_outside_the_panel_are_bit_identical_and_those_inside_move(panel: str) -> None:
    critics = group(panel=panel, weight_decay=0.5, refresh_rate=0.0, heads_per_slot=3)
    for step in range(3):
        chosen = set(critics.pool.panel(step, critics.index))
        before = [bank.state() for bank in critics.banks]
        critics.judge(samples(step))
        for bank, old in zip(critics.banks, before, strict=True):
            for row in range(len(bank.rows)):
                same = all(torch.equal(old[name][row], new[row]) for name, new in bank.state().items())
                moved = not torch.equal(old["rows"][row], bank.rows[row])
                judged = (bank.slots[row // 3], row % 3) in chosen
                assert (same, moved) == (not judged, judged)


def test_statistics_are_mean_logits_by_kind_and_level() -> None:
    critics = double(group(refresh_rate=0.0, panel="uniform"))
    naive, s = Naive(critics), doubled(samples(0))
    looks = draw_looks(critics.pool.config, 0, (0, critics.index), s.fake)
    expected = torch.full((2, 3, critics.pool.levels), torch.nan)
    panel = critics.pool.panel(0, critics.index)
    for kind in range(3):
        for level in range(critics.pool.levels):
            here = [
                k
                for k in panel
                if (critics.pool.slots[k[0]].kind, critics.pool.slots[k[0]].level) == (kind, level)
            ]
            for which, (images, look) in enumerate(((s.real, looks[1]), (s.fake, looks[0]))):
                means = [naive.logits(key, images, s.labels, look).mean() for key in here]
                if means:
                    expected[which, kind, level] = torch.stack(means).mean()
    verdict = critics.judge(s)
    found = torch.stack([verdict.real_logits, verdict.fake_logits])
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan().any()
    assert found.dtype == torch.float32


def test_logits_show_every_head_and_change_nothing() -> None:
    critics = double(group(patch_windows=2))
    naive, s, before = Naive(critics), doubled(samples(0)), critics.digest()
    look, _ = draw_looks(critics.pool.config, 0, ("probe", 7, critics.index), s.fake)
    heads = [(slot, spare) for bank in critics.banks for slot in bank.slots for spare in range(2)]
    expected = torch.stack([naive.logits(key, s.fake, s.labels, look) for key in heads], dim=1)
    torch.testing.assert_close(critics.logits(s.fake, s.labels, step=7), expected.detach())
    assert critics.digest() == before


def test_losses_do_not_overflow() -> None:
    from counterpoint.critics.losses import critic_loss, generator_loss

    far = torch.tensor([500.0, -500.0])
    torch.testing.assert_close(critic_loss("softplus", far, -far), torch.tensor([0.0, 1000.0]))
    torch.testing.assert_close(generator_loss("softplus", far), F.softplus(-far))
