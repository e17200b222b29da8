"""The curriculum over timesteps: where they are cut, when clusters join, and that no stop changes either."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import digits, unet
from torch import Tensor

from counterpoint.curriculum import Curriculum, CurriculumConfig, cut, log_snr
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.place import Place
from counterpoint.teacher import TeacherConfig, TeacherTrainer, mean_over_ranks

RATIOS = torch.linspace(8.0, -8.0, 60)


def spread(values: Sequence[float], bounds: Sequence[int]) -> float:
    """The sum of distances of values to the median of their run."""
    runs = [np.asarray(values[a:b]) for a, b in pairwise(bounds)]
    return float(sum(np.abs(run - np.median(run)).sum() for run in runs))


@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_cuts_are_the_best_of_all(clusters: int) -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(clusters)).sort(descending=True).values
    inner = combinations(range(1, 12), clusters - 1)
    best = min(spread(values.tolist(), (0, *some, 12)) for some in inner)
    bounds = cut(values, clusters)
    assert len(bounds) == clusters + 1
    assert spread(values.tolist(), bounds) == pytest.approx(best, rel=1e-6)


def test_even_ratios_are_cut_evenly() -> None:
    assert cut(RATIOS, 4) == [0, 15, 30, 45, 60]


def test_the_log_snr_is_the_processs_own() -> None:
    noise = build_noise_scheduler(NoiseConfig())
    found = log_snr(noise)
    x, e = torch.full((1, 1, 1, 1), 1.0), torch.zeros(1, 1, 1, 1)
    for t in (0, 400, 900):
        times = torch.tensor([t])
        signal, sigma = (float(noise.add_noise(a, b, times)) for a, b in ((x, e), (e, x)))
        assert float(found[t]) == pytest.approx(2 * np.log(signal / sigma), rel=1e-3)
    assert (found.diff() < 0).all()


def test_a_flow_has_its_own_log_snr() -> None:
    found = log_snr(build_noise_scheduler(NoiseConfig(process="flow")))
    sigma = torch.arange(1, 1000) / 1000
    torch.testing.assert_close(found[:-1].float(), 2 * torch.log((1 - sigma) / sigma), rtol=1e-3, atol=1e-3)
    assert found.isfinite().all()
    assert len(cut(found, 20)) == 21


def curriculum(**options: Any) -> Curriculum:
    return Curriculum(CurriculumConfig(**{"clusters": 3, "patience": 4} | options), RATIOS)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("easy_to_hard", [range(40, 60), range(20, 60), range(60)]),
        ("hard_to_easy", [range(20), range(40), range(60)]),
    ],
)
def test_clusters_join_and_stay(order: str, expected: list[range]) -> None:
    it, seen = curriculum(order=order), []
    while not it.finished:
        seen.append(it.timesteps)
        it.see(1.0)
    assert [r for i, r in enumerate(seen) if r not in seen[:i]] + [it.timesteps] == expected
    # The first loss is the best there is; then the patience, and one step more.
    assert seen.count(expected[0]) == seen.count(expected[1]) == 1 + 4 + 1


def test_a_falling_loss_keeps_the_stage_and_a_resting_one_ends_it() -> None:
    it = curriculum(average_decay=0.5)
    for step in range(40):
        it.see(0.9**step)
    assert it.stage == 0
    for _ in range(40):
        it.see(0.9**39)
    assert it.stage == 2


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_patience_is_relative_to_the_size_of_the_loss(size: float) -> None:
    losses = (size * (1.0 + torch.rand(60, generator=torch.Generator().manual_seed(0)))).tolist()
    one, other = curriculum(), curriculum()
    stages = []
    for loss in losses:
        one.see(loss)
        other.see(loss / size)
        stages.append((one.stage, other.stage))
    assert all(a == b for a, b in stages)
    assert stages[-1][0] > 0


def test_the_average_is_that_of_a_plain_loop_and_begins_anew() -> None:
    it, losses = curriculum(average_decay=0.8, patience=100, max_stage_steps=10), np.arange(1.0, 10.0)
    for loss in losses:
        it.see(float(loss))
    weights = 0.8 ** np.arange(9)[::-1]
    average = it.moment / (1.0 - 0.8**it.steps)
    assert average == pytest.approx(float((weights * losses).sum() / weights.sum()), rel=1e-12)
    it.see(1.0)
    assert (it.stage, it.steps, it.moment) == (1, 0, 0.0)
    assert it.best == float("inf")


def test_a_cap_ends_a_stage_that_still_improves() -> None:
    it = curriculum(max_stage_steps=5)
    for step in range(10):
        it.see(0.5**step)
    assert it.finished


def test_more_clusters_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="clusters=61 exceeds the 60 timesteps"):
        curriculum(clusters=61)


def trainer(place: Place | None = None) -> TeacherTrainer:
    pacing = CurriculumConfig(clusters=3, patience=1, min_improvement=0.2, average_decay=0.0)
    config = TeacherConfig(steps=12, batch_size=12, curriculum=pacing)
    noise = build_noise_scheduler(NoiseConfig())
    return TeacherTrainer(unet(), noise, digits(), config, 0, place or Place())


@pytest.mark.parametrize("cut_at", [1, 4])
def test_a_teacher_resumed_in_mid_stage_is_the_unbroken_one_bit_for_bit(cut_at: int) -> None:
    unbroken, resumed = trainer(), trainer()
    first = [unbroken.step(step) for step in range(cut_at)]
    state = unbroken.state()
    assert int(state["curriculum"]["steps"]) > 0
    resumed.step(0)
    resumed.load(state, cut_at)
    rest = [unbroken.step(step) for step in range(cut_at, 10)]
    assert [resumed.step(step) for step in range(cut_at, 10)] == rest
    stages = [figures["curriculum_stage"] for figures in first + rest]
    assert stages[0] == 0
    assert stages[-1] == 2
    for name, part in unbroken.state().items():
        assert all(torch.equal(x, resumed.state()[name][key]) for key, x in part.items())


def test_rank_0_alone_writes_the_stage() -> None:
    assert trainer(Place(1, 2)).state()["curriculum"] == {}


def test_two_ranks_agree_on_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each brings other losses, of which one rank's alone would not end a stage and the other's would."""
    store, here = dist.HashStore(), threading.local()
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: here.group.allreduce([tensor]).wait())

    def rank_of(rank: int) -> dict[str, Tensor]:
        here.group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        it = curriculum(average_decay=0.0, patience=3)
        for step in range(9):
            it.see(mean_over_ranks(1.0 if rank else 0.5**step, Place(rank, 2)))
        return it.state()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(rank_of, range(2))
    assert one == other
    alone = curriculum(average_decay=0.0, patience=3)
    for step in range(9):
        alone.see((1.0 + 0.5**step) / 2)
    assert one == alone.state()
