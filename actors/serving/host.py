"""What the deployments that host models have in common: which checkpoints they hold, and how they change."""

import abc
import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from actors.serving.config import HostedConfig
from actors.serving.errors import ApiError
from actors.serving.messages import Kind, ModelInfo
from actors.serving.shelf import Shelf, Slot

logger = logging.getLogger(__name__)

M = TypeVar("M")


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """A checkpoint in memory."""

    model: M
    checkpoint: str
    version: str
    created: int


class ModelHost(abc.ABC, Generic[M]):
    """A replica that hosts models by name; subclasses say how one is loaded and tried.

    `user_config` is `{"models": {name: {"checkpoint": ..., "previous": ...}}}`. A change of it loads what is
    new beside the old, tries it, and swaps; what fails to load or to pass leaves the old one at work and is
    told in `describe`. Which models are in memory is Serve's own multiplexing, least recently used out first:
    `serve.multiplexed` wraps `slot` where the deployment is made.
    """

    kind: Kind

    def __init__(self, root: str, hosted: HostedConfig) -> None:
        self.root, self.hosted = root, hosted
        self.wanted: dict[str, str] = {}
        self.listed: dict[str, tuple[str | None, ...]] = {}
        """Checkpoints that each name stands for, or stood for until its last promotion."""
        self.infos: dict[str, ModelInfo] = {}
        """What was last known of each listed model, in memory or not."""
        self.shelf: Shelf[Loaded[M]] = Shelf(
            self.load, self.canary, self.check_unlisted if hosted.unlisted else None
        )

    @abc.abstractmethod
    def load(self, checkpoint: str) -> Loaded[M]:
        """Load a checkpoint; ValueError, in one line without paths, if it is missing or damaged."""
        ...

    @abc.abstractmethod
    def canary(self, loaded: Loaded[M]) -> None:
        """Ask a new checkpoint one question; ValueError if the answer is unfit."""
        ...

    @abc.abstractmethod
    def check_unlisted(self, name: str) -> str:
        """Return the checkpoint that an unlisted `name` stands for; ValueError if there is none."""
        ...

    @abc.abstractmethod
    def details(self, name: str, model: M) -> dict[str, Any]:
        """Return what clients are told of `model` under the name by which they know it."""
        ...

    async def slot(self, name: str) -> Slot[Loaded[M]]:
        """Have a model in memory."""
        return await asyncio.to_thread(self.shelf.open, name)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Follow a change of which checkpoint each name stands for.

        At a replica's start every listed model is loaded once, so that a bad checkpoint is found now; one
        that does not load falls back to the checkpoint before it, and ends the start if there is none.
        """
        models = user_config["models"]
        first = not self.wanted
        self.wanted = {name: entry["checkpoint"] for name, entry in models.items()}
        self.listed = {name: (entry["checkpoint"], entry.get("previous")) for name, entry in models.items()}
        if first:
            before = {name: entry.get("previous") or entry["checkpoint"] for name, entry in models.items()}
            await asyncio.to_thread(self.shelf.assign, before)
        await asyncio.to_thread(self.shelf.assign, self.wanted)
        for name in reversed(self.wanted) if first else ():  # the first listed is the last to be evicted
            await self.opened(name)
        self.infos = {name: info for name, info in self.infos.items() if name in self.wanted}

    async def opened(self, name: str) -> Loaded[M]:
        """Return a model's version in force, loaded if need be; ApiError where clients may not name it."""
        if name not in self.wanted and self.shelf.resident(name) is None:
            await self._check_may_open(name)
        try:
            slot = await self.slot(name)
        except ValueError as error:
            raise ApiError("unavailable" if name in self.wanted else "model_not_found", str(error)) from error
        if name in self.wanted:
            self.infos[name] = self._info(name, slot.model)
        return slot.model

    async def _check_may_open(self, name: str) -> None:
        """Refuse a name before it makes Serve evict a model for it."""
        if not self.hosted.unlisted:
            listed = ", ".join(self.wanted)
            raise ApiError(
                "model_not_found", f"model={name[:80]!r} is not served: give one of {listed}", "model"
            )
        try:
            await asyncio.to_thread(self.check_unlisted, name)
        except ValueError as error:
            raise ApiError("model_not_found", f"model: {error}", "model") from error

    async def describe(self) -> list[ModelInfo]:
        """Return the listed models as they are now."""
        found = []
        for name in self.wanted:
            slot = self.shelf.resident(name)
            found.append(self.infos[name] if slot is None else self._info(name, slot.model))
        return found

    async def info(self, name: str) -> ModelInfo:
        """Return what is known of a model, which is loaded for that; ApiError if it may not be named."""
        return self._info(name, await self.opened(name))

    def _info(self, name: str, loaded: Loaded[M]) -> ModelInfo:
        refused = self.shelf.refused(name)
        return ModelInfo(
            name,
            self.kind,
            loaded.checkpoint,
            loaded.version,
            loaded.created,
            self.details(name, loaded.model),
            refused,
        )
