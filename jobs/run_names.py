"""How a run is named and what its files are called, for verbs that load nothing of what it trains."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

CONFIG = "config.yaml"
RESULTS = "results.json"
STORAGE = "COUNTERPOINT_STORAGE"
"""Variable that says below which folder or URI relative paths of runs lie; `jobs.submit storage=` sets it."""


def absolute(uri: str) -> str:
    """Return a storage URI that means the same in every process: a local path is made absolute."""
    path = Path(uri).expanduser()
    if "://" in uri or path.is_absolute():
        return uri if "://" in uri else str(path)
    base = os.environ.get(STORAGE, "").rstrip("/")
    return f"{base}/{uri}" if base else str(path.absolute())


RunUri = Annotated[str, AfterValidator(absolute)]
"""A run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
