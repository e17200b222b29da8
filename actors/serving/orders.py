"""One request on its way through the engine: its images under way, and what it took to make them."""

import copy
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance

from actors.serving.image_model import ImageModel
from actors.serving.images_sampling import scale_of
from actors.serving.messages import ImageRequest
from counterpoint.flow import set_steps
from counterpoint.guidance import GuiderConfig, build_guider
from counterpoint.inflight import Chain
from counterpoint.seeds import generator


@dataclass(frozen=True)
class EngineAnswer:
    """The images of a request, and what it took to make them."""

    images: np.ndarray
    """uint8 [n,H,W,C]."""
    queued_s: float
    """From arrival to the first evaluation."""
    compute_s: float
    """From the first evaluation's start to the last one's end, neighbours and waiting in between included."""
    evaluations: int
    """Evaluations that the request took part in."""
    batch_size: float
    """Mean rows of those, of all who took part; what they were filled up with is not counted."""


@dataclass(eq=False)
class Order:
    """A request on its way; its chains belong to the engine's thread."""

    model: ImageModel
    request: ImageRequest
    arrived: float
    deadline: float | None
    future: "Future[EngineAnswer]" = field(default_factory=Future)
    flying: dict[int, Chain] = field(default_factory=dict)
    """Images under way, by their index."""
    landed: dict[int, np.ndarray] = field(default_factory=dict)
    """Finished images, uint8 [H,W,C]."""
    begun: float = 0.0
    batches: list[int] = field(default_factory=list)
    """Rows of each evaluation that it took part in."""

    @property
    def rows(self) -> int:
        """Rows of each of its images, at the most."""
        if self.guider is None:
            return 1 if self.request.guidance_scale == 1.0 else 2
        return int(self.guider.num_conditions)

    @cached_property
    def guider(self) -> BaseGuidance | None:
        """The guider of its images, which each copies."""
        return guider_of(self.request)

    @property
    def unborn(self) -> range:
        """Images that are not yet under way."""
        return range(len(self.flying) + len(self.landed), self.request.count)

    def board(self, index: int) -> None:
        """Begin an image; its noise is that of `jobs.sample`."""
        asked = self.request
        stream = generator(asked.seed, "sample", asked.label, index)
        self.flying[index] = Chain(
            self.model.unet, scheduler_of(self.model, asked), asked.label, asked.steps, asked.guidance_scale,
            stream, self.guider,
        )  # fmt: skip

    def settle(self, now: float) -> None:
        """Take what has finished out of the batch; answer once that is all."""
        for index in [index for index, chain in self.flying.items() if chain.done]:
            self.landed[index] = pixels(self.flying.pop(index))
        if len(self.landed) == self.request.count:
            images = np.stack([self.landed[index] for index in range(self.request.count)])
            taken = EngineAnswer(
                images, self.begun - self.arrived, now - self.begun, len(self.batches),
                sum(self.batches) / len(self.batches),
            )  # fmt: skip
            self._resolve(taken)

    def fail(self, error: Exception) -> None:
        """Answer with an error; nobody else's."""
        self._resolve(error)

    def _resolve(self, answer: EngineAnswer | Exception) -> None:
        self.flying.clear()
        try:
            if isinstance(answer, Exception):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)
        except InvalidStateError:  # it was cancelled a moment ago
            return


def check(model: ImageModel, request: ImageRequest) -> None:
    """Raise ValueError, in a line, for a request that the model cannot serve."""
    if not 0 <= request.label < model.classes:
        raise ValueError(f"label={request.label} must be a class from 0 to {model.classes - 1}")
    if not 1 <= request.steps <= model.max_steps:
        raise ValueError(f"steps={request.steps}: the model takes 1 to {model.max_steps}")
    if request.count < 1:
        raise ValueError(f"count={request.count}: ask for at least 1 image")
    if not np.isfinite(request.guidance_scale):
        raise ValueError(f"guidance_scale={request.guidance_scale} must be a finite number, 1 for none")
    if request.scheduler is not None:
        if request.scheduler not in model.samplers:
            raise ValueError(
                f"scheduler={request.scheduler}: the model offers {', '.join(model.samplers) or 'none'}"
            )
        set_steps(copy.deepcopy(scheduler_of(model, request)), request.steps)
    if request.guider is not None and request.guider not in model.guiders:
        raise ValueError(f"guider={request.guider}: the model offers {', '.join(model.guiders) or 'none'}")
    guider_of(request)


def scheduler_of(model: ImageModel, request: ImageRequest) -> SchedulerMixin:
    """Return the scheduler that a request asks for, the same object for all that ask for the same."""
    return model.scheduler if request.scheduler is None else model.samplers[request.scheduler]


def guider_of(request: ImageRequest) -> BaseGuidance | None:
    """Return a new guider as the request asks for it; none for plain guidance. Raises as `build_guider`."""
    if request.guider is None:
        return None
    options = {scale_of(request.guider): request.guidance_scale, **dict(request.guider_options)}
    return build_guider(GuiderConfig(guider=request.guider, options=options))


def pixels(chain: Chain) -> np.ndarray:
    """Return a finished chain's image as uint8 [H,W,C]; ArithmeticError if it is not finite."""
    image = chain.image.float().cpu().numpy()
    if not np.isfinite(image).all():
        raise ArithmeticError("the model's image is not finite")
    return np.rint((np.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8).transpose(1, 2, 0)
