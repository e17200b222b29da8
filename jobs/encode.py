"""Encode prompts, and images, once: `python -m jobs.encode configs/sdxl/tiny_encode.yaml`.

A Ray Data job runs the text encoders and the VAE of a pipeline over a file of prompts and writes Parquet
shards, from which distillation reads what it needs; training holds no encoder. Row i is the i-th prompt of
the file, the last row the null prompt.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from actors.encoding import EncodingRecipe, ShardEncoder, ShardWork, check_model, record_name, shard_name
from actors.prompted import PROMPTS, is_hub_id
from actors.recipe import PIPELINE
from cluster.connect import connected, thread_env
from cluster.identity import current
from cluster.placement import Pool, plan
from cluster.progress import ProgressLine
from cluster.reserve import reserve
from cluster.sealing import save_sealed
from cluster.storage import RunStore
from cluster.waiting import unwrapped
from counterpoint.data.prompts import PromptsConfig, PromptSource, read_prompts
from counterpoint.encoding import LatentDraw, full_time_ids
from counterpoint.prompts import TABLE, TableLayout, read_layout
from counterpoint.section import Section
from counterpoint.tiny_sdxl import TinySDXLConfig, build_tiny_sdxl
from jobs.config import run_job
from jobs.run_names import RunUri, absolute
from jobs.runs import RESULTS, open_run, read_results, write_results

logger = logging.getLogger(__name__)

PLACEMENT_TIMEOUT = 25.0


def model_uri(uri: str) -> str:
    """Return a pipeline's URI that means the same in every process; a hub id stays as it is."""
    return uri if is_hub_id(uri) else absolute(uri)


ModelUri = Annotated[str, AfterValidator(model_uri)]
"""A pipeline of diffusers: a run or folder on any storage, or a hub id as `from_pretrained` takes it."""


class ModelConfig(Section):
    """The pipeline whose encoders encode."""

    pretrained: ModelUri | None = None
    """Folder or run with a pipeline of SDXL's family, on any storage, or a hub id."""
    build: TinySDXLConfig | None = None
    """Builds a small, randomly initialised SDXL and keeps it in the run, as a teacher."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.pretrained is not None and self.build is not None:
            raise ValueError("pretrained and build are both given: set one of them")
        return self


class WorkersSection(Section):
    """Ray Data's pool of encoding actors."""

    count: int = Field(default=1, ge=0)
    """Actors, each with a copy of the encoders; 0 encodes in the driver's own process, without Ray."""
    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    """Logical CPUs reserved for each."""
    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each."""
    threads: int = Field(default=1, ge=1)
    """Threads of each one's maths."""


class EncodeConfig(Section):
    """Encode prompts, and images beside them, into Parquet shards of embeddings and latents."""

    run: RunUri = "runs/sdxl/prompts"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    resume: bool = False
    """Go on with the run that is there, keeping its shards; without it a used `run` is refused."""
    seed: int = 0
    """Seed of a built model and of latents that are drawn."""
    model: ModelConfig = ModelConfig()
    """Whose encoders."""
    prompts: PromptsConfig = PromptsConfig()
    """What is encoded."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type of embeddings and latents on disk."""
    latents: LatentDraw = "mode"
    """Latents of images: the VAE's mode, or a sample drawn with the row's own seed."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts encoded at once."""
    shard_rows: int = Field(default=512, ge=1)
    """Prompts of a shard; a shard is what is redone after a failure."""
    group_rows: int = Field(default=8, ge=1)
    """Rows of a Parquet row group, which is what training reads at once."""
    workers: WorkersSection = WorkersSection()
    """Encoding actors."""

    @model_validator(mode="after")
    def _check(self) -> "EncodeConfig":
        if self.model.pretrained is None and self.model.build is None:
            raise ValueError("model: set model.pretrained to a pipeline, or model.build to make a small one")
        return self


def main(config: EncodeConfig) -> dict[str, Any]:
    """Encode what is missing, describe the table, and return the headline figures."""
    source = read_prompts(config.prompts)
    images = config.prompts.image_column is not None
    known = None if config.model.pretrained is None else check_model(config.model.pretrained, images)
    store = open_run(config.run, config, config.resume, in_process=config.workers.count == 0)
    if store.exists(f"{PROMPTS}/{TABLE}"):
        layout = read_layout(store.read_text(f"{PROMPTS}/{TABLE}"), config.run)
        result = headline(config, layout, shards=0, seconds=0.0)
        conclude(store, result if not store.exists(RESULTS) else read_results(store)["headline"])
        return result
    begun = time.monotonic()
    model = config.model.pretrained or _build(config, store)
    known = known or check_model(model, images)
    recipe = EncodingRecipe(
        config.run, model, config.prompts, config.dtype, config.batch_size, config.group_rows,
        known["image_side"], config.latents, config.seed, config.workers.gpus_per_worker > 0,
    )  # fmt: skip
    works = list(shards(config, source))
    missing = [work for work in works if not store.exists(record_name(work.number))]
    run_encoders(config, recipe, missing)
    layout = describe(config, store, works, known)
    store.write_text(f"{PROMPTS}/{TABLE}", layout.to_json())
    result = headline(config, layout, len(missing), round(time.monotonic() - begun, 1))
    conclude(store, result)
    if layout.truncated:
        logger.warning(
            "%d of %d prompts are longer than the tokenizers take and were cut",
            layout.truncated,
            layout.prompts,
        )
    return result


