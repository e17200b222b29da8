"""From the name of a checkpoint to a checked model: where it may lie, and what is believed of it.

A checkpoint is RUN or RUN@STEP, a run below the service's root. RUN is its sealed pipeline or policy; with a
step, the same with the weights of that step's checkpoint. Names come from clients, so that no name leads out
of the root, and no message says where the root is: such details go to the log.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.sampler import POLICY
from actors.serving.messages import Kind
from actors.worker import WEIGHTS
from cluster.checkpoints import checkpoint_group, step_folder
from cluster.manifest import MANIFEST, DamagedCheckpointError
from cluster.sealing import opened, seal, verify
from cluster.storage import RunStore

if TYPE_CHECKING:
    from actors.serving.image_model import ImageModel
    from counterpoint.policies.bundle import PolicyBundle

logger = logging.getLogger(__name__)

LONGEST = 256
"""Characters of a name."""
_FOLDER = r"[A-Za-z0-9_][A-Za-z0-9._+=,-]*"
_NAME = re.compile(rf"(?P<run>{_FOLDER}(/{_FOLDER})*)(@(?P<step>[0-9]{{1,12}}))?")
_REMEDY = "restore the run from a whole copy, or name another"


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies."""

    name: str
    """RUN or RUN@STEP, as it was given."""
    uri: str
    """Of the run; for a local root the real path, without symbolic links."""
    step: int | None
    """Of the step checkpoint whose weights are meant; none for what the run ended with."""
    root: str | None = field(default=None, repr=False)
    """The real path that no file may leave; none where the store knows no symbolic links."""


def locate(root: str, name: str) -> Place:
    """Return the place of the checkpoint `name`, RUN or RUN@STEP, below the URI `root`.

    RUN is one or more names of folders joined by "/", each of letters, digits and `_ . + = , -`, of which the
    first is a letter, a digit or `_`. Nothing is read, so that the run may be missing. Raises
    ValueError, in one line without the root, for any other name and for one that a symbolic link leads out
    of the root.
    """
    match = _NAME.fullmatch(name) if len(name) <= LONGEST else None
    if match is None:
        raise ValueError(
            f"checkpoint {_shortened(name)} is no name of a checkpoint: give RUN or RUN@STEP, a run below "
            "the service's root, of letters, digits and _ . + = , - between slashes"
        )
    step = None if match["step"] is None else int(match["step"])
    store = RunStore(root)
    if not store.is_local:
        return Place(name, f"{root}{'' if root.endswith('/') else '/'}{match['run']}", step)
    real = Path(store.root).resolve()
    place = Place(name, str(_resolved(real / match["run"], name)), step, str(real))
    _check_inside(place, ())
    return place


def load_images(place: Place, largest: int, exact: bool, device: torch.device) -> "tuple[ImageModel, int]":
    """Load the pipeline of a run onto `device`; return it with when it was committed, in seconds since 1970.

    `largest` and `exact` are of the batches (see `build_image_model`). Raises ValueError, in one line without
    paths, if the checkpoint is missing, damaged, or not of a kind that can be served. A store that cannot be
    reached raises OSError.
    """
    from actors.serving.image_model import build_image_model
    from counterpoint.optimization import load_weights

    with _opened(place, "images") as (folder, sealed), _readable(place):
        pipeline = _read_pipeline(folder)
        if sealed.weights is not None:
            load_weights(pipeline.unet, sealed.weights)
    model = build_image_model(pipeline.unet, pipeline.scheduler, sealed.version, largest, exact, device)
    return model, sealed.created


def load_policy(place: Place, device: torch.device) -> "tuple[PolicyBundle, str, int]":
    """Load the policy of a run onto `device`; return it with its version and when it was committed.

    The time is in seconds since 1970. Raises as `load_images` does.
    """
    from counterpoint.optimization import load_weights
    from counterpoint.policies.bundle import PolicyBundle  # slow to import, and replicas must come back fast

    with _opened(place, "actions") as (folder, sealed), _readable(place):
        bundle = PolicyBundle.load(folder, device)
        if sealed.weights is not None:
            load_weights(bundle.policy, sealed.weights)
    return bundle, sealed.version, sealed.created


def check(place: Place, kind: Kind) -> str:
    """Check every file that loading would read, without building a network; return the version.

    Raises as `load_images` does.
    """
    store = RunStore(place.uri)
    folder = _folder_of(kind)
    _check_inside(place, _folders(place, kind))
    with _told(place, folder):
        digest = verify(store, folder).digest
    return _version(place, digest, _weights_of(place, store)[1])


def seal_run(uri: str) -> dict[str, str]:
    """Seal what a run that was made before there were seals has to serve; return each kind's digest.

    What is sealed already is checked, and left alone. What is sealed now is loaded first, as a seal on damage
    would keep it. Raises ValueError if there is nothing to seal or it is damaged.
    """
    store = RunStore(uri)
    digests: dict[str, str] = {}
    kinds: tuple[Kind, ...] = ("images", "actions")
    for kind in kinds:
        folder = _folder_of(kind)
        if store.exists(f"{folder}/{MANIFEST}"):
            digests[kind] = verify(store, folder).digest
        elif store.list(folder):
            _try_loading(store, kind)
            digests[kind] = seal(store, folder)
    if not digests:
        raise ValueError(f"{uri} has nothing to serve: give the URI of a finished run")
    return digests


