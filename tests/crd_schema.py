"""Strict validation against a structural schema of Kubernetes, as `kubectl --validate=strict` asks for.

Rules in CEL (`x-kubernetes-validations`) and what KubeRay's controller checks beyond its schema are not run.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent / "schemas" / "kuberay"
PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
# What the API server itself knows of a schema that says only `type: object` for these.
METADATA = {"name", "generateName", "namespace", "labels", "annotations", "finalizers"}


def schema_of(kind: str) -> dict[str, Any]:
    """The published schema of a custom resource."""
    return json.loads(gzip.decompress((SCHEMAS / f"{PLURALS[kind]}.json.gz").read_bytes()))


def problems(manifest: dict[str, Any]) -> list[str]:
    """What an API server would say against a manifest of one of KubeRay's kinds; [] if it is accepted."""
    kind = manifest.get("kind")
    if kind not in PLURALS or manifest.get("apiVersion") != "ray.io/v1":
        return [f"{manifest.get('apiVersion')} {kind} is none of ray.io/v1's {', '.join(PLURALS)}"]
    schema = schema_of(kind)
    found = [
        f"{'.'.join(map(str, error.absolute_path)) or '(top)'}: {error.message[:200]}"
        for error in Draft202012Validator(_plain(schema)).iter_errors(manifest)
    ]
    metadata = manifest.get("metadata", {})
    if not (metadata.get("name") or metadata.get("generateName")):
        found.append("metadata: name or generateName is required")
    found += [f"metadata.{name}: unknown field" for name in metadata if name not in METADATA]
    return found + list(_unknown(schema, manifest, ""))


def _plain(schema: Any) -> Any:
    """The schema in words that JSON Schema has: `x-kubernetes-int-or-string` and `nullable` become types."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _plain(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string") is True:
        plain["type"] = ["integer", "string"]
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        plain["type"] = [schema["type"], "null"]
    return plain


def _unknown(schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:
    """Fields that the schema does not name, which the API server would drop or, strictly, refuse."""
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _unknown(schema.get("items", {}), each, f"{where}[{index}]")
    if not isinstance(value, dict):
        return
    known, more = schema.get("properties"), schema.get("additionalProperties")
    free = schema.get("x-kubernetes-preserve-unknown-fields") or more is True or where == ".metadata"
    for name, each in value.items():
        if known is not None and name in known:
            yield from _unknown(known[name], each, f"{where}.{name}")
        elif isinstance(more, dict):
            yield from _unknown(more, each, f"{where}.{name}")
        elif not free:
            yield f"{where}.{name}".lstrip(".") + ": unknown field"
