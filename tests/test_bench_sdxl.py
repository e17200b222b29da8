"""The SDXL step and its plain rival compute the same, on a tiny network of the same shape."""

import pytest
import torch

from counterpoint.critics.config import CriticsConfig
from jobs import bench_sdxl
from jobs.bench_sdxl import Bench, SdxlBenchConfig

UNET = {
    "sample_size": 16, "block_out_channels": (32, 32, 32), "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2), "cross_attention_dim": 32, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80, "norm_num_groups": 8,
}  # fmt: skip
CRITICS = CriticsConfig(levels_per_step=2, panel="all", heads_per_slot=1, width=4, groups=2, refresh_rate=0.0)
TINY = SdxlBenchConfig(
    unet=UNET, critics=CRITICS, batch=4, tokens=3, rounds=1, device="cpu", dtype="float32", fewest_heads=50
)


def test_both_sides_give_the_student_the_same_gradient():
    bench = Bench(TINY)
    _, ours = bench.step(0, bench.ours)
    bench = Bench(TINY)
    parts, plain = bench.step(0, bench.plainly)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-3)
    assert ours.abs().max() > 0
    assert set(parts) == {"forward", "critics", "backward", "optimizer"}


def test_benchmark_tells_the_ratio_and_the_parts():
    told = bench_sdxl.main(TINY)
    assert told["ratio"] > 0
    assert told["heads_judging"] == 60
    assert told["label"] == "MEASURED"
    assert told["first_gradients_apart"] < 1.0
    for side in ("ours", "plain"):
        assert sum(told[f"{side}_parts_s"].values()) == pytest.approx(told[f"{side}_step_s"], rel=0.5)
        assert told[f"{side}_peak_gib"] is None


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="60 heads judge in a step, fewer than fewest_heads=160: raise it"):
        bench_sdxl.main(TINY.model_copy(update={"fewest_heads": 160}))
    with pytest.raises(ValueError, match=r"batch=1 leaves some of critics\.levels_per_step=2"):
        SdxlBenchConfig(batch=1, critics=CRITICS)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda but torch sees no GPU"):
            bench_sdxl.main(TINY.model_copy(update={"device": "cuda"}))
