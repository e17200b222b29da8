"""Hosts of critic groups: an actor owns one noise band (or several) and survives being killed."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.assembly import Assembly, Behind, Key
from actors.recipe import PanelRecipe, build_group
from actors.wire import Message, pack_state, pack_verdict, unpack, unpack_state
from cluster.checkpoints import checkpoint_steps, latest_checkpoint, prune_checkpoints, save_checkpoint
from cluster.failures import reporting
from cluster.storage import RunStore
from counterpoint.critics.group import CriticGroup
from counterpoint.critics.panel import group_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostSettings:
    """What a host needs to know beside the panel's recipe."""

    name: str
    groups: tuple[int, ...]
    """Critic groups hosted here."""
    snapshots: str
    """URI of the folder for snapshots; each group has its own below."""
    snapshot_every: int
    """Steps between snapshots; trainers keep the messages since, and send them again after a restart."""
    patience: float
    """Seconds to wait for the other ranks of a step."""


class HostedGroup:
    """A critic group that many ranks may ask, and that returns to its last snapshot when it is made anew."""

    def __init__(
        self, group: CriticGroup, store: RunStore, settings: HostSettings, device: torch.device
    ) -> None:
        self.group, self.store, self.settings, self.device = group, store, settings, device
        self.name = group_name(group.index)
        self.assembly = Assembly(self._compute, settings.patience)
        self.next_key = (0, 0)
        """The first (step, micro-batch) that has not been judged."""
        self.durable = 0
        """Step before which the newest snapshot was taken."""
        snapshot = latest_checkpoint(store)
        if snapshot is not None:
            group.load(snapshot.tensors(self.name))
            self.next_key, self.durable = (snapshot.step, 0), snapshot.step
            logger.warning("%s continues from its snapshot before panel step %d", self.name, snapshot.step)

    def judge(self, rank: int, ranks: int, message: Message) -> Message:
        """Judge one rank's samples together with the other ranks'.

        Raises Behind if the message that this rank sent before this one was lost with an earlier life, and
        RuntimeError for a message of the past whose answer is not at hand any more.
        """
        self.check_seen(message["after"])
        key = (message["step"], message["micro"])
        if key < self.next_key and not self.assembly.remembers(key):
            raise RuntimeError(
                f"{self.name} has judged step {key[0]} long ago and expects {self.next_key[0]}"
            )
        answer: Message = self.assembly.submit(key, rank, ranks, message)
        return answer | {"durable": self.durable}

    def check_seen(self, key: Key | None) -> None:
        """Raise Behind unless the message `key` has been judged."""
        if key is not None and key >= self.next_key:
            raise Behind(self.next_key)

    def load(self, state: dict[str, Any], step: int) -> None:
        """Return to a stored state, after which panel step `step` comes next."""
        self.assembly.reset()
        self.group.load(unpack_state(state))
        self.next_key = (step, 0)
        for later in checkpoint_steps(self.store):
            # A snapshot of steps that will be taken again must not be found by a restart before they are.
            if later > step:
                self.store.delete(f"checkpoints/step-{later:08d}")
        self.remember(step)

    def remember(self, step: int) -> None:
        """Take a snapshot before panel step `step`."""
        save_checkpoint(self.store, step, {self.name: self.group.state()}, {})
        prune_checkpoints(self.store, keep=2)
        self.durable = step

    def _compute(self, messages: Sequence[Message]) -> list[Message]:
        begun = time.perf_counter()
        samples = unpack(messages, self.device)
        if samples.micro == 0 and samples.step >= self.durable + self.settings.snapshot_every:
            # Not sooner: only now is it certain that every rank has got its answer to what came before.
            self.remember(samples.step)
        verdict = self.group.judge(samples)
        parts = pack_verdict(verdict, [len(m["labels"]) for m in messages])
        last = samples.micro == samples.micros - 1
        self.next_key = (samples.step + 1, 0) if last else (samples.step, samples.micro + 1)
        seconds = time.perf_counter() - begun
        return [part | {"seconds": seconds} for part in parts]


class CriticHost:
    """Hosts critic groups; an ordinary class, to which `ray.remote` adds nothing but transport.

    Restarted, its groups go back to their last snapshots and tell trainers what they have missed; trainers
    send that again, so nothing is lost and the result is the one of an undisturbed run.
    """

    def __init__(self, recipe: PanelRecipe, settings: HostSettings) -> None:
        self.settings = settings
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.hosted = {
            index: HostedGroup(
                build_group(recipe, index, device),
                RunStore(f"{settings.snapshots}/{group_name(index)}"),
                settings,
                device,
            )
            for index in settings.groups
        }

    # Innermost: Ray looks for the group on the function that decorators wrap.
    @reporting(lambda self: self.settings.name)  # type: ignore[type-var]
    @ray.method(concurrency_group="judging")
    def judge(self, group: int, rank: int, ranks: int, message: Message) -> Message:
        """Judge one rank's samples; see `HostedGroup.judge`."""
        return self.hosted[group].judge(rank, ranks, message)

    @reporting(lambda self: self.settings.name)
    def state(self, group: int, after: Key | None) -> dict[str, Any]:
        """Return the state of a group after the message `after`; raises Behind if it was lost."""
        self.hosted[group].check_seen(after)
        return pack_state(self.hosted[group].group.state())

    def load(self, state: dict[str, dict[str, Any]], step: int) -> None:
        """Return every group here to a stored state, after which panel step `step` comes next."""
        for hosted in self.hosted.values():
            hosted.load(state[hosted.name], step)

    def expects(self, group: int) -> tuple[int, int]:
        """Return the first (step, micro-batch) that a group has not judged."""
        return self.hosted[group].next_key

    def digests(self) -> dict[str, str]:
        """Return each group's digest of its heads."""
        return {hosted.name: hosted.group.digest() for hosted in self.hosted.values()}

    def pid(self) -> int:
        """Return the process id, by which a fault drill finds this host."""
        return os.getpid()


def critic_actor(groups: int, ranks: int) -> Any:
    """Return the actor class of a host of `groups` critic groups that `ranks` trainers ask at once.

    Judging has threads of its own, enough for every rank to wait while another group's ranks do; state,
    digests and loading answer on others, so that a stuck step can be ended.
    """
    threads: dict[str, Any] = {"concurrency_groups": {"judging": groups * ranks}, "max_concurrency": 4}
    return ray.remote(max_restarts=-1, max_task_retries=0, **threads)(CriticHost)
