"""The guidance benchmark compares equals: both ways hear three branches that differ, and agree."""

import pytest
import torch

from counterpoint.guiders.perturbed_attention import BatchedPerturbedAttentionGuidance
from jobs import bench_guidance
from jobs.bench_guidance import GuidanceBenchConfig


@pytest.mark.parametrize("shape", ["unet", "dit"])
@torch.no_grad()
def test_all_branches_differ(shape: str) -> None:
    network = bench_guidance.build_network(getattr(GuidanceBenchConfig(), shape), 1, 8, 10, 0)
    network = bench_guidance.spread(network)
    asked = bench_guidance.question(4)
    conditional, null_too, perturbed_too = (
        bench_guidance.separately(network, *asked, BatchedPerturbedAttentionGuidance(scale, s))
        for scale, s in ((1.0, 0.0), (0.0, 0.0), (1.0, 1.0))
    )
    assert (null_too - conditional).abs().max() > 1e-3
    assert (perturbed_too - conditional).abs().max() > 1e-3


def test_a_ratio_is_told_for_each_network_and_batch_and_a_difference_is_an_error(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    config = GuidanceBenchConfig(batches=(1, 3), rounds=2)
    told = bench_guidance.main(config)
    for name in ("unet_1", "unet_3", "dit_1", "dit_3"):
        network, batch = name.split("_")
        assert told[f"{network}_ratio_at_{batch}"] > 0
        assert len(told[f"{network}_spread_at_{batch}"]) == 2
    assert 0 <= told["largest_difference"] < 1e-4
    monkeypatch.setattr(bench_guidance, "separately", lambda network, x, *rest: x)
    with pytest.raises(RuntimeError, match="the two ways differ by"):
        bench_guidance.main(config)
