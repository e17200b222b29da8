"""diffusers' UNet2DConditionModel called with the rows of a prompt table where others take class labels."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from counterpoint.prompts import PromptTable


class PromptedUNet(UNet2DConditionModel):
    """A text-to-image UNet (SDXL's family, or without added conditioning) that looks up its own prompts.

    Called as `unet(x_t, timesteps, class_labels=rows).sample` it takes the embeddings of `rows` [B] from the
    table that `attach` gave it, so that everything that trains or samples a class-conditional network does
    the same with this one. Called with `encoder_hidden_states` it is diffusers' own. The table is neither a
    parameter nor a buffer, and parameters keep diffusers' names.
    """

    table: PromptTable | None = None
    time_ids: tuple[int, ...] | None = None

    def attach(self, table: PromptTable) -> "PromptedUNet":
        """Look prompts up in `table` from now on; raises ValueError if its embeddings do not fit."""
        check_conditioning(self.config, table)
        self.table, self.time_ids = table, table.layout.time_ids
        return self

    @property
    def null_row(self) -> int:
        """The label that stands for "no condition"."""
        return self._attached().null_row

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return diffusers' output for states [B,C,h,w] at `timestep` under the prompts of rows [B]."""
        if encoder_hidden_states is None and class_labels is not None:
            embeds, pooled = self._attached().take(class_labels, sample.device, sample.dtype)
            if pooled is not None and self.config.addition_embed_type == "text_time":
                ids = full_ids(self.time_ids, len(class_labels), sample)
                options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
            return super().forward(sample, timestep, embeds, **options)
        return super().forward(sample, timestep, encoder_hidden_states, class_labels, **options)

    def _attached(self) -> PromptTable:
        if self.table is None:
            raise ValueError("this network has no prompt table: call attach with one first")
        return self.table


def full_ids(time_ids: tuple[int, ...] | None, batch: int, like: Tensor) -> Tensor:
    """Return SDXL's time ids [batch, 6] of whole images, on the device and in the type of `like`."""
    if time_ids is None:
        raise ValueError("the network wants SDXL's time ids but the prompt table has none: encode again")
    return torch.tensor(time_ids, device=like.device, dtype=like.dtype).expand(batch, -1)


def check_conditioning(config: Mapping[str, Any], table: PromptTable) -> None:
    """Raise ValueError unless a UNet of `config` can be conditioned on the embeddings of `table`."""
    kind = config["addition_embed_type"]
    if kind not in (None, "text_time") or config["encoder_hid_dim_type"] is not None:
        raise ValueError(
            f"the UNet has addition_embed_type={kind}: distillation takes SDXL's text_time or none"
        )
    if config["class_embed_type"] is not None or config["num_class_embeds"] is not None:
        raise ValueError(
            "the UNet wants class labels beside prompts: use one that is conditioned on text only"
        )
    width = config["cross_attention_dim"]
    if isinstance(width, int) and width != table.layout.embeds[1]:
        raise ValueError(
            f"the UNet has cross_attention_dim={width} but prompts are encoded in "
            f"{table.layout.embeds[1]} numbers at {table.uri}: encode them with this model's own pipeline"
        )
    if kind == "text_time":
        pooled, ids = table.layout.pooled, table.layout.time_ids
        wanted = config["projection_class_embeddings_input_dim"]
        found = (
            None if pooled is None or ids is None else pooled + len(ids) * config["addition_time_embed_dim"]
        )
        if found != wanted:
            raise ValueError(
                f"the UNet's added conditioning has {wanted} numbers but the prompts at "
                f"{table.uri} give {found}: encode them with this model's own pipeline"
            )


def plain_unet(network: PromptedUNet) -> UNet2DConditionModel:
    """Return diffusers' own network with the same weights (shared, not copied), as pipelines save it."""
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(dict(network.config))
    plain.load_state_dict(network.state_dict(), assign=True)
    return plain.train(network.training)
