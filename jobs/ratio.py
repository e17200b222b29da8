"""How large guidance is beside the velocity, step by step: `python -m jobs.ratio run=runs/digits/flow`."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from cluster.storage import RunStore
from counterpoint.guidance import GuiderConfig, build_guider
from counterpoint.guiders.ratio_aware import RatioAwareGuidance
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.sampling import sample
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.unet import null_class
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.runs import load_pipeline
from jobs.table import text_table

Row = dict[str, Any]
COLUMNS = ("ratio", "ratio_deviation", "scale", "scale_deviation")


class RatioConfig(Section):
    """Sample a flow under ratio-aware guidance and draw the ratio and the scale of every step."""

    run: RunUri = "runs/digits/flow"
    """URI of a finished run of jobs.train with noise.process=flow."""
    steps: int = Field(default=10, ge=1)
    """Steps of the sampler."""
    samples: int = Field(default=200, ge=2)
    """Images, spread evenly over the classes."""
    seed: int = 0
    """Seed; image i depends on it and on i alone."""
    guider: GuiderConfig = GuiderConfig(guider="RatioAwareGuidance", options={})
    """RatioAwareGuidance and its options, which decide the path that the ratios are met on."""
    out: str = "ratio.png"
    """Where to draw them."""


def main(config: RatioConfig) -> dict[str, Any]:
    """Measure, draw, print the table, and return the largest mean ratio and the sigma where it is."""
    if Path(config.out).suffix != ".png":
        raise ValueError(f"out={config.out} must end in .png")
    table = profile(load_pipeline(RunStore(config.run)), config)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    figure(table).savefig(config.out, dpi=150)
    named = [{"name": f"sigma {row['sigma']}"} | row for row in table]
    sys.stderr.write(text_table(named, COLUMNS) + "\n")
    peak = max(table, key=lambda row: float(row["ratio"]))
    return {"run": config.run, "out": config.out, "peak_ratio": peak["ratio"], "peak_sigma": peak["sigma"]}


def profile(pipeline: ClassConditionalPipeline, config: RatioConfig) -> list[Row]:
    """Return for each step its sigma and the mean and standard deviation of ratio and scale over samples.

    Raises ValueError for another guider, or one that is off in some steps.
    """
    guider, network = build_guider(config.guider), pipeline.unet
    if not isinstance(guider, RatioAwareGuidance):
        raise ValueError(f"guider.guider={config.guider.guider} measures no ratio: use RatioAwareGuidance")
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    streams = (generator(config.seed, "ratio", i) for i in range(config.samples))
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
    labels = torch.arange(config.samples) % null_class(network)
    table: list[Row] = []

    def watched(timesteps: Iterable[Tensor]) -> Iterator[Tensor]:
        for t in timesteps:
            guider.ratios = None
            yield t
            if guider.ratios is None:
                raise ValueError(
                    f"guider.options={config.guider.options} leave steps without guidance, where there is no "
                    "ratio: leave out start and stop, and set max_guidance_scale above 1"
                )
            ratio, scale = guider.ratios
            table.append(
                {
                    "sigma": round(float(t) / pipeline.scheduler.config.num_train_timesteps, 4),
                    "ratio": float(ratio.mean()), "ratio_deviation": float(ratio.std()),
                    "scale": float(scale.mean()), "scale_deviation": float(scale.std()),
                }
            )  # fmt: skip

    sample(network, pipeline.scheduler, noise, labels, config.steps, progress=watched, guider=guider)
    return table


def figure(table: list[Row]) -> Figure:
    """Draw ratio and scale over sigma, pure noise on the left, with one standard deviation around them."""
    drawn = Figure(figsize=(7.0, 3.2), layout="constrained")
    sigma = [row["sigma"] for row in table]
    for ax, name, title in zip(
        drawn.subplots(1, 2),
        ("ratio", "scale"),
        ("ratio |v_c - v_u| / |v_u|", "guidance scale w"),
        strict=True,
    ):
        mean, spread = ([row[name + suffix] for row in table] for suffix in ("", "_deviation"))
        low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread, strict=True)), strict=True)
        ax.fill_between(sigma, low, high, alpha=0.25, linewidth=0)
        ax.plot(sigma, mean, marker="o", markersize=3)
        ax.set(xlabel="sigma (1 is pure noise)", title=title, xlim=(1.02, 0.0))
        ax.grid(alpha=0.3)
    return drawn


if __name__ == "__main__":
    run_job(main, RatioConfig)
