"""What is served: GET /v1/models, in the shape of OpenAI's API with fields of ours beside it."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from actors.serving.door import Door
from actors.serving.messages import Kind, ModelInfo

EXAMPLE_DETAILS = {
    "classes": ["zero", "one"], "height": 16, "width": 16, "channels": 1, "max_steps": 4,
    "schedulers": ["DDIMScheduler"], "guiders": ["ClassifierFreeGuidance"],
}  # fmt: skip


class ModelCard(BaseModel):
    """A served model as it is now."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    id: str = Field(examples=["digits"])
    """What requests call it."""
    object: Literal["model"] = Field("model", examples=["model"])
    """Always "model"."""
    created: int = Field(examples=[1790000000])
    """When its checkpoint was saved, seconds since 1970."""
    owned_by: str = Field(examples=["counterpoint"])
    """The service's name."""
    kind: Kind = Field(examples=["images"])
    """Ours. What it makes: images (POST /v1/images/generations) or actions (POST /v1/actions)."""
    version: str = Field(examples=["student@final-0123456789ab"])
    """Ours. Names the weights; every answer carries it."""
    checkpoint: str = Field(examples=["student@400"])
    """Ours. RUN or RUN@STEP below the service's root."""
    refused: str | None = Field(examples=[None])
    """Ours. Why the last promotion was not followed, where it was not."""
    details: dict[str, Any] = Field(examples=[EXAMPLE_DETAILS])
    """Ours. Of images: the names of the classes by label, height, width, channels, the most
    num_inference_steps, and the names of schedulers (its own first) and guiders. Of actions:
    observation_space, action_space, and conditions that can be masked."""


class ModelList(BaseModel):
    """All models that have a name, image generators first; the first of a kind is its default."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["list"] = Field("list", examples=["list"])
    """Always "list"."""
    data: list[ModelCard]
    """The models."""


def models_router(door: Door) -> APIRouter:
    """Return the routes; what they raise is in the form of ApiError."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", response_description="What is served.")
    async def list_models() -> ModelList:
        """List the models that are served."""
        return ModelList(data=[_card(info, door.config.name) for info in await door.backend.models()])

    # A checkpoint's name may have slashes in it.
    @router.get("/v1/models/{model:path}", response_description="The model.")
    async def show_model(
        request: Request,
        model: Annotated[str, Path(max_length=512, description="The model's name.", examples=["digits"])],
    ) -> ModelCard:
        """Show one model."""
        info = await door.backend.model(model)
        request.state.model = info.name
        return _card(info, door.config.name)

    return router


def _card(info: ModelInfo, service: str) -> ModelCard:
    return ModelCard(
        id=info.name,
        created=info.created,
        owned_by=service,
        kind=info.kind,
        version=info.version,
        checkpoint=info.checkpoint,
        refused=info.refused,
        details=dict(info.details),
    )
