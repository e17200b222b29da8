"""A small convolutional classifier of tiny images: the default feature space and the judge of accuracy."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from counterpoint.metrics.extractor import weights_digest
from counterpoint.section import Section


class ClassifierArchitecture(Section):
    """All that rebuilds the network; stored as JSON beside the weights."""

    channels: int
    """Channels of an image."""
    num_classes: int
    """Number of classes."""
    width: int = 32
    """Channels of the first convolution; the second and third stage have twice as many."""
    feature_dim: int = 64
    """Length of the penultimate layer, the feature space."""


class SmallClassifier(nn.Module):
    """Three convolutional stages, a pooled 2x2 map and a linear feature layer, for images of 8x8 and more."""

    def __init__(self, architecture: ClassifierArchitecture) -> None:
        """Build the network with fresh weights from torch's global generator."""
        super().__init__()
        self.architecture = architecture
        width = architecture.width
        self.body = nn.Sequential(
            _stage(architecture.channels, width, stride=1),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 2 * width, stride=1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, architecture.feature_dim),
            nn.SiLU(),
        )
        self.head = nn.Linear(architecture.feature_dim, architecture.num_classes)

    @property
    def extractor(self) -> str:
        """Return `classifier@<digest of the weights>`."""
        return f"classifier@{weights_digest(self)}"

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate activations [N,feature_dim] of `images` [N,C,H,W] in [-1,1]."""
        return self.body(images.to(self.head.weight))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N,num_classes] of `images` [N,C,H,W] in [-1,1]."""
        return self.head(self.features(images))

    def predict(self, images: Tensor) -> Tensor:
        """Return logits [N,num_classes] of `images` [N,C,H,W] in [-1,1]."""
        return self(images)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, contiguous on the CPU, fit for safetensors or a wire."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        architecture: ClassifierArchitecture,
        device: torch.device | str = "cpu",
    ) -> "SmallClassifier":
        """Return the frozen classifier that `to_tensors` wrote, on `device`.

        Raises ValueError when the weights are not those of `architecture`.
        """
        with torch.device("meta"):
            model = cls(architecture)
        try:
            model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"classifier weights do not fit {architecture!r}: {reason}") from error
        return model.to(device).eval().requires_grad_(False)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return convolution, batch norm and SiLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())
