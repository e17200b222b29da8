"""Which feature network a job measures in: its own classifier, a PyTorch module or a transformers model."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import nn

from counterpoint.data.images import ImageSet
from counterpoint.metrics.classifier_training import ClassifierConfig, train_classifier
from counterpoint.metrics.extractor import FeatureNetwork
from counterpoint.metrics.module_features import Preprocessing, wrap_module
from counterpoint.section import Section
from counterpoint.seeds import seed_of

if TYPE_CHECKING:
    # Loaded where a run names such a model: every evaluation worker would wait for it.
    from transformers import PreTrainedModel

CLASSIFIER = "classifier"
HALF = (0.5,)


class FeatureConfig(Section):
    """The feature space of Frechet distance, kernel distance, precision and recall."""

    network: str = CLASSIFIER
    """`classifier` trains a small one on the training images; `package.module:Name` calls a class or function
    that returns a torch module; a folder or hub name with a slash loads a transformers vision model."""
    classifier: ClassifierConfig = ClassifierConfig()
    """The small classifier, where `network` is `classifier`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class or function that `network` names."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels that images are resized to (bicubic, antialiased) for a module or transformers model;
    unset takes the transformers model's own size, and leaves images alone for a module."""
    mean: tuple[float, ...] | None = None
    """Channel means, for pixels in [0,1], that are subtracted for a module or transformers model; unset takes
    those stored beside a transformers model, else 0.5, which keeps images in [-1,1]."""
    std: tuple[float, ...] | None = None
    """Channel deviations, for pixels in [0,1], that divide after `mean`; unset as for `mean`."""


def load_feature_network(
    config: FeatureConfig, train: ImageSet | None = None, seed: int = 0, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """Return the frozen feature network `config` names, on `device`.

    `train` is needed by the classifier alone; `seed` decides its training, or a module's fresh weights.
    Weights of transformers models are read as safetensors only, and no code that comes with them is run.

    Raises ValueError with one line when the network is missing, fails to build or is not a torch module.
    """
    if config.network == CLASSIFIER:
        if train is None:
            raise ValueError("features.network=classifier is trained on the data: pass the training images")
        return train_classifier(train, config.classifier, seed, device)
    if "/" in config.network or Path(config.network).is_dir():
        return _transformers_model(config, device)
    module = _build(config, seed).to(device)
    preprocessing = Preprocessing(config.image_size, config.mean or HALF, config.std or HALF, channels=None)
    return wrap_module(module, config.network, preprocessing)


def _build(config: FeatureConfig, seed: int) -> nn.Module:
    """Call the class or function that `config.network` names; torch's global generator is left as it was."""
    factory = _imported(config.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "features", config.network))
        try:
            module = factory(**config.options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"features.options={config.options} do not fit {config.network}: {error}"
            ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"features.network={config.network} gave a {type(module).__name__}: name a torch module"
        )
    return module


def _imported(path: str) -> Any:
    """Return the object at `package.module:Name`, or raise ValueError."""
    module_name, colon, name = path.partition(":")
    if not colon:
        raise ValueError(
            f"features.network={path} is unknown: use classifier, package.module:Name "
            "or a transformers folder"
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features.network={path} cannot be imported: {error}") from error


def _transformers_model(config: FeatureConfig, device: torch.device | str) -> FeatureNetwork:
    """Return a transformers vision model by folder or hub name, with the pixel scaling stored beside it."""
    from transformers import AutoModel

    try:
        model: PreTrainedModel = AutoModel.from_pretrained(config.network, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"features.network={config.network} does not load: {reason}") from error
    settings = getattr(model.config, "vision_config", model.config)
    stored = _stored_scaling(config.network)
    preprocessing = Preprocessing(
        image_size=config.image_size or getattr(settings, "image_size", None),
        mean=config.mean or stored.get("image_mean") or HALF,
        std=config.std or stored.get("image_std") or HALF,
        channels=getattr(settings, "num_channels", None),
    )
    module: nn.Module = model
    return wrap_module(module.to(device), type(model).__name__, preprocessing)


def _stored_scaling(network: str) -> dict[str, Any]:
    """Return the image processor's settings stored beside a transformers model, empty without any."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(network)[0]
    except OSError:
        return {}
