"""A bank of heads against one torch.optim.AdamW per head."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from counterpoint.critics.bank import HeadBank
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.heads import HeadShape

SHAPE = HeadShape(channels=2, side=1, width=4, groups=2)
OPTIMIZER: dict[str, Any] = {"learning_rate": 0.03, "betas": (0.5, 0.9), "weight_decay": 0.2}


def bank_of(heads: int, **options: Any) -> HeadBank:
    rows = torch.randn(heads, SHAPE.size, generator=torch.Generator().manual_seed(0))
    return HeadBank(SHAPE, [0], rows, CriticsConfig(**OPTIMIZER | options))


def updates(heads: int, steps: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield who learns in each step (never head 0), so that all have different ages, and their gradients."""
    stream = torch.Generator().manual_seed(1)
    for _ in range(steps):
        often = torch.linspace(0, 0.9, heads)
        chosen = torch.nonzero(torch.rand(heads, generator=stream) < often).flatten().tolist() or [1]
        yield chosen, torch.randn(len(chosen), SHAPE.size, generator=stream)


class Alone:
    """One head with an optimizer of its own."""

    def __init__(self, row: Tensor) -> None:
        self.weight = row.clone().requires_grad_()
        rate, betas, decay = OPTIMIZER.values()
        self.optimizer = torch.optim.AdamW([self.weight], lr=rate, betas=betas, weight_decay=decay)

    def learn(self, gradient: Tensor) -> None:
        self.weight.grad = gradient.clone()
        self.optimizer.step()


def test_each_head_has_an_adamw_of_its_own() -> None:
    bank = bank_of(5)
    alone = [Alone(row) for row in bank.rows]
    for chosen, gradients in updates(5, 40):
        before = bank.rows.clone()
        bank.update(chosen, gradients)
        for head, gradient in zip(chosen, gradients, strict=True):
            alone[head].learn(gradient)
        resting = [head for head in range(5) if head not in chosen]
        assert torch.equal(bank.rows[resting], before[resting])
        assert not torch.equal(bank.rows[chosen], before[chosen])
    torch.testing.assert_close(bank.rows, torch.stack([a.weight.detach() for a in alone]))
    assert bank.updates[0] == 0
    assert len(set(bank.updates.tolist())) == 5
    assert torch.equal(bank.updates, bank.optimizer_steps.long())


@pytest.mark.parametrize("policy", ["dropped", "kept"])
def test_a_new_head_starts_with_empty_moments_or_inherits(policy: Literal["dropped", "kept"]) -> None:
    bank = bank_of(3, refresh_optimizer_state=policy)
    alone = [Alone(row) for row in bank.rows]
    for step, (chosen, gradients) in enumerate(updates(3, 30)):
        if step == 15:
            moments = [x[2].clone() for x in (bank.exp_avg, bank.exp_avg_sq, bank.optimizer_steps)]
            bank.renew(2, torch.full((SHAPE.size,), 0.5), generation=4, tick=14)
            now = [x[2] for x in (bank.exp_avg, bank.exp_avg_sq, bank.optimizer_steps)]
            if policy == "dropped":
                assert all((x == 0).all() for x in now)
                alone[2] = Alone(bank.rows[2])
            else:
                assert all(torch.equal(x, y) for x, y in zip(now, moments, strict=True))
                alone[2].weight.data.copy_(bank.rows[2])
            assert (bank.rows[2] == 0.5).all()
            assert [bank.updates[2], bank.generations[2], bank.born[2]] == [0, 4, 15]
        bank.update(chosen, gradients)
        for head, gradient in zip(chosen, gradients, strict=True):
            alone[head].learn(gradient)
    torch.testing.assert_close(bank.rows, torch.stack([a.weight.detach() for a in alone]))


def test_the_state_is_a_copy_and_returns_exactly() -> None:
    bank, other = bank_of(4), bank_of(4)
    batches = list(updates(4, 10))
    for batch in batches[:5]:
        bank.update(*batch)
    state = bank.state()
    for batch in batches[5:]:
        bank.update(*batch)
    other.load(state)
    for batch in batches[5:]:
        other.update(*batch)
    assert all(torch.equal(x, other.state()[name]) for name, x in bank.state().items())
    assert not torch.equal(state["rows"], bank.rows)


def test_the_state_of_another_pool_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"stored rows is .* resume with the configuration of the stored run"
    ):
        bank_of(4).load(bank_of(3).state())
