"""Checkpoints: what is saved comes back bit for bit, and what is not whole is never read."""

import json
import logging
import multiprocessing
import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from torch import Tensor

from cluster.checkpoints import (
    DamagedCheckpointError,
    checkpoint_steps,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from cluster.storage import RunStore


class FailingFile(MemoryFile):
    """A file that takes part of what is written and then loses the connection."""

    def write(self, data: bytes) -> int:
        if FailingFileSystem.writes_left <= 0:
            super().write(bytes(data)[: len(data) // 2])
            raise OSError("connection lost")
        FailingFileSystem.writes_left -= 1
        return super().write(data)


class FailingFileSystem(MemoryFileSystem):
    """A remote store that fails in the middle of a write, after `writes_left` good ones."""

    protocol = "failing"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    writes_left = 10**9

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **options)
        file = FailingFile(self, self._strip_protocol(path))
        file.commit()
        return file

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def failing() -> Iterator[RunStore]:
    FailingFileSystem.writes_left = 10**9
    yield RunStore(f"failing://{uuid.uuid4().hex}")
    FailingFileSystem.store.clear()


def state(step: int, size: int = 64) -> dict[str, dict[str, Tensor]]:
    weights = torch.arange(size, dtype=torch.float32) + step
    return {"student": {"w": weights, "b": weights[:3]}, "panel": {"step": torch.tensor(step)}}


def assert_is(store: RunStore, step: int) -> None:
    """The newest whole checkpoint is exactly what `state(step)` saved."""
    checkpoint = latest_checkpoint(store)
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.meta == {"samples": step * 10}
    for name, tensors in state(step).items():
        loaded = checkpoint.tensors(name)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def save(store: RunStore, step: int) -> str:
    return save_checkpoint(store, step, state(step), {"samples": step * 10})


def test_the_newest_checkpoint_comes_back_and_a_step_can_be_saved_again(store: RunStore) -> None:
    assert latest_checkpoint(store) is None
    assert save(store, 120) == "checkpoints/step-00000120"
    save(store, 9)
    assert_is(store, 120)
    save_checkpoint(store, 120, {"other": {"x": torch.zeros(2)}}, {})
    assert load_checkpoint(store, 120).files.keys() == {"other"}
    for _ in range(3):
        save(store, 120)
        assert_is(store, 120)
    assert len(store.list("checkpoints/step-00000120", unfinished=True)) == 3
    assert checkpoint_steps(store) == [9, 120]


def test_a_first_save_uses_the_plain_names(tmp_path: Path) -> None:
    save(RunStore(tmp_path), 7)
    files = {path.name for path in (tmp_path / "checkpoints/step-00000007").iterdir()}
    assert files == {"student.safetensors", "panel.safetensors", "manifest.json"}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_keeps_its_bits(store: RunStore, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 2.5, 3.0]).to(dtype)
    save_checkpoint(store, 1, {"x": {"v": values, "scalar": values[1], "empty": values[:0]}}, {})
    loaded = load_checkpoint(store, 1).tensors("x")
    assert loaded["v"].dtype == dtype
    assert torch.equal(loaded["v"], values)
    assert loaded["scalar"].shape == ()
    assert loaded["empty"].shape == (0,)


def test_tensors_that_share_memory_or_are_not_contiguous_keep_their_values(store: RunStore) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.t(),
        "row": base[2],
        "column": base[:, 1],
        "expanded": base[0, :1].expand(5),
        "flipped": base.flip(0),
        "grad": base.clone().requires_grad_(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    save_checkpoint(store, 1, {"x": tensors}, {})
    loaded = load_checkpoint(store, 1).tensors("x")
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_meta_comes_back_exactly(store: RunStore) -> None:
    meta = {
        "seed": 2**63 + 1,
        "lr": 0.1 + 0.2,
        "best": float("inf"),
        "names": ["a", None],
        "nested": {"x": {}},
    }
    save_checkpoint(store, 1, {}, meta)
    assert load_checkpoint(store, 1).meta == meta
    save_checkpoint(store, 2, {}, {7: "int keys become strings, as JSON has them", 11: 0})
    assert load_checkpoint(store, 2).meta.keys() == {"7", "11"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, {}, {}), "step -1"),
        ((1, {"a/b": {}}, {}), "'a/b'"),
        ((1, {"a": {"w": 3}}, {}), r"a\['w'\] is a int"),
        ((1, {}, {"x": object()}), "meta cannot be written as JSON"),
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(
    store: RunStore, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        save_checkpoint(store, *arguments)
    assert store.list(unfinished=True) == []


def test_an_unknown_name_or_step_is_named(store: RunStore) -> None:
    save(store, 1)
    with pytest.raises(ValueError, match=r"no 'teacher'; it has \['panel', 'student'\]"):
        load_checkpoint(store, 1).tensors("teacher")
    with pytest.raises(DamagedCheckpointError, match="was never finished"):
        load_checkpoint(store, 2)


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [_flip_bit, _truncate, _empty, _zeros, Path.unlink])
@pytest.mark.parametrize("file", ["student.safetensors", "panel.safetensors", "manifest.json"])
def test_a_damaged_file_makes_the_checkpoint_before_it_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None]
) -> None:
    store = RunStore(tmp_path)
    save(store, 1)
    save(store, 2)
    damage(tmp_path / "checkpoints/step-00000002" / file)
    with caplog.at_level(logging.WARNING):
        assert_is(store, 1)
    assert f"step-00000002/{file}" in caplog.text
    save(store, 2)
    assert_is(store, 2)


