"""Who is in the pool and whose turn it is, against counting and the laws of chance."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import ABAR, group, rows_of, samples

from counterpoint.critics.config import KINDS, CriticsConfig
from counterpoint.critics.pool import Pool, build_pool, scaled_levels

SDXL = [(320, 128)] * 3 + [(320, 64), (640, 64), (640, 64), (640, 32), (1280, 32), (1280, 32), (1280, 32)]
SDXL_PATCHES = [(channels, side // 2) for channels, side in SDXL]


def pool_of(levels: int = 3, seed: int = 0, **options: object) -> Pool:
    shapes = [(8, 8)] * levels
    return build_pool(CriticsConfig(**options), shapes, shapes, 8, ABAR, seed)


def test_sdxl_has_480_heads_of_which_30_judge() -> None:
    pool = build_pool(CriticsConfig(), SDXL, SDXL_PATCHES, 128, ABAR, seed=0)
    assert pool.size == 480
    assert len(pool.timesteps) == 4
    assert Counter(slot.kind for slot in pool.slots) == {0: 10, 1: 10, 2: 10}
    assert len(pool.panel(0, 0)) == 30
    assert pool.levels == 10
    sides = {slot.kind: slot.shape.side for slot in pool.slots if slot.level == 0}
    assert sides == {0: 128, 1: 64, 2: 64}


def test_head_ids_number_the_pool() -> None:
    pool = pool_of(heads_per_slot=3)
    ids = [
        pool.head_id(group, slot, spare)
        for group in range(4)
        for slot in range(len(pool.slots))
        for spare in range(3)
    ]
    assert ids == list(range(pool.size))


def test_a_panel_is_one_head_of_every_kind_on_every_level() -> None:
    pool = pool_of(levels=5, heads_per_slot=4)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(400):
        panel = pool.panel(step, group=2)
        places = [(pool.slots[slot].kind, pool.slots[slot].level) for slot, _ in panel]
        assert sorted(places) == [(kind, level) for kind in range(len(KINDS)) for level in range(5)]
        seen.update(panel)
    # Each of the 15 x 4 heads judges in a quarter of the steps.
    assert (
        scipy.stats.chisquare([seen[slot, spare] for slot in range(15) for spare in range(4)]).pvalue > 0.001
    )


def test_panels_differ_between_steps_and_groups_and_come_back() -> None:
    pool = pool_of(levels=5)
    assert pool.panel(3, 1) == pool_of(levels=5).panel(3, 1)
    assert pool.panel(3, 1) != pool.panel(3, 2)
    assert pool.panel(3, 1) != pool.panel(4, 1)
    assert pool.panel(3, 1) != pool_of(levels=5, seed=1).panel(3, 1)


def test_uniform_panels_have_as_many_heads_from_anywhere_and_all_has_all() -> None:
    uniform, everyone = pool_of(panel="uniform"), pool_of(panel="all")
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(400):
        panel = uniform.panel(step, 0)
        assert len(set(panel)) == len(uniform.slots)
        assert panel == sorted(panel)
        seen.update(panel)
    assert (
        scipy.stats.chisquare([seen[slot, spare] for slot in range(9) for spare in range(4)]).pvalue > 0.001
    )
    assert everyone.panel(0, 0) == [(slot, spare) for slot in range(9) for spare in range(4)]


def test_fractions_of_refreshed_heads_carry_over() -> None:
    for rate in (0.29, 0.013, 0.0025):
        pool = pool_of(refresh_rate=rate)
        counts = [len(pool.refreshed(tick)) for tick in range(1000)]
        assert sum(counts) == round(1000 * rate * pool.size)
        assert max(counts) - min(counts) <= 1
    # 144 heads at 25 %, and no rounding: in floats 0.29 x 100 heads would be 28.
    assert [len(pool_of(refresh_rate=0.25).refreshed(tick)) for tick in range(20)] == [36] * 20
    hundred = pool_of(levels=25, kinds=("global_conditional",), heads_per_slot=1, refresh_rate=0.29)
    assert hundred.size == 100
    assert [len(hundred.refreshed(tick)) for tick in range(20)] == [29] * 20


def test_refresh_draws_each_head_equally_often_and_none_twice() -> None:
    pool = pool_of(refresh_rate=0.1)
    counts = np.zeros(pool.size)
    for tick in range(1500):
        drawn = pool.refreshed(tick)
        assert len(set(drawn)) == len(drawn)
        counts[drawn] += 1
    assert scipy.stats.chisquare(counts).pvalue > 0.001
    assert pool.refreshed(7) == pool_of(refresh_rate=0.1).refreshed(7) != pool.refreshed(8)
    assert pool_of(refresh_rate=0.0).refreshed(0) == []
    assert pool_of(refresh_rate=1.0).refreshed(0) == list(range(pool.size))


def test_bernoulli_draws_are_binomial() -> None:
    pool = pool_of(refresh_rate=0.05, refresh_draw="bernoulli")
    counts = [len(pool.refreshed(tick)) for tick in range(1500)]
    edges = [0, 4, 6, 7, 8, 10, pool.size]  # counts up to 3, 4 to 5, 6, 7, 8 to 9 and 10 up
    law = scipy.stats.binom(pool.size, 0.05)
    expected = [1500 * (law.cdf(high - 1) - law.cdf(low - 1)) for low, high in pairwise(edges)]
    expected[-1] += 1500 - sum(expected)
    assert scipy.stats.chisquare(np.histogram(counts, edges)[0], expected).pvalue > 0.001


def test_ages_follow_the_geometric_law() -> None:
    """After many ticks at rate r, a head is k ticks old with probability r (1 - r)^k."""
    rate, ticks = 0.1, 120
    ages = []
    for seed in range(12):
        critics = group(seed=seed, refresh_rate=rate, heads_per_slot=4)
        critics._advance(ticks)
        ages.append(critics.ages())
    old = torch.cat(ages).numpy()
    assert len(old) == 12 * critics.pool.heads_per_group
    edges = [0, 1, 2, 3, 5, 7, 10, 14, 20, ticks + 1]
    counted = np.histogram(old, edges)[0]

    def evidence(rate: float) -> float:
        law = scipy.stats.geom(rate, loc=-1)
        expected = np.array([law.cdf(high - 1) - law.cdf(low - 1) for low, high in pairwise(edges)])
        expected[-1] = 1 - expected[:-1].sum()
        return float(scipy.stats.chisquare(counted, expected * len(old)).pvalue)

    assert evidence(rate) > 0.001
    assert evidence(1.5 * rate) < 1e-6


def test_any_process_rebuilds_any_head() -> None:
    critics = group(refresh_rate=0.2)
    for step in range(6):
        critics.judge(samples(step))
    spares, seen = critics.pool.config.heads_per_slot, 0
    for bank in critics.banks:
        for row in range(len(bank.rows)):
            if bank.updates[row] == 0:
                head = critics.pool.head_id(critics.index, bank.slots[row // spares], row % spares)
                born = critics.pool.initial_head(head, int(bank.generations[row]))
                assert torch.equal(bank.rows[row], born)
                seen += int(bank.generations[row] > 0)
    assert seen > 0


def test_heads_and_generations_have_weights_of_their_own() -> None:
    pool = pool_of()
    drawn = {
        tuple(pool.initial_head(head, generation)[:4].tolist())
        for head in range(5)
        for generation in range(5)
    }
    assert len(drawn) == 25
    assert not torch.equal(rows_of(group(seed=0)), rows_of(group(seed=1)))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_samples_are_shared_out_evenly_among_the_levels_of_a_step(levels: int) -> None:
    pool = pool_of(levels_per_step=levels)
    together: Counter[int] = Counter()
    for step in range(200):
        groups = pool.assign_groups(step, batch=24)
        chosen = groups.unique().tolist()
        assert torch.bincount(groups)[chosen].tolist() == [24 // levels] * levels
        for part in groups.split(12):
            assert torch.bincount(part)[chosen].tolist() == [12 // levels] * levels
        together.update(chosen)
    expected = 200 * levels / 4
    assert all(abs(together[i] - expected) < 4 * np.sqrt(expected) for i in range(4))
    assert pool.assign_groups(5, 24).tolist() == pool.assign_groups(5, 24).tolist()


def test_levels_at_128_pixels_are_the_papers() -> None:
    levels = (10, 250, 500, 750)
    assert scaled_levels(levels, 128, ABAR) == levels
    assert build_pool(CriticsConfig(scale_levels=False), SDXL, SDXL, 8, ABAR, 0).timesteps == levels


@pytest.mark.parametrize(("side", "sheet"), [(8, (2, 16, 40, 95)), (16, (5, 30, 80, 190))])
def test_levels_of_small_images_keep_noise_to_signal_per_image(side: int, sheet: tuple[int, ...]) -> None:
    found = scaled_levels((10, 250, 500, 750), side, ABAR)
    assert found == pytest.approx(sheet, abs=8)  # the sheet says "about"
    ratio = np.sqrt((1 - ABAR.double().numpy()) / ABAR.double().numpy())
    for level, timestep in zip((10, 250, 500, 750), found, strict=True):
        wanted = ratio[level] * side / 128
        assert abs(ratio[timestep] - wanted) <= min(abs(ratio[[max(timestep - 1, 0), timestep + 1]] - wanted))


def test_levels_that_fall_together_move_apart_and_stay_in_the_schedule() -> None:
    low = scaled_levels((0, 1, 2, 3), 8, ABAR)
    assert sorted(low) == [0, 1, 2, 3]
    high = scaled_levels((990, 995, 998, 999), 512, ABAR)
    assert len(set(high)) == 4
    assert max(high) == 999


@pytest.mark.parametrize("scale", [True, False])
def test_a_level_beyond_the_schedule_is_refused(scale: bool) -> None:
    with pytest.raises(
        ValueError, match="noise_levels has 1000, beyond the schedule's 1000 timesteps: lower it"
    ):
        pool_of(noise_levels=(10, 1000), scale_levels=scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels_per_step": 5}, "levels_per_step=5 exceeds the 4 noise_levels"),
        ({"width": 6, "groups": 4}, "width=6 is not a multiple of groups=4"),
        ({"kinds": ()}, "at least one kind"),
        ({"kinds": ("local_conditional", "local_conditional")}, "none twice"),
        ({"noise_levels": (10, 10)}, "must be different"),
        ({"noise_levels": (-1,)}, "0 or more"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CriticsConfig(**options)


def test_updates_per_life_are_the_sheets() -> None:
    assert CriticsConfig().updates_per_life() == pytest.approx(6.25)
    assert CriticsConfig(levels_per_step=4).updates_per_life() == pytest.approx(25)
    assert CriticsConfig(refresh_rate=0).updates_per_life() == float("inf")
