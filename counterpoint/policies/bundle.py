"""A policy is one bundle: weights, text tokenizer, action tokenizer with its statistics, spaces, chunking.

Trainer, rollout and endpoint load the same folder through the same class, so that what is preprocessed in one
way in training cannot be preprocessed in another way afterwards:

    policy.json           format, network, spaces, where the data came from
    model.safetensors     weights
    words/                text tokenizer, in transformers' format
    actions/              action tokenizer and statistics
    sample.safetensors    a few of the actions it was trained on, by which loading checks the statistics
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from counterpoint.actions.config import ActionTokenizer, load_tokenizer, save_tokenizer
from counterpoint.actions.space import ActionSpace
from counterpoint.policies.compact import CompactConfig, CompactPolicy
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.policies.policy import Inputs
from counterpoint.policies.words import build_words, encode_words, load_words
from counterpoint.section import Section

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, WEIGHTS, WORDS, ACTIONS, SAMPLE = (
    "policy.json", "model.safetensors", "words", "actions", "sample.safetensors",
)  # fmt: skip
SAMPLE_CHUNKS = 256
MOST_MEDIAN_ERROR, MOST_CLIPPED = 0.05, 0.2
"""Shares above which statistics are taken to be of other data; one of 32 bins errs by 0.016 of the range."""


class Manifest(Section):
    """What `policy.json` holds."""

    format: int = FORMAT
    """Version of the folder's layout."""
    network: CompactConfig
    """The network."""
    observation_space: ObservationSpace
    """Cameras and state."""
    action_space: ActionSpace
    """Dimensions, ranges, chunking."""
    words_length: int = Field(ge=1)
    """Most words of an instruction."""
    source: str = ""
    """URI of the demonstrations."""


