"""Alarms: quiet on rows and on a run that are healthy, raised on those that are not."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import ABAR, panel, unet

from counterpoint import distillation
from counterpoint.alarms import AlarmsConfig, Watcher
from counterpoint.critics.encoder import FrozenEncoder
from counterpoint.data import DataConfig, ImageSet, balanced_subset, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.distillation import AdversarialConfig, Distiller, WarmupConfig
from counterpoint.optimization import OptimizerConfig, load_weights
from counterpoint.pairs import Pairs
from counterpoint.student import StudentConfig

CONFIG = AlarmsConfig(window=4)
HEALTHY: dict[str, Any] = {
    "stage": "panel",
    "gap": {
        "group0": {"global_conditional": [0.1, float("nan"), 0.3]},
        "group2": {"local_conditional": [-0.2]},
    },
    "critic_loss": 1.98,
    "critic_excess": -0.02,
    "voting": 12,
    "verdict_gradient_norm": 0.1,
    "gradient_norm": 0.5,
    "sample_std_ratio": 0.97,
}


def alarms(*rows: dict[str, Any], times: int = 4) -> list[str]:
    """What a watcher says of each row, shown several times."""
    watcher = Watcher(CONFIG)
    return [alarm for row in rows for _ in range(times) for alarm in watcher.see(row)]


def test_healthy_rows_are_quiet() -> None:
    heads = {name: value for name, value in HEALTHY.items() if "gradient" not in name} | {"stage": "heads"}
    assert alarms({"stage": "warmup", "regression_loss": 0.1}, heads, HEALTHY, times=10) == []


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (
            {"gap": {"group1": {"local_conditional": [0.1, 2.5, 3.5]}}},
            "group1: .* 3.5 apart at local_conditional, level 2",
        ),
        ({"critic_excess": 0.03}, "0.030 above that of heads that see nothing"),
        (
            {"critic_loss": float("nan"), "critic_excess": float("nan")},
            "the heads' loss is nan: they diverge",
        ),
        ({"critic_loss": float("inf")}, "the heads' loss is inf"),
        ({"verdict_gradient_norm": 0.0}, "the path through the encoder is cut"),
        ({"gradient_norm": 0.0}, "does not reach its weights"),
        ({"gradient_norm": float("nan")}, "the student's gradient norm is nan"),
        ({"sample_std_ratio": 0.3}, "0.30 times the real ones' standard deviation"),
        ({"sample_std_ratio": 1.7}, "1.70 times"),
        ({"sample_std_ratio": float("nan")}, "nan times"),
    ],
)
def test_a_broken_row_raises_its_alarm_once(broken: dict[str, Any], expected: str) -> None:
    found = alarms(HEALTHY | broken, times=12)
    assert len(found) == 1
    assert re.search(expected, found[0])


def test_means_over_a_full_window_count_and_not_single_steps() -> None:
    spike = HEALTHY | {"critic_excess": 0.07, "sample_std_ratio": 0.4}
    assert alarms(spike, times=3) == []
    assert alarms(HEALTHY, spike, HEALTHY, times=1) == []
    watcher = Watcher(CONFIG)
    rows = [HEALTHY] * 4 + [spike] * 4
    raised = [bool(watcher.see(row)) for row in rows]
    # -0.02 three times and 0.07 once make 0.0025; two of each make 0.025, above 0.02.
    assert raised.index(True) == 5


def test_a_panel_without_votes_may_have_no_gradient() -> None:
    assert alarms(HEALTHY | {"voting": 0, "verdict_gradient_norm": 0.0}) == []


def test_rows_from_storage_do() -> None:
    stored = json.loads(json.dumps(HEALTHY).replace("NaN", "null"))
    assert alarms(stored) == []


def test_recall_that_falls_is_told_by_steps() -> None:
    watcher = Watcher(CONFIG)
    snapshots = [
        {"step": step, "1": {"recall": one, "fd": 3.0}, "4": {"recall": four}, "seconds": 3.0}
        for step, one, four in ((100, 0.9, 0.8), (200, 0.7, 0.8), (300, 0.5, 0.8), (400, 0.4, 0.5))
    ]
    found = [watcher.see_snapshot(row) for row in snapshots]
    assert [len(alarm) for alarm in found] == [0, 0, 1, 1]
    assert found[2][0].startswith("recall at 1 fell from 0.90 to 0.50")
    assert found[3][0].startswith("recall at 4 fell from 0.80 to 0.50")


# From here on: real runs, on pairs that are easy enough for a student of a second's training.


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return load_data(DataConfig()).train


@pytest.fixture(scope="module")
def warm(real: ImageSet) -> dict[str, torch.Tensor]:
    """A student that takes mild noise off digits."""
    student = distiller(real, WarmupConfig(steps=40, batch_size=32, optimizer=QUICK), None, real)
    for step in range(40):
        student.step(step)
    return student.weights()


QUICK = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, ema_decay=0.9)
CRITICS: dict[str, Any] = {
    "kinds": ("global_conditional", "local_unconditional"),
    "noise_levels": (10, 500),
    "levels_per_step": 2,
    "refresh_rate": 0.0025,
    "reduction": "mean",
    "width": 8,
    "learning_rate": 2e-3,
}
PANEL = AdversarialConfig(steps=50, heads_alone=20, batch_size=32, adversarial_weight=0.1)


def distiller(
    images: ImageSet, warmup: WarmupConfig, critics: dict[str, Any] | None, real: ImageSet
) -> Distiller:
    ends = real.images[:400]
    noise = torch.randn(ends.shape, generator=torch.Generator().manual_seed(0))
    mild = ABAR[300].sqrt() * ends + (1 - ABAR[300]).sqrt() * noise
    return Distiller(
        unet(),
        build_noise_scheduler(NoiseConfig()),
        Pairs(mild, real.labels[:400], ends, {}, 1000),
        images,
        None if critics is None else panel(network=unet(seed=9), **CRITICS | critics),
        StudentConfig(refinement=()),
        warmup,
        PANEL if critics is not None else AdversarialConfig(steps=0, heads_alone=0),
        seed=0,
    )


@pytest.fixture
def run(real: ImageSet, warm: dict[str, torch.Tensor]) -> Callable[..., Iterator[tuple[int, str]]]:
    def start(images: ImageSet = real, **critics: Any) -> Iterator[tuple[int, str]]:
        """Train against a panel; yield each alarm with its step."""
        student, watcher = distiller(images, WarmupConfig(steps=0), critics, real), Watcher(AlarmsConfig())
        load_weights(student.unet, warm)
        for step in range(student.total_steps):
            for alarm in watcher.see(student.step(step)):
                yield step, alarm

    return start


Run = Callable[..., Iterator[tuple[int, str]]]


def test_a_good_run_is_quiet(run: Run) -> None:
    assert list(run()) == []


def test_heads_that_learn_too_fast_are_told(run: Run) -> None:
    _, alarm = next(run(learning_rate=30 * CRITICS["learning_rate"]))
    assert "above that of heads that see nothing" in alarm


def test_heads_that_know_a_tiny_bank_by_heart_are_told(run: Run, real: ImageSet) -> None:
    _, alarm = next(run(balanced_subset(real, 10, seed=0), refresh_rate=0.0, heads_per_slot=1))
    assert "know the real images by heart" in alarm


def test_an_encoder_that_lets_no_gradient_through_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FrozenEncoder.forward
    monkeypatch.setattr(
        FrozenEncoder, "forward", lambda self, x, *rest: forward(self, x.detach() + 0 * x, *rest)
    )
    step, alarm = next(run())
    assert "the path through the encoder is cut" in alarm
    assert step == PANEL.heads_alone


def test_a_student_cut_off_from_its_samples_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = distillation.student_x0

    def detached(*args: Any) -> torch.Tensor:
        fake = estimate(*args)
        return fake.detach() + 0 * fake

    monkeypatch.setattr(distillation, "student_x0", detached)
    step, alarm = next(run())
    assert "does not reach its weights" in alarm
    assert step == PANEL.heads_alone
