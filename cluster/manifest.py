"""Manifests: what a folder of a run holds, each file with its size and checksum, put in place at once."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.storage import RunStore

MANIFEST = "manifest.json"
FORMAT = 1


class DamagedCheckpointError(ValueError):
    """Files that are not whole; the message says where, which one is missing or wrong, and how.

    Attributes:
        file: its name within the folder that the manifest describes.
        reason: the rest of the sentence that begins with the file.
    """

    def __init__(self, message: str, file: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.file, self.reason = file, reason


def damaged(store: RunStore, folder: str, file: str, reason: str) -> DamagedCheckpointError:
    """Return the error which says that `file` in `folder` "`reason`"."""
    return DamagedCheckpointError(f"{store.location(f'{folder}/{file}')} {reason}", file, reason)


def write_manifest(store: RunStore, folder: str, fields: Mapping[str, Any]) -> None:
    """Put the manifest of `folder` in place: JSON-able `fields`, the format, and a checksum of them all."""
    # Through JSON once, so that keys become strings before the digest is taken, as on reading.
    plain = json.loads(json.dumps({"format": FORMAT, **fields}))
    store.write_text(f"{folder}/{MANIFEST}", json.dumps({**plain, "sha256": fields_digest(plain)}, indent=1))


def read_manifest(store: RunStore, folder: str, missing: str) -> dict[str, Any]:
    """Return the fields of the manifest of `folder` after checking them against their checksum.

    Raises DamagedCheckpointError if there is none, which `missing` explains, or it is not whole.
    """
    try:
        fields: dict[str, Any] = json.loads(store.read_bytes(f"{folder}/{MANIFEST}"))
        digest = fields.pop("sha256")
    except FileNotFoundError:
        raise damaged(store, folder, MANIFEST, f"is missing: {missing}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(store, folder, MANIFEST, f"is not a manifest: {error}") from error
    if digest != fields_digest(fields):
        raise damaged(store, folder, MANIFEST, "does not match its own checksum")
    if fields.get("format") != FORMAT:
        raise damaged(
            store, folder, MANIFEST, f"has format {fields.get('format')}, this version reads {FORMAT}"
        )
    return fields


def verify_file(store: RunStore, folder: str, file: str, entry: Mapping[str, Any]) -> None:
    """Raise DamagedCheckpointError unless `file` in `folder` has the size and checksum of its `entry`."""
    try:
        found = file_entry(store, f"{folder}/{file}")
    except FileNotFoundError:
        raise damaged(store, folder, file, "is missing") from None
    check_entry(store, folder, file, found, entry)


def check_entry(
    store: RunStore, folder: str, file: str, found: Mapping[str, Any], entry: Mapping[str, Any]
) -> None:
    """Raise DamagedCheckpointError unless what was `found` in a file is what the manifest's `entry` says."""
    if found["bytes"] != entry["bytes"]:
        raise damaged(store, folder, file, f"has {found['bytes']} bytes instead of {entry['bytes']}")
    if found["sha256"] != entry["sha256"]:
        raise damaged(store, folder, file, "does not match its checksum")


def file_entry(store: RunStore, name: str) -> dict[str, Any]:
    """Return `{"bytes", "sha256"}` of a file of the store; FileNotFoundError when there is none."""
    hashed, size = hashlib.sha256(), 0
    with store.fs.open(store.path(name), "rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": hashed.hexdigest()}


def local_entry(path: Path) -> dict[str, Any]:
    """Return `{"bytes", "sha256"}` of a local file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def fields_digest(fields: Any) -> str:
    """Return the SHA-256, in hex, of JSON-able `fields`, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
