"""Any vision-language-action model of transformers' with OpenVLA's interface (arXiv 2406.09246) as a policy.

Action k of V is the token k+1 places before the end of the unpadded text vocabulary, and a chunk is one token
per dimension. The policy has no state; its one condition besides the image is the instruction.

Two ways of taking in an image are known: transformers' own classes replace placeholder tokens of the prompt
(LLaVA, PaliGemma), and OpenVLA's own class inserts the patches behind the first token and hands over to its
`language_model`, to which cached steps go directly, since the class itself takes one row only.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from counterpoint.policies.masks import Mask
from counterpoint.policies.policy import Inputs, check_mask
from counterpoint.policies.prefix import Prefix, join, layers_of


def action_ids(config: Any) -> Tensor:
    """Return the text-vocabulary id of each action token, int64 [V], from a model's configuration.

    Raises ValueError, in one line, if the configuration is not that of such a model.
    """
    sizes: dict[str, Any] = {
        name: getattr(config, name, None) for name in ("n_action_bins", "pad_to_multiple_of")
    }
    missing = [name for name, value in sizes.items() if not isinstance(value, int)]
    if missing or not isinstance(getattr(config, "norm_stats", None), dict):
        raise ValueError(
            f"config.json has no {', '.join(missing) or 'norm_stats'}: take a model with OpenVLA's interface"
        )
    unpadded = config.get_text_config().vocab_size - sizes["pad_to_multiple_of"]
    if not 2 < sizes["n_action_bins"] <= unpadded:
        raise ValueError(
            f"config.json has n_action_bins={sizes['n_action_bins']} and {unpadded} text tokens without "
            "padding: the bins must be at least 3 and fit into them"
        )
    return unpadded - 1 - torch.arange(sizes["n_action_bins"])


class OpenVLAPolicy(nn.Module):
    """A `TokenPolicy` around such a model; `load_openvla` makes it together with what prepares its inputs.

    Inputs are `pixel_values` [B,...] and two prompts, right-padded int64 [B,S] with lengths int64 [B]:
    `prompt`, `prompt_length`, and the same without instruction as `null_prompt`, `null_prompt_length`.
    """

    conditions = frozenset({"text"})
    end_token: int | None = None
    model: Any
    """The model, in transformers' own form."""
    ids: Tensor
    """Text-vocabulary id of each action token, int64 [V]."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.max_tokens = max_tokens
        ids = action_ids(self.model.config)
        self.vocabulary = len(ids)
        self.register_buffer("ids", ids.to(self.model.device), persistent=False)
        self.inserts = all(
            hasattr(model, part) for part in ("vision_backbone", "projector", "language_model")
        )
        accepted = inspect.signature(self._decoder.forward).parameters
        self._takes = {
            name: name in accepted for name in ("mm_encoder_outputs", "token_type_ids", "logits_to_keep")
        }

    @property
    def encodes_once(self) -> bool:
        """Whether images are encoded once for all masks.

        If neither way of handing over features exists, each mask's prefill encodes the images anew.
        """
        features = hasattr(self.model, "get_image_features") and self._takes["mm_encoder_outputs"]
        return self.inserts or features

    def encode(self, inputs: Inputs) -> Inputs:
        """Return `inputs` with `features` [B,P,d] of the images in place of their pixels, see `encodes_once`.

        Where the model keeps features as a list, they are called `feature_list`.
        """
        if not self.encodes_once:
            return inputs
        pixels = inputs["pixel_values"].to(self.model.dtype)
        rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        if self.inserts:
            return rest | {"features": self.model.projector(self.model.vision_backbone(pixels))}
        found = self.model.get_image_features(pixel_values=pixels).pooler_output
        if isinstance(found, Tensor):
            return rest | {"features": found}
        return rest | {"feature_list": torch.stack(list(found))}

    def prefill(self, encoded: Inputs, masks: Sequence[Mask]) -> Prefix:
        """Read the prompts once per mask; rows are mask-major [len(masks)*B].

        Prompts of one length are read in one pass without any padding; "text" reads the prompt without its
        instruction. Raises ValueError for other masks.
        """
        prompts = [prompt for mask in masks for prompt in self._prompts(encoded, mask)]
        parts, order = [], []
        for rows in _by_length(prompts):
            output = self._read(torch.stack([prompts[row] for row in rows]), encoded, rows, suffix=0)
            layers = layers_of(output.past_key_values)
            shape = (len(rows), layers[0][0].shape[2])
            seen = torch.ones(shape, dtype=torch.bool, device=self.ids.device)
            parts.append(Prefix(self._over_actions(output.logits)[:, -1], layers, seen, seen.sum(1)))
            order += rows
        joined = join(parts)
        return joined if len(parts) == 1 else joined.pick(_inverse(order, self.ids.device))

    def advance(self, prefix: Prefix, tokens: Tensor) -> Prefix:
        """Read one more action token per row, `tokens` int64 [R] in [0, V)."""
        seen = F.pad(prefix.mask, (0, 1), value=True)
        output = self._decoder(
            input_ids=self.ids[tokens][:, None],
            attention_mask=seen.long(),
            position_ids=prefix.positions[:, None],
            past_key_values=prefix.cache(),
            use_cache=True,
        )
        logits = self._over_actions(output.logits)[:, -1]
        return Prefix(logits, layers_of(output.past_key_values), seen, prefix.positions + 1)

    def logits(self, encoded: Inputs, mask: Mask, tokens: Tensor) -> Tensor:
        """Return the logits float32 [B,L,V] of tokens [B,L] given those before each, without a cache."""
        prompts = [
            torch.cat([prompt, self.ids[row[:-1]]])
            for prompt, row in zip(self._prompts(encoded, mask), tokens, strict=True)
        ]
        parts, order = [], []
        length = tokens.shape[1]
        for rows in _by_length(prompts):
            ids = torch.stack([prompts[row] for row in rows])
            output = self._read(ids, encoded, rows, suffix=length - 1)
            parts.append(self._over_actions(output.logits)[:, -length:])
            order += rows
        return torch.cat(parts)[_inverse(order, self.ids.device)]

    @property
    def _decoder(self) -> Any:
        return self.model.language_model if self.inserts else self.model

    def _prompts(self, encoded: Inputs, mask: Mask) -> list[Tensor]:
        check_mask(mask, self.conditions)
        name = "prompt" if mask == "none" else "null_prompt"
        lengths = encoded[f"{name}_length"].tolist()
        return [ids[:length] for ids, length in zip(encoded[name], lengths, strict=True)]

    def _read(self, ids: Tensor, encoded: Inputs, rows: Sequence[int], suffix: int) -> Any:
        """Return the model's output for prompts [n,S] that end in `suffix` action tokens."""
        decisions = len(encoded["prompt_length"])
        images = torch.tensor([row % decisions for row in rows], device=ids.device)
        more: dict[str, Any] = {}
        length = ids.shape[1]
        if self.inserts:
            words = self.model.get_input_embeddings()(ids)
            patches = encoded["features"][images].to(words.dtype)
            more["inputs_embeds"] = torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)
            length += patches.shape[1]
        else:
            more["input_ids"] = ids
            more |= _picked(encoded, images, self.model.dtype)
        if self._takes["token_type_ids"]:
            # Prefix language models look both ways within type 0 only.
            more["token_type_ids"] = (torch.arange(length, device=ids.device) >= length - suffix).long()
            more["token_type_ids"] = more["token_type_ids"].expand(len(rows), -1)
        if self._takes["logits_to_keep"]:
            more["logits_to_keep"] = suffix + 1
        return self._decoder(
            attention_mask=torch.ones((len(rows), length), dtype=torch.long, device=ids.device),
            position_ids=torch.arange(length, device=ids.device).expand(len(rows), -1),
            past_key_values=DynamicCache(),
            use_cache=True,
            **more,
        )

    def _over_actions(self, logits: Tensor) -> Tensor:
        return logits[..., self.ids].float()


def _picked(encoded: Inputs, images: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return the argument by which transformers' own classes take the images of some rows."""
    if "pixel_values" in encoded:
        return {"pixel_values": encoded["pixel_values"][images].to(dtype)}
    features: Any = encoded["features"][images] if "features" in encoded else None
    if features is None:
        features = list(encoded["feature_list"][images])
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


def _by_length(prompts: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(row)
    return list(groups.values())


def _inverse(order: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(order, device=device).argsort()
