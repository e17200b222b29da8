"""One WebSocket session with a policy: frames are read while a decision is under way, and the latest wins."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import WebSocket

from actors.serving.actions_api import Policy, policy_of
from actors.serving.door import Door
from actors.serving.errors import ApiError
from actors.serving.frames import pack, unpack
from actors.serving.images_api import LARGEST_SEED
from actors.serving.images_routes import LARGEST_DRAWN
from actors.serving.messages import ActionAnswer, ActionRequest
from actors.serving.observing import ObservationKeys
from actors.serving.selecting import NAMES, Selecting, selection_of
from counterpoint.policies.observation import Observation
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream

logger = logging.getLogger(__name__)

ENDPOINT = "/v1/actions/stream"
"""Under which decisions of sessions are counted, whatever their path."""
BAD_FRAME, TOO_LARGE = 1008, 1009
LONGEST_ID = 256


class ViolationError(Exception):
    """A frame that no client may send; `code` is the WebSocket's close code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class _Asked:
    """An observation that waits for a decision."""

    observation: Observation
    selection: SelectionConfig
    observation_id: int | str | None
    arrived: float


class Session:
    """Answers one client's observations, one decision at a time; see `sessions.sessions_router`.

    Args:
        selecting: how actions are chosen where a frame does not say.
        seed: of the first episode; drawn if None.
        with_candidates: whether answers hold all candidates.
        deadline_s: seconds for each decision.
        authorization: the client's header, whose key's rate each decision counts against.
    """

    def __init__(
        self, door: Door, socket: WebSocket, policy: Policy, selecting: Selecting, seed: int | None,
        with_candidates: bool, deadline_s: float, authorization: str | None,
    ) -> None:  # fmt: skip
        """Raises ApiError if the policy cannot be asked in this way."""
        self.door, self.socket = door, socket
        self.selecting, self.with_candidates = selecting, with_candidates
        self.deadline_s, self.authorization = deadline_s, authorization
        self.decided = self.dropped = 0
        self._seed = secrets.randbelow(LARGEST_DRAWN) if seed is None else seed
        self._decision = 0
        self._newest: _Asked | None = None
        self._came = asyncio.Event()
        self._previous_s: float | None = None
        self._follow(policy)
        self._selection(None)

    async def run(self) -> None:
        """Talk until the client leaves, which ends the decision under way; raises ViolationError."""
        await self.socket.send_bytes(pack(self.metadata()))
        tasks = [asyncio.create_task(self._read_all()), asyncio.create_task(self._decide_all())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    def metadata(self) -> dict[str, Any]:
        """Return the first frame's content: what the client talks to."""
        policy, selection = self.policy, self._selection(None)
        return {
            "model": policy.info.name,
            "version": policy.info.version,
            "cameras": {name: list(size) for name, size in policy.observation_space.cameras.items()},
            "state": list(policy.observation_space.state),
            "keys": self.keys.known,
            "action_space": policy.action_space.model_dump(mode="json"),
            "horizon": policy.action_space.horizon,
            "action_dim": policy.action_space.dimensions,
            "conditions": sorted(policy.conditions),
            "selection": NAMES[selection.rule],
            "num_candidates": selection.candidates,
            "seed": self._seed,
        }

    async def _read_all(self) -> None:
        """Keep the newest observation, until the client leaves."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            content = await self._opened(message.get("bytes"))
            try:
                asked = self._asked(content)
            except ApiError as error:
                await self._complain(error, _id_in(content))
                continue
            if self._newest is not None:
                self.dropped += 1
                self.door.meters.dropped(self.policy.info.name, 1)
            self._newest = asked
            self._came.set()
            await asyncio.sleep(0)  # a client that sends without pause shall not keep others waiting

    async def _opened(self, frame: bytes | None) -> dict[Any, Any]:
        most = self.door.config.limits.max_body_bytes
        if frame is None:
            raise ViolationError(BAD_FRAME, "text frames are not understood: send MessagePack as binary")
        if len(frame) > most:
            raise ViolationError(TOO_LARGE, f"a frame has {len(frame)} bytes: send at most {most}")
        try:
            return unpack(frame, most)
        except ValueError as error:
            await self._complain(ApiError("invalid_value", str(error)), None)
            raise ViolationError(BAD_FRAME, str(error)) from error

    def _asked(self, content: Mapping[Any, Any]) -> _Asked:
        """Return what a frame asks, and begin a new episode if it says so; raises ApiError."""
        told = {name: _plain(content.get(name)) for name in ("reset", "seed", "num_candidates")}
        reset, seed, count = told["reset"], told["seed"], told["num_candidates"]
        if reset is not None and not isinstance(reset, bool):
            raise ApiError("invalid_value", "reset is no truth value: send true or false", "reset")
        if seed is not None and not (type(seed) is int and 0 <= seed <= LARGEST_SEED):
            raise ApiError("invalid_value", f"seed is no whole number from 0 to {LARGEST_SEED}", "seed")
        if count is not None and not (type(count) is int and count >= 1):
            raise ApiError("invalid_value", "num_candidates is no whole number above 0", "num_candidates")
        observation_id, selection = _id_in(content), self._selection(count)
        try:
            observation = self.keys.read(content)
        except ValueError as error:
            raise ApiError("invalid_value", str(error), "observation") from error
        if reset or seed not in (None, self._seed):
            self._decision = 0
            self._seed = self._seed if seed is None else seed
        return _Asked(observation, selection, observation_id, time.perf_counter())

    async def _decide_all(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            asked, self._newest = self._newest, None
            if asked is None:
                continue
            # Numbered before anything is waited for: a frame that begins an episode may arrive meanwhile.
            stream = Stream(self._seed, self._decision)
            self._decision += 1
            version = ""
            try:
                reply = await self._decide(asked, stream)
            except ApiError as error:
                await self._complain(error, asked.observation_id)
            else:
                await self.socket.send_bytes(pack(reply))
                self.decided += 1
                version = reply["version"]
            self._previous_s = time.perf_counter() - asked.arrived
            if version != self.policy.info.version:
                await self._refresh()

    async def _decide(self, asked: _Asked, stream: Stream) -> dict[str, Any]:
        meters, name = self.door.meters, self.policy.info.name
        begun, status = time.perf_counter(), 499
        try:
            self.door.keyring.admit(self.authorization)
            request = ActionRequest(name, asked.observation, asked.selection, stream)
            with self.door.admission.enter("actions"):
                answer = await self.door.backend.act(request, self.deadline_s)
            status = 200
        except ApiError as error:
            status = error.status
            raise
        finally:
            meters.request(ENDPOINT, name, status, time.perf_counter() - asked.arrived)
        meters.work("actions", name, answer.work)
        return self._reply(asked, stream, answer, begun)

    def _reply(self, asked: _Asked, stream: Stream, answer: ActionAnswer, begun: float) -> dict[str, Any]:
        decision, work, now = answer.decision, answer.work, time.perf_counter()
        reply: dict[str, Any] = {
            "actions": decision.actions.astype(np.float32, copy=False),
            "policy_timing": {"infer_ms": work.compute_s * 1000},
            "server_timing": {
                "infer_ms": (now - begun) * 1000,
                "queue_ms": (begun - asked.arrived + work.queued_s) * 1000,
                "total_ms": (now - asked.arrived) * 1000,
            },
            "version": work.version,
            "seed": stream.seed,
            "decision": stream.decision,
            "dropped": self.dropped,
            "chosen": decision.chosen,
            "rejected": decision.rejected,
            "clipped": decision.clipped,
        }
        if self._previous_s is not None:
            reply["server_timing"]["prev_total_ms"] = self._previous_s * 1000
        if asked.observation_id is not None:
            reply["observation_id"] = asked.observation_id
        if self.with_candidates:
            reply |= {"candidates": decision.candidates, "confidences": decision.confidences}
        return reply

    async def _refresh(self) -> None:
        """Look the policy up again: where its weights have changed, what it expects may have too."""
        try:
            self._follow(await policy_of(self.door.backend, self.door.config, self.policy.info.name))
        except ApiError as error:
            logger.info("the policy of a session cannot be looked up: %s", error)

    def _follow(self, policy: Policy) -> None:
        listed = [model.keys for model in self.door.config.actions.models if model.name == policy.info.name]
        try:
            self.keys = ObservationKeys(policy.observation_space, listed[0] if listed else {})
        except ValueError as error:
            logger.error("%s", error)
            raise ApiError("unavailable", "the service's keys do not fit this policy's cameras") from error
        self.policy = policy

    def _selection(self, count: int | None) -> SelectionConfig:
        selecting = self.selecting
        if count is not None:
            selecting = selecting.model_copy(update={"num_candidates": count})
        config = self.door.config
        return selection_of(selecting, config.actions.selection, self.policy.conditions, config.limits)

    async def _complain(self, error: ApiError, observation_id: int | str | None) -> None:
        """Send an error as openpi's clients know one: by a text frame."""
        told = error.body()
        if observation_id is not None:
            told["observation_id"] = observation_id
        await self.socket.send_text(json.dumps(told))


def _id_in(content: Mapping[Any, Any]) -> int | str | None:
    value = _plain(content.get("observation_id"))
    if isinstance(value, str):
        return value[:LONGEST_ID]
    return value if type(value) is int else None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
