"""The serving benchmark compares equals: the same pictures by three ways, and ratios of the same round."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from cluster.storage import RunStore
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.seeds import generator
from counterpoint.unet import UNetConfig
from jobs import bench_direct, bench_serve, plain_server, processes
from jobs.bench_direct import DirectBenchConfig
from jobs.bench_serve import ServeBenchConfig
from jobs.load_answers import Asked, decoded
from jobs.load_figures import spread
from jobs.runs import load_pipeline

STANDIN = str(Path(__file__).parent / "standin_service.py")
TINY = {"block_out_channels": [16, 16], "norm_num_groups": 8}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage URI of a student with random weights for 1x8x8 images of four classes."""
    uri = str(tmp_path_factory.mktemp("models") / "student")
    bench_serve.save_untrained(uri, UNetConfig.model_validate(TINY), (1, 8), 4, 0)
    return uri


@pytest.fixture
def pipeline(student: str) -> ClassConditionalPipeline:
    made = load_pipeline(RunStore(student))
    made.set_progress_bar_config(disable=True)
    return made


def test_the_plain_server_answers_with_the_pipelines_pictures(student, pipeline):
    client = TestClient(plain_server.create_app(load_pipeline(RunStore(student))))
    assert client.get("/readyz").status_code == 200
    for asked in (Asked(3, 4, 1.0, 5, images=2), Asked(0, 1, 2.0, 0)):
        answer = client.post("/v1/images/generations", json=asked.body()).json()
        streams = [generator(asked.seed, "sample", asked.label, k) for k in range(asked.images)]
        labels = [asked.label] * asked.images
        images = pipeline(labels, asked.steps, asked.guidance_scale, streams).images
        assert answer["seed"] == asked.seed
        assert len(answer["data"]) == asked.images
        for item, image in zip(answer["data"], images, strict=True):
            assert np.array_equal(decoded(item["b64_json"]), np.asarray(image))


def test_the_plain_server_keeps_requests_apart(student):
    client = TestClient(plain_server.create_app(load_pipeline(RunStore(student))))
    questions = [Asked(k % 4, 1 + k % 4, 1.0, k) for k in range(12)]

    def ask(asked: Asked) -> str:
        answer = client.post("/v1/images/generations", json=asked.body())
        return str(answer.json()["data"][0]["b64_json"])

    alone = [ask(asked) for asked in questions]
    assert len(set(alone)) == 12
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, questions)) == alone


def test_the_plain_server_refuses_what_it_cannot_do(student):
    client = TestClient(plain_server.create_app(load_pipeline(RunStore(student))))
    assert client.post("/v1/images/generations", json=Asked(4, 1, 1.0, 0).body()).status_code == 400
    assert client.post("/v1/images/generations", json=Asked(0, 5, 1.0, 0).body()).status_code == 400
    assert client.post("/v1/images/generations", json={"prompt": "x"}).status_code == 422


def test_the_benchmark_sees_that_a_servers_pictures_are_the_pipelines(student, pipeline):
    port = processes.free_port()
    app = plain_server.create_app(load_pipeline(RunStore(student)))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        url = f"http://127.0.0.1:{port}"
        while not processes.is_ready(url):
            assert thread.is_alive()
            time.sleep(0.02)
        assert bench_serve.difference(url, pipeline, 4) <= 1
        with torch.no_grad():
            pipeline.unet.conv_out.bias += 0.2
        assert bench_serve.difference(url, pipeline, 4) > 1
    finally:
        server.should_exit = True
        thread.join()


def test_direct_calls_are_told_at_their_best_batch_size(student):
    told = bench_direct.main(DirectBenchConfig(run=student, batches=(1, 8), steps=(1, 2), seconds=0.05))
    assert set(told["images_per_second"]) == {1, 8}
    assert told["best"] == max(told["images_per_second"].values())
    assert told["images_per_second"][told["best_batch"]] == told["best"]
    assert torch.get_num_threads() == 1


def a_round(direct: float, serve: float, plain: float, p50: float, p99: float) -> dict:
    opened = {
        "p50_ms": p50, "p99_ms": p99, "rps": 7.0, "goodput": 1.0, "requests": 100, "late_p99_ms": 1.0,
        "client_cpu": 0.1, "failed": 1, "wrong": 0,
    }  # fmt: skip
    loads = [opened | {"failed": 0, "wrong": 2, "client_cpu": 0.3}]
    return {
        "direct": direct, "serve": serve, "plain": plain, "best_batch": 16, "mean_batch": 9.0,
        "open": opened, "loads": loads,
    }  # fmt: skip


def test_ratios_are_of_the_same_round_and_faults_are_summed():
    rounds = [a_round(100, 80, 20, 10, 25), a_round(50, 45, 15, 10, 20), a_round(200, 100, 50, 20, 90)]
    told = bench_serve.headline(ServeBenchConfig(), rounds)
    assert told["of_direct_at_saturation"] == 0.8
    assert told["spread_of_direct_at_saturation"] == [0.5, 0.9]
    assert told["over_plain_fastapi"] == 3.0
    assert told["p99_over_median_at_70"] == 2.5
    assert told["images_per_second_direct"] == 100
    assert (told["failed"], told["wrong"]) == (3, 6)
    assert told["client_cpu"] == 0.3
    assert told["requests_at_70"] == 300
    assert spread("x", [3.0, 1.0, 2.0]) == {"x": 2.0, "spread_x": [1.0, 3.0]}


def test_the_service_of_the_benchmark_serves_the_run_with_room_for_all_clients():
    config = ServeBenchConfig(concurrency=(64, 256), threads=2, steps=(1, 3))
    service = bench_serve.service_config(config, "s3://bucket/runs/digits", 8123)
    assert (service.root, service.images.models[0].checkpoint) == ("s3://bucket/runs", "digits")
    assert service.limits.max_queue >= 256
    assert (service.images.replicas.count, service.images.replicas.threads) == (1, 2)
    assert service.images.models[0].max_steps == 3


def test_a_server_that_ends_before_it_is_ready_is_told_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('error: port=1 is not free')"]
    with (
        pytest.raises(RuntimeError, match=r"ended with code 1 before it was ready: error: port=1"),
        processes.server(command, "http://127.0.0.1:9", tmp_path / "log"),
    ):
        pytest.fail("it was taken for ready")


def test_benchmark_tells_its_figures_and_finds_a_server_of_other_pictures(student, monkeypatch):
    """The servers' places are taken by a stand-in whose pictures are noise, far from the pipeline's."""

    def standins(config, uri, ports, folder):
        return {name: [sys.executable, STANDIN, str(port)] for name, port in ports.items()}

    monkeypatch.setattr(bench_serve, "server_commands", standins)
    monkeypatch.setattr(bench_serve, "call_directly", lambda config, _: bench_direct.main(config))
    short = {"direct_s": 0.1, "saturation_s": 0.4, "open_s": 0.5, "warmup_s": 0.1}
    config = ServeBenchConfig.model_validate(
        short | {"run": student, "steps": [2], "rounds": 1, "batches": [1, 16], "concurrency": [4]}
    )
    told = bench_serve.main(config)
    assert told["grey_levels_from_direct_serve"] > 50
    for figure in ("of_direct_at_saturation", "over_plain_fastapi", "p99_over_median_at_70"):
        assert told[figure] > 0
    assert told["failed"] == told["wrong"] == 0
    assert told["mean_batch"] == 4.0
    assert told["requests_at_70"] > 0
