"""Checkpoints of a run: safetensors files and a manifest of their checksums, written last.

`checkpoints/step-00000120/` holds `<name>.safetensors` and `manifest.json`. A file counts only when the
manifest names it, and the manifest is put in place at once: that one write is the commit, on every kind of
store. Saving a step again never touches the files which the manifest in force names.

A group of tensors may be spread over files, one per process that saved: rank 0's `<name>` and the others'
`<name>.part-1`, `<name>.part-2` ...; who reads it sees one group, and need not know how many wrote it.
"""

import functools
import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from cluster.checkpoint_names import FOLDER as FOLDER
from cluster.checkpoint_names import NEVER_FINISHED, checkpoint_steps, step_folder
from cluster.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    check_entry,
    damaged,
    local_entry,
    read_manifest,
    verify_file,
    write_manifest,
)
from cluster.storage import RunStore

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_PART = re.compile(r"(.+)\.part-(\d+)")

Meet = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Brings together what every process gives, in the order of their ranks; returns on all of them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was there with the right size and checksum when it was opened."""

    store: RunStore
    step: int
    meta: dict[str, Any]
    files: dict[str, tuple[str, ...]]
    """From the name given at saving to the names in the store of the files that hold it."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors saved under `name`, on the CPU; ValueError when there is no such name."""
        found: dict[str, Tensor] = {}
        for file in self._files(name):
            found |= _load(self.store, file)
        return found

    def stored(self, name: str) -> "StoredTensors":
        """Return the same tensors, each read when it is asked for."""
        return StoredTensors(self.store, self._files(name))

    def _files(self, name: str) -> tuple[str, ...]:
        if name not in self.files:
            raise ValueError(f"checkpoint of step {self.step} has no {name!r}; it has {sorted(self.files)}")
        return self.files[name]


