"""Scores of generated images: shards, the wire, and agreement with the single metrics."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch

from counterpoint.data import DataConfig, load_data
from counterpoint.metrics import score as score_module
from counterpoint.metrics.classifier import ClassifierArchitecture, SmallClassifier
from counterpoint.metrics.frechet import frechet_distance
from counterpoint.metrics.kernel import kernel_distance
from counterpoint.metrics.moments import Moments
from counterpoint.metrics.precision_recall import improved_precision_recall
from counterpoint.metrics.score import Reference, Scores
from counterpoint.metrics.subset import equal_subsets


class Pixels:
    """Images as their own features; predicts no class."""

    extractor = "pixels"

    def features(self, images):
        return images.flatten(1)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SmallClassifier(ClassifierArchitecture(channels=1, num_classes=10)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference(digits, network):
    return Reference.from_images(digits.test.images, network)


def score(network, images, labels) -> Scores:
    scores = Scores(network.extractor)
    scores.update(images, labels, network)
    return scores


def test_equals_the_single_metrics(digits, network, reference):
    images, labels = digits.train.images[:497], digits.train.labels[:497]
    table = score(network, images, labels).compute(reference)
    real, made = network.features(digits.test.images), network.features(images)
    assert table["fd"] == pytest.approx(frechet_distance(Moments.of(real), Moments.of(made)), abs=1e-5)
    assert table["kid"] == pytest.approx(kernel_distance(real, made), abs=1e-5)
    expected = improved_precision_recall(real, made)
    assert (table["precision"], table["recall"]) == pytest.approx(expected, abs=0.01)
    assert table["accuracy"] == pytest.approx((network(images).argmax(1) == labels).double().mean().item())
    assert table["samples"] == 497
    assert table["extractor"] == network.extractor
    assert json.loads(json.dumps(table)) == table


def test_shards_over_a_wire_equal_the_single_pass_in_any_order(digits, network, reference, tmp_path):
    images, labels = digits.train.images[:600], digits.train.labels[:600]
    whole = score(network, images, labels).compute(reference)
    shards = []
    for first, last in ((0, 256), (256, 386), (386, 600)):
        path = tmp_path / f"{first}.npz"
        np.savez(path, **score(network, images[first:last], labels[first:last]).as_arrays())
        with np.load(path) as arrays:
            shards.append(Scores.from_arrays(arrays))
    for order in permutations(shards):
        merged = Scores(network.extractor)
        for shard in order:
            merged = merged.merge(shard)
        table = merged.compute(reference)
        assert table.keys() == whole.keys()
        for name in ("fd", "kid", "precision", "recall", "accuracy", "samples"):
            assert table[name] == pytest.approx(whole[name], abs=1e-8), name


def test_reference_survives_npz(digits, network, reference, tmp_path):
    np.savez(tmp_path / "reference.npz", **reference.as_arrays())
    with np.load(tmp_path / "reference.npz") as arrays:
        back = Reference.from_arrays(arrays)
    scores = score(network, digits.train.images[:100], digits.train.labels[:100])
    assert scores.compute(back) == scores.compute(reference)


def test_memorised_images_have_no_distance(digits, network, reference):
    table = score(network, digits.test.images, digits.test.labels).compute(reference)
    assert abs(table["fd"]) < 1e-9
    assert (table["precision"], table["recall"]) == (1.0, 1.0)


def test_a_network_without_classes_gives_no_accuracy_unless_one_judges(digits, network):
    pixels = Pixels()
    reference = Reference.from_images(digits.test.images, pixels)
    images, labels = digits.train.images[:64], digits.train.labels[:64]
    assert "accuracy" not in score(pixels, images, labels).compute(reference)
    judged = Scores("pixels")
    judged.update(images, labels, pixels, classifier=network)
    expected = (network(images).argmax(1) == labels).double().mean().item()
    assert judged.compute(reference)["accuracy"] == pytest.approx(expected)


def test_equal_subsets_ignore_the_order_of_rows():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(90, 3)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32)
    first, second = equal_subsets(a, b, 1000, seed=3)
    assert first.shape == (40, 3)
    np.testing.assert_array_equal(second, b)
    shuffled, _ = equal_subsets(rng.permutation(a), b, 1000, seed=3)
    np.testing.assert_array_equal(first, shuffled)
    assert len(np.unique(first, axis=0)) == 40
    assert {row.tobytes() for row in first} <= {row.tobytes() for row in a}
    assert not np.array_equal(first, equal_subsets(a, b, 1000, seed=4)[0])


def test_both_sides_are_capped(digits, network, reference, monkeypatch):
    monkeypatch.setattr(score_module, "MAX_NEIGHBOUR_SAMPLES", 50)
    sizes = []

    def record(real, generated, k):
        sizes.append((len(real), len(generated)))
        return 0.0, 0.0

    monkeypatch.setattr(score_module, "improved_precision_recall", record)
    score(network, digits.train.images[:100], digits.train.labels[:100]).compute(reference)
    assert sizes == [(50, 50)]


def test_fewer_images_than_dimensions_are_warned_of(digits, network, reference, caplog):
    score(network, digits.train.images[:65], digits.train.labels[:65]).compute(reference)
    assert not caplog.records
    score(network, digits.train.images[:64], digits.train.labels[:64]).compute(reference)
    assert "64 images in 64 dimensions" in caplog.text


def test_what_does_not_belong_together_is_refused(digits, network, reference):
    pixels, images, labels = Pixels(), digits.train.images[:8], digits.train.labels[:8]
    with pytest.raises(ValueError, match="do not compare"):
        score(pixels, images, labels).compute(reference)
    with pytest.raises(ValueError, match="do not compare"):
        score(pixels, images, labels).merge(Scores(network.extractor))
    with pytest.raises(ValueError, match="do not compare"):
        Scores("another").update(images, labels, network)
    with pytest.raises(ValueError, match="8 images with 7 labels"):
        Scores("pixels").update(images, labels[:7], pixels)
    with pytest.raises(ValueError, match="samples=0"):
        Scores("pixels").compute(reference.from_images(images, pixels))
    with pytest.raises(ValueError, match="0 images"):
        Scores("pixels").update(images[:0], labels[:0], pixels)
    with pytest.raises(ValueError, match="not finite"):
        Scores("pixels").update(images / 0.0 - images / 0.0, labels, pixels)


def test_a_damaged_shard_is_refused(digits, network):
    arrays = score(network, digits.train.images[:8], digits.train.labels[:8]).as_arrays()
    with pytest.raises(ValueError, match="lack \\['features'\\]"):
        Scores.from_arrays({name: value for name, value in arrays.items() if name != "features"})
    with pytest.raises(ValueError, match="lack \\['correct'\\]"):
        Scores.from_arrays({name: value for name, value in arrays.items() if name != "correct"})
    with pytest.raises(ValueError, match="do not belong"):
        Scores.from_arrays(arrays | {"features": arrays["features"][:5]})
