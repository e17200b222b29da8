"""A service without models: a backend whose answers follow from the seed, with faults on request."""

import asyncio
import hashlib
from base64 import b64encode
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from toy_environment import OBSERVATION_SPACE, SPACE, ToyEnvironment

from actors.serving.backend import Backend
from actors.serving.config import ServiceConfig
from actors.serving.errors import ApiError
from actors.serving.messages import ActionAnswer, ImageAnswer, ModelInfo, Work
from counterpoint.selection.decision import Decision

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8
"""Height and width of an image of "digits", in pixels."""
CREATED = 1_790_000_000
DIGITS = ModelInfo(
    "digits", "images", "student", "digits-v1", CREATED,
    {"classes": list(CLASSES), "height": SIDE, "width": SIDE, "channels": 1, "max_steps": 4,
     "schedulers": ["DDIMScheduler", "UniPCMultistepScheduler"],
     "guiders": ["ClassifierFreeGuidance", "AdaptiveProjectedGuidance"]},
)  # fmt: skip
BLOCKS = ModelInfo(
    "blocks", "actions", "policy@7", "blocks-v1", CREATED + 1,
    {
        "observation_space": OBSERVATION_SPACE.model_dump(mode="json"),
        "action_space": SPACE.model_dump(mode="json"),
        "conditions": ["state", "text"],
    },
)  # fmt: skip
RULES_WITHOUT_CONFIDENCE = ("greedy", "random", "oracle")


def service(**changes: Any) -> ServiceConfig:
    """Return the configuration of a service of "digits" and "blocks"; `changes` replace its sections."""
    sections: dict[str, Any] = {
        "images": {"models": [{"name": "digits", "checkpoint": "student", "classes": CLASSES}]},
        "actions": {"models": [{"name": "blocks", "checkpoint": "policy@7"}]},
        "simulator": {},
    }
    return ServiceConfig.model_validate(sections | changes)


def pixels(label: int, steps: int, guidance_scale: float, seed: int, index: int) -> np.ndarray:
    """Return image `index` of a request to "digits", uint8 [8,8,1]."""
    name = f"{label} {steps} {guidance_scale} {seed} {index}"
    return _noise(name).integers(0, 256, (SIDE, SIDE, 1), np.uint8)


def toy_choice(stream, selection, undecodable: int = 0) -> Decision:
    """Return the decision of "blocks"; the first `undecodable` candidates could not be decoded."""
    noise = _noise(f"{stream.seed} {stream.decision} {selection.model_dump_json()}")
    count = 1 if selection.rule == "greedy" else selection.candidates
    candidates = SPACE.clip(noise.normal(0, 1, (count, SPACE.horizon, SPACE.dimensions)))
    confidences = noise.normal(0, 1, count)
    if selection.rule in RULES_WITHOUT_CONFIDENCE:
        confidences[:] = np.nan
    greedy = SPACE.clip(noise.normal(0, 1, candidates.shape[1:]))
    candidates[:undecodable] = np.nan
    confidences[:undecodable] = -np.inf
    chosen = undecodable if np.isnan(confidences).any() else int(confidences.argmax())
    chosen = chosen if undecodable < count else -1
    terms = np.repeat(np.nan_to_num(confidences, neginf=0.0)[:, None], 2, 1).astype(np.float32)
    tokens = tuple((index, index + 1) for index in range(count))
    kept = greedy if chosen < 0 else candidates[chosen]
    return Decision(kept, chosen, candidates, tokens, confidences, terms, min(undecodable, count), 0)


