"""A replica that hosts image generators, without Ray around it."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.serving import image_server
from actors.serving.config import ServiceConfig
from actors.serving.errors import ApiError
from actors.serving.image_server import ImageServer
from actors.serving.messages import ImageRequest, ModelInfo

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def root(tiny_run: str, tmp_path: Path) -> Path:
    for name in ("good", "bad"):
        shutil.copytree(tiny_run, tmp_path / name)
    manifest = tmp_path / "bad/pipeline/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"created": 1}))
    return tmp_path


@pytest.fixture(autouse=True)
def stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the niceness of the tests' own process as it is."""
    monkeypatch.setattr(image_server, "step_back", lambda but: None)


def hosting(root: Path, *models: dict[str, Any]) -> ImageServer:
    config = {"root": str(root), "images": {"models": models, "batching": {"max_batch": 4}}}
    return ImageServer(ServiceConfig.model_validate(config))


def told(server: ImageServer, **models: dict[str, str | None]) -> dict[str, ModelInfo]:
    asyncio.run(server.reconfigure({"models": models}))
    return {info.name: info for info in asyncio.run(server.describe())}


def test_one_checkpoint_under_two_names_is_told_as_each_was_configured(root: Path) -> None:
    server = hosting(
        root, {"name": "few", "checkpoint": "good", "classes": NAMES, "max_steps": 2},
        {"name": "many", "checkpoint": "good", "max_steps": 9},
    )  # fmt: skip
    place = {"checkpoint": "good", "previous": None}
    infos = told(server, few=place, many=place)
    assert (infos["few"].details["classes"], infos["few"].details["max_steps"]) == (NAMES, 2)
    assert infos["many"].details["classes"] == [str(label) for label in range(10)]
    assert infos["many"].details["max_steps"] == 4  # a student takes no more
    server.engine.close()


def test_a_replica_that_starts_after_a_bad_promotion_falls_back_with_its_names(root: Path) -> None:
    server = hosting(root, {"name": "digits", "checkpoint": "good", "classes": NAMES})
    infos = told(server, digits={"checkpoint": "bad", "previous": "good"})
    assert infos["digits"].checkpoint == "good"
    assert infos["digits"].details["classes"] == NAMES
    assert infos["digits"].refused is not None
    answer = asyncio.run(server.generate(ImageRequest("digits", 3), 30.0))
    assert answer.work.version == infos["digits"].version
    server.engine.close()


def test_a_checkpoint_of_other_classes_is_refused(root: Path) -> None:
    server = hosting(root, {"name": "digits", "checkpoint": "good", "classes": NAMES[:3]})
    with pytest.raises(ApiError, match="names 3 classes, its checkpoint has 10"):
        told(server, digits={"checkpoint": "good", "previous": None})
    server.engine.close()


def test_what_does_not_fit_the_model_is_the_clients_mistake(root: Path) -> None:
    server = hosting(root, {"name": "digits", "checkpoint": "good"})
    told(server, digits={"checkpoint": "good", "previous": None})
    with pytest.raises(ApiError) as refused:
        asyncio.run(server.generate(ImageRequest("digits", 3, steps=5), 30.0))
    assert refused.value.code == "invalid_value"
    with pytest.raises(ApiError) as unknown:
        asyncio.run(server.generate(ImageRequest("bad", 3), 30.0))
    assert unknown.value.code == "model_not_found"
    server.engine.close()
    with pytest.raises(ApiError) as closed:
        asyncio.run(server.generate(ImageRequest("digits", 3), 30.0))
    assert closed.value.code == "unavailable"
