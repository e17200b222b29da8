"""The whole way of a served model: trained, deployed, asked by every kind of client, swapped, hurt, ended."""

import base64
import concurrent.futures
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import page_steps
import pytest
import websockets.exceptions
import websockets.sync.client
import yaml
from malformed import hammer
from PIL import Image
from served import Service, serving

from actors.serving.frames import pack, unpack
from cluster.serving import Serving
from cluster.storage import RunStore
from counterpoint.environments.config import EnvironmentConfig, build_environment
from counterpoint.policies.bundle import PolicyBundle
from counterpoint.seeds import generator
from counterpoint.selection.choice import decide
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream
from jobs.runs import load_pipeline
from jobs.serve import write_manifest
from jobs.serve_promote import promote, rollback
from jobs.serve_settings import ManifestConfig, PromoteConfig, RollbackConfig

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CONFIG: dict[str, Any] = {
    "images": {
        "models": [
            {"name": "digits", "checkpoint": "student", "classes": NAMES},
            {"name": "teacher", "checkpoint": "teacher", "max_steps": 1000},
        ],
        "replicas": {"count": 2, "cpus": 0.1},
        "resident": 1,
        "unlisted": True,
    },
    "actions": {"models": [{"name": "blocks", "checkpoint": "policy"}], "replicas": {"cpus": 0.1}},
    "simulator": {"cpus": 0.1},
    "gateways": {"cpus": 0.1},
}
MOST_GROWTH = 60e6
"""Bytes by which a process may grow under a thousand bad requests: allocators keep some of what they had."""


