"""One step of guidance by three branches: one forward pass of all of them against one pass a branch.

python -m jobs.bench guidance out=configs/bench/guidance.results.json
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cluster.environment import describe_environment
from cluster.storage import RunStore
from counterpoint.dit import DiTConfig, build_network
from counterpoint.guidance import guided, perturbed
from counterpoint.guiders.perturbed_attention import BatchedPerturbedAttentionGuidance
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.unet import UNetConfig
from jobs.bench_heads import seconds

CHANNELS, SIDE, CLASSES = 1, 8, 10
TOLERANCE = 1e-4
"""Largest difference of the two ways' outputs, of the order of 1, that rounding may make."""


class GuidanceBenchConfig(Section):
    """Three branches: with the condition, without it, with perturbed attention; both ways hear all three."""

    batches: tuple[int, ...] = Field(default=(1, 4, 16, 64), min_length=1)
    """Numbers of images."""
    unet: UNetConfig = UNetConfig(block_out_channels=(32, 64), mid_attention=True)
    """A UNet for digits of 8x8 pixels."""
    dit: DiTConfig = DiTConfig()
    """A transformer for the same."""
    rounds: int = Field(default=9, ge=1)
    """Rounds, in each of which both take turns; the ratio is the median over rounds."""
    threads: int = Field(default=1, ge=0)
    """Threads of the maths for both; 0 keeps torch's default."""
    out: str | None = None
    """File for the results (JSON); none is written unless set."""


@torch.inference_mode()
def main(config: GuidanceBenchConfig) -> dict[str, Any]:
    """Return `<network>_ratio_at_<n>`, the seconds of separate passes over those of one, for n images.

    They are medians over rounds; `<network>_spread_at_<n>` is the least and largest ratio of a round, and
    `<network>_ms_at_<n>` the milliseconds of the one pass. `largest_difference` is that of all outputs.
    Raises RuntimeError if both ways do not compute the same.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": config.rounds}
    guider = BatchedPerturbedAttentionGuidance(guidance_scale=3.0, perturbed_guidance_scale=1.0)
    differences = []
    for name, shape in (("unet", config.unet), ("dit", config.dit)):
        network = spread(build_network(shape, CHANNELS, SIDE, CLASSES, 0))
        for batch in config.batches:
            asked = question(batch)
            one, many = guided(network, *asked, guider), separately(network, *asked, guider)
            differences.append(float((one - many).abs().max()))
            times = [
                (
                    seconds(lambda: guided(network, *asked, guider)),  # noqa: B023  called at once
                    seconds(lambda: separately(network, *asked, guider)),  # noqa: B023
                )
                for _ in range(config.rounds)
            ]
            ratios = [theirs / ours for ours, theirs in times]
            result[f"{name}_ms_at_{batch}"] = round(1e3 * statistics.median(ours for ours, _ in times), 3)
            result[f"{name}_ratio_at_{batch}"] = round(statistics.median(ratios), 2)
            result[f"{name}_spread_at_{batch}"] = [round(min(ratios), 2), round(max(ratios), 2)]
    result["largest_difference"] = max(differences)
    if max(differences) > TOLERANCE:
        raise RuntimeError(f"the two ways differ by {max(differences):g}, which is more than rounding")
    if config.out is not None:
        path = Path(config.out).absolute()
        told = {"environment": describe_environment()} | result
        RunStore(str(path.parent)).write_text(path.name, json.dumps(told, indent=1) + "\n")
    return result


def separately(
    network: nn.Module, x: Tensor, times: Tensor, labels: Tensor, guider: BatchedPerturbedAttentionGuidance
) -> Tensor:
    """Return what `guidance.guided` does, [B,C,H,W], by one forward pass a branch."""
    branches = guider.prepare_inputs({"class_labels": (labels, torch.full_like(labels, CLASSES))})
    for branch in branches:
        with perturbed(network, guider, [branch], len(x)):
            branch.noise_pred = network(x, times, class_labels=branch.class_labels).sample
    combined: Tensor = guider(branches).pred
    return combined


def spread(network: nn.Module) -> nn.Module:
    """Give a network weights under which branches differ; an untrained transformer answers zero to all."""
    for index, parameter in enumerate(network.parameters()):
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator(0, "bench-guidance", index))
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return network.eval()


def question(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return states [B,C,H,W], times [B] and labels [B]."""
    stream = generator(0, "bench-guidance", "question", batch)
    x = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=stream)
    times = torch.randint(1000, (batch,), generator=stream)
    return x, times, torch.randint(CLASSES, (batch,), generator=stream)
