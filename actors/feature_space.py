"""The network that figures are measured with: made once, stored with the teacher, the same for all."""

import json

import safetensors.torch

from cluster.storage import RunStore
from counterpoint.data import Split
from counterpoint.metrics.classifier import ClassifierArchitecture, SmallClassifier
from counterpoint.metrics.extractor import FeatureNetwork
from counterpoint.metrics.features import CLASSIFIER, FeatureConfig, load_feature_network

WEIGHTS, ARCHITECTURE = "features/classifier.safetensors", "features/classifier.json"


def make_feature_network(store: RunStore, config: FeatureConfig, data: Split, seed: int) -> FeatureNetwork:
    """Return the feature network of the teacher's run at `store`, making it if it is not there."""
    if config.network == CLASSIFIER and not store.exists(ARCHITECTURE):
        network = load_feature_network(config, data.train, seed)
        assert isinstance(network, SmallClassifier)
        store.write_bytes(WEIGHTS, safetensors.torch.save(network.to_tensors()))
        store.write_text(ARCHITECTURE, network.architecture.model_dump_json())
    return stored_feature_network(store, config, seed)


def stored_feature_network(store: RunStore, config: FeatureConfig, seed: int = 0) -> FeatureNetwork:
    """Return the feature network of the finished teacher's run at `store`, the same in every process."""
    if config.network != CLASSIFIER:
        return load_feature_network(config, seed=seed)
    if not store.exists(ARCHITECTURE):
        raise ValueError(
            f"{store.location(ARCHITECTURE)} is missing: the teacher's run has not finished, resume it"
        )
    architecture = ClassifierArchitecture(**json.loads(store.read_text(ARCHITECTURE)))
    return SmallClassifier.from_tensors(safetensors.torch.load(store.read_bytes(WEIGHTS)), architecture)
