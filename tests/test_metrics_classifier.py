"""The small classifier: accuracy on held-out digits, seeds, and its way through safetensors."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from counterpoint.data import DataConfig, load_data
from counterpoint.metrics.classifier import ClassifierArchitecture, SmallClassifier
from counterpoint.metrics.classifier_training import ClassifierConfig, shift_images, train_classifier


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig())


@pytest.fixture(scope="module")
def trained(digits):
    return train_classifier(digits.train, ClassifierConfig(), seed=0)


def test_reaches_its_accuracy_on_held_out_digits(digits, trained):
    predicted = trained.predict(digits.test.images).argmax(dim=1)
    assert (predicted == digits.test.labels).double().mean() >= 0.97


@pytest.mark.slow
def test_reaches_its_accuracy_on_held_out_textures():
    textures = load_data(DataConfig(source="textures"))
    model = train_classifier(textures.train, ClassifierConfig(), seed=0)
    predicted = model.predict(textures.test.images).argmax(dim=1)
    assert (predicted == textures.test.labels).double().mean() >= 0.9


def test_features_are_the_input_of_the_head(digits, trained):
    images = digits.test.images[:7]
    features = trained.features(images)
    assert features.shape == (7, 64)
    torch.testing.assert_close(trained.head(features), trained(images))
    assert not features.requires_grad


def test_the_seed_decides_the_weights(digits):
    config = ClassifierConfig(steps=3)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = train_classifier(digits.train, config, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert train_classifier(digits.train, config, seed=1).extractor == one.extractor
    assert train_classifier(digits.train, config, seed=2).extractor != one.extractor


def test_safetensors_and_json_rebuild_the_classifier(digits, trained):
    weights, architecture = save(trained.to_tensors()), trained.architecture.model_dump_json()
    rebuilt = ClassifierArchitecture.model_validate_json(architecture)
    back = SmallClassifier.from_tensors(load(weights), rebuilt)
    images = digits.test.images[:9]
    assert torch.equal(back(images), trained(images))
    assert back.extractor == trained.extractor
    assert not back.training


def test_weights_of_another_architecture_are_refused(trained):
    other = trained.architecture.model_copy(update={"num_classes": 3})
    with pytest.raises(ValueError, match=r"do not fit .*num_classes=3.*head\.weight"):
        SmallClassifier.from_tensors(trained.to_tensors(), other)
    tensors = trained.to_tensors()
    del tensors["head.bias"]
    with pytest.raises(ValueError, match=r"head\.bias"):
        SmallClassifier.from_tensors(tensors, trained.architecture)


def test_shifts_equal_a_naive_edge_padded_crop():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    shifted = shift_images(images.repeat(40, 1, 1, 1), 1, torch.Generator().manual_seed(0)).numpy()
    for index in range(80):
        padded = np.pad(images[index % 2].numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
        crops = [padded[:, t : t + 4, c : c + 5] for t in range(3) for c in range(3)]
        assert any(np.array_equal(shifted[index], crop) for crop in crops)
    assert len({shifted[i].tobytes() for i in range(0, 80, 2)}) == 9


def test_colour_images_of_other_sizes_fit():
    model = SmallClassifier(ClassifierArchitecture(channels=3, num_classes=4)).eval()
    for size in (8, 16, 28):
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 4)
