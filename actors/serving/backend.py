"""What the HTTP side asks of the models, wherever they are."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from actors.serving.messages import ActionAnswer, ActionRequest, ImageAnswer, ImageRequest, ModelInfo


class Backend(Protocol):
    """The models of a service. Every method raises ApiError and nothing else, save for being cancelled.

    Cancelling a call frees what it holds in the replica.
    """

    async def models(self) -> Sequence[ModelInfo]:
        """Return what is served, in the configuration's order: images first."""
        ...

    async def model(self, name: str) -> ModelInfo:
        """Return a model by name; model_not_found names those there are. Cheap: a replica is seldom asked."""
        ...

    async def generate(self, request: ImageRequest, deadline_s: float) -> ImageAnswer:
        """Return the images; deadline_exceeded after `deadline_s` seconds, unavailable without replicas."""
        ...

    async def act(self, request: ActionRequest, deadline_s: float) -> ActionAnswer:
        """Return the decision; invalid_value if the observation or selection does not fit the policy."""
        ...

    def play(
        self, model: str, selection: dict[str, Any], seed: int, deadline_s: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Play an episode in the simulator and yield its events; not_found without a simulator.

        {"event": "start", "instruction", "seed", "max_steps", "action_space"},
        {"event": "decision", "step", "image" (PNG, base64), "chosen", "actions", "candidates" (null where
        undecodable), "confidences", "work"} for each decision,
        {"event": "end", "success", "outcome", "steps", "image"}.
        JSON-able; numbers that are not finite are null.
        """
        ...

    async def ready(self) -> None:
        """Return once every deployment has answered a real question of the smallest size."""
        ...
