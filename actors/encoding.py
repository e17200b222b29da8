"""Encoding workers: each writes whole shards of the prompt table straight to storage."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.prompted import PROMPTS, model_part
from cluster.storage import RunStore
from counterpoint.data.prompts import PromptsConfig, read_images
from counterpoint.encoding import Encoders, LatentDraw, check_pipeline
from counterpoint.prompts import DTYPES, write_shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodingRecipe:
    """What an encoding worker is made of."""

    run: str
    """URI of the run to write to."""
    model: str
    """Pipeline whose encoders encode."""
    prompts: PromptsConfig
    dtype: str
    batch_size: int
    group_rows: int
    image_side: int
    draw: LatentDraw
    seed: int
    use_gpu: bool = False


@dataclass(frozen=True)
class ShardWork:
    """One shard to be encoded."""

    number: int
    first: int
    """Number of its first prompt."""
    texts: list[str]
    rows: list[int]
    """Where each prompt, and its image, stands in its file."""
    last: bool
    """Whether the null prompt comes after it."""


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"part-{number:05d}.parquet"


def record_name(number: int) -> str:
    """Return the name in the run of what is known of a finished shard."""
    return f"{PROMPTS}/part-{number:05d}.json"


class ShardEncoder:
    """Encodes shards with one copy of the encoders; Ray Data's `map_batches` calls it in its actors."""

    def __init__(self, recipe: EncodingRecipe) -> None:
        self.recipe, self.store = recipe, RunStore(recipe.run)
        device = torch.device("cuda" if recipe.use_gpu and torch.cuda.is_available() else "cpu")
        with model_part(recipe.model) as (where, _):
            self.encoders = Encoders(where, recipe.prompts.image_column is not None, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode one shard, given as one row, and return its record as one row."""
        fields = {name: values[0] for name, values in batch.items()}
        work = ShardWork(
            int(fields["number"]), int(fields["first"]), [str(t) for t in fields["texts"]],
            [int(r) for r in fields["rows"]], bool(fields["last"]),
        )  # fmt: skip
        return {"record": [json.dumps(self.encode(work))]}

    def encode(self, work: ShardWork) -> dict[str, Any]:
        """Write the shard and then its record, which is returned: a shard without one is not finished."""
        parts = list(self._batches(work))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        texts = [*work.texts, *([""] if work.last else [])]
        dtype = DTYPES[self.recipe.dtype]
        stored = {name: tensor.to("cpu", dtype) for name, tensor in columns.items()}
        for name, tensor in stored.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"dtype={self.recipe.dtype} cannot hold the {name} of prompts {work.first} to "
                    f"{work.first + len(work.texts) - 1}: set dtype=bfloat16 or float32"
                )
        with self.store.staged(f"{PROMPTS}/{shard_name(work.number)}") as path:
            digest = write_shard(Path(path), texts, stored, self.recipe.group_rows)
        record = {
            "number": work.number, "prompts": len(work.texts), "sha256": digest,
            "truncated": self.encoders.too_long(work.texts),
            "shapes": {name: list(tensor.shape[1:]) for name, tensor in stored.items()},
        }  # fmt: skip
        self.store.write_text(record_name(work.number), json.dumps(record))
        return record

    def _batches(self, work: ShardWork) -> Iterator[dict[str, torch.Tensor]]:
        recipe = self.recipe
        for start in range(0, len(work.texts), recipe.batch_size):
            part = slice(start, start + recipe.batch_size)
            columns = self.encoders.prompts(work.texts[part])
            if recipe.prompts.image_column is not None:
                images = read_images(recipe.prompts, work.rows[part])
                columns["latent"] = self.encoders.images(
                    images, recipe.image_side, recipe.draw, recipe.seed, work.first + start
                )
            yield columns
        if work.last:
            null = self.encoders.null()
            if recipe.prompts.image_column is not None:
                null["latent"] = torch.zeros_like(columns["latent"][:1])
            yield null


def check_model(model: str, images: bool) -> dict[str, Any]:
    """Return what is known of a pipeline before it is loaded: `kind`, `latent_side`, `image_side`, `added`.

    Raises ValueError if it lacks what encoding needs.
    """
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

    with model_part(model) as (where, _):
        index = DiffusionPipeline.load_config(where)
        check_pipeline(index, model, images)
        unet = UNet2DConditionModel.load_config(where, subfolder="unet")
        vae = AutoencoderKL.load_config(where, subfolder="vae")
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return {
        "kind": index["_class_name"],
        "latent_side": unet["sample_size"],
        "image_side": unet["sample_size"] * scale,
        "added": unet.get("addition_embed_type") is not None,
    }
