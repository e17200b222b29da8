"""A small SDXL, a table of encoded prompts and a panel over them, made in memory or in a folder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from counterpoint.prompted import PromptedUNet
from counterpoint.prompts import TABLE, PromptTable, TableLayout, write_shard
from counterpoint.seeds import generator
from counterpoint.tiny_sdxl import TinySDXLConfig, build_tiny_sdxl

SHAPE = TinySDXLConfig(block_out_channels=(8, 16, 16), text_widths=(8, 16), norm_num_groups=4, tokens=8)
EMBEDS, POOLED, LATENT = (8, 24), 16, (4, 8, 8)
TIME_IDS = (16, 16, 0, 0, 16, 16)


def pipeline(**options: Any) -> StableDiffusionXLPipeline:
    """A small SDXL with random weights."""
    return build_tiny_sdxl(SHAPE.model_copy(update=options), seed=0)


def columns(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random columns of a table of `rows` rows, the last of them zeros."""
    stream = generator(7, "columns")
    made = {
        "embeds": torch.randn(rows, *EMBEDS, generator=stream),
        "pooled": torch.randn(rows, POOLED, generator=stream),
        "latent": torch.randn(rows, *LATENT, generator=stream),
    }
    for tensor in made.values():
        tensor[-1] = 0.0
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def table(
    folder: Path,
    prompts: int = 11,
    shard_rows: int = 4,
    group_rows: int = 3,
    dtype: str = "float32",
    **options: Any,
) -> PromptTable:
    """A table of random rows."""
    folder.mkdir(parents=True, exist_ok=True)
    made = columns(prompts + 1, getattr(torch, dtype))
    texts = [f"prompt {row}" for row in range(prompts)] + [""]
    starts = range(0, prompts, shard_rows)
    shards = []
    for number, start in enumerate(starts):
        stop = prompts + 1 if start == starts[-1] else start + shard_rows
        name = f"part-{number:05d}.parquet"
        part = {key: tensor[start:stop] for key, tensor in made.items()}
        shards.append((name, write_shard(folder / name, texts[start:stop], part, group_rows)))
    layout = TableLayout(
        prompts, EMBEDS, POOLED, LATENT, dtype, TIME_IDS, shard_rows, tuple(shards), group_rows
    )
    (folder / TABLE).write_text(layout.to_json())
    return PromptTable(str(folder), **options)


def prompted(unet: Any, rows: PromptTable) -> PromptedUNet:
    """The network of a pipeline, prompted from a table."""
    network = PromptedUNet.from_config(dict(unet.config))
    network.load_state_dict(unet.state_dict())
    return network.eval().attach(rows)
