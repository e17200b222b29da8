"""What a run ran on: the commit of the code, the versions of its libraries, the machine and its devices."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
)


def describe_environment() -> dict[str, Any]:
    """Return a JSON-able description; `commit` is None where the code does not lie in a git work tree."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {name: _version(name) for name in LIBRARIES},
        "command": [_script(sys.argv[0]), *sys.argv[1:]],
    }


def _script(path: str) -> str:
    """Return what was started, as a path below this project if it is: results name no machine's paths."""
    source = Path(__file__).resolve().parent.parent
    return str(Path(path).relative_to(source)) if Path(path).is_relative_to(source) else path


def _git(*arguments: str) -> str | None:
    source = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
