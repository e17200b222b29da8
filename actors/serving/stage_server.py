"""The deployment in which the page plays episodes: a simulator that asks the policies' deployment."""

import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

from ray.serve.handle import DeploymentHandle

from actors.serving.config import ServiceConfig
from actors.serving.messages import ActionAnswer, ActionRequest
from actors.serving.remote import RemoteModels
from actors.serving.simulator import Simulator
from actors.watchdog import Watchdog
from counterpoint.environments.config import build_environment
from counterpoint.environments.running import Deed
from counterpoint.policies.observation import Observation
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream

DEADLINES_S: dict[Deed, float] = {"build": 120.0, "start": 60.0, "act": 30.0}


class StageServer:
    """Hosts one simulator."""

    def __init__(self, config: ServiceConfig, actions: DeploymentHandle[Any]) -> None:
        self.config = config
        self.backend = RemoteModels(config, None, actions, None)
        assert config.simulator is not None
        # A simulator that hangs in C would hold its place for ever; Serve replaces the replica.
        guard = Watchdog(f"{config.name}-simulator", DEADLINES_S).guard
        build = functools.partial(build_environment, config.simulator.environment)
        self.simulator = Simulator(build, guard=guard)

    async def play(self, model: str, selection: dict[str, Any], seed: int) -> AsyncIterator[dict[str, Any]]:
        """Play an episode and yield its events; see `backend.Backend.play`."""
        rule = SelectionConfig.model_validate(selection)
        execute = (await self.backend.model(model)).details["action_space"]["execute"]

        async def choose(observation: Observation, stream: Stream) -> ActionAnswer:
            request = ActionRequest(model, observation, rule, stream)
            return await self.backend.act(request, self.config.limits.deadline_s)

        async with contextlib.aclosing(self.simulator.play(choose, seed, execute)) as events:
            async for event in events:
                yield event
