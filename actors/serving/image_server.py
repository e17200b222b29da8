"""The deployment that hosts image generators."""

import asyncio
import logging
from typing import Any

import ray
import torch

from actors.serving.checkpoints import check, load_images, locate
from actors.serving.config import ImageModelConfig, ServiceConfig
from actors.serving.engine import Engine
from actors.serving.errors import ApiError
from actors.serving.host import Loaded, ModelHost
from actors.serving.image_model import ImageModel, canary
from actors.serving.messages import ImageAnswer, ImageRequest, Work
from actors.serving.priority import step_back

logger = logging.getLogger(__name__)

UNLISTED_STEPS = 4
"""Most steps of a model that the configuration does not name, be it a teacher of many."""


class ImageServer(ModelHost[ImageModel]):
    """Answers image requests; all of them, whichever model they name, pass through one engine's thread."""

    kind = "images"

    def __init__(self, config: ServiceConfig) -> None:
        self.settings = config.images
        self.device = torch.device(self.settings.devices or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.engine = Engine(self.settings.batching)
        step_back(but=[self.engine.thread_id])
        self.replica = replica_name()
        super().__init__(config.root, config.images)

    def load(self, checkpoint: str) -> Loaded[ImageModel]:
        """Load a pipeline."""
        batching = self.settings.batching
        model, created = load_images(
            locate(self.root, checkpoint), batching.max_batch, batching.exact, self.device
        )
        for entry in self.settings.models:
            if entry.classes and checkpoint in self.listed.get(entry.name, ()):
                _check_classes(entry, model)
        return Loaded(model, checkpoint, model.version, created)

    def canary(self, loaded: Loaded[ImageModel]) -> None:
        """Generate one image."""
        canary(loaded.model)

    def check_unlisted(self, name: str) -> str:
        """Return `name` if a pipeline lies there."""
        check(locate(self.root, name), "images")
        return name

    async def generate(self, request: ImageRequest, deadline_s: float) -> ImageAnswer:
        """Return the images; being cancelled gives up their place in the batch."""
        loaded = await self.opened(request.model)
        try:
            future = self.engine.submit(loaded.model, request, deadline_s)
        except ValueError as error:
            raise ApiError("invalid_value", str(error)) from error
        except RuntimeError as error:  # closed
            raise ApiError(
                "unavailable", "this replica is shutting down: try again", retry_after=1.0
            ) from error
        try:
            answer = await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise ApiError("deadline_exceeded", f"no images within {deadline_s:.3g} s: try later") from error
        except Exception as error:
            logger.exception("a request failed")
            raise ApiError("internal_error", "the model failed on this request") from error
        work = Work(
            loaded.version, self.replica, answer.queued_s, answer.compute_s, answer.evaluations,
            answer.batch_size,
        )  # fmt: skip
        return ImageAnswer(answer.images, work)

    async def probe(self) -> None:
        """Generate one image of the default model."""
        await self.generate(ImageRequest(next(iter(self.wanted)), label=0), deadline_s=30.0)

    def check_health(self) -> None:
        """Raise RuntimeError once the engine's thread is gone, upon which Serve replaces the replica."""
        if not self.engine.alive:
            raise RuntimeError("the engine's thread has ended")

    def details(self, name: str, model: ImageModel) -> dict[str, Any]:
        """Return the classes' names, the images' shape, the most steps, and how they can be sampled."""
        entry = next((entry for entry in self.settings.models if entry.name == name), None)
        side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
        names = entry.classes if entry is not None else ()
        return {
            "classes": list(names) or [str(label) for label in range(model.classes)],
            "height": side, "width": side, "channels": channels,
            "max_steps": min(entry.max_steps if entry is not None else UNLISTED_STEPS, model.max_steps),
            "schedulers": list(model.samplers), "guiders": list(model.guiders),
            "exact_batch_sizes": list(model.sizes),
        }  # fmt: skip


def _check_classes(entry: ImageModelConfig, model: ImageModel) -> None:
    if len(entry.classes) != model.classes:
        raise ValueError(
            f"images.models: {entry.name} names {len(entry.classes)} classes, its checkpoint has "
            f"{model.classes}: name each, or none"
        )


def replica_name() -> str:
    """Return the id of this replica's actor, by which answers tell who made them; "here" outside of Ray."""
    if not ray.is_initialized():
        return "here"
    return ray.get_runtime_context().get_actor_id() or "here"