class StoredTensors(Mapping[str, Tensor]):
    """A group of tensors that stay in storage until they are asked for; no more than a file is in memory.

    Ask in the order of iteration: a store that is no local folder is read file by file.
    """

    def __init__(self, store: RunStore, files: tuple[str, ...]) -> None:
        self._store, self._files = store, files
        self._open: dict[str, Any] = {}
        self._newest: tuple[str, Any] = ("", None)

    @functools.cached_property
    def _where(self) -> dict[str, str]:
        return {key: file for file in self._files for key in self._reader(file).keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        reader = self._reader(self._where[key])
        tensor: Tensor = reader[key] if isinstance(reader, dict) else reader.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def _reader(self, file: str) -> Any:
        if self._store.is_local:
            if file not in self._open:
                self._open[file] = safetensors.safe_open(self._store.path(file), framework="pt")
            return self._open[file]
        if self._newest[0] != file:
            self._newest = file, _load(self._store, file)
        return self._newest[1]


def save_checkpoint(
    store: RunStore,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    rank: int = 0,
    meet: Meet = lambda entries: [entries],
) -> str:
    """Store named groups of tensors and JSON-able `meta` as the checkpoint of `step`; return its directory.

    Tensors may be of any dtype and layout, on any device, and may share memory. Several processes save one
    checkpoint together: each calls with its `rank`, its own tensors and a `meet` that waits for all; rank 0
    then commits what all have written. Raises ValueError for a negative step, a group's name that is no file
    name, a value that is no tensor, or meta unfit for JSON.
    """
    if step < 0:
        raise ValueError(f"checkpoint step {step} must not be negative")
    _check(files, meta)
    folder = step_folder(step)
    in_force = _committed_files(store, folder)
    mine = {
        name if rank == 0 else f"{name}.part-{rank}": tensors
        for name, tensors in files.items()
        if tensors or rank == 0
    }
    parts = meet({name: _save_file(store, folder, name, mine[name], in_force) for name in mine})
    if rank > 0:
        return folder
    entries = {name: entry for part in parts for name, entry in part.items()}
    write_manifest(store, folder, {"step": step, "files": entries, "meta": dict(meta)})
    wanted = {entry["file"] for entry in entries.values()} | {MANIFEST}
    for left in store.list(folder, unfinished=True):
        if left.rpartition("/")[2] not in wanted:
            store.delete(left)
    return folder


def latest_checkpoint(store: RunStore) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None; a warning says which newer ones are skipped and why."""
    for step in reversed(checkpoint_steps(store)):
        try:
            return load_checkpoint(store, step)
        except DamagedCheckpointError as damage:
            logger.warning("skipping a checkpoint: %s", damage)
    return None


def load_checkpoint(store: RunStore, step: int) -> Checkpoint:
    """Return the checkpoint of `step` after checking the size and checksum of its every file.

    Raises DamagedCheckpointError, a ValueError, when the checkpoint is missing or not whole.
    """
    folder, manifest = step_folder(step), _manifest_of(store, step)
    for entry in manifest["files"].values():
        verify_file(store, folder, entry["file"], entry)
    return Checkpoint(store, step, manifest["meta"], _grouped(folder, manifest))


def checkpoint_group(store: RunStore, step: int, name: str) -> tuple[dict[str, Tensor], str]:
    """Return one group of tensors of the checkpoint of `step`, on the CPU, and its file's SHA-256 in hex.

    Of several files it is the digest of their digests, one after the other. What is returned is what was
    checked: each file is read once, and the checkpoint's other files not at all.
    Raises DamagedCheckpointError if the group or the manifest is missing or not whole.
    """
    folder, manifest = step_folder(step), _manifest_of(store, step)
    files = _grouped(folder, manifest)
    if name not in files:
        raise damaged(store, folder, MANIFEST, f"names no {name!r}, only {sorted(files)}")
    entries = {f"{folder}/{entry['file']}": entry for entry in manifest["files"].values()}
    found: dict[str, Tensor] = {}
    digests = []
    for path in files[name]:
        file = entries[path]["file"]
        try:
            content = store.read_bytes(path)
        except FileNotFoundError:
            raise damaged(store, folder, file, "is missing") from None
        digests.append(hashlib.sha256(content).hexdigest())
        check_entry(store, folder, file, {"bytes": len(content), "sha256": digests[-1]}, entries[path])
        found |= safetensors.torch.load(content)
    if len(digests) == 1:
        return found, digests[0]
    return found, hashlib.sha256("".join(digests).encode()).hexdigest()


def prune_checkpoints(store: RunStore, keep: int = 2) -> None:
    """Delete all but the newest `keep` committed checkpoints; whatever is newer than those is left alone.

    The manifest goes first, so that a checkpoint whose removal was cut short is not taken for a whole one.
    """
    if keep < 1:
        raise ValueError(f"keep {keep} must be at least 1: the newest checkpoint is what a run resumes from")
    folders = {step: step_folder(step) for step in checkpoint_steps(store)}
    committed = [step for step, folder in folders.items() if store.exists(f"{folder}/{MANIFEST}")]
    for step, folder in folders.items():
        if len(committed) >= keep and step < committed[-keep]:
            store.delete(f"{folder}/{MANIFEST}")
            store.delete(folder)


def _check(files: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    for name, tensors in files.items():
        if not _NAME.fullmatch(name) or _PART.fullmatch(name):
            raise ValueError(
                f"checkpoint file name {name!r} may only hold letters, digits, '_', '-' and '.', "
                "and not end in '.part-' and a number"
            )
        for key, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"checkpoint {name}[{key!r}] is a {type(value).__name__}, not a tensor; use meta"
                )
    try:
        json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint meta cannot be written as JSON: {error}") from error


def _save_file(
    store: RunStore, folder: str, name: str, tensors: Mapping[str, Tensor], in_force: set[str]
) -> dict[str, Any]:
    file = f"{name}.safetensors"
    if file in in_force:
        file = f"{name}-{uuid.uuid4().hex[:8]}.safetensors"
    with store.staged(f"{folder}/{file}") as local:
        safetensors.torch.save_file(_own_memory(tensors), local)
        return {"file": file, **local_entry(local)}


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    plain = {}
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return plain


def _load(store: RunStore, file: str) -> dict[str, Tensor]:
    if store.is_local:
        return safetensors.torch.load_file(store.path(file))
    return safetensors.torch.load(store.read_bytes(file))


def _grouped(folder: str, manifest: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The files of each group by its name, in the order of the ranks that wrote them."""
    found: dict[str, dict[int, str]] = {}
    for name, entry in manifest["files"].items():
        match = _PART.fullmatch(name)
        group, rank = (match[1], int(match[2])) if match else (name, 0)
        found.setdefault(group, {})[rank] = f"{folder}/{entry['file']}"
    return {group: tuple(files[rank] for rank in sorted(files)) for group, files in found.items()}


def _manifest_of(store: RunStore, step: int) -> dict[str, Any]:
    folder = step_folder(step)
    manifest = read_manifest(store, folder, NEVER_FINISHED)
    if manifest["step"] != step:
        raise damaged(store, folder, MANIFEST, f"is of step {manifest['step']}")
    return manifest


def _committed_files(store: RunStore, folder: str) -> set[str]:
    try:
        files = read_manifest(store, folder, NEVER_FINISHED)["files"]
        return {entry["file"] for entry in files.values()}
    except DamagedCheckpointError:
        return set()
