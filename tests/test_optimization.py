"""The optimizer step against a loop over torch's parts, and sharing a batch out."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterpoint.optimization import OptimizerConfig, load_weights, rank_slices, weights_of
from counterpoint.strategies.learner import Learner
from counterpoint.strategies.whole import WholeLearner

OPTIONS: dict[str, Any] = {
    "learning_rate": 0.05,
    "betas": (0.8, 0.9),
    "weight_decay": 0.1,
    "warmup_steps": 3,
    "max_gradient_norm": 0.7,
    "ema_decay": 0.6,
}
TOTAL = 12


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def gradients(step: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(step)
    return [torch.randn(2, 3, generator=stream), torch.randn(2, generator=stream)]


def learn(net: nn.Module, learner: Learner, steps: range) -> list[tuple[float, float]]:
    figures = []
    for step in steps:
        for p, gradient in zip(net.parameters(), gradients(step), strict=True):
            p.grad = gradient
        figures.append(learner.step(step))
    return figures


@pytest.mark.parametrize("decay", [True, False])
def test_a_step_is_adamw_with_schedule_clipping_and_ema(decay: bool) -> None:
    net, other = network(), network()
    learner = WholeLearner(net, OptimizerConfig(**OPTIONS, decay=decay), TOTAL)
    figures = learn(net, learner, range(TOTAL))
    adamw = torch.optim.AdamW(other.parameters(), lr=1.0, betas=(0.8, 0.9), weight_decay=0.1)
    ema = [p.detach().clone() for p in other.parameters()]
    for step in range(TOTAL):
        rate = 0.05 * min(1, (step + 1) / 3) * ((1 + math.cos(math.pi * step / TOTAL)) / 2 if decay else 1)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients(step)))
        assert figures[step] == pytest.approx((rate, norm), rel=1e-5)
        for p, gradient in zip(other.parameters(), gradients(step), strict=True):
            p.grad = gradient * min(1.0, 0.7 / norm)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        # The average starts at the first step's weights and lengthens its memory up to the decay.
        memory = min(0.6, (step + 1) / (step + 10)) if step else 0.0
        ema = [memory * e + (1 - memory) * p.detach() for e, p in zip(ema, other.parameters(), strict=True)]
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()))
    assert list(learner.averaged()) == ["weight", "bias"]
    torch.testing.assert_close(list(learner.averaged().values()), ema)
    assert all(p.grad is None for p in net.parameters())


def test_without_ema_the_last_weights_are_kept() -> None:
    net = network()
    learner = WholeLearner(net, OptimizerConfig(ema_decay=0.0), TOTAL)
    learn(net, learner, range(4))
    assert all(torch.equal(learner.averaged()[name], p) for name, p in net.named_parameters())


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_restored_optimization_goes_on_bit_for_bit(cut: int) -> None:
    nets = network(), network()
    unbroken, restored = (WholeLearner(net, OptimizerConfig(**OPTIONS), TOTAL) for net in nets)
    learn(nets[0], unbroken, range(cut))
    weights, state = unbroken.weights(), unbroken.state()
    learn(nets[1], restored, range(7))  # what a restored optimization did before must not count
    restored.load(weights, state)
    learn(nets[0], unbroken, range(cut, TOTAL))
    learn(nets[1], restored, range(cut, TOTAL))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert all(torch.equal(x, restored.state()[name]) for name, x in unbroken.state().items())


def test_frozen_parameters_are_left_alone() -> None:
    net = network()
    net.bias.requires_grad_(False)
    learner = WholeLearner(net, OptimizerConfig(**OPTIONS), TOTAL)
    before = net.bias.clone()
    learn(net, learner, range(2))
    assert torch.equal(net.bias, before)
    assert list(learner.averaged()) == ["weight"]


def test_weights_that_do_not_fit_are_refused() -> None:
    weights = weights_of(network())
    with pytest.raises(ValueError, match=r"missing \['bias'\], unknown \['slope'\]"):
        load_weights(network(), {"weight": weights["weight"], "slope": weights["bias"]})


@pytest.mark.parametrize(("ranks", "micros"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_ranks_and_micro_batches_share_out_the_batch(ranks: int, micros: int) -> None:
    batch = list(range(12))
    shares = [rank_slices(12, rank, ranks, micros) for rank in range(ranks)]
    for micro in range(micros):
        together = [sample for rank in range(ranks) for sample in batch[shares[rank][micro]]]
        size = 12 // micros
        assert together == batch[micro * size : (micro + 1) * size]


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=10 .*workers=2 .*accumulate=3: use a multiple of 6"):
        rank_slices(10, 0, 2, 3)
