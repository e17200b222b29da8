"""The benchmarks compare equals: the rivals compute the same, and both tell what they should."""

import inspect

import pytest
import torch
from tiny_jobs import CRITICS, UNET

from counterpoint.critics.heads import HeadShape, head_logits
from counterpoint.seeds import generator
from jobs import bench_heads, bench_panel
from jobs.bench_heads import HeadsBenchConfig
from jobs.bench_panel import PanelBenchConfig


@pytest.mark.parametrize(("side", "width"), [(1, 8), (2, 4), (4, 16), (8, 4)])
def test_rival_modules_are_the_same_heads(side, width):
    shape = HeadShape(6, side, width=width, groups=2)
    rows = torch.stack([shape.initial(generator(0, "head", k)) + 0.1 for k in range(6)])
    features = torch.randn(5, 3, 6, side, side, generator=generator(1, "features"))
    logits = head_logits(shape, rows, features)
    for k, row in enumerate(rows):
        alone = bench_heads.as_module(shape, row)(features[:, k // 2]).flatten()
        torch.testing.assert_close(alone, logits[:, k], atol=1e-5, rtol=1e-5)


def test_batched_and_looped_steps_move_the_heads_alike():
    config = HeadsBenchConfig(heads=(4,), heads_per_slot=2, batch=3, channels=5, side=2)
    batched, looped = bench_heads.contenders(config, 4)
    bank = inspect.getclosurevars(batched).nonlocals["bank"]
    modules = inspect.getclosurevars(looped).nonlocals["modules"]
    before = bank.rows.clone()
    for _ in range(3):
        batched()
        looped()
    assert (bank.rows - before).abs().max() > 1e-4
    for row, head in zip(bank.rows, modules, strict=True):
        flat = torch.cat([parameter.detach().flatten() for parameter in head.parameters()])
        # Real and fake pull the last bias alike while no margin is met: AdamW enlarges what rounding leaves.
        torch.testing.assert_close(flat[:-1], row[:-1], atol=1e-5, rtol=1e-4)


def test_heads_benchmark_tells_a_ratio_for_each_number_of_heads():
    config = HeadsBenchConfig(heads=(4, 8), batch=2, channels=8, side=2, rounds=2)
    told = bench_heads.main(config)
    assert {"ratio_at_4", "ratio_at_8", "spread_at_4", "batch", "threads"} <= set(told)
    assert told["ratio_at_4"] > 0
    with pytest.raises(ValueError, match="heads=6 is not a multiple of heads_per_slot=4"):
        bench_heads.main(HeadsBenchConfig(heads=(6,)))


@pytest.mark.slow  # a whole benchmark; test_panel_actors has the same panel
def test_panel_benchmark_trains_the_same_student_on_both_sides(ray_cluster):
    config = PanelBenchConfig.model_validate(
        {
            "unet": UNET,
            "critics": CRITICS | {"actors": 2},
            "batch_size": 8,
            "steps": 2,
            "rounds": 2,
            "threads": 1,
        }
    )
    told = bench_panel.main(config)
    assert told["largest_weight_difference"] < 1e-5
    assert told["ratio"] > 0
    assert told["compute_s"] > 0
    assert told["wire_s"] > 0
    assert told["wait_s"] >= 0
    assert told["compute_s"] + told["wire_s"] + told["wait_s"] < 10 * told["step_s"]
