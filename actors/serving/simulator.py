"""A simulator in which policies that are served play episodes, for people to look at."""

import asyncio
import contextlib
import io
import logging
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from actors.serving.errors import ApiError
from actors.serving.messages import ActionAnswer
from counterpoint.actions.space import ActionSpace
from counterpoint.actions.tokenizer import Undecodable
from counterpoint.environments.episode import Environment, Step
from counterpoint.environments.running import NO_ACTION, Build, Deed, Guard, unguarded
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.selection.decision import Stream

logger = logging.getLogger(__name__)

T = TypeVar("T")

Choose = Callable[[Observation, Stream], Awaitable[ActionAnswer]]
"""Asks a policy for a decision; may raise ApiError, and Undecodable where the policy has no action."""
TIME_IS_UP = "time is up"


class Simulator:
    """Hosts one environment, in which one episode is played at a time.

    The environment is built, stepped and closed in one thread of its own, as a renderer's context belongs to
    the thread that made it; all else happens on the event loop. An environment that raises is closed, and the
    next episode builds another.

    Args:
        build: makes the environment.
        waiting: episodes that may wait for their turn.
        patience: seconds for which they may.
        guard: the context of every deed in the environment, such as one with a deadline.
    """

    def __init__(
        self, build: Build, waiting: int = 2, patience: float = 20.0, guard: Guard = unguarded
    ) -> None:
        if waiting < 0 or patience <= 0:
            raise ValueError(f"waiting={waiting}, patience={patience}: pass at least 0 and more than 0")
        self.build, self.waiting, self.patience, self.guard = build, waiting, patience, guard
        self._environment: Environment | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulator")
        self._turn = asyncio.Lock()
        self._in_line = 0

    async def spaces(self) -> tuple[ObservationSpace, ActionSpace]:
        """Return what the environment shows and takes, after building it; ApiError if that fails."""
        return await self._do("build", 0, 0, lambda env: (env.observation_space, env.action_space))

    async def play(
        self, choose: Choose, seed: int, execute: int | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Play the episode of `seed` and yield its events, as `Backend.play` describes them.

        `choose` is asked once a chunk, of which `execute` steps are taken (None: as many as the environment's
        action space says). Closing or cancelling it ends the episode at the next step. Raises ApiError:
        queue_full when others are before it for too long, unavailable if the environment raises,
        invalid_value if the chunks do not fit the environment, and whatever `choose` raises.
        """
        async with self._in_turn():
            observation, space, camera, most = await self._do("start", seed, 0, _starting(seed))
            execute = execute or space.execute
            yield {
                "event": "start", "instruction": observation.instruction, "seed": seed, "max_steps": most,
                "action_space": space.model_dump(mode="json") | {"execute": execute},
            }  # fmt: skip
            last = Step(observation, success=False, over=False)
            steps = decisions = 0
            while not last.over:
                try:
                    answer = await choose(last.observation, Stream(seed, decisions))
                except Undecodable:
                    # The policy's own failure, and no other than a wrong action: the episode counts.
                    last = Step(last.observation, success=False, over=True, outcome=NO_ACTION)
                    break
                yield _told(answer, steps, _png(last.observation.images[camera]))
                decisions += 1
                for action in _executed(answer.decision.actions, execute, space):
                    last = await self._do("act", seed, steps, _acting(action))
                    steps += 1
                    if last.over:
                        break
            yield {
                "event": "end", "success": last.success,
                "outcome": "success" if last.success else last.outcome or TIME_IS_UP,
                "steps": steps, "image": _png(last.observation.images[camera]),
            }  # fmt: skip

    async def close(self) -> None:
        """Close the environment, after the step that is under way, and end the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._give_up)
        self._thread.shutdown()

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """Wait until no other episode is under way."""
        busy = f"the simulator plays one episode at a time, and {self._in_line} wait: try again later"
        if self._turn.locked() and self._in_line >= self.waiting:
            raise ApiError("queue_full", busy, retry_after=self.patience)
        self._in_line += 1
        try:
            async with asyncio.timeout(self.patience):
                await self._turn.acquire()
        except TimeoutError:
            raise ApiError("queue_full", busy, retry_after=self.patience) from None
        finally:
            self._in_line -= 1
        try:
            yield
        finally:
            self._turn.release()

    async def _do(self, deed: Deed, seed: int, step: int, what: Callable[[Environment], T]) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._done, deed, seed, step, what)

    def _done(self, deed: Deed, seed: int, step: int, what: Callable[[Environment], T]) -> T:
        """Do something with the environment; runs in its thread."""
        try:
            if self._environment is None:
                with self.guard("build", seed, 0):
                    self._environment = self.build()
            with self.guard(deed, seed, step):
                return what(self._environment)
        except Exception:
            logger.warning("episode of seed %d, step %d: the environment failed", seed, step, exc_info=True)
            self._give_up()
            message = f"the simulator failed in the episode of seed={seed} after {step} steps: try again"
            raise ApiError("unavailable", message) from None

    def _give_up(self) -> None:
        """Close the environment, whose state nobody may know any more; runs in its thread."""
        environment, self._environment = self._environment, None
        if environment is not None:
            with contextlib.suppress(Exception):
                environment.close()


def _starting(seed: int) -> Callable[[Environment], tuple[Observation, ActionSpace, str, int]]:
    """Return what starts an episode and tells its observation, the actions, a camera and the most steps."""

    def start(environment: Environment) -> tuple[Observation, ActionSpace, str, int]:
        camera = next(iter(environment.observation_space.cameras))
        return environment.start(seed), environment.action_space, camera, environment.max_steps

    return start


def _acting(action: np.ndarray) -> Callable[[Environment], Step]:
    return lambda environment: environment.act(action)


def _executed(actions: np.ndarray, execute: int, space: ActionSpace) -> np.ndarray:
    """Return the steps of a chunk [H,D] that are taken; raise ApiError if it does not fit `space`."""
    if actions.shape[1] != space.dimensions or len(actions) < execute:
        names = ", ".join(space.names)
        message = (
            f"model: its chunks have shape {list(actions.shape)}, the simulator takes at least {execute} "
            f"steps of {space.dimensions} ({names}): ask for a policy that was trained for it"
        )
        raise ApiError("invalid_value", message, "model")
    return actions[:execute]


def _told(answer: ActionAnswer, step: int, image: str) -> dict[str, Any]:
    """Return the event of a decision after `step` control steps; what is not finite becomes null."""
    decision = answer.decision
    return {
        "event": "decision", "step": step, "image": image, "chosen": decision.chosen,
        "actions": _plain(decision.actions),
        "candidates": [_plain(chunk) for chunk in decision.candidates],
        "confidences": [_plain(confidence) for confidence in decision.confidences],
        "work": asdict(answer.work),
    }  # fmt: skip


def _plain(values: np.ndarray) -> Any:
    return np.round(values.astype(float), 6).tolist() if np.isfinite(values).all() else None


def _png(image: np.ndarray) -> str:
    """Return `image`, uint8 [H,W,3], as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return b64encode(buffer.getvalue()).decode("ascii")