def test_every_single_byte_of_the_manifest_is_guarded(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    save_checkpoint(store, 1, {"a": {"w": torch.ones(1)}}, {"samples": 10, "best": 0.5})
    path = tmp_path / "checkpoints/step-00000001/manifest.json"
    good = path.read_bytes()
    fields = json.loads(good)
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            loaded = load_checkpoint(store, 1)
        except DamagedCheckpointError:
            continue
        assert loaded.meta == fields["meta"]  # only whitespace may change unnoticed


def test_a_manifest_of_another_step_or_format_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    save(store, 1)
    (tmp_path / "checkpoints/step-00000001").rename(tmp_path / "checkpoints/step-00000003")
    with pytest.raises(DamagedCheckpointError, match="is of step 1"):
        load_checkpoint(store, 3)


def test_a_lost_connection_is_not_taken_for_a_damaged_checkpoint(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("credentials expired")

    monkeypatch.setattr(store, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        latest_checkpoint(store)


@pytest.mark.parametrize("writes_left", range(3))
def test_a_store_that_fails_in_a_write_keeps_the_checkpoint_before(
    failing: RunStore, writes_left: int
) -> None:
    save(failing, 1)
    save(failing, 2)
    for step in (2, 3):
        FailingFileSystem.writes_left = writes_left
        with pytest.raises(OSError, match="connection lost"):
            save_checkpoint(failing, step, state(99), {})
        FailingFileSystem.writes_left = 10**9
        assert_is(failing, 2)
    save(failing, 3)
    assert_is(failing, 3)
    assert len(failing.list("checkpoints/step-00000003", unfinished=True)) == 3


def test_the_failing_store_would_let_a_half_file_through(failing: RunStore) -> None:
    FailingFileSystem.writes_left = 0
    with pytest.raises(OSError, match="connection lost"), failing.fs.open(failing.path("x"), "wb") as file:
        file.write(b"whole")
    assert failing.read_bytes("x") == b"wh"


def test_prune_keeps_the_newest_and_what_is_still_being_written(store: RunStore) -> None:
    for step in (1, 2, 3, 4):
        save(store, step)
    store.delete("checkpoints/step-00000001/manifest.json")
    store.write_text("checkpoints/step-00000009/student.safetensors", "in progress")
    prune_checkpoints(store, keep=2)
    assert checkpoint_steps(store) == [3, 4, 9]
    assert_is(store, 4)
    prune_checkpoints(store, keep=5)
    assert checkpoint_steps(store) == [3, 4, 9]
    with pytest.raises(ValueError, match="keep 0"):
        prune_checkpoints(store, keep=0)


def test_a_removal_cut_short_leaves_nothing_that_looks_whole(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(store, step)
    deleted: list[str] = []
    delete = store.delete

    def fail_on_the_second(name: str) -> None:
        deleted.append(name)
        if len(deleted) == 2:
            raise OSError("connection lost")
        delete(name)

    monkeypatch.setattr(store, "delete", fail_on_the_second)
    with pytest.raises(OSError, match="connection lost"):
        prune_checkpoints(store, keep=2)
    with pytest.raises(DamagedCheckpointError, match="was never finished"):
        load_checkpoint(store, 1)


def test_prune_clears_a_step_that_was_killed_before_its_first_file_was_whole(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000002").mkdir()
    (tmp_path / "checkpoints/step-00000002/.student.safetensors.tmp-0").write_bytes(b"half")
    assert latest_checkpoint(store) is None
    save(store, 3)
    prune_checkpoints(store, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_truncated_file_is_told_by_its_size(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    save(store, 1)
    path = tmp_path / "checkpoints/step-00000001/student.safetensors"
    size = path.stat().st_size
    _truncate(path)
    with pytest.raises(DamagedCheckpointError, match=f"has {size - 1} bytes instead of {size}"):
        load_checkpoint(store, 1)


def _save_until_killed(uri: str, first: int, saved: Any) -> None:
    store = RunStore(uri)
    for step in range(first, first + 10**6):
        save_checkpoint(store, step // 2, state(step // 2, 50_000), {"samples": (step // 2) * 10})
        prune_checkpoints(store)
        saved.value = step // 2


def test_a_process_killed_while_saving_always_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["cluster.checkpoints"])
    saved = processes.Value("q", 0)
    for round_ in range(8):
        before = saved.value
        child = processes.Process(target=_save_until_killed, args=(str(tmp_path), 2 * before + 1, saved))
        child.start()
        deadline = time.monotonic() + 240
        while saved.value == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.Random(round_).uniform(0, 0.03))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        checkpoint = latest_checkpoint(store)
        assert checkpoint is not None
        assert checkpoint.step in (saved.value, saved.value + 1)
        assert checkpoint.step > 0
        expected = state(checkpoint.step, 50_000)["student"]["w"]
        assert torch.equal(checkpoint.tensors("student")["w"], expected)
    save_checkpoint(store, saved.value + 2, {}, {})
    prune_checkpoints(store, keep=1)
    assert len(list(tmp_path.rglob("*"))) == 3, "the leavings of killed writers are cleared away"
