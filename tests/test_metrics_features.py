"""Feature networks by configuration: classifier, torch module, transformers model."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from counterpoint.data import ImageSet
from counterpoint.metrics.classifier_training import ClassifierConfig
from counterpoint.metrics.extractor import Classifier, FeatureNetwork, extract_features, weights_digest
from counterpoint.metrics.features import FeatureConfig, load_feature_network
from counterpoint.metrics.score import Reference


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny_dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return Dinov2Model(config).eval()


def test_classifier_is_the_default(images):
    labels = torch.arange(5) % 2
    config = FeatureConfig(classifier=ClassifierConfig(steps=1, batch_size=4))
    network = load_feature_network(config, ImageSet(images, labels, 2, "five"), seed=3)
    assert isinstance(network, FeatureNetwork)
    assert isinstance(network, Classifier)
    assert network.features(images).shape == (5, 64)
    with pytest.raises(ValueError, match="pass the training images"):
        load_feature_network(config)


def test_torch_module_by_name_is_fresh_by_seed_alone(images):
    config = FeatureConfig(
        network="torch.nn:Conv2d", options={"in_channels": 1, "out_channels": 4, "kernel_size": 8}
    )
    torch.manual_seed(1)
    network = load_feature_network(config, seed=7)
    torch.manual_seed(2)
    assert load_feature_network(config, seed=7).extractor == network.extractor
    assert load_feature_network(config, seed=8).extractor != network.extractor
    assert network.extractor.startswith("torch.nn:Conv2d@")
    assert network.features(images).shape == (5, 4)
    assert not isinstance(network, Classifier)


def test_pixels_are_a_feature_network_too(images):
    network = load_feature_network(FeatureConfig(network="torch.nn:Identity"))
    torch.testing.assert_close(network.features(images), images.flatten(1))


def test_module_with_predict_judges_classes(images):
    architecture = "counterpoint.metrics.classifier:ClassifierArchitecture"
    with pytest.raises(ValueError, match="ClassifierArchitecture: name a torch module"):
        load_feature_network(FeatureConfig(network=architecture, options={"channels": 1, "num_classes": 3}))
    network = load_feature_network(FeatureConfig(network=f"{__name__}:TwoClasses"))
    assert isinstance(network, Classifier)
    assert network.predict(images).shape == (5, 2)
    torch.testing.assert_close(network.features(images), images.flatten(1).mean(dim=1, keepdim=True))


class TwoClasses(torch.nn.Module):
    """Brighter than grey, or not."""

    def features(self, images):
        return images.flatten(1).mean(dim=1, keepdim=True)

    def predict(self, images):
        return torch.cat([-self.features(images), self.features(images)], dim=1)


def test_transformers_folder_with_its_own_pixel_scaling(images, tmp_path):
    model = tiny_dinov2()
    model.save_pretrained(tmp_path)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    network = load_feature_network(FeatureConfig(network=str(tmp_path)))
    resized = F.interpolate(images.repeat(1, 3, 1, 1), (28, 28), mode="bicubic", antialias=True).clamp(-1, 1)
    pixels = (resized / 2 + 0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = model(pixels).pooler_output
    torch.testing.assert_close(network.features(images), expected, atol=1e-5, rtol=1e-4)
    assert network.extractor == f"Dinov2Model@{weights_digest(model)}/bicubic28"
    assert Reference.from_images(images, network).features.shape == (5, 16)


def test_configured_scaling_wins_over_the_stored(images, tmp_path):
    tiny_dinov2().save_pretrained(tmp_path)
    plain = load_feature_network(FeatureConfig(network=str(tmp_path)))
    half = load_feature_network(FeatureConfig(network=str(tmp_path), mean=(0.5,) * 3, std=(0.5,) * 3))
    other = load_feature_network(FeatureConfig(network=str(tmp_path), mean=(0.1,), std=(0.5,), image_size=14))
    torch.testing.assert_close(plain.features(images), half.features(images))
    assert not torch.allclose(plain.features(images), other.features(images))
    assert other.extractor.endswith("/bicubic14")


def test_convolutional_and_two_tower_transformers_give_vectors(images, tmp_path):
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(
        tmp_path / "resnet"
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPConfig(
        text_config=small, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=12
    )
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    resnet = load_feature_network(FeatureConfig(network=str(tmp_path / "resnet"), image_size=32))
    assert resnet.features(images).shape == (5, 16)
    two_tower = load_feature_network(FeatureConfig(network=str(tmp_path / "clip")))
    assert two_tower.extractor.endswith("/bicubic16")
    assert two_tower.features(images).shape == (5, 12)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("nonsense", {}, "features.network=nonsense is unknown: use classifier"),
        ("no_such_package:Net", {}, "cannot be imported: No module named 'no_such_package'"),
        ("torch.nn:NoSuchLayer", {}, "cannot be imported: .*NoSuchLayer"),
        ("torch.nn:Linear", {"wide": 3}, "features.options=.* do not fit torch.nn:Linear"),
        ("builtins:dict", {}, "gave a dict: name a torch module"),
    ],
)
def test_a_missing_network_gives_one_clear_line(network, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load_feature_network(FeatureConfig(network=network, options=options))
    assert "\n" not in str(error.value)


def test_pickled_or_absent_transformers_weights_are_refused(tmp_path):
    model = tiny_dinov2()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="does not load") as error:
            load_feature_network(FeatureConfig(network=str(folder)))
        assert "\n" not in str(error.value)


def test_wrong_channels_and_wrong_outputs_are_refused(images, tmp_path):
    tiny_dinov2().save_pretrained(tmp_path)
    network = load_feature_network(FeatureConfig(network=str(tmp_path)))
    with pytest.raises(ValueError, match="wants 3 channels, images have 2"):
        network.features(images.repeat(1, 2, 1, 1))
    gru = load_feature_network(
        FeatureConfig(network="torch.nn:GRU", options={"input_size": 8, "hidden_size": 2})
    )
    with pytest.raises(ValueError, match="returned a tuple"):
        gru.features(images[:, 0])
    mean = load_feature_network(FeatureConfig(network="torch.nn:MSELoss"))
    mean.features = lambda images: images.mean()[None, None]
    with pytest.raises(ValueError, match=r"returned \(1, 1\) for 5 images"):
        extract_features(mean, images, batch_size=5)


def test_digest_sees_values_names_and_shapes():
    linear = torch.nn.Linear(2, 3)
    before = weights_digest(linear)
    with torch.no_grad():
        linear.weight[0, 0] += 1e-6
    assert weights_digest(linear) != before
    assert weights_digest(torch.nn.Sequential(linear)) != weights_digest(linear)
    scalar = torch.nn.BatchNorm1d(2)
    assert weights_digest(scalar) == weights_digest(scalar)
