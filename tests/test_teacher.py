"""The teacher's training: resumed, accumulated and shared out, it is the same training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import digits, unet
from torch import Tensor

from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.optimization import OptimizerConfig
from counterpoint.place import Place
from counterpoint.strategies import whole
from counterpoint.strategies.learner import Learner
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
        patch.setattr(Learner, "step", lambda self, step: (0.0, 0.0))
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


def test_gradients_stay_local_until_the_last_micro_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whole, "averages", lambda place: True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        teacher, local = trainer(accumulate=3), []
        forward = teacher.learner.network

        def listen(*args: Any, **options: Any) -> Any:
            local.append(not teacher.learner.wrapped.require_backward_grad_sync)
            return forward(*args, **options)

        teacher.learner.network = listen
        teacher.step(0)
    finally:
        dist.destroy_process_group()
    assert local == [True, True, False]


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
