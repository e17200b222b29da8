"""RunStore on a local path, in memory and on S3: whole files or none, and names that stay inside."""

import io
import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.environment import describe_environment
from cluster.metrics_log import MetricsLog, read_metrics
from cluster.storage import RunStore, save_image


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def uri(
    request: pytest.FixtureRequest, tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    if request.param == "local":
        return str(tmp_path / "runs" / "one [a*]")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex}"
    RunStore(f"s3://{bucket}/x").fs.mkdir(bucket)
    return f"s3://{bucket}/runs/one"


def test_a_file_comes_back_as_written_and_a_second_write_replaces_it(uri: str) -> None:
    store = RunStore(uri)
    assert store.list() == []
    assert not store.exists("a/b.txt")
    store.write_text("a/b.txt", "first, and longer")
    store.write_text("a/b.txt", "caf\u00e9")
    store.write_bytes("top.bin", b"\x00\xff")
    again = RunStore(uri)
    assert again.read_text("a/b.txt") == "caf\u00e9"
    assert again.read_bytes("top.bin") == b"\x00\xff"
    assert again.list() == ["a/b.txt", "top.bin"]
    assert again.list("a") == ["a/b.txt"]
    assert again.list(unfinished=True) == again.list()
    assert again.exists("a")
    assert again.children("a") == ["b.txt"]
    assert again.children("nowhere") == []
    assert RunStore(uri.rpartition("/")[0]).children(uri.rpartition("/")[2]) == ["a", "top.bin"]
    store.delete("a")
    assert again.list() == ["top.bin"]
    store.delete("a")


def test_append_adds_to_the_end_and_creates_the_file(uri: str) -> None:
    store = RunStore(uri)
    for part in (b"one", b"two", b"three"):
        store.append("log/rows", part)
    assert RunStore(uri).read_bytes("log/rows") == b"onetwothree"


def test_append_rewrites_the_file_where_the_store_cannot_append(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(f"memory://{uuid.uuid4().hex}")
    plain_open = MemoryFileSystem._open

    def refuse(self: MemoryFileSystem, path: str, mode: str = "rb", **options: object) -> object:
        if mode == "ab":
            raise NotImplementedError("append")
        return plain_open(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    store.append("rows", b"one")
    store.append("rows", b"two")
    assert store.read_bytes("rows") == b"onetwo"


def test_a_folder_is_stored_with_its_json_last_and_read_back(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    (source / "unet").mkdir(parents=True)
    (source / "a_config.json").write_text("{}")
    (source / "unet" / "weights.bin").write_bytes(b"w")
    store = RunStore(uri)
    order = []
    staged = store.staged
    monkeypatch.setattr(store, "staged", lambda name: order.append(name) or staged(name))
    store.write_folder("student", source)
    assert order == ["student/unet/weights.bin", "student/a_config.json"]
    with store.local_folder("student") as folder:
        assert (folder / "a_config.json").read_text() == "{}"
        assert (folder / "unet/weights.bin").read_bytes() == b"w"


def test_a_writer_that_raises_leaves_the_old_file_and_nothing_beside_it(uri: str) -> None:
    store = RunStore(uri)
    store.write_text("report.html", "old")

    def write_half() -> None:
        with store.staged("report.html") as local:
            local.write_text("ne")
            raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        write_half()
    assert store.read_text("report.html") == "old"
    assert store.list(unfinished=True) == ["report.html"]


@pytest.mark.parametrize("name", ["../outside", "a/../../b", "/etc/passwd", "", "."])
def test_a_name_that_leaves_the_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must be relative to the run"):
        RunStore(tmp_path).write_text(name, "x")


@pytest.mark.parametrize(
    ("uri", "words"),
    [("nosuch://x", "nosuch"), ("memory://a[1]/b", r"must not contain"), ("gs://b/x", "gcsfs")],
)
def test_a_uri_that_cannot_work_is_named(uri: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunStore(uri)


def test_location_is_what_a_person_can_open(tmp_path: Path) -> None:
    assert RunStore(tmp_path).location("report.html") == str(tmp_path / "report.html")
    assert RunStore("memory://run").location("report.html") == "memory:///run/report.html"


def test_an_image_is_stored_as_png(uri: str) -> None:
    image = Image.new("L", (3, 2), color=7)
    save_image(RunStore(uri), "grids/one.png", image)
    read = Image.open(io.BytesIO(RunStore(uri).read_bytes("grids/one.png")))
    assert read.format == "PNG"
    assert read.tobytes() == image.tobytes()


def test_the_environment_is_json_and_names_commit_and_versions() -> None:
    environment = json.loads(json.dumps(describe_environment()))
    assert environment["versions"]["torch"].startswith("2.")
    assert environment["commit"] is None or len(environment["commit"]) == 40


def test_metrics_of_a_remote_run_are_rows_and_tensorboard_events(uri: str, tmp_path: Path) -> None:
    with MetricsLog(RunStore(uri)) as log:
        log.log(1, loss=0.5, band={"10": 1.0})
    assert read_metrics(RunStore(uri)) == [{"step": 1, "loss": 0.5, "band": {"10": 1.0}}]
    with RunStore(uri).local_folder("tensorboard") as folder:
        events = EventAccumulator(str(folder)).Reload()
        assert [event.value for event in events.Scalars("loss")] == [0.5]
        assert [event.step for event in events.Scalars("band/10")] == [1]
