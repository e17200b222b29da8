"""Any torch module as a feature network: pixel scaling before it, one vector an image after it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.metrics.extractor import FeatureNetwork, weights_digest


class Preprocessing(NamedTuple):
    """What happens to images in [-1,1] before the module sees them."""

    image_size: int | None
    """Side in pixels after resizing (bicubic, antialiased), or None to leave the size alone."""
    mean: Sequence[float]
    """Means for pixels in [0,1], one for all channels or one each."""
    std: Sequence[float]
    """Deviations for pixels in [0,1], one for all channels or one each."""
    channels: int | None
    """Channels the module wants, or None for those of the images."""

    def apply(self, images: Tensor) -> Tensor:
        """Return `images` [N,C,H,W] as the module wants them; grey ones are repeated where it wants colour.

        Raises ValueError when the images have other channels than the module wants.
        """
        if self.channels is not None and images.shape[1] != self.channels:
            if images.shape[1] != 1:
                raise ValueError(
                    f"feature network wants {self.channels} channels, images have {images.shape[1]}: "
                    "choose another features.network"
                )
            images = images.expand(-1, self.channels, -1, -1)
        if self.image_size is not None and images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(-1.0, 1.0)  # the bicubic kernel overshoots at edges
        mean, std = (torch.tensor(values).to(images).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return ((images + 1.0) / 2.0 - mean) / std


class ModuleFeatures:
    """A frozen module whose `features` method, or else whose call, gives the features."""

    def __init__(self, module: nn.Module, name: str, preprocessing: Preprocessing) -> None:
        """Freeze `module` and name it `name@<digest of the weights>`, with the resizing if there is any."""
        self._module = module.eval().requires_grad_(False)
        self._preprocessing = preprocessing
        size = preprocessing.image_size
        self._extractor = f"{name}@{weights_digest(module)}" + (f"/bicubic{size}" if size else "")

    @property
    def extractor(self) -> str:
        """Return the name of the module with the digest of its weights and its resizing."""
        return self._extractor

    def features(self, images: Tensor) -> Tensor:
        """Return features [N,d] of `images` [N,C,H,W] in [-1,1]."""
        inputs = self._inputs(images)
        for method in ("features", "get_image_features"):
            if callable(found := getattr(self._module, method, None)):
                return as_vectors(found(inputs))
        return as_vectors(self._module(inputs))

    def _inputs(self, images: Tensor) -> Tensor:
        """Return `images` preprocessed, with the module's device and dtype."""
        weight = next(self._module.parameters(), None)
        return self._preprocessing.apply(images if weight is None else images.to(weight))


class ModuleClassifier(ModuleFeatures):
    """A frozen module that also has `predict(images) -> logits`."""

    def predict(self, images: Tensor) -> Tensor:
        """Return logits [N,classes] of `images` [N,C,H,W] in [-1,1]."""
        predict: Any = self._module.predict
        return predict(self._inputs(images))


def wrap_module(module: nn.Module, name: str, preprocessing: Preprocessing) -> FeatureNetwork:
    """Return `module` as a feature network, one that predicts classes if the module has `predict`."""
    kind = ModuleClassifier if callable(getattr(module, "predict", None)) else ModuleFeatures
    return kind(module, name, preprocessing)


def as_vectors(output: Any) -> Tensor:
    """Return one vector an image, [N,d], of a module's output.

    A tensor is flattened. Of a transformers output the pooled vector is taken (the class token's where the
    model has one), or else the mean over the tokens [N,tokens,d] or the map [N,d,H,W] of the last layer.

    Raises ValueError for any other output.
    """
    if isinstance(output, Tensor):
        return output.flatten(1)
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(f"feature network returned a {type(output).__name__}: it must return a tensor [N,d]")
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
