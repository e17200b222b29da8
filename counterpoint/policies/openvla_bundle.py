"""A model with OpenVLA's interface, loaded from disk with everything that stands between it and a robot."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from counterpoint.actions.config import ActionTokenizer
from counterpoint.actions.space import ActionSpace
from counterpoint.actions.statistics import ActionStatistics
from counterpoint.actions.uniform import UniformTokenizer
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.policies.openvla import OpenVLAPolicy, action_ids
from counterpoint.policies.policy import Inputs

LLAMA_SPACE = 29871
"""Llama's lone word boundary, with which OpenVLA's prompts end."""
SEVEN = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass
class OpenVLABundle:
    """The same interface as `PolicyBundle`: a policy, its spaces, its action tokenizer, its processor."""

    policy: OpenVLAPolicy
    observation_space: ObservationSpace
    action_space: ActionSpace
    tokenizer: ActionTokenizer
    processor: Any
    """The model's own processor."""
    device: torch.device

    def __post_init__(self) -> None:
        (self.camera,) = self.observation_space.cameras
        blank = np.zeros((*self.observation_space.cameras[self.camera], 3), np.uint8)
        self._null_prompt, _ = self._process("", blank)

    def prepare(self, observations: Sequence[Observation]) -> Inputs:
        """Return the observations as the policy's inputs, on its device, after checking each.

        The instruction is lowercased, as OpenVLA's training data were; states are not looked at. Raises
        ValueError, in one line, for the first observation that does not fit.
        """
        for observation in observations:
            self.observation_space.check(observation)
        read = [self._process(o.instruction, o.images[self.camera]) for o in observations]
        lengths = torch.tensor([len(ids) for ids, _ in read])
        null = self._null_prompt.expand(len(read), -1)
        inputs: dict[str, Tensor] = {
            "pixel_values": torch.cat([pixels for _, pixels in read]),
            "prompt": pad_sequence([ids for ids, _ in read], batch_first=True),
            "prompt_length": lengths,
            "null_prompt": null,
            "null_prompt_length": torch.full((len(read),), null.shape[1]),
        }
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def decode(self, tokens: Sequence[int]) -> tuple[np.ndarray, int]:
        """Return the chunk that `tokens` stand for, float32 [H,D] within bounds, and how many were clipped.

        Raises Undecodable, a ValueError.
        """
        actions = self.tokenizer.decode(tokens)
        clipped = self.action_space.clip(actions)
        return clipped, int((np.abs(clipped - actions) > 1e-6).sum())

    def _process(self, instruction: str, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return a prompt's ids, int64 [S], and the image's pixels [1,...], as the processor makes them."""
        text = f"In: What action should the robot take to {instruction.strip().lower()}?\nOut:"
        text = getattr(self.processor, "image_token", "") + text
        found = self.processor(text=text, images=Image.fromarray(image), return_tensors="pt")
        ids = found["input_ids"][0]
        words = self.processor.tokenizer
        is_llama = len(words) > LLAMA_SPACE and words.convert_ids_to_tokens(LLAMA_SPACE) == "▁"
        if is_llama and ids[-1] != LLAMA_SPACE:
            ids = torch.cat([ids, ids.new_tensor([LLAMA_SPACE])])
        return ids, found["pixel_values"]


def load_openvla(
    folder: Path,
    unnorm_key: str,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    observation_space: ObservationSpace | None = None,
    action_space: ActionSpace | None = None,
) -> OpenVLABundle:
    """Load a model and its processor from `folder`, in the precision they were saved in.

    `unnorm_key` names the statistics to scale actions by, of `config.norm_stats` or, before it, of
    `dataset_statistics.json`, which fine-tuning leaves beside the weights. Dimensions that their mask
    excludes are not scaled. Code from the folder runs only with `trust_remote_code`, and must have been
    written for the installed transformers: what OpenVLA's authors published is for 4.40. Without
    `observation_space` there is one camera, "image", of the model's input size; without `action_space` a
    chunk is one step and its bounds are the statistics' quantiles. Raises ValueError, in one line, if
    something is missing or does not fit.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a model saved by transformers")
    try:
        model, processor = _load(folder, trust_remote_code)
    except Exception as error:  # code from the folder can raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} cannot be loaded by transformers ({reason})") from error
    statistics = read_statistics(folder, model.config, unnorm_key)
    if action_space is None:
        action_space = _bounds(statistics)
    if action_space.dimensions != statistics.dimensions:
        raise ValueError(
            f"action_space has {action_space.dimensions} dimensions, norm_stats[{unnorm_key!r}] "
            f"{statistics.dimensions}: use a model of this robot"
        )
    if observation_space is None:
        observation_space = ObservationSpace(cameras={"image": _image_size(model.config)})
    if len(observation_space.cameras) != 1:
        raise ValueError(
            f"observation_space has cameras {sorted(observation_space.cameras)}, this model looks "
            "through one: choose it"
        )
    device = torch.device(device)
    policy = OpenVLAPolicy(model.to(device).eval(), action_space.horizon * action_space.dimensions).eval()
    tokenizer = UniformTokenizer(statistics, action_space.horizon, policy.vocabulary)
    return OpenVLABundle(policy, observation_space, action_space, tokenizer, processor, device)


def read_statistics(folder: Path, config: Any, unnorm_key: str) -> ActionStatistics:
    """Return the action statistics that a model in `folder` has under `unnorm_key`."""
    action_ids(config)  # refuses other models before their statistics are looked for
    known: dict[str, Any] = dict(config.norm_stats)
    path = folder / "dataset_statistics.json"
    if path.is_file():
        try:
            known |= json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no JSON object ({error}): copy it anew") from error
    if unnorm_key not in known:
        raise ValueError(f"unnorm_key={unnorm_key!r} is not among the model's statistics: {sorted(known)}")
    try:
        found: Mapping[str, Any] = known[unnorm_key]["action"]
        optional = {name: found[name] for name in ("mean", "std") if name in found}
        scaled = found.get("mask")
        return ActionStatistics(
            low=found["q01"],
            high=found["q99"],
            scaled=None if scaled is None else tuple(map(bool, scaled)),
            count=known[unnorm_key].get("num_transitions"),
            fingerprint=unnorm_key,
            **optional,
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"norm_stats[{unnorm_key!r}]['action'] is not usable: {reason}") from error


def _load(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **where)
    # OpenVLA registers its code for a class that transformers has since renamed.
    code = (getattr(config, "auto_map", None) or {}).get("AutoModelForVision2Seq")
    if trust_remote_code and code is not None:
        loader: Any = get_class_from_dynamic_module(code, str(folder), local_files_only=True)
        where = {"local_files_only": True}
    else:
        loader = AutoModelForImageTextToText
    model, found = loader.from_pretrained(
        folder, config=config, dtype="auto", use_safetensors=True, output_loading_info=True, **where
    )
    if found["missing_keys"]:
        # Otherwise these weights would be random, and nothing but the robot would notice.
        raise ValueError(f"the weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    return model, AutoProcessor.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )


def _bounds(statistics: ActionStatistics) -> ActionSpace:
    scaled = statistics.scaled or (True,) * statistics.dimensions
    low = [value if s else -1.0 for value, s in zip(statistics.low, scaled, strict=True)]
    high = [value if s else 1.0 for value, s in zip(statistics.high, scaled, strict=True)]
    # A dimension that never moves still needs bounds that differ.
    high = [max(h, math.nextafter(lo, math.inf)) for lo, h in zip(low, high, strict=True)]
    names = SEVEN if len(low) == len(SEVEN) else tuple(f"action_{i}" for i in range(len(low)))
    return ActionSpace(names=names, low=tuple(low), high=tuple(high), horizon=1, execute=1)


def _image_size(config: Any) -> tuple[int, int]:
    sizes = getattr(config, "image_sizes", None) or [config.vision_config.image_size]
    size = sizes[0]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
