"""The scale benchmark: operations counted, machines recovered from what they measure, labels, a whole run."""

import json
import math

import pytest
import torch
from tiny_jobs import UNET
from torch import nn
from torch.nn import functional as F

from counterpoint.critics.config import CriticsConfig
from jobs import bench_scale
from jobs.bench_scale import ArmConfig, MeasureConfig, ScaleBenchConfig
from jobs.scale_cluster import ABLATIONS, BANDS, Options, World, ablate, best_split, critic_gpus, sweep
from jobs.scale_figures import ClusterFigures, Workload, step_costs
from jobs.scale_flops import StepFlops, count, step_flops
from jobs.scale_machine import Machine, bisect, calibrate, compare, line, predict
from jobs.scale_measure import Arm
from jobs.scale_step import Cost, Costs

TINY_UNET = {
    "sample_size": 16, "block_out_channels": (32, 32, 32), "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2), "cross_attention_dim": 32, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80, "norm_num_groups": 8,
}  # fmt: skip
FLOPS = StepFlops(6 * 10**12, 12 * 10**12, 9 * 10**12, 5 * 10**12, 2_500_000_000, 27_000_000, 480, 65536)
WORLD = World(FLOPS, ClusterFigures(), Workload(), steps=3)


def test_operations_are_those_of_the_formulas():
    x = torch.empty(3, 5, 8, 8, device="meta", requires_grad=True)
    conv = nn.Conv2d(5, 7, 3, padding=1, device="meta")
    forward, out = count(lambda: conv(x))
    assert forward == 2 * 3 * 8 * 8 * 7 * 5 * 9
    assert count(lambda: out.sum().backward())[0] == 2 * forward
    linear = nn.Linear(11, 13, device="meta")
    assert count(lambda: linear(torch.empty(4, 11, device="meta")))[0] == 2 * 4 * 11 * 13
    grouped = torch.empty(6, 2, 1, 1, device="meta")
    assert (
        count(lambda: F.conv2d(torch.empty(1, 6, 4, 4, device="meta"), grouped, groups=3))[0]
        == 2 * 16 * 6 * 2
    )


def test_a_step_costs_what_its_passes_do():
    critics = CriticsConfig(levels_per_step=4, width=4, groups=2)
    flops = step_flops(TINY_UNET, critics)
    assert flops.heads == 480
    assert flops.sample == 4 * 16 * 16
    assert 1.8 < flops.backward / flops.forward < 2.1
    # Three views of the fake and of the real sample, 1 + 2 / 4 of a whole one each; half the network at most.
    assert flops.learn < 3 * flops.forward
    assert flops.judge < flops.learn
    more = step_flops(TINY_UNET, critics.model_copy(update={"width": 8}))
    assert (more.forward, more.backward) == (flops.forward, flops.backward)
    assert more.learn > flops.learn


def test_costs_follow_from_the_stated_figures():
    figures = ClusterFigures()
    costs = step_costs(FLOPS, figures, Workload(teacher_steps=4), 2, False)
    rate = 989.4e12 * 0.4
    assert costs.forward(10) == pytest.approx(8e-3 + 10 * 6e12 / rate)
    assert costs.sampling(1) == pytest.approx(4 * (8e-3 + 6e12 / rate))
    assert costs.optimizer == pytest.approx(2.5e9 * 28 / 3.35e12 + 8e-3)
    assert costs.sample_bytes == 2 * 65536 * 2 + 8
    assert step_costs(FLOPS, figures, Workload(), 4, True).copy_rate == 50e9


TRUTH = Machine(
    Costs(
        Cost(), Cost(0.005, 0.001), Cost(0.01, 0.0015), 0.01, Cost(0.02, 0.001), Cost(), Cost(0.0, 1e-5),
        0.0, math.inf, 0.0, 0.0,
    ),
    0.002, 0.004, 1.6, 1.2,
)  # fmt: skip
COMPONENTS = {
    "judge_s": {8: 0.028, 32: 0.052}, "forward_s": {16: 0.021, 64: 0.069},
    "backward_s": {16: 0.034, 64: 0.106},
    "message_s": 0.004, "averaging_s": 0.004,
}  # fmt: skip


def as_measured(arm):
    made = predict(TRUTH, arm, BANDS)
    parts = {"forward": made.parts["forward"], "wire": made.parts["wire"]}
    parts["backward"] = made.parts["backward"] + made.parts["optimizer"]
    return {"step_s": made.step, "spread_s": [made.step, made.step], "parts_s": parts}


