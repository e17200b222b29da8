"""The teacher's training: resumed, accumulated and shared out, it is the same training."""

from typing import Any

import pytest
import torch
from tiny import digits, unet
from torch import Tensor

from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.optimization import Optimization, OptimizerConfig
from counterpoint.place import Place
from counterpoint.teacher import TeacherConfig, TeacherTrainer

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=4, ema_decay=0.9)


def trainer(
    place: Place | None = None, accumulate: int = 1, dropout: float = 0.0, **options: Any
) -> TeacherTrainer:
    config = TeacherConfig(**{"steps": 30, "batch_size": 12, "optimizer": OPTIMIZER} | options)
    network, noise = unet(dropout=dropout), build_noise_scheduler(NoiseConfig())
    return TeacherTrainer(network, noise, digits(), config, 0, place or Place(), accumulate)


def gradient(monkeypatch: pytest.MonkeyPatch, teacher: TeacherTrainer) -> dict[str, Tensor]:
    """The gradients that one step hands to the optimizer."""
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "step", lambda self, step: (0.0, 0.0))
        teacher.step(3)
    return {name: p.grad.clone() for name, p in teacher.unet.named_parameters() if p.grad is not None}


def test_it_learns() -> None:
    teacher = trainer(steps=60, batch_size=24)
    losses = [teacher.step(step)["loss"] for step in range(60)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert not any(torch.equal(teacher.weights()[name], p) for name, p in teacher.unet.named_parameters())


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(cut: int) -> None:
    """Dropout included."""
    unbroken, resumed = trainer(dropout=0.2), trainer(dropout=0.2)
    figures = [unbroken.step(step) for step in range(cut)]
    state = unbroken.state()
    resumed.step(0)
    resumed.load(state, cut)
    figures = [unbroken.step(step) for step in range(cut, 5)]
    torch.rand(17)  # somebody else draws from the global stream
    assert [resumed.step(step) for step in range(cut, 5)] == figures
    for name, part in unbroken.state().items():
        assert all(torch.equal(x, resumed.state()[name][key]) for key, x in part.items())


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_gradients_are_the_large_batchs(monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    whole, parts = gradient(monkeypatch, trainer()), gradient(monkeypatch, trainer(accumulate=accumulate))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    assert trainer(accumulate=accumulate).step(0)["loss"] == pytest.approx(
        trainer().step(0)["loss"], rel=1e-5
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_average_to_the_whole_batch(monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    whole = gradient(monkeypatch, trainer())
    ranks = [gradient(monkeypatch, trainer(Place(rank, 3), accumulate)) for rank in range(3)]
    mean = {name: sum(rank[name] for rank in ranks) / 3 for name in whole}
    torch.testing.assert_close(mean, whole, atol=1e-6, rtol=1e-4)


def test_gradients_stay_local_until_the_last_micro_batch() -> None:
    entered: list[str] = []

    class Wrapped(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, *args: Any, **options: Any) -> Any:
            entered.append("forward")
            return self.network(*args, **options)

        def no_sync(self) -> Any:
            entered.append("no_sync")
            return torch.enable_grad()

    trainer(Place(wrap=Wrapped), accumulate=3).step(0)
    assert entered == ["no_sync", "forward", "no_sync", "forward", "forward"]


def test_all_conditions_dropped_train_the_null_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = gradient(monkeypatch, trainer(condition_dropout=1.0))["class_embedding.weight"]
    assert table[10].abs().max() > 0
    assert table[:10].abs().max() == 0
    assert (
        gradient(monkeypatch, trainer(condition_dropout=0.0))["class_embedding.weight"][10].abs().max() == 0
    )


def test_a_batch_that_cannot_be_shared_out_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="use a multiple of 5"):
        trainer(accumulate=5)
    assert trainer().samples_per_step(0) == 12
