"""Sealed folders: what is not exactly what was sealed is named, wherever it is stored."""

import json
import os
import pickle
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.manifest import DamagedCheckpointError, fields_digest
from cluster.sealing import opened, save_sealed, seal, verify
from cluster.storage import RunStore

FILES = {
    "config.json": b'{"layers": 2}',
    "unet/weights.safetensors": bytes(range(256)) * 40,
    "unet/config.json": b'{"side": 16}',
    "empty.txt": b"",
}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "source"


@pytest.fixture
def sealed(store: RunStore, source: Path) -> RunStore:
    save_sealed(store, "pipeline", source)
    return store


def overwrite(store: RunStore, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file of the store behind the seal's back."""
    store.fs.pipe_file(store.path(name), change(store.read_bytes(name)))


def test_a_seal_names_every_file_and_is_the_same_for_the_same_content(
    store: RunStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = save_sealed(store, "pipeline", source)
    found = verify(store, "pipeline")
    assert found.digest == digest
    assert {name: entry["bytes"] for name, entry in found.files.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert abs(found.created - time.time()) < 3600
    monkeypatch.setattr(time, "time", lambda: found.created + 1000.0)
    store.write_folder("copy", source)
    assert seal(store, "copy") == digest
    assert verify(store, "copy").created == found.created + 1000
    assert seal(store, "pipeline") == digest
    store.write_text("copy/config.json", '{"layers": 3}')
    assert seal(store, "copy") != digest


def flip(content: bytes) -> bytes:
    middle = len(content) * 2 // 3
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "one bit": (flip, "does not match its checksum"),
    "cut off": (lambda content: content[:-1], "bytes instead of"),
    "longer": (lambda content: content + b"x", "bytes instead of"),
    "zeros": (lambda content: bytes(len(content)), "does not match its checksum"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["config.json", "unet/weights.safetensors"])
def test_a_damaged_file_is_named(sealed: RunStore, file: str, how: str) -> None:
    change, reason = DAMAGE[how]
    overwrite(sealed, f"pipeline/{file}", change)
    with pytest.raises(DamagedCheckpointError, match=reason) as caught:
        verify(sealed, "pipeline")
    assert caught.value.file == file
    assert reason in caught.value.reason
    assert sealed.location(f"pipeline/{file}") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(sealed: RunStore) -> None:
    sealed.delete("pipeline/empty.txt")
    with pytest.raises(DamagedCheckpointError, match=r"empty\.txt is missing"):
        verify(sealed, "pipeline")


@pytest.mark.parametrize("name", ["unet/more.safetensors", "x.json", "weights.bin", "code.py", "a/b/c.txt"])
def test_a_file_of_which_the_seal_does_not_know_is_refused(sealed: RunStore, name: str) -> None:
    sealed.write_bytes(f"pipeline/{name}", b"{}")
    with pytest.raises(DamagedCheckpointError, match="no part of what was sealed") as caught:
        verify(sealed, "pipeline")
    assert caught.value.file == name


def test_hidden_files_are_left_out(sealed: RunStore, source: Path) -> None:
    before = verify(sealed, "pipeline")
    for name in (".DS_Store", "unet/.nfs0001", ".cache/index.json"):
        sealed.write_bytes(f"pipeline/{name}", b"x")
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x")
    assert verify(sealed, "pipeline") == before
    assert save_sealed(sealed, "pipeline", source) == before.digest


def test_a_folder_without_a_seal_is_refused_with_the_command_that_makes_one(
    store: RunStore, source: Path
) -> None:
    store.write_folder("pipeline", source)
    with pytest.raises(DamagedCheckpointError, match=r"python -m jobs\.serve seal RUN"):
        verify(store, "pipeline")
    with pytest.raises(ValueError, match="holds no files"):
        seal(store, "policy")


def test_every_single_byte_of_the_seal_is_guarded(tmp_path: Path, source: Path) -> None:
    store = RunStore(tmp_path / "run")
    save_sealed(store, "pipeline", source)
    good, path = verify(store, "pipeline"), tmp_path / "run/pipeline/manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            found = verify(store, "pipeline")
        except DamagedCheckpointError:
            continue
        assert found == good  # only whitespace may change unnoticed


@pytest.mark.parametrize(
    "files",
    [
        {"../secret": {"bytes": 1, "sha256": "0" * 64}},
        {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}},
        {"a/./b": {"bytes": 1, "sha256": "0" * 64}},
        {"": {"bytes": 1, "sha256": "0" * 64}},
        {"config.json": {"bytes": 1}},
        {"config.json": "x"},
        {},
        ["config.json"],
        None,
    ],
)
def test_a_well_sealed_manifest_of_nonsense_is_refused(sealed: RunStore, files: object) -> None:
    fields = {"format": 1, "created": 5, "files": files}
    sealed.write_text("pipeline/manifest.json", json.dumps({**fields, "sha256": fields_digest(fields)}))
    with pytest.raises(DamagedCheckpointError, match="is not a seal"):
        verify(sealed, "pipeline")


def test_saving_again_replaces_the_whole_content(sealed: RunStore, source: Path) -> None:
    (source / "empty.txt").unlink()
    (source / "config.json").write_text("{}")
    digest = save_sealed(sealed, "pipeline", source)
    found = verify(sealed, "pipeline")
    assert found.digest == digest
    assert found.files.keys() == FILES.keys() - {"empty.txt"}
    assert not sealed.exists("pipeline/empty.txt")


@pytest.mark.parametrize("writes", range(len(FILES) + 1))
def test_a_save_that_breaks_off_leaves_no_seal(
    sealed: RunStore, source: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    staged, left = RunStore.staged, [writes]

    def failing(store: RunStore, name: str) -> object:
        if not left[0]:
            raise OSError("connection lost")
        left[0] -= 1
        return staged(store, name)

    monkeypatch.setattr(RunStore, "staged", failing)
    with pytest.raises(OSError, match="connection lost"):
        save_sealed(sealed, "pipeline", source)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing"):
        verify(sealed, "pipeline")


def test_a_fault_on_the_way_to_the_store_is_found(
    store: RunStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RunStore.write_folder

    def lossy(store: RunStore, name: str, folder: Path) -> None:
        write(store, name, folder)
        overwrite(store, f"{name}/unet/config.json", flip)

    monkeypatch.setattr(RunStore, "write_folder", lossy)
    save_sealed(store, "pipeline", source)
    with pytest.raises(DamagedCheckpointError, match=r"unet/config\.json does not match"):
        verify(store, "pipeline")


def test_a_file_of_the_seals_own_name_is_not_saved(store: RunStore, source: Path) -> None:
    (source / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="save that file under another"):
        save_sealed(store, "pipeline", source)


def test_what_is_opened_is_what_was_checked(sealed: RunStore) -> None:
    with opened(sealed, "pipeline") as (folder, found):
        assert found == verify(sealed, "pipeline")
        for name, content in FILES.items():
            assert (folder / name).read_bytes() == content


def test_it_is_the_fetched_copy_that_is_checked(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(f"memory://{uuid.uuid4().hex}")
    save_sealed(store, "pipeline", source)
    fetch, fetched = store.fs.get_file, []

    def lossy(remote: str, local: str) -> None:
        fetch(remote, local)
        fetched.append(remote)
        if remote.endswith("weights.safetensors"):
            os.truncate(local, 100)

    monkeypatch.setattr(store.fs, "get_file", lossy)
    with (
        pytest.raises(DamagedCheckpointError, match=r"has 100 bytes instead of") as caught,
        opened(store, "pipeline"),
    ):
        pass
    assert caught.value.file == "unet/weights.safetensors"
    assert len(fetched) == len(set(fetched)) == len(FILES) + 1
    verify(store, "pipeline")


def test_a_folder_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, source: Path) -> None:
    store = RunStore(tmp_path / "run")
    save_sealed(store, "pipeline", source)
    (source / "config.json").write_text("{}")
    with (
        pytest.raises(DamagedCheckpointError, match="replaced while the folder was read"),
        opened(store, "pipeline"),
    ):
        save_sealed(store, "pipeline", source)


def test_what_was_damaged_is_still_told_in_another_process(sealed: RunStore) -> None:
    sealed.delete("pipeline/config.json")
    with pytest.raises(DamagedCheckpointError) as caught:
        verify(sealed, "pipeline")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.file, error.reason) == (str(caught.value), "config.json", "is missing")
