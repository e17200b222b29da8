"""What a node says of itself: versions, this project's sources, devices, memory and limits.

Only the standard library and Ray are imported, so that a node which lacks a library can say so.
"""

import hashlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import ray

LIBRARIES = (
    "ray", "torch", "numpy", "pyarrow", "pydantic", "diffusers", "transformers", "deepspeed", "safetensors",
    "fsspec",
)  # fmt: skip
"""What processes of one run exchange objects of, or compute the same numbers with."""
PACKAGES = ("counterpoint", "cluster", "actors", "jobs")
DEVICE_SECONDS = 60.0
# In a process of its own: Ray hides the devices from a task that asks for none, and drivers may crash.
TORCH_PROGRAM = (
    "import json, torch; count = torch.cuda.device_count(); "
    "nccl = torch.cuda.nccl.version() if count and torch.distributed.is_nccl_available() else None; "
    "work = [float(torch.ones(8, device=f'cuda:{i}').sum()) for i in range(count)]; "
    "print(json.dumps({'devices': len([w for w in work if w == 8.0]), 'cuda': torch.version.cuda, "
    "'nccl': '.'.join(map(str, nccl)) if nccl else None}))"
)


@dataclass(frozen=True)
class Gpu:
    """A device as the driver's own tool sees it."""

    index: int
    name: str
    memory_mib: int
    free_mib: int


@dataclass(frozen=True)
class Machine:
    """One node, or the driver, as it sees itself."""

    python: str
    versions: dict[str, str | None]
    """Installed version of each of `LIBRARIES`; None where it is missing."""
    project: str
    """Digest of this project's sources as this process would import them; "absent" without them."""
    open_files: int
    """The soft limit of open files."""
    shm_bytes: int
    """Size of /dev/shm; 0 where there is none."""
    session: str
    """Ray's session directory, below which objects spill; empty if unknown."""
    disk_free: int
    """Bytes free on the session directory's disk."""
    disk_total: int
    """Bytes of that disk."""
    gpus: tuple[Gpu, ...] = ()
    """Devices of `nvidia-smi`."""
    torch_devices: int | None = None
    """CUDA devices that torch could compute on; None where nobody looked."""
    toolkit: dict[str, str | None] = field(default_factory=dict)
    """The `cuda` and `nccl` that torch uses."""
    trouble: str = ""
    """Why torch could not tell its devices."""


def describe(devices: bool = False, counted: int = 0) -> Machine:
    """Return what this process can see of its machine.

    Args:
        devices: look for GPUs too; torch is asked, and computes on each, where there are any.
        counted: how many GPUs Ray counts: with any, torch is asked in every case.
    """
    session = _session()
    disk = shutil.disk_usage(session or "/tmp")
    gpus = nvidia_smi() if devices else ()
    seen, trouble = _torch_sees() if devices and (counted or gpus) else ({}, "")
    return Machine(
        python=platform.python_version(),
        versions={name: _version(name) for name in LIBRARIES},
        project=project_digest(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        session=session,
        disk_free=disk.free,
        disk_total=disk.total,
        gpus=gpus,
        torch_devices=seen.get("devices"),
        toolkit={name: seen.get(name) for name in ("cuda", "nccl")} if seen.get("devices") else {},
        trouble=trouble,
    )


def clock() -> float:
    """Return this machine's time, in seconds since the epoch."""
    return time.time()


def project_digest() -> str:
    """Digest of the sources that `import` would find here, wherever each package lies."""
    sources: dict[str, Path] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        # A package may lie in several folders, or in one several times: the first file of a name counts.
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in Path(folder).rglob("*.py"):
                sources.setdefault(f"{package}/{file.relative_to(folder).as_posix()}", file)
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\0".encode() + sources[name].read_bytes())
    return digest.hexdigest()[:12] if sources else "absent"


def nvidia_smi() -> tuple[Gpu, ...]:
    """The devices of `nvidia-smi`; none where there is no such program or it fails."""
    query = ["--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=DEVICE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.split(",") for line in done.stdout.splitlines() if line.count(",") == 3)
    return tuple(
        Gpu(int(index), name.strip(), _number(total), _number(free)) for index, name, total, free in rows
    )


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0


def _torch_sees() -> tuple[dict[str, Any], str]:
    """What torch computed on in a fresh process, or why it could not."""
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_PROGRAM],
            env=kept, capture_output=True, text=True, timeout=DEVICE_SECONDS, check=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1]), ""
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        return {}, lines[-1] if lines else f"exit code {error.returncode}"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {}, f"{type(error).__name__}: {error}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _session() -> str:
    node = ray._private.worker._global_node
    return node.get_session_dir_path() if node is not None else ""
