"""The deployment that hosts robot policies."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import torch

from actors.batching import Batched, Batcher
from actors.serving.checkpoints import check, load_policy, locate
from actors.serving.config import ServiceConfig
from actors.serving.errors import ApiError
from actors.serving.host import Loaded, ModelHost
from actors.serving.hosted_policy import GREEDY, Asked, HostedPolicy
from actors.serving.image_server import replica_name
from actors.serving.messages import ActionAnswer, ActionRequest, Work
from actors.serving.policy_probe import made_up
from actors.serving.priority import step_back
from counterpoint.actions.tokenizer import Undecodable
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream

logger = logging.getLogger(__name__)


class ActionServer(ModelHost[HostedPolicy]):
    """Answers requests for decisions; those for one version and one selection meet in batches.

    All of them, whichever policy they name, are computed in one thread.
    """

    kind = "actions"

    def __init__(self, config: ServiceConfig) -> None:
        self.settings = config.actions
        self.device = torch.device(self.settings.devices or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.replica = replica_name()
        batching = self.settings.batching
        self.batcher: Batcher[Asked, Decision] = Batcher(_decide, batching.max_batch, batching.max_wait)
        step_back(but=[self.batcher.thread_id])
        super().__init__(config.root, config.actions)

    def load(self, checkpoint: str) -> Loaded[HostedPolicy]:
        """Load a policy."""
        bundle, version, created = load_policy(locate(self.root, checkpoint), self.device)
        batching = self.settings.batching
        hosted = HostedPolicy(bundle, version, batching.max_batch, batching.exact)
        return Loaded(hosted, checkpoint, version, created)

    def details(self, name: str, model: HostedPolicy) -> dict[str, Any]:
        """Return the policy's spaces and conditions."""
        bundle = model.bundle
        return {
            "observation_space": bundle.observation_space.model_dump(mode="json"),
            "action_space": bundle.action_space.model_dump(mode="json"),
            "conditions": sorted(bundle.policy.conditions),
        }

    def canary(self, loaded: Loaded[HostedPolicy]) -> None:
        """Choose on noise."""
        loaded.model.canary()

    def check_unlisted(self, name: str) -> str:
        """Return `name` if a policy lies there."""
        check(locate(self.root, name), "actions")
        return name

    async def act(self, request: ActionRequest, deadline_s: float) -> ActionAnswer:
        """Return the decision; being cancelled gives up its place in the batch."""
        loaded = await self.opened(request.model)
        return await answered(self.batcher, loaded.model, request, deadline_s, self.replica)

    async def probe(self) -> None:
        """Make a greedy decision of the default policy."""
        name = next(iter(self.wanted))
        loaded = await self.opened(name)
        observation = made_up(loaded.model.bundle, 0)
        request = ActionRequest(name, observation, GREEDY, Stream(0, 0))
        try:
            await answered(self.batcher, loaded.model, request, 30.0, self.replica)
        except ApiError as error:
            if not isinstance(error.__cause__, Undecodable):  # noise may have no answer
                raise

    def check_health(self) -> None:
        """Raise RuntimeError once the batcher's thread is gone, upon which Serve replaces the replica."""
        if not self.batcher.alive:
            raise RuntimeError("the batcher's thread has ended")


async def answered(
    batcher: Batcher[Asked, Decision], hosted: HostedPolicy, request: ActionRequest, deadline_s: float,
    replica: str,
) -> ActionAnswer:  # fmt: skip
    """Return the decision of `hosted`, computed by `batcher` with others of the same selection.

    Raises ApiError: invalid_value for an observation or a mask that does not fit, deadline_exceeded,
    no_action where the policy has none to offer, internal_error where it fails. Being cancelled drops the
    request.
    """
    try:
        observation = hosted.fitted(request.observation, request.selection)
    except ValueError as error:
        raise ApiError("invalid_value", str(error), "observation") from error
    try:
        asked = batcher.enqueue([(observation, request.stream)], (hosted, request.selection))
    except RuntimeError as error:  # closed
        raise ApiError("unavailable", "this replica is shutting down: try again", retry_after=1.0) from error
    try:
        async with asyncio.timeout(deadline_s):
            took: Batched[Decision] = await asyncio.wrap_future(asked)
    except TimeoutError as error:
        raise ApiError("deadline_exceeded", f"no decision within {deadline_s:.3g} s: try later") from error
    except Undecodable as error:
        raise ApiError(
            "no_action",
            "the policy has no action to offer: neither a candidate nor its greedy chunk can be decoded; "
            "try another seed, or more candidates",
        ) from error
    except Exception as error:
        logger.exception("a decision failed")
        raise ApiError("internal_error", "the policy failed on this request") from error
    (decision,) = took.answers
    work = Work(hosted.version, replica, took.queued_s, took.compute_s, 1, float(took.batch_size))
    return ActionAnswer(decision, work)


def _decide(key: tuple[HostedPolicy, SelectionConfig], asked: list[Asked]) -> Sequence[Decision]:
    hosted, selection = key
    return hosted.decide(asked, selection)
