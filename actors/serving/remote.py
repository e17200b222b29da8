"""The models of a service as its gateway reaches them: by Serve handles, with deadlines and retries."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from actors.serving.config import ServiceConfig
from actors.serving.errors import ApiError
from actors.serving.messages import ActionAnswer, ActionRequest, ImageAnswer, ImageRequest, Kind, ModelInfo
from cluster.kinds import root_cause

logger = logging.getLogger(__name__)

Handle = DeploymentHandle[Any]
FRESH_S = 1.0
"""Seconds for which what a replica said of its models is believed."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
READY_S = 30.0


class RemoteModels:
    """Implements `backend.Backend`.

    A request whose replica dies is sent again: it carries its seed, so whoever answers gives the same answer.
    """

    def __init__(
        self, config: ServiceConfig, images: Handle | None, actions: Handle | None, simulator: Handle | None
    ) -> None:
        self.config, self.simulator = config, simulator
        self.handles: dict[Kind, Handle] = {}
        if images is not None:
            self.handles["images"] = images
        if actions is not None:
            self.handles["actions"] = actions
        self._told: dict[Kind, tuple[float, list[ModelInfo]]] = {}
        self._unlisted: dict[str, tuple[float, ModelInfo]] = {}
        self._routed: dict[tuple[Kind, str], Handle] = {}

    async def models(self) -> Sequence[ModelInfo]:
        """Return what is served."""
        told = [await self._listed(kind) for kind in self.handles]
        return [info for infos in told for info in infos]

    async def model(self, name: str) -> ModelInfo:
        """Return a model by name."""
        known = await self.models()
        for info in known:
            if info.name == name:
                return info
        for kind, hosted in (("images", self.config.images), ("actions", self.config.actions)):
            if hosted.unlisted and kind in self.handles:
                return await self._look_up(kind, name)
        names = ", ".join(info.name for info in known)
        raise ApiError("model_not_found", f"model={name[:80]!r} is not served: give one of {names}", "model")

    async def generate(self, request: ImageRequest, deadline_s: float) -> ImageAnswer:
        """Return the images."""
        answer, retries = await self._ask("images", "generate", request.model, request, deadline_s)
        return replace(answer, work=replace(answer.work, retries=retries))

    async def act(self, request: ActionRequest, deadline_s: float) -> ActionAnswer:
        """Return the decision."""
        answer, retries = await self._ask("actions", "act", request.model, request, deadline_s)
        return replace(answer, work=replace(answer.work, retries=retries))

    async def play(
        self, model: str, selection: dict[str, Any], seed: int, deadline_s: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Play an episode in the simulator and yield its events."""
        if self.simulator is None:
            raise ApiError("not_found", "this service has no simulator: add `simulator` to its configuration")
        events: Any = self.simulator.options(stream=True).play.remote(model, selection, seed)
        deadline = time.monotonic() + deadline_s
        try:
            while True:  # whoever asks for the next event may be another task than the one before
                yield await asyncio.wait_for(anext(events), deadline - time.monotonic())
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise ApiError("deadline_exceeded", f"the episode took longer than {deadline_s:.3g} s") from error
        except (RayError, RayServeException) as error:
            raise _told_to_client(error) from error
        finally:
            events.cancel()

    async def ready(self) -> None:
        """Return once a replica of every kind has answered a question of the smallest size."""
        self._told.clear()
        for kind in self.handles:
            await self._ask(kind, "probe", "", None, READY_S)

    async def _listed(self, kind: Kind) -> list[ModelInfo]:
        told = self._told.get(kind)
        if told is None or time.monotonic() - told[0] > FRESH_S:
            infos, _ = await self._ask(kind, "describe", "", None, self.config.limits.deadline_s)
            told = self._told[kind] = (time.monotonic(), infos)
        return told[1]

    async def _look_up(self, kind: Kind, name: str) -> ModelInfo:
        found = self._unlisted.pop(name, None)
        if found is None or time.monotonic() - found[0] > FRESH_S:
            info, _ = await self._ask(kind, "info", name, name, self.config.limits.deadline_s)
            found = (time.monotonic(), info)
        self._unlisted[name] = found
        while len(self._unlisted) > 64:
            self._unlisted.pop(next(iter(self._unlisted)))
        return found[1]

    def _routed_to(self, kind: Kind, model: str) -> Handle:
        """Return the handle that prefers replicas which hold `model`."""
        if not model:
            return self.handles[kind]
        key = (kind, model)
        if key not in self._routed:
            if len(self._routed) > 256:  # a name is the client's to make up
                self._routed.clear()
            self._routed[key] = self.handles[kind].options(multiplexed_model_id=model)
        return self._routed[key]

    async def _ask(
        self, kind: Kind, method: str, model: str, request: Any, deadline_s: float
    ) -> tuple[Any, int]:
        """Return a replica's answer, and how often it had to be asked again."""
        if kind not in self.handles:
            raise ApiError("not_found", f"this service hosts no {kind}: add models to its configuration")
        deadline, pause = time.monotonic() + deadline_s, FIRST_PAUSE_S
        limited = method in ("generate", "act")
        retries = 0
        while True:
            left = deadline - time.monotonic()
            arguments = () if request is None else (request, left) if limited else (request,)
            response = getattr(self._routed_to(kind, model), method).remote(*arguments)
            try:
                async with asyncio.timeout(left):
                    return await response, retries
            except TimeoutError as error:
                response.cancel()
                raise ApiError("deadline_exceeded", f"no answer within {deadline_s:.3g} s") from error
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (RayError, RayServeException) as error:
                told = _told_to_client(error)
                again = told.code == "unavailable" and _is_loss(error)
                if not again or retries >= self.config.limits.retries or time.monotonic() + pause > deadline:
                    raise told from error
            retries += 1
            logger.info("%s: asking again after a replica was lost", method)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _is_loss(error: BaseException) -> bool:
    """Say whether a replica was lost, rather than its deployment being unable to run."""
    return isinstance(root_cause(error), RayActorError | ReplicaUnavailableError)


def _told_to_client(error: BaseException) -> ApiError:
    """Return what a client is told of an error that a handle raised."""
    if isinstance(error, RayTaskError):
        cause = root_cause(error)
        if isinstance(cause, ApiError):
            return cause
        if isinstance(cause, RayActorError):
            return ApiError("unavailable", "the model's process was lost: try again", retry_after=1.0)
        logger.error("a replica failed", exc_info=error)
        return ApiError("internal_error", "the model failed on this request")
    if isinstance(error, BackPressureError):
        return ApiError("queue_full", "all replicas are busy: try again later", retry_after=1.0)
    if isinstance(error, TaskCancelledError):
        return ApiError("unavailable", "the request was cancelled in the model's process", retry_after=1.0)
    return ApiError("unavailable", "no replica of the model answers: try again later", retry_after=1.0)
