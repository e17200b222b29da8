"""What the gateway and the deployments that host models say to one another; plain data and numpy arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from counterpoint.policies.observation import Observation
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream

Kind = Literal["images", "actions"]


@dataclass(frozen=True)
class ModelInfo:
    """A served model as it is now."""

    name: str
    kind: Kind
    checkpoint: str
    """RUN or RUN@STEP below the service's root."""
    version: str
    """Names the weights: changes with every promotion, and is part of every answer."""
    created: int
    """When the checkpoint was committed, seconds since 1970."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able. images: classes (names by label), height, width, channels, max_steps, schedulers (the
    model's own first), guiders. actions:
    observation_space, action_space (as `model_dump(mode="json")`), conditions (sorted)."""
    refused: str | None = None
    """Why a promotion was not followed, if the last one was not."""


@dataclass(frozen=True)
class ImageRequest:
    """Images of one class; what is random follows from `seed`, the label and the image's index."""

    model: str
    label: int
    count: int = 1
    steps: int = 1
    guidance_scale: float = 1.0
    seed: int = 0
    scheduler: str | None = None
    """Class name of one that the model offers; its own unless given."""
    guider: str | None = None
    """Class name of one that the model offers; `guidance_scale` is its, or else plain guidance's."""
    guider_options: tuple[tuple[str, float], ...] = ()
    """Names and values."""


@dataclass(frozen=True)
class ActionRequest:
    """One decision; what is random in it follows from `stream`."""

    model: str
    observation: Observation
    selection: SelectionConfig
    stream: Stream


@dataclass(frozen=True)
class Work:
    """What it took to answer."""

    version: str
    """Of the model that answered."""
    replica: str
    """Which replica answered."""
    queued_s: float
    """From arrival at the replica to the first evaluation."""
    compute_s: float
    """From the first evaluation's start to the last one's end, neighbours included."""
    evaluations: int
    """Evaluations of the network that the request took part in: its steps, or 1 for a decision."""
    batch_size: float
    """Mean rows of those evaluations, padding not counted."""
    retries: int = 0
    """Times it was sent again because a replica died."""


@dataclass(frozen=True)
class ImageAnswer:
    """Images, uint8 [n,H,W,C] with 1 or 3 channels."""

    images: np.ndarray
    work: Work


@dataclass(frozen=True)
class ActionAnswer:
    """A decision."""

    decision: Decision
    work: Work