@dataclass(frozen=True)
class _Checked:
    """What is known of a checkpoint before it is built."""

    version: str
    created: int
    weights: dict[str, Tensor] | None
    """Of the step, if one was named."""


@contextmanager
def _opened(place: Place, kind: Kind) -> "Iterator[tuple[Path, _Checked]]":
    """Yield a local folder of checked files, and what is known of the checkpoint."""
    store, folder = RunStore(place.uri), _folder_of(kind)
    _check_inside(place, _folders(place, kind))
    weights, digest = _weights_of(place, store)
    with _told(place, folder), opened(store, folder) as (local, sealed):
        created = sealed.created if place.step is None else _committed(store, place.step, sealed.created)
        yield local, _Checked(_version(place, sealed.digest, digest), created, weights)


def _weights_of(place: Place, store: RunStore) -> tuple[dict[str, Tensor] | None, str]:
    if place.step is None:
        return None, ""
    with _told(place, step_folder(place.step)):
        return checkpoint_group(store, place.step, WEIGHTS)


def _committed(store: RunStore, step: int, otherwise: int) -> int:
    try:
        return int(store.fs.modified(store.path(f"{step_folder(step)}/{MANIFEST}")).timestamp())
    except (NotImplementedError, FileNotFoundError):  # a store without times, or a checkpoint pruned since
        return otherwise


def _version(place: Place, sealed: str, weights: str) -> str:
    """Return a name of the content: that of the seal, and of the step's weights if they replace others."""
    content = hashlib.sha256(f"{sealed} {weights}".encode()).hexdigest() if weights else sealed
    run = place.name.partition("@")[0].rpartition("/")[2]
    return f"{run}@{'final' if place.step is None else place.step}-{content[:12]}"


def _folder_of(kind: Kind) -> str:
    if kind == "actions":
        return POLICY
    from actors.recipe import PIPELINE  # slow to import, and a replica with policies does not need it

    return PIPELINE


def _folders(place: Place, kind: Kind) -> tuple[str, ...]:
    return (_folder_of(kind), *(() if place.step is None else (step_folder(place.step),)))


def _check_inside(place: Place, folders: tuple[str, ...]) -> None:
    """Raise ValueError if the run, one of these folders or a file in them really lies outside the root."""
    if place.root is None:
        return
    run = Path(place.uri)
    within = [path for folder in folders for path in (run / folder, *(run / folder).rglob("*"))]
    for path in (run, *within):
        if not _resolved(path, place.name).is_relative_to(place.root):
            raise ValueError(
                f"checkpoint {_shortened(place.name)} leads out of the service's root: name another"
            )


def _resolved(path: Path, name: str) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself, a name that the system refuses
        logger.warning("checkpoint %s: %s", name, error)
        raise ValueError(f"checkpoint {_shortened(name)} cannot be followed: name another") from None


@contextmanager
def _told(place: Place, folder: str) -> Iterator[None]:
    """Raise what is damaged as a ValueError that says nothing of the root."""
    try:
        yield
    except DamagedCheckpointError as error:
        logger.warning("checkpoint %s: %s", place.name, error)
        said = f"{folder}/{error.file} {error.reason}"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        logger.warning("checkpoint %s: %s", place.name, error)
        said = f"{folder} is not whole"
    else:
        return
    raise ValueError(f"checkpoint {_shortened(place.name)}: {said}; {_REMEDY}") from None


@contextmanager
def _readable(place: Place) -> Iterator[None]:
    """Raise whatever a library says of checked files that do not make a model as a ValueError."""
    try:
        yield
        return
    except Exception:  # each library has errors of its own, and most of them name paths
        logger.warning("checkpoint %s does not load", place.name, exc_info=True)
    raise ValueError(
        f"checkpoint {_shortened(place.name)} does not load although its files are whole: the service's log "
        "says why; name another"
    ) from None


def _read_pipeline(folder: Path) -> Any:
    from diffusers.utils.logging import disable_progress_bar

    from counterpoint.pipeline import ClassConditionalPipeline

    disable_progress_bar()
    return ClassConditionalPipeline.from_pretrained(
        folder, low_cpu_mem_usage=False, use_safetensors=True, local_files_only=True
    )


def _try_loading(store: RunStore, kind: Kind) -> None:
    from counterpoint.policies.bundle import PolicyBundle

    with store.local_folder(_folder_of(kind)) as folder:
        try:
            _ = _read_pipeline(folder) if kind == "images" else PolicyBundle.load(folder)
        except Exception as error:  # each library has errors of its own
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder} does not load, and is not sealed: {reason}") from error


def _shortened(name: str, most: int = 80) -> str:
    return repr(name if len(name) <= most else f"{name[: most - 3]}...")
