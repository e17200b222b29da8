"""What POST /v1/actions takes and gives, and which policy is asked."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from actors.serving.backend import Backend
from actors.serving.complaints import shortened
from actors.serving.config import ServiceConfig
from actors.serving.errors import ApiError
from actors.serving.images_api import LARGEST_SEED, Timings
from actors.serving.messages import ActionAnswer, ActionRequest, ModelInfo
from actors.serving.observing import ObservationBody
from actors.serving.selecting import NAMES, Selecting
from counterpoint.actions.space import ActionSpace
from counterpoint.policies.observation import ObservationSpace

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
ModelField = Annotated[str, Field(min_length=1, max_length=512)]


class ActionsBody(Selecting):
    """A request for one decision; null is the same as leaving a field out.

    Types are strict: neither "3" nor true is a number. Fields that are not listed are refused by name.
    """

    model: ModelField | None = Field(None, examples=["blocks"])
    """Which policy, see GET /v1/models; the service's first one by default."""
    observation: ObservationBody
    """What the robot sees."""
    seed: Seed | None = Field(None, examples=[7])
    """Of the episode. The candidates follow from it and `decision` alone, so the same request to the same
    version gives the same answer. Drawn where missing, below 2^53 so that every JSON reader keeps it exactly,
    and returned."""
    decision: Seed | None = Field(None, examples=[0])
    """Index of the decision within its episode, 0 by default: decisions of one seed differ by it."""
    return_candidates: bool | None = Field(None, examples=[False])
    """Whether the answer lists all candidates; it does not by default."""


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class ActionSpaceAnswer(_Answer):
    """What the actions are."""

    names: list[str] = Field(examples=[["dx", "dy"]])
    """Of the dimensions D."""
    low: list[float] = Field(examples=[[-1.0, -1.0]])
    """Least value of each."""
    high: list[float] = Field(examples=[[1.0, 1.0]])
    """Greatest value of each."""
    control_hz: float = Field(examples=[25.0])
    """Control steps per second."""
    horizon: int = Field(examples=[4])
    """Control steps H of a chunk."""
    execute: int = Field(examples=[4])
    """How many of them to take before the next decision."""


class Candidate(_Answer):
    """A candidate and how sure the policy is of it."""

    actions: list[list[float]] | None
    """H x D, in the environment's units; null where its tokens could not be decoded."""
    confidence: float | None = Field(examples=[12.5])
    """By which candidates are compared; null where undecodable, and for rules without."""
    tokens: list[int]
    """Its action tokens, without the end token."""


class ActionsAnswer(_Answer):
    """A decision, and all that it takes to ask for the same one again."""

    model: str = Field(examples=["blocks"])
    """The policy that answered."""
    version: str = Field(examples=["policy@final-0123456789ab"])
    """Names the policy's weights."""
    actions: list[list[float | None]] = Field(examples=[[[0.1, -0.2], [0.1, -0.1]]])
    """The chunk that was kept, H x D in the environment's units."""
    action_space: ActionSpaceAnswer
    """What they are."""
    selection: str = Field(examples=["mg-select"])
    """The rule, by its name."""
    seed: int = Field(examples=[7])
    """Given, or drawn."""
    decision: int = Field(examples=[0])
    """Index of the decision within its episode."""
    chosen: int = Field(examples=[2])
    """Index of the kept candidate; -1 where none could be decoded or compared, and it is the greedy chunk."""
    rejected: int = Field(examples=[0])
    """Candidates that could not be decoded."""
    clipped: int = Field(examples=[0])
    """Entries of the chunk that had to be clipped to the action space."""
    candidates: list[Candidate] | None = None
    """All of them, if asked for."""
    timings: Timings
    """Where the time went."""


@dataclass(frozen=True)
class Policy:
    """A served policy, with its spaces at hand."""

    info: ModelInfo
    observation_space: ObservationSpace
    action_space: ActionSpace
    conditions: frozenset[str]


async def policy_of(backend: Backend, config: ServiceConfig, name: str | None) -> Policy:
    """Return the policy `name`, or the service's first; ApiError if there is none or it is no policy."""
    if name is None:
        if not config.actions.models:
            message = "model is missing, and this service has no default policy: name one"
            raise ApiError("invalid_value", message, "model")
        name = config.actions.models[0].name
    info = await backend.model(name)
    if info.kind != "actions":
        message = f"model={shortened(name)} is no policy: GET /v1/models lists those of kind actions"
        raise ApiError("invalid_value", message, "model")
    return Policy(
        info,
        ObservationSpace.model_validate(info.details["observation_space"]),
        ActionSpace.model_validate(info.details["action_space"]),
        frozenset(info.details["conditions"]),
    )


def actions_answer(
    asked: ActionRequest, answer: ActionAnswer, space: ActionSpace, with_candidates: bool, seconds: float
) -> ActionsAnswer:
    """Return what a client is told of a decision that took `seconds` in all."""
    decision, work = answer.decision, answer.work
    return ActionsAnswer(
        model=asked.model,
        version=work.version,
        actions=_plain(decision.actions),
        action_space=ActionSpaceAnswer.model_validate(space.model_dump(mode="json")),
        selection=NAMES[asked.selection.rule],
        seed=asked.stream.seed,
        decision=asked.stream.decision,
        chosen=decision.chosen,
        rejected=decision.rejected,
        clipped=decision.clipped,
        candidates=[
            Candidate(
                actions=chunk.tolist() if np.isfinite(chunk).all() else None,
                confidence=_plain(confidence),
                tokens=list(tokens),
            )
            for chunk, confidence, tokens in zip(
                decision.candidates, decision.confidences, decision.tokens, strict=True
            )
        ]
        if with_candidates
        else None,
        timings=Timings(
            queue_ms=round(work.queued_s * 1000, 3),
            compute_ms=round(work.compute_s * 1000, 3),
            total_ms=round(seconds * 1000, 3),
            batch_size=work.batch_size,
        ),
    )


def _plain(values: Any) -> Any:
    """Return numbers as JSON has them; those that are not finite become None."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return float(values) if math.isfinite(values) else None