@dataclass
class FakeBackend(Backend):
    """Answers at once with what the seed says, unless told to wait or to fail; both can be changed meanwhile.

    `started` counts calls that were begun, `cancelled` those that ended by cancellation; `asked` keeps the
    requests with their deadlines in the order of their arrival. A wait past the deadline is a 504, as in the
    real backend.
    """

    delay: float = 0.0
    """Seconds that each call takes."""
    gate: asyncio.Event | None = None
    """Calls wait for it where given."""
    error: Exception | None = None
    """Raised by every call but `models`, `model` and `ready`."""
    lookup_error: Exception | None = None
    """Raised by `models` and `model`."""
    ready_error: Exception | None = None
    """Raised by `ready`."""
    retries: int = 0
    """Of each answer's work."""
    undecodable: int = 0
    """Candidates of each decision that could not be decoded."""
    infos: tuple[ModelInfo, ...] = (DIGITS, BLOCKS)
    max_steps: int = 12
    """Steps of an episode."""
    asked: list[Any] = field(default_factory=list)
    started: int = 0
    cancelled: int = 0

    async def models(self):
        if self.lookup_error is not None:
            raise self.lookup_error
        return list(self.infos)

    async def model(self, name):
        for info in await self.models():
            if info.name == name:
                return info
        there = ", ".join(info.name for info in self.infos)
        raise ApiError("model_not_found", f"model={name!r} is not served: ask for one of {there}", "model")

    async def generate(self, request, deadline_s):
        info = await self.model(request.model)
        await self._work(request, deadline_s)
        images = [
            pixels(request.label, request.steps, request.guidance_scale, request.seed, index)
            for index in range(request.count)
        ]
        return ImageAnswer(np.stack(images), self.work(info, request.steps, request.count))

    async def act(self, request, deadline_s):
        info = await self.model(request.model)
        try:
            OBSERVATION_SPACE.check(request.observation)
        except ValueError as error:
            raise ApiError("invalid_value", str(error), "observation") from error
        await self._work(request, deadline_s)
        decision = toy_choice(request.stream, request.selection, self.undecodable)
        return ActionAnswer(decision, self.work(info, 1, 1))

    async def play(self, model, selection, seed, deadline_s):
        info = await self.model(model)
        await self._work((model, selection, seed), deadline_s)
        environment = ToyEnvironment(max_steps=self.max_steps)
        observation = environment.start(seed)
        space = SPACE.model_dump(mode="json")
        yield {
            "event": "start", "instruction": observation.instruction, "seed": seed,
            "max_steps": self.max_steps, "action_space": space,
        }  # fmt: skip
        over, steps, success, outcome = False, 0, False, ""
        while not over:
            await self._wait(deadline_s)
            chunk = np.tile(SPACE.clip(environment.expert_action()), (SPACE.horizon, 1))
            yield {
                "event": "decision", "step": steps, "image": png(observation.images["top"]), "chosen": 0,
                "actions": chunk.tolist(), "candidates": [chunk.tolist(), None], "confidences": [1.5, None],
                "work": {"version": info.version, "queued_s": 0.001, "compute_s": 0.002, "batch_size": 1.0},
            }  # fmt: skip
            for action in chunk[: SPACE.execute]:
                if not over:
                    step = environment.act(action.astype(np.float64))
                    observation, over = step.observation, step.over
                    success, outcome = step.success, step.outcome
                    steps += 1
        yield {
            "event": "end", "success": success, "outcome": outcome or ("success" if success else "time"),
            "steps": steps, "image": png(observation.images["top"]),
        }  # fmt: skip

    async def ready(self):
        await self._wait(3600.0)
        if self.ready_error is not None:
            raise self.ready_error

    def work(self, info, evaluations, batch_size):
        """Return what a call took, with numbers that tests can expect."""
        return Work(info.version, "replica-0", 0.001, 0.002, evaluations, float(batch_size), self.retries)

    async def _work(self, asked, deadline_s):
        self.asked.append((asked, deadline_s))
        await self._wait(deadline_s)
        if self.error is not None:
            raise self.error

    async def _wait(self, deadline_s):
        self.started += 1
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.sleep(self.delay)
                if self.gate is not None:
                    await self.gate.wait()
        except TimeoutError:
            message = f"no answer within {deadline_s:g} s: ask for less, or raise x-deadline-ms"
            raise ApiError("deadline_exceeded", message) from None
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def png(image: np.ndarray) -> str:
    """Return `image`, uint8 [H,W,3], as PNG in base64."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return b64encode(buffer.getvalue()).decode()


def _noise(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))
