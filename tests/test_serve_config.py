"""What `jobs.serve` makes of a configuration, and what it says of a bad one."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from actors.serving.application import IMPORT_PATH, serve_config
from actors.serving.config import ServiceConfig
from actors.serving.keys import Keyring
from cluster.serving import Serving, ServingError, last_line
from jobs import serve
from jobs.serve_promote import find
from jobs.serve_settings import KeyMakingConfig, ManifestConfig, ServeConfig

ROOT = Path(__file__).resolve().parent.parent
MODELS: dict[str, Any] = {
    "images": {"models": [{"name": "digits", "checkpoint": "student"}]},
    "actions": {"models": [{"name": "blocks", "checkpoint": "policy"}]},
}


@pytest.fixture
def root(tiny_run: str, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "student")
    return tmp_path


def images_only(root: Path, **changes: Any) -> ServeConfig:
    return ServeConfig.model_validate({"root": str(root), "images": MODELS["images"]} | changes)


def deployments(config: ServiceConfig) -> dict[str, Any]:
    return {each["name"]: each for each in serve_config(config)["applications"][0]["deployments"]}


def test_serve_itself_accepts_what_is_deployed() -> None:
    config = ServiceConfig.model_validate(MODELS | {"simulator": {}})
    accepted = ServeDeploySchema.model_validate(serve_config(config))
    (application,) = accepted.applications
    assert application.import_path == IMPORT_PATH
    assert [each.name for each in application.deployments] == [
        "Gateway", "ImageServer", "ActionServer", "Simulator",
    ]  # fmt: skip
    assert ServiceConfig.model_validate(application.args) == config


def test_nothing_is_exposed_or_unbounded_unless_asked_for() -> None:
    config = ServiceConfig.model_validate(MODELS)
    assert serve_config(config)["http_options"] == {"host": "127.0.0.1", "port": 8000}
    for name in ("Gateway", "ImageServer", "ActionServer"):
        assert deployments(config)[name]["max_queued_requests"] > 0
        assert deployments(config)[name]["max_ongoing_requests"] > 5


def test_a_range_of_replicas_scales_between_its_ends() -> None:
    images = MODELS["images"] | {"replicas": {"count": 1, "most": 4, "target_ongoing": 6}}
    deployed = deployments(ServiceConfig.model_validate({"images": images}))["ImageServer"]
    assert "num_replicas" not in deployed
    assert deployed["autoscaling_config"] == {
        "min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 6.0,
    }  # fmt: skip


def test_only_user_config_names_the_checkpoint_in_force() -> None:
    config = ServiceConfig.model_validate(MODELS)
    application = serve_config(config)["applications"][0]
    entry, deployment, name = find(application, "digits")
    assert (entry, deployment, name) == ({"checkpoint": "student", "previous": None}, "ImageServer", "digits")
    with pytest.raises(ValueError, match="model is not given: give one of digits, blocks"):
        find(application, None)
    with pytest.raises(ValueError, match="model=cats is not served: give one of digits, blocks"):
        find(application, "cats")


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "name a checkpoint to serve"),
    ({"images": {"models": [{"name": "a", "checkpoint": "x"}] * 2}}, "a is the name of two"),
    ({"images": {"models": [{"name": "../a", "checkpoint": "x"}]}}, "pattern"),
    (MODELS | {"images": MODELS["images"] | {"replicas": {"count": 3, "most": 2}}}, "below count=3"),
    ({"images": MODELS["images"], "simulator": {}}, "no policy to play"),
    (MODELS | {"keys": [{"name": "a", "sha256": "secret"}]}, "pattern"),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_a_configuration_that_cannot_be_served_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServiceConfig.model_validate(fields)


def test_checking_deploys_nothing_and_tells_versions(root: Path) -> None:
    told = serve.main(images_only(root, check=True))
    assert told["checked"] is True
    assert told["digits"].startswith("student@final-")


DAMAGE = [
    (lambda root: shutil.rmtree(root / "student"), "images.models\\[0\\].checkpoint: checkpoint 'student'"),
    (lambda root: (root / "student/pipeline/manifest.json").unlink(), "jobs.serve seal"),
    (lambda root: (root / "student/pipeline/unet/config.json").write_text("{}"), "config.json has 2 bytes"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_checking_finds_a_bad_checkpoint(root: Path, damage: Any, words: str) -> None:
    damage(root)
    with pytest.raises(ValueError, match=words) as refused:
        serve.main(images_only(root, check=True))
    assert "\n" not in str(refused.value)
    assert str(root) not in str(refused.value)


def test_the_command_line_says_it_in_one_line(root: Path) -> None:
    path = root / "serve.yaml"
    path.write_text(
        yaml.safe_dump({"root": str(root), "images": {"models": [{"name": "a", "checkpoint": ".."}]}})
    )
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.serve", str(path), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(
        "error: images.models[0].checkpoint: checkpoint '..' is no name"
    )


def test_the_manifest_is_written_for_serve_deploy(root: Path) -> None:
    out = root / "deploy" / "serve.yaml"
    serve.write_manifest(ManifestConfig.model_validate(images_only(root).model_dump() | {"out": str(out)}))
    written = yaml.safe_load(out.read_text())
    ServeDeploySchema.model_validate(written)
    assert written["applications"][0]["args"]["root"] == str(root)


def test_a_key_is_told_once_and_kept_as_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    entry = serve.make_key(KeyMakingConfig(name="alice", requests_per_minute=60))
    token = capsys.readouterr().err.split("token (shown once): ")[1].split()[0]
    assert entry["sha256"] == hashlib.sha256(token.encode()).hexdigest()
    assert token not in json.dumps(entry)
    config = ServiceConfig.model_validate(MODELS | {"keys": [entry]})
    assert Keyring(config.keys).admit(f"Bearer {token}") == "alice"


def test_verbs_take_their_field_bare() -> None:
    assert serve.arguments(["promote", "a@3", "model=x"])[2] == ["checkpoint=a@3", "model=x"]
    assert serve.arguments(["key", "name=a"])[2] == ["name=a"]
    assert serve.arguments(["serve.yaml", "--check"])[0] is serve.main


def test_a_dashboard_that_is_not_there_is_named_in_one_line() -> None:
    with pytest.raises(
        ServingError, match=r"dashboard=http://127\.0\.0\.1:9: no Ray dashboard answers"
    ) as refused:
        Serving("http://127.0.0.1:9")
    assert "\n" not in str(refused.value)


def test_the_telling_line_of_a_trace_is_found() -> None:
    assert last_line("Traceback\n  File x\nValueError: bad\n\n") == "ValueError: bad"
    assert last_line("KeyError: 1\nAnd then some words\n") == "KeyError: 1"
    assert last_line("") == ""
