"""What a feature network must offer, and how its weights are named in results."""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn


@runtime_checkable
class FeatureNetwork(Protocol):
    """A frozen network whose activations are the space that distances are measured in."""

    @property
    def extractor(self) -> str:
        """Return the name of the network with the digest of its weights and its resizing."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Return features [N,d] of images [N,C,H,W] in [-1,1]; the images may lie on any device."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """A network that also names the class of an image."""

    def predict(self, images: Tensor) -> Tensor:
        """Return logits [N,classes] of images [N,C,H,W] in [-1,1]; the images may lie on any device."""
        ...


def weights_digest(module: nn.Module) -> str:
    """Return 12 hex digits of the SHA-256 of a module's state: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(np.ascontiguousarray(raw.numpy()).tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def extract_features(network: FeatureNetwork, images: Tensor, batch_size: int) -> Tensor:
    """Return float32 features [N,d] on the CPU of `images` [N,C,H,W], `batch_size` images at a time.

    Raises ValueError without images or when the network does not return [N,d].
    """
    if len(images) == 0:
        raise ValueError("images holds 0 images: features need at least one")
    features = torch.cat([network.features(part).float().cpu() for part in images.split(batch_size)])
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"feature network {network.extractor} returned {tuple(features.shape)} for {len(images)} images: "
            "it must return [N,d]"
        )
    return features


@torch.no_grad()
def predict_classes(classifier: Classifier, images: Tensor, batch_size: int) -> Tensor:
    """Return the most likely class [N] (int64, on the CPU) of each of `images` [N,C,H,W]."""
    return torch.cat([classifier.predict(part).argmax(dim=1).cpu() for part in images.split(batch_size)])
