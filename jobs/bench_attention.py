"""One forward pass of self-attention at several numbers of tokens: softmax's against linear.

python -m jobs.bench attention out=configs/bench/attention.results.json
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from pydantic import Field
from torch import Tensor

from cluster.environment import describe_environment
from cluster.storage import RunStore
from counterpoint.linear_attention import LinearAttention
from counterpoint.section import Section
from counterpoint.seeds import generator
from jobs.bench_heads import seconds


class AttentionBenchConfig(Section):
    """Two modules of one width, projections included: what a transformer's block would call."""

    tokens: tuple[int, ...] = Field(default=(64, 256, 1024, 4096), min_length=1)
    """Numbers of tokens; squares, as the convolution beside linear attention needs a grid."""
    width: int = Field(default=384, ge=1)
    """Channels of a token; DiT-S has 384."""
    heads: int = Field(default=6, ge=1)
    """Heads of softmax attention, which is torch's scaled_dot_product_attention."""
    linear_heads: int = Field(default=2, ge=1)
    """Heads of linear attention."""
    kernel_size: int = Field(default=5, ge=0)
    """Side of the depth-wise convolution beside linear attention; 0 for none."""
    batch: int = Field(default=2, ge=1)
    """Images of a forward pass."""
    rounds: int = Field(default=9, ge=1)
    """Rounds, in each of which both take turns; the ratio is the median over rounds."""
    threads: int = Field(default=1, ge=0)
    """Threads of the maths for both; 0 keeps torch's default."""
    out: str | None = None
    """File for the results (JSON); none is written unless set."""


@torch.inference_mode()
def main(config: AttentionBenchConfig) -> dict[str, Any]:
    """Return `softmax_ms_at_<N>`, `linear_ms_at_<N>` and `ratio_at_<N>`, softmax's time over linear's.

    They are medians over rounds; `spread_at_<N>` is the least and largest ratio of a round.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    softmax, linear = rivals(config)
    result: dict[str, Any] = {
        "width": config.width, "batch": config.batch, "threads": torch.get_num_threads(),
        "rounds": config.rounds,
    }  # fmt: skip
    for count in config.tokens:
        x = torch.randn(config.batch, count, config.width, generator=generator(0, "bench", count))
        times = rounds_of(softmax, linear, x, config.rounds)
        ratios = [theirs / ours for theirs, ours in times]
        for name, values in zip(("softmax", "linear"), zip(*times, strict=True), strict=True):
            result[f"{name}_ms_at_{count}"] = round(1e3 * statistics.median(values), 3)
        result[f"ratio_at_{count}"] = round(statistics.median(ratios), 2)
        result[f"spread_at_{count}"] = [round(min(ratios), 2), round(max(ratios), 2)]
    if config.out is not None:
        path = Path(config.out).absolute()
        told = {"environment": describe_environment()} | result
        RunStore(str(path.parent)).write_text(path.name, json.dumps(told, indent=1) + "\n")
    return result


def rivals(config: AttentionBenchConfig) -> tuple[Attention, LinearAttention]:
    """Return both modules, with equal projections."""
    linear = LinearAttention(config.width, config.linear_heads, config.kernel_size)
    softmax = Attention(
        config.width, heads=config.heads, dim_head=config.width // config.heads, bias=True,
        processor=AttnProcessor2_0(),
    )  # fmt: skip
    softmax.load_state_dict({n: w for n, w in linear.state_dict().items() if not n.startswith("local.")})
    return softmax.eval(), linear.eval()


def rounds_of(
    softmax: Callable[[Tensor], Tensor], linear: Callable[[Tensor], Tensor], x: Tensor, rounds: int
) -> list[tuple[float, float]]:
    """Return the seconds of both in each round, after one call of each that is not counted."""
    softmax(x)
    linear(x)
    return [(seconds(lambda: softmax(x)), seconds(lambda: linear(x))) for _ in range(rounds)]
