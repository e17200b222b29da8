"""One request on its way through the engine: its images under way, and what it took to make them."""

from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from actors.serving.image_model import ImageModel
from actors.serving.messages import ImageRequest
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
        """Rows of each of its images."""
        return 1 if self.request.guidance_scale == 1.0 else 2

    @property
    def unborn(self) -> range:
        """Images that are not yet under way."""
        return range(len(self.flying) + len(self.landed), self.request.count)

    def board(self, index: int) -> None:
        """Begin an image; its noise is that of `jobs.sample`."""
        asked = self.request
        stream = generator(asked.seed, "sample", asked.label, index)
        self.flying[index] = Chain(
            self.model.unet, self.model.scheduler, asked.label, asked.steps, asked.guidance_scale, stream
        )

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


def pixels(chain: Chain) -> np.ndarray:
    """Return a finished chain's image as uint8 [H,W,C]; ArithmeticError if it is not finite."""
    image = chain.image.float().cpu().numpy()
    if not np.isfinite(image).all():
        raise ArithmeticError("the model's image is not finite")
    return np.rint((np.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8).transpose(1, 2, 0)