@dataclass
class PolicyBundle:
    """A compact policy with everything that stands between it and a robot."""

    policy: CompactPolicy
    observation_space: ObservationSpace
    action_space: ActionSpace
    tokenizer: ActionTokenizer
    words: PreTrainedTokenizerFast
    words_length: int
    sample: np.ndarray
    """Chunks of the training data, float32 [n,H,D]."""
    source: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def prepare(self, observations: Sequence[Observation]) -> Inputs:
        """Return the observations as the policy's inputs, on its device, after checking each.

        Raises ValueError, in one line, for the first that does not fit.
        """
        for observation in observations:
            self.observation_space.check(observation)
        cameras = self.observation_space.cameras
        images = np.stack([np.stack([o.images[camera] for camera in cameras]) for o in observations])
        states = np.stack([np.asarray(o.state, dtype=np.float32) for o in observations])
        words = encode_words(self.words, [o.instruction for o in observations], self.words_length)
        inputs = {"images": torch.from_numpy(images), "state": torch.from_numpy(states), "words": words}
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def decode(self, tokens: Sequence[int]) -> tuple[np.ndarray, int]:
        """Return the chunk that `tokens` stand for, float32 [H,D] within bounds, and how many were clipped.

        Raises Undecodable, a ValueError.
        """
        actions = self.tokenizer.decode(tokens)
        clipped = self.action_space.clip(actions)
        return clipped, int((np.abs(clipped - actions) > 1e-6).sum())

    def save(self, folder: Path) -> None:
        """Write the bundle into `folder`, the manifest last: a folder that has one is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.policy.state_dict().items()
        }
        safetensors.torch.save_file(weights, folder / WEIGHTS)
        safetensors.torch.save_file({"actions": torch.from_numpy(self.sample)}, folder / SAMPLE)
        self.words.save_pretrained(str(folder / WORDS))
        save_tokenizer(self.tokenizer, folder / ACTIONS)
        manifest = Manifest(
            network=self.policy.config, observation_space=self.observation_space,
            action_space=self.action_space, words_length=self.words_length, source=self.source,
        )  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1))

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "PolicyBundle":
        """Load what `save` wrote, and check that its parts fit one another.

        A sample of the training actions goes through the action tokenizer: what it clips is logged. Raises
        ValueError, in one line, for a missing, damaged or mismatched part.
        """
        manifest = _read_manifest(folder)
        tokenizer = load_tokenizer(folder / ACTIONS)
        words = load_words(folder / WORDS)
        device = torch.device(device)
        policy = build_policy(
            manifest.network, manifest.observation_space, tokenizer, words, manifest.words_length
        )
        _load_weights(policy, folder / WEIGHTS)
        sample = _read_tensors(folder / SAMPLE)["actions"].numpy()
        bundle = cls(
            policy.to(device).eval(), manifest.observation_space, manifest.action_space, tokenizer, words,
            manifest.words_length, sample, manifest.source, device,
        )  # fmt: skip
        check_sample(bundle)
        return bundle


def build_policy(
    network: CompactConfig,
    observation_space: ObservationSpace,
    tokenizer: ActionTokenizer,
    words: PreTrainedTokenizerFast,
    words_length: int,
    seed: int = 0,
) -> CompactPolicy:
    """Build the network that fits its tokenizers, with weights drawn from `seed`."""
    return CompactPolicy(
        network, observation_space, vocabulary=tokenizer.vocab_size, end_token=tokenizer.end_token,
        max_tokens=tokenizer.max_tokens, words_vocabulary=len(words), words_length=words_length,
        seed=seed,
    )  # fmt: skip


def new_bundle(
    network: CompactConfig,
    observation_space: ObservationSpace,
    action_space: ActionSpace,
    tokenizer: ActionTokenizer,
    instructions: Sequence[str],
    words_length: int,
    actions: np.ndarray,
    source: str = "",
    seed: int = 0,
) -> PolicyBundle:
    """Make the bundle of a policy that is about to be trained on chunks `actions` [F,H,D]."""
    words = build_words(instructions)
    policy = build_policy(network, observation_space, tokenizer, words, words_length, seed)
    picked = np.linspace(0, len(actions) - 1, min(SAMPLE_CHUNKS, len(actions))).astype(int)
    sample = np.ascontiguousarray(actions[picked], dtype=np.float32)
    encode_words(words, instructions, words_length)  # refuses now what the policy could not read later
    return PolicyBundle(
        policy, observation_space, action_space, tokenizer, words, words_length, sample, source
    )


def check_sample(bundle: PolicyBundle) -> dict[str, float]:
    """Send the bundle's sample of training actions through its action tokenizer, and return what was lost.

    `largest_error` is the greatest difference after the round trip in units of the action space's range,
    `clipped` the share of entries that the space cuts off. Raises ValueError if the sample does not fit the
    spaces; logs a warning if statistics and sample can hardly be of the same data.
    """
    space, sample = bundle.action_space, bundle.sample
    if sample.ndim != 3 or sample.shape[1:] != (space.horizon, space.dimensions):
        raise ValueError(
            f"{SAMPLE} holds chunks of shape {list(sample.shape[1:])}, the action space has "
            f"[{space.horizon}, {space.dimensions}]: save the policy again with its own data"
        )
    if not np.isfinite(sample).all():
        raise ValueError(f"{SAMPLE} holds actions that are not finite: save the policy again")
    decoded = np.stack([bundle.tokenizer.decode(tokens) for tokens in bundle.tokenizer.encode(sample)])
    span = np.asarray(space.high) - np.asarray(space.low)
    error = np.abs(decoded - sample) / span
    clipped = float((space.clip(decoded) != decoded.astype(np.float32)).mean())
    report = {
        "median_error": float(np.median(error)),
        "largest_error": float(error.max()),
        "clipped": clipped,
    }
    if report["median_error"] > MOST_MEDIAN_ERROR or clipped > MOST_CLIPPED:
        logger.warning(
            "the action statistics hardly fit the policy's own training data: median error %.3f of the "
            "range, %.1f%% clipped; were they made from other data, or in other units?",
            report["median_error"], 100 * clipped,
        )  # fmt: skip
    return report


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no policy: it has no {MANIFEST}; give the folder of a finished run")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = fields.get("format") if isinstance(fields, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path} has format {found}, this version reads {FORMAT}: save the policy again")
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: {first['msg']}; save the policy again") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); save the policy again") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); save the policy again") from error


def _load_weights(policy: CompactPolicy, path: Path) -> None:
    try:
        policy.load_state_dict(_read_tensors(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the network of {MANIFEST} ({reason})") from error
