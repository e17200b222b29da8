"""Samples and verdicts as dictionaries of numpy arrays: a fifth of the cost of tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.critics.group import Samples, Verdict

Message = dict[str, Any]


def pack(samples: Samples) -> Message:
    """Return `samples` as a message."""
    return {
        "step": samples.step,
        "fake": _array(samples.fake),
        "real": _array(samples.real),
        "labels": _array(samples.labels),
        "judge": samples.judge,
        "micro": samples.micro,
        "micros": samples.micros,
    }


def unpack(messages: Sequence[Message], device: torch.device) -> Samples:
    """Return one batch of samples from the ranks' messages of one micro-batch, in rank order."""
    first = messages[0]
    joined = [_tensor([m[name] for m in messages], device) for name in ("fake", "real", "labels")]
    return Samples(
        first["step"], joined[0], joined[1], joined[2], first["judge"], first["micro"], first["micros"]
    )  # fmt: skip


def pack_verdict(verdict: Verdict, sizes: Sequence[int]) -> list[Message]:
    """Return a verdict cut into one message per rank, whose samples number `sizes`.

    Sums are shared out by the number of samples; statistics go to every rank.
    """
    parts: list[Message] = []
    gradients = [None] * len(sizes) if verdict.gradient is None else list(verdict.gradient.split(list(sizes)))
    for size, gradient in zip(sizes, gradients, strict=True):
        parts.append(
            {
                "step": verdict.step,
                "loss": verdict.loss * size / max(1, verdict.samples),
                "gradient": None if gradient is None else _array(gradient),
                "critic_loss": verdict.critic_loss,
                "real_logits": _array(verdict.real_logits),
                "fake_logits": _array(verdict.fake_logits),
                "samples": size,
                "refreshed": verdict.refreshed,
                "voting": verdict.voting,
            }
        )
    return parts


def unpack_verdict(message: Message) -> Verdict:
    """Return the verdict in `message`; its tensors are copies on the CPU."""
    tensors: dict[str, Any] = {
        name: None if message[name] is None else _tensor([message[name]], torch.device("cpu"))
        for name in ("gradient", "real_logits", "fake_logits")
    }
    return Verdict(**{field: message[field] for field in _PLAIN}, **tensors)


_PLAIN = ("step", "loss", "critic_loss", "samples", "refreshed", "voting")


def pack_state(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return named tensors as arrays."""
    return {name: _array(tensor) for name, tensor in state.items()}


def unpack_state(state: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return named arrays as tensors; the object store's arrays are read-only, so these are copies."""
    return {name: torch.tensor(array) for name, array in state.items()}


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().contiguous().numpy()
    return array


def _tensor(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    joined = arrays[0].copy() if len(arrays) == 1 else np.concatenate(arrays)
    return torch.from_numpy(joined).to(device)
