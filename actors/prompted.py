"""How any process builds a text-to-image network and the critics' view of it, prompts included."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel

from cluster.storage import RunStore
from counterpoint.critics.prompted_encoder import PatchIds, PromptedEncoder, shape_of
from counterpoint.prompted import PromptedUNet
from counterpoint.prompts import PromptTable

PROMPTS = "prompts"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PromptsRecipe:
    """What a text-to-image network is prompted with, and how critics look at it; small enough to send."""

    table: str
    """URI of a run of jobs.encode."""
    patch_ids: PatchIds = "image"
    """Time ids that the critics' windows are given."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen encoder's weights and arithmetic."""


def open_table(uri: str) -> PromptTable:
    """Open the encoded prompts of a run of jobs.encode; raises ValueError if it has not finished."""
    return PromptTable(f"{uri.rstrip('/')}/{PROMPTS}")


def is_hub_id(uri: str) -> bool:
    """Say whether `uri` names a model of the Hugging Face hub, as `from_pretrained` takes it."""
    return bool(_HUB_ID.fullmatch(uri)) and not Path(uri).exists()


@contextmanager
def model_part(uri: str, part: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what `from_pretrained` takes for a `part` ("unet") of the pipeline at `uri`, or for all of it.

    `uri` is a run with a pipeline, the folder of one on any storage, or a hub id. Raises ValueError if it is
    none of these.
    """
    if is_hub_id(uri):
        yield uri, {"subfolder": part} if part else {}
        return
    store, folder = RunStore(uri), "pipeline"
    if not store.exists(f"{folder}/model_index.json"):
        if not store.exists("model_index.json"):
            raise ValueError(
                f"{uri} holds no pipeline of diffusers (no model_index.json): give a folder that "
                "save_pretrained wrote, a run that saved one, or a hub id"
            )
        path = PurePosixPath(uri)
        store, folder = RunStore(uri.rstrip("/").rpartition("/")[0]), path.name
    if part and not store.exists(f"{folder}/{part}/config.json"):
        raise ValueError(f"{uri} has no {part}: give the pipeline of a text-to-image model of SDXL's family")
    with store.local_folder(f"{folder}/{part}" if part else folder) as local:
        yield str(local), {}


def load_prompted_unet(uri: str, prompts: PromptsRecipe) -> PromptedUNet:
    """Load the UNet of the pipeline at `uri`, prompted from the table of encoded prompts."""
    with model_part(uri, "unet") as (where, options):
        unet = PromptedUNet.from_pretrained(where, low_cpu_mem_usage=False, **options)
    return unet.attach(open_table(prompts.table))


def prompted_encoder(unet: PromptedUNet, prompts: PromptsRecipe) -> PromptedEncoder:
    """Return the critics' frozen view of `unet`, whose modules it takes."""
    encoder = PromptedEncoder(unet, unet.table, prompts.patch_ids)
    return encoder.to(_TYPES[prompts.encoder_dtype])


def prompted_config(uri: str) -> dict[str, Any]:
    """Return the configuration of the UNet of the pipeline at `uri`."""
    with model_part(uri, "unet") as (where, options):
        return dict(UNet2DConditionModel.load_config(where, **options))


def prompted_shape(uri: str) -> PromptedEncoder:
    """Return that view without weights, for the shapes of its maps; only the configuration is read."""
    return shape_of(prompted_config(uri))