def conclude(store: RunStore, figures: dict[str, Any]) -> None:
    """Store the figures, which makes the run a finished one."""
    write_results(store, {"headline": figures, "rows": [], "seconds": {"encode": figures["seconds"]}})


def shards(config: EncodeConfig, source: PromptSource) -> Iterator[ShardWork]:
    """Yield the shards, in the order of the prompts."""
    total = len(source.texts)
    for number, first in enumerate(range(0, total, config.shard_rows)):
        stop = min(first + config.shard_rows, total)
        yield ShardWork(number, first, source.texts[first:stop], source.rows[first:stop], stop == total)


def run_encoders(config: EncodeConfig, recipe: EncodingRecipe, missing: list[ShardWork]) -> None:
    """Encode the missing shards, in Ray Data's actors or here; each is on storage when it is counted."""
    if not missing:
        return
    total = sum(len(work.texts) for work in missing)
    with ProgressLine(total, "encode", unit="prompts") as line:
        done = 0
        records = _on_ray(config, recipe, missing) if config.workers.count else _here(recipe, missing)
        for record in records:
            done += record["prompts"]
            line.update(done, units=record["prompts"], shard=record["number"])


def _here(recipe: EncodingRecipe, missing: list[ShardWork]) -> Iterator[dict[str, Any]]:
    encoder = ShardEncoder(recipe)
    yield from (encoder.encode(work) for work in missing)


def _on_ray(
    config: EncodeConfig, recipe: EncodingRecipe, missing: list[ShardWork]
) -> Iterator[dict[str, Any]]:
    """Yield records of shards as Ray Data's pool finishes them.

    Only texts and records pass through Ray: workers read images from their file and write shards to storage.
    Raises ValueError for what is wrong with the input, and PlacementError if the pool has no room.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    workers = config.workers
    pool = Pool(
        "encoders", workers.count, workers.cpus_per_worker, workers.gpus_per_worker, setting="workers.count"
    )
    with connected():
        with reserve(plan([pool]), timeout=PLACEMENT_TIMEOUT):
            pass
        context = ray.data.DataContext.get_current()
        before = context.enable_progress_bars, context.raise_original_map_exception
        context.enable_progress_bars, context.raise_original_map_exception = False, True
        rows = [vars(work) for work in missing]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardEncoder,
            fn_constructor_kwargs={"recipe": recipe},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers.count, len(rows))),
            num_cpus=workers.cpus_per_worker,
            num_gpus=workers.gpus_per_worker or None,
            runtime_env={"env_vars": thread_env(workers.threads)},
        )
        dataset.set_name(current().id)
        try:
            for row in dataset.iter_rows():
                yield json.loads(row["record"])
        except Exception as error:
            cause = unwrapped(error)
            raise (cause if isinstance(cause, ValueError) else error) from error
        finally:
            context.enable_progress_bars, context.raise_original_map_exception = before


def describe(
    config: EncodeConfig, store: RunStore, works: list[ShardWork], known: dict[str, Any]
) -> TableLayout:
    """Return the layout of the finished shards; raises ValueError if the UNet takes others."""
    records = [json.loads(store.read_text(record_name(work.number))) for work in works]
    shapes = records[0]["shapes"]
    latent = tuple(shapes["latent"]) if "latent" in shapes else None
    if latent is not None and latent[-1] != known["latent_side"]:
        raise ValueError(
            f"the VAE makes latents of side {latent[-1]} where the UNet takes {known['latent_side']}: "
            "give a pipeline whose parts belong together"
        )
    return TableLayout(
        prompts=sum(record["prompts"] for record in records),
        embeds=tuple(shapes["embeds"]),
        pooled=shapes["pooled"][0] if "pooled" in shapes else None,
        latent=latent,
        dtype=config.dtype,
        time_ids=full_time_ids(known["image_side"]) if known["added"] else None,
        shard_rows=config.shard_rows,
        shards=tuple((shard_name(record["number"]), record["sha256"]) for record in records),
        group_rows=config.group_rows,
        truncated=sum(record["truncated"] for record in records),
    )


def headline(config: EncodeConfig, layout: TableLayout, shards: int, seconds: float) -> dict[str, Any]:
    """Return the figures of the result line."""
    return {
        "run": config.run, "prompts": layout.prompts, "images": layout.latent is not None,
        "truncated": layout.truncated, "shards": len(layout.shards), "encoded_now": shards,
        "fingerprint": layout.fingerprint()[:16], "seconds": seconds,
    }  # fmt: skip


def _build(config: EncodeConfig, store: RunStore) -> str:
    """Build the small model into the run, unless it is there, and return where it is."""
    assert config.model.build is not None
    if not store.exists(f"{PIPELINE}/manifest.json"):
        with tempfile.TemporaryDirectory() as folder:
            build_tiny_sdxl(config.model.build, config.seed).save_pretrained(folder)
            save_sealed(store, PIPELINE, Path(folder))
    return config.run


if __name__ == "__main__":
    run_job(main, EncodeConfig)
