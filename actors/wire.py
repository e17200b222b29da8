"""Samples and verdicts as dictionaries of numpy arrays: a fifth of the cost of tensors."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from counterpoint.critics.group import Samples, Verdict
from counterpoint.critics.replicas import Contribution

Message = dict[str, Any]
WireDtype = Literal["float32", "bfloat16"]
COLLECTIVE = ("gloo",)
"""Transports between replicas, whose ends are of one fate; trainers cannot be among them."""
Transport = Literal["object_store", "gloo", "nixl"]

BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
"""numpy has no bfloat16: these are its bits, under a name that tells the receiver what they are."""


def pack(samples: Samples, dtype: WireDtype = "float32") -> Message:
    """Return `samples` as a message; images cross as they are, or rounded to bfloat16, which halves them."""
    return {
        "step": samples.step,
        "fake": _array(_rounded(samples.fake, dtype)),
        "real": _array(_rounded(samples.real, dtype)),
        "labels": _array(samples.labels),
        "judge": samples.judge,
        "micro": samples.micro,
        "micros": samples.micros,
    }


def unpack(messages: Sequence[Message], device: torch.device) -> Samples:
    """Return one batch of samples from the ranks' messages of one micro-batch, in rank order.

    What crossed as bfloat16 arrives as float32.
    """
    first = messages[0]
    joined = [_tensor([m[name] for m in messages], device) for name in ("fake", "real", "labels")]
    return Samples(
        first["step"], joined[0], joined[1], joined[2], first["judge"], first["micro"], first["micros"]
    )  # fmt: skip


def wire_dtype(message: Message) -> WireDtype:
    """Return what the images of `message` crossed as; the gradient goes back the same way."""
    return "bfloat16" if message["fake"].dtype == BFLOAT16 else "float32"


def pack_verdict(
    verdict: Verdict,
    sizes: Sequence[int],
    dtype: WireDtype = "float32",
    transport: Transport = "object_store",
) -> list[Message]:
    """Return a verdict cut into one message per rank, whose samples number `sizes`.

    Sums are shared out by the number of samples; statistics go to every rank. The gradient may be rounded
    to bfloat16, whose range is that of float32: small gradients lose digits and nothing else. For a direct
    transport it stays a tensor where it is; each rank's lies in memory of its own.
    """
    parts: list[Message] = []
    gradients = [None] * len(sizes) if verdict.gradient is None else list(verdict.gradient.split(list(sizes)))
    for size, gradient in zip(sizes, gradients, strict=True):
        rounded = None if gradient is None else _rounded(gradient, dtype)
        crossing = rounded if rounded is None or transport == "nixl" else _array(rounded)
        parts.append(
            {
                "step": verdict.step,
                "loss": verdict.loss * size / max(1, verdict.samples),
                "gradient": crossing.clone() if isinstance(crossing, Tensor) else crossing,
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
    """Return the verdict in `message`; its tensors are copies on the CPU, or where a transport left them."""
    cpu = torch.device("cpu")
    tensors: dict[str, Any] = {name: _tensor([message[name]], cpu) for name in ("real_logits", "fake_logits")}
    gradient = message["gradient"]
    if isinstance(gradient, Tensor):
        tensors["gradient"] = gradient.float()
    else:
        tensors["gradient"] = None if gradient is None else _tensor([gradient], cpu)
    return Verdict(**{field: message[field] for field in _PLAIN}, **tensors)


_PLAIN = ("step", "loss", "critic_loss", "samples", "refreshed", "voting")


def pack_contribution(part: Contribution) -> Message:
    """Return what one replica learned as a message; gradients of heads always cross as they are."""
    return {
        "samples": part.samples,
        "learned": part.learned,
        "critic_loss": part.critic_loss,
        "real_logits": _array(part.real_logits),
        "fake_logits": _array(part.fake_logits),
        # Kept for peers to fetch, while the lesson's own tensors are summed into: these are copies.
        "gradients": [_array(gradient).copy() for gradient in part.gradients],
    }


def unpack_contribution(message: Message) -> Contribution:
    """Return the contribution in `message`; its tensors are copies on the CPU."""
    logits = [_restored(message[name].copy()) for name in ("real_logits", "fake_logits")]
    gradients = tuple(_restored(array.copy()) for array in message["gradients"])
    return Contribution(
        message["samples"], message["learned"], message["critic_loss"], logits[0], logits[1], gradients
    )


def pack_state(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return named tensors as arrays."""
    return {name: _array(tensor) for name, tensor in state.items()}


def unpack_state(state: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return named arrays as tensors; the object store's arrays are read-only, so these are copies."""
    return {name: _restored(array.copy()) for name, array in state.items()}


def _rounded(tensor: Tensor, dtype: WireDtype) -> Tensor:
    return tensor.to(torch.bfloat16) if dtype == "bfloat16" else tensor


def _array(tensor: Tensor) -> np.ndarray:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        bits: np.ndarray = plain.view(torch.uint16).numpy().view(BFLOAT16)
        return bits
    array: np.ndarray = plain.numpy()
    return array


def _restored(array: np.ndarray) -> Tensor:
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _tensor(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    joined = _restored(arrays[0].copy() if len(arrays) == 1 else np.concatenate(arrays))
    return (joined.float() if joined.dtype == torch.bfloat16 else joined).to(device)