@pytest.fixture(scope="module")
def service(
    tiny_run: str, tiny_teacher: str, tiny_policy: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    for name, run in (("student", tiny_run), ("teacher", tiny_teacher), ("policy", tiny_policy)):
        shutil.copytree(run, folder / name)
    with serving(CONFIG, folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=240.0) as opened:
        yield opened


def asked(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/images/generations", json={"model": "digits", "prompt": "three"} | fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def pixels(image: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def made(run: Path, label: int, steps: int, seed: int, count: int) -> np.ndarray:
    """What the saved pipeline makes of the same question, as uint8."""
    pipeline = load_pipeline(RunStore(str(run)))
    pipeline.set_progress_bar_config(disable=True)
    streams = [generator(seed, "sample", label, k) for k in range(count)]
    (images,) = pipeline([label] * count, steps, 1.0, streams, output_type="pt", return_dict=False)
    return np.rint((images.numpy()[:, 0] + 1.0) * 127.5).astype(np.uint8)


def test_the_openai_client_gets_what_the_pipeline_makes(service: Service) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as sdk:
        assert [model.id for model in sdk.models.list()] == ["digits", "teacher", "blocks"]
        answer = sdk.images.generate(
            model="digits", prompt="a handwritten three", n=2, response_format="b64_json", size="auto",
            extra_body={"seed": 11, "num_inference_steps": 4},
        )  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.images.generate(model="digits", prompt="three", extra_body={"num_inference_steps": 5})
    assert refused.value.param == "num_inference_steps"
    expected = made(service.folder / "student", label=3, steps=4, seed=11, count=2)
    assert answer.data is not None
    for image, reference in zip(answer.data, expected, strict=True):
        difference = pixels(image.b64_json).astype(int) - reference
        assert np.abs(difference).max() <= 1  # a rounding apart, as batch sizes differ


def test_an_answer_is_the_same_bits_alone_and_among_others(client: httpx2.Client) -> None:
    questions = [
        {"class_label": k % 10, "num_inference_steps": 1 + k % 4, "seed": k, "guidance_scale": 1.0 + k % 2}
        for k in range(24)
    ]
    for question in questions:
        question["prompt"] = NAMES[question.pop("class_label")]  # type: ignore[arg-type,call-overload]
    alone = [asked(client, **question) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda question: asked(client, **question), questions))
    assert max(answer["timings"]["batch_size"] for answer in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert one["data"] == other["data"]


def test_models_that_take_turns_in_memory_stay_themselves(service: Service, client: httpx2.Client) -> None:
    questions = [{"model": "digits"}, {"model": "teacher", "num_inference_steps": 8}]
    first = [asked(client, prompt="3", seed=2, **question) for question in questions]
    assert first[0]["version"] != first[1]["version"]
    for _ in range(2):
        again = [asked(client, prompt="3", seed=2, **question) for question in questions]
        assert [answer["data"] for answer in again] == [answer["data"] for answer in first]


def test_a_checkpoint_below_the_root_may_be_named_and_no_other(
    service: Service, client: httpx2.Client
) -> None:
    step = max(int(path.name[5:]) for path in (service.folder / "student/checkpoints").iterdir())
    named = asked(client, model=f"student@{step}", prompt="3", seed=2)
    assert named["version"].startswith(f"student@{step}-")
    assert named["data"] == asked(client, prompt="3", seed=2)["data"]  # the run ended with that step
    for name in ("../student", "/etc", "student@999999", "student/../teacher", "nobody"):
        refused = client.post("/v1/images/generations", json={"model": name, "prompt": "3"})
        assert refused.status_code == 404
        assert refused.json()["error"]["param"] == "model"
        assert str(service.folder) not in refused.text


def test_a_websocket_client_gets_what_the_policy_decides(service: Service) -> None:
    bundle = PolicyBundle.load(service.folder / "policy/policy")
    shown = build_environment(EnvironmentConfig()).start(5)
    selection = SelectionConfig(rule="masked_condition", mask="text", candidates=3)
    address = service.url.replace("http", "ws")
    question = {
        "observation/image": shown.images["front"], "observation/state": shown.state,
        "prompt": shown.instruction,
    }  # fmt: skip
    path = "/v1/actions/stream?selection=mg-select&mask=text&num_candidates=3&seed=9"
    with websockets.sync.client.connect(address + path, max_size=None, compression=None) as session:
        metadata = unpack(session.recv(), 2**20)
        for decision in range(2):
            session.send(pack(question))
            answer = unpack(session.recv(), 2**20)
            expected = decide(bundle, [shown], [Stream(9, decision)], selection, 0)[0]
            np.testing.assert_allclose(answer["actions"], expected.actions, atol=1e-5)
            assert answer["decision"] == decision
    assert metadata["version"] == answer["version"]
    assert answer["policy_timing"]["infer_ms"] > 0


def test_an_openpi_client_is_served_at_the_root_and_a_bad_one_refused(service: Service) -> None:
    shown = build_environment(EnvironmentConfig()).start(5)
    address = service.url.replace("http", "ws")
    question = {
        "observation/image": shown.images["front"], "observation/state": shown.state, "prompt": "x" * 2**21,
    }  # fmt: skip
    with websockets.sync.client.connect(address, max_size=None, compression=None) as session:
        assert unpack(session.recv(), 2**20)["version"]
        session.send(pack(question))  # a frame of two megabytes, with words that the policy does not know
        assert json.loads(session.recv())["error"]["code"] == "invalid_value"
        session.send(pack(question | {"prompt": shown.instruction}))
        assert unpack(session.recv(), 2**20)["actions"].dtype == np.float32
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(f"{address}/v1/actions/stream?model=nobody")
    assert refused.value.response.status_code == 404


def test_the_page_makes_pictures_and_plays_an_episode(service: Service) -> None:
    with page_steps.browser() as browser, page_steps.watched(browser, service.url) as page:
        page_steps.generate_images(page)
        page_steps.move_steps(page)
        page_steps.compare_settings(page)
        page_steps.play_episode(page)


def test_no_malformed_request_hurts_it(service: Service, client: httpx2.Client) -> None:
    deployments = ("Gateway", "ImageServer", "ActionServer", "Simulator")
    asked(client)
    before = {name: set(service.replicas(name)) for name in deployments}
    memory = {
        pid: each.memory_info().rss for name in deployments for pid, each in service.replicas(name).items()
    }
    sent = hammer(client, count=1200)
    assert sum(sent.values()) >= 1000
    asked(client)
    assert {name: set(service.replicas(name)) for name in deployments} == before
    for name in deployments:
        for pid, each in service.replicas(name).items():
            assert each.memory_info().rss - memory[pid] < MOST_GROWTH, name


def test_who_hangs_up_leaves_no_place_taken(service: Service, client: httpx2.Client) -> None:
    slow = {"model": "teacher", "prompt": "3", "num_inference_steps": 900, "n": 10}
    for _ in range(3):
        with pytest.raises(httpx2.TimeoutException):
            client.post("/v1/images/generations", json=slow, timeout=0.3)
    asked(client)
    for _ in range(100):
        metrics = client.get("/metrics").text
        found = re.search(r'^counterpoint_queue_length\{kind="images"\} (\S+)$', metrics, re.MULTILINE)
        assert found is not None
        if float(found[1]) == 0.0:
            break
        threading.Event().wait(0.1)
    assert float(found[1]) == 0.0


class Load:
    """A client that asks the same questions over and over, and keeps every answer."""

    def __init__(self, client: httpx2.Client, clients: int = 4) -> None:
        self.client, self.answers = client, []
        self.expected = {seed: asked(client, seed=seed) for seed in range(clients)}
        self._over = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(clients)
        self._runs = [self._pool.submit(self._ask, seed) for seed in range(clients)]

    def _ask(self, seed: int) -> None:
        while not self._over.is_set():
            self.answers.append(asked(self.client, seed=seed))

    def wait_for(self, more: int) -> None:
        wanted = len(self.answers) + more
        while len(self.answers) < wanted:
            assert not any(run.done() for run in self._runs), [run.exception() for run in self._runs]
            threading.Event().wait(0.05)

    def end(self) -> list[dict[str, Any]]:
        self._over.set()
        for run in self._runs:
            run.result(timeout=240)
        self._pool.shutdown()
        return self.answers


def test_a_promotion_under_load_drops_nothing_and_can_be_taken_back(
    service: Service, client: httpx2.Client
) -> None:
    steps = sorted(int(path.name[5:]) for path in (service.folder / "student/checkpoints").iterdir())
    other = f"student@{steps[0]}"
    before, replicas = asked(client)["version"], set(service.replicas("ImageServer"))
    load = Load(client)
    load.wait_for(8)
    told = promote(PromoteConfig(checkpoint=other, model="digits", dashboard=service.dashboard))
    load.wait_for(8)
    back = rollback(RollbackConfig(model="digits", dashboard=service.dashboard))
    load.wait_for(8)
    versions = {answer["version"] for answer in load.end()}
    assert versions == {before, told["version"]}
    assert back["version"] == before
    assert set(service.replicas("ImageServer")) == replicas
    with pytest.raises(ValueError, match="nothing to go back to"):
        rollback(RollbackConfig(model="digits", dashboard=service.dashboard))


def test_the_file_for_serve_deploy_is_taken_as_it_is(service: Service, client: httpx2.Client) -> None:
    replicas = {name: set(service.replicas(name)) for name in ("Gateway", "ImageServer", "ActionServer")}
    out = service.folder / "deploy.yaml"
    source = yaml.safe_load((service.folder / "serve.yaml").read_text())
    write_manifest(ManifestConfig.model_validate(source | {"out": str(out)}))
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [Path(sys.executable).parent / "serve", "deploy", str(out), "-a", service.dashboard],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    Serving(service.dashboard).wait("counterpoint", 240.0)
    asked(client)
    assert {name: set(service.replicas(name)) for name in replicas} == replicas


def test_a_checkpoint_that_is_damaged_is_not_promoted(service: Service, client: httpx2.Client) -> None:
    shutil.copytree(service.folder / "student", service.folder / "hurt", dirs_exist_ok=True)
    weights = service.folder / "hurt/pipeline/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    before = asked(client)["version"]
    with pytest.raises(ValueError, match=r"hurt.*checksum") as refused:
        promote(PromoteConfig(checkpoint="hurt", model="digits", dashboard=service.dashboard))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="no name of a checkpoint"):
        promote(PromoteConfig(checkpoint="../served/student", model="digits", dashboard=service.dashboard))
    assert asked(client)["version"] == before


def test_a_killed_replica_costs_no_request(service: Service, client: httpx2.Client) -> None:
    load = Load(client)
    load.wait_for(8)
    victim = next(iter(service.replicas("ImageServer").values()))
    victim.send_signal(signal.SIGKILL)
    load.wait_for(40)
    for answer in load.end():
        assert answer["data"] == load.expected[answer["seed"]]["data"]


def test_it_ends_in_order(service: Service) -> None:
    told = service.end()
    assert told["url"] == service.url
    assert told["served_s"] > 0
    assert json.dumps(told)