def test_calibration_recovers_a_machine_and_predicts_what_it_was_not_shown():
    shown = [Arm(1, 1, 64), Arm(4, 1, 64)]
    unseen = [Arm(2, 1, 64), Arm(2, 1, 32), Arm(4, 2, 64)]
    measured = {arm: as_measured(arm) for arm in (*shown, *unseen)}
    machine = calibrate(COMPONENTS, {arm: measured[arm] for arm in shown}, 2, BANDS)
    assert machine.cores == pytest.approx(1.6, rel=1e-3)
    assert machine.threads == pytest.approx(1.2, rel=1e-3)
    rows = compare(machine, measured, shown, BANDS)
    assert [row["calibrated_on"] for row in rows] == [True, True, False, False, False]
    assert all(abs(row["error"]) < 1e-2 for row in rows)
    assert rows[0]["labels"] == {"predicted_s": "SIMULATED", "measured_s": "MEASURED"}
    # A measurement that the simulation cannot explain shows as an error.
    measured[unseen[0]]["step_s"] *= 2
    wrong = compare(machine, measured, shown, BANDS)[2:]
    assert max(abs(row["error"]) for row in wrong) == pytest.approx(0.5, abs=0.01)


def test_calibration_wants_two_arrangements_that_differ_in_actors_alone():
    arms = {arm: as_measured(arm) for arm in (Arm(1, 1, 64), Arm(4, 1, 32))}
    with pytest.raises(ValueError, match="must be two arrangements with one trainer"):
        calibrate(COMPONENTS, arms, 2, BANDS)


def test_small_parts():
    assert line({8: 0.5, 16: 0.9}) == Cost(pytest.approx(0.1), pytest.approx(0.05))
    assert bisect(lambda x: 2.0 - x, 0.0, 4.0) == pytest.approx(2.0)
    assert (bisect(lambda x: 9.0 - x, 0.0, 4.0), bisect(lambda x: -x, 1.0, 4.0)) == (4.0, 1.0)
    assert [critic_gpus(16, share, True) for share in (0, 8, 4, 2)] == [0, 2, 4, 8]
    assert critic_gpus(1024, 2, False) == 4


def test_sweep_is_deterministic_labelled_and_starts_at_efficiency_one():
    rows = sweep((1, 2, 8), WORLD)
    assert rows == sweep((1, 2, 8), WORLD)
    assert rows[0]["efficiency"] == pytest.approx(1.0)
    assert {row["label"] for row in rows} == {"SIMULATED"}
    for row in rows:
        assert row["trainers"] + row["critic_gpus"] == row["gpus"]
        gains = row["gain_if_twice_as_fast"]
        assert gains[row["bottleneck"]] == max(gains.values())
        assert row["images_per_second"] == pytest.approx(16 * row["gpus"] / row["step_s"])


def test_replicas_pay_where_one_host_a_band_is_too_few():
    rows = {row["setting"]: row for row in ablate((32,), WORLD)}
    assert set(rows) == set(ABLATIONS)
    assert rows["no replicas"]["gain"] < -0.3
    assert rows["own GPUs, staleness 1"]["against"] == "critics on own GPUs"
    assert rows["bfloat16 on the wire"]["gain"] > -0.02
    case, _ = best_split(32, Options(beside=False), WORLD)
    assert case.critics > 0


def test_a_panel_that_does_not_judge_as_simulated_is_refused():
    with pytest.raises(ValueError, match="levels_per_step=1 of 4"):
        MeasureConfig(critics=CriticsConfig())


@pytest.mark.slow  # nine processes, for figures whose arithmetic the tests above check
def test_the_whole_benchmark_measures_predicts_and_simulates(ray_cluster, tmp_path):
    critics = {"levels_per_step": 4, "heads_per_slot": 1, "width": 4, "groups": 2, "reduction": "mean"}
    config = ScaleBenchConfig(
        measure=MeasureConfig(
            unet=UNET, critics=critics,
            calibrate=(ArmConfig(actors=1, batch=16), ArmConfig(actors=2, batch=16)),
            predict=(ArmConfig(actors=2, trainers=2, batch=16),), rounds=1, steps=2, repeats=1,
        ),
        gpus=(1, 4), ablate=(4,), unet=TINY_UNET, critics=critics, simulated_steps=3,
        out=str(tmp_path / "results.json"), page=str(tmp_path / "page.html"),
    )  # fmt: skip
    told = bench_scale.main(config)
    assert list(told["prediction_error"]) == ["2 critic actors, 2 trainers, batch 16"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {one["label"] for one in stored["measured"]["arrangements"].values()} == {"MEASURED"}
    assert {row["label"] for row in stored["clusters"][0]["rows"] + stored["ablation"]} == {"SIMULATED"}
    for one in stored["measured"]["arrangements"].values():
        assert sum(
            one["parts_s"][part] for part in ("forward", "wire", "waiting", "backward")
        ) == pytest.approx(one["step_s"], rel=0.3)
    page = (tmp_path / "page.html").read_text()
    assert "SIMULATED" in page
    assert "MEASURED" in page
    assert "assumed" in page
