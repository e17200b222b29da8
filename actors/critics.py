"""Hosts of critic groups: an actor owns one noise band (or several) and survives being killed."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from actors.assembly import Assembly, Behind, Key
from actors.recipe import PanelRecipe, build_groups
from actors.replicas import CollectiveExchange, PeerExchange
from actors.telemetry import Telemetry, run_tag
from actors.wire import (
    COLLECTIVE,
    Message,
    Transport,
    pack_state,
    pack_verdict,
    unpack,
    unpack_state,
    wire_dtype,
)
from cluster.checkpoints import checkpoint_steps, latest_checkpoint, prune_checkpoints, save_checkpoint
from cluster.dumpable import dumpable
from cluster.failures import reporting
from cluster.storage import RunStore
from counterpoint.critics.group import CriticGroup, Samples
from counterpoint.critics.panel import group_name

logger = logging.getLogger(__name__)

GRACE_S = 0.5
"""Seconds by which a message may overtake the one that its rank sent before it."""


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
    """Seconds to wait for the other ranks of a step, and for other replicas."""
    replica: int = 0
    """Which of the actors that share these groups' samples this is."""
    replicas: int = 1
    transport: Transport = "object_store"
    """nixl carries gradients to the trainers; gloo what replicas exchange."""
    run: str = ""
    """URI of the run, by which metrics name it; that of the snapshots unless given."""
    rank: int = 0
    """Which of the run's hosts this is, over all replicas."""


class HostedGroup:
    """A critic group that many ranks may ask, and that returns to its last snapshot when it is made anew."""

    def __init__(
        self, group: CriticGroup, store: RunStore, settings: HostSettings, device: torch.device
    ) -> None:
        self.group, self.store, self.settings, self.device = group, store, settings, device
        self.name = group_name(group.index)
        self.telemetry = Telemetry(run_tag(settings.run or settings.snapshots), "critics", settings.rank)
        self.assembly = Assembly(self._compute, settings.patience)
        self.exchange: PeerExchange | None = None
        self.collective: CollectiveExchange | None = None
        place = (group.index, settings.replica, settings.replicas)
        if settings.replicas > 1 and settings.transport in COLLECTIVE:
            self.collective = CollectiveExchange(*place)
            group.replication = self.collective
        elif settings.replicas > 1:
            self.exchange = group.replication = PeerExchange(*place, settings.patience)
        self.next_key = (0, 0)
        """The first (step, micro-batch) that has not been judged."""
        self.durable = 0
        """Step before which the newest snapshot was taken."""
        self._judged: Key | None = None
        """The last key judged in this life."""
        self._taken: tuple[int, Key | None, dict[str, Tensor]] | None = None
        """A snapshot that waits: its step, the last key before it, and the state."""
        snapshot = latest_checkpoint(store)
        if snapshot is not None:
            group.load(snapshot.tensors(self.name))
            self.next_key, self.durable = (snapshot.step, 0), snapshot.step
            logger.warning("%s continues from its snapshot before panel step %d", self.name, snapshot.step)
        self.telemetry.gauge("counterpoint_snapshot_step", self.durable, group=group.index)

    def judge(self, rank: int, ranks: int, message: Message) -> Message:
        """Judge one rank's samples together with the other ranks'.

        Raises Behind if the message that this rank sent before this one was lost with an earlier life, or if
        this host has yet to meet its peers; and RuntimeError for a message of the past whose answer is not at
        hand any more.
        """
        after = message["after"]
        if after is not None and not self.assembly.follows(after, lambda: after < self.next_key, GRACE_S):
            raise Behind(self.next_key)
        if self.exchange is not None and self.exchange.peers is None:
            raise Behind(self.next_key)
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
        if self.exchange is not None:
            # First: a step that waits for other replicas holds what the next line wants.
            self.exchange.reset()
        self.assembly.reset()
        self.group.load(unpack_state(state))
        self.next_key = (step, 0)
        self._judged = self._taken = None
        for later in checkpoint_steps(self.store):
            # A snapshot of steps that will be taken again must not be found by a restart before they are.
            if later > step:
                self.store.delete(f"checkpoints/step-{later:08d}")
        self.remember(step, self.group.state())

    def remember(self, step: int, state: dict[str, Tensor]) -> None:
        """Make `state`, from before panel step `step`, the snapshot that a restart finds."""
        save_checkpoint(self.store, step, {self.name: state}, {})
        prune_checkpoints(self.store, keep=2)
        if self.exchange is not None:
            # Peers may be one snapshot behind, if they died before they had taken this one.
            self.exchange.forget_before(self.durable)
        self.durable = step
        self.telemetry.gauge("counterpoint_snapshot_step", step, group=self.group.index)

    def _compute(self, messages: Sequence[Message]) -> list[Message]:
        begun, clock = time.perf_counter(), time.time()
        samples = unpack(messages, self.device)
        self._snapshot(samples, [message["answered"] for message in messages])
        verdict = self.group.judge(samples)
        sizes = [len(m["labels"]) for m in messages]
        parts = pack_verdict(verdict, sizes, wire_dtype(messages[0]), self.settings.transport)
        self._judged = (samples.step, samples.micro)
        last = samples.micro == samples.micros - 1
        self.next_key = (samples.step + 1, 0) if last else (samples.step, samples.micro + 1)
        seconds = time.perf_counter() - begun
        self._tell(sum(sizes), seconds, verdict.refreshed)
        stamps = {"seconds": seconds, "begun": clock, "ended": clock + seconds}
        return [part | stamps for part in parts]

    def _tell(self, samples: int, seconds: float, refreshed: int) -> None:
        group = self.group.index
        self.telemetry.count("counterpoint_judged_total", samples, group=group)
        self.telemetry.observe("counterpoint_judge_seconds", seconds, group=group)
        self.telemetry.count("counterpoint_judge_seconds_total", seconds, group=group)
        self.telemetry.count("counterpoint_heads_refreshed_total", refreshed, group=group)

    def _snapshot(self, samples: Samples, answered: Sequence[Key | None]) -> None:
        """Take a snapshot when one is due, and store it once no rank needs the answers from before it.

        A restart could not give those again. Ranks that ask a step ahead have them a step later.
        """
        known = [key for key in answered if key is not None]
        self.assembly.answered = min(known) if len(known) == len(answered) else None
        due = samples.step >= self.durable + self.settings.snapshot_every
        if samples.micro == 0 and due and self._taken is None:
            self._taken = (samples.step, self._judged, self.group.state())
        if self._taken is not None:
            step, before, state = self._taken
            if before is None or (self.assembly.answered is not None and self.assembly.answered >= before):
                self._taken = None
                self.remember(step, state)


class CriticHost:
    """Hosts critic groups; an ordinary class, to which `ray.remote` adds nothing but transport.

    Restarted, its groups go back to their last snapshots and tell trainers what they have missed; trainers
    send that again, so nothing is lost and the result is the one of an undisturbed run.
    """

    def __init__(self, recipe: PanelRecipe, settings: HostSettings) -> None:
        dumpable()
        self.settings = settings
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.hosted = {
            group.index: HostedGroup(
                group, RunStore(f"{settings.snapshots}/{group_name(group.index)}"), settings, device
            )
            for group in build_groups(recipe, settings.groups, device)
        }

    # Innermost: Ray looks for the group on the function that decorators wrap.
    @reporting(lambda self: self.settings.name)  # type: ignore[type-var]
    @ray.method(concurrency_group="judging")
    def judge(self, group: int, rank: int, ranks: int, message: Message) -> Message:
        """Judge one rank's samples; see `HostedGroup.judge`."""
        return self.hosted[group].judge(rank, ranks, message)

    @reporting(lambda self: self.settings.name)  # type: ignore[type-var]
    @ray.method(concurrency_group="peers")
    def contribution(self, group: int, key: Key) -> Message | None:
        """Return what this replica of a group learned under `key`; see `PeerExchange.contribution`."""
        exchange = self.hosted[group].exchange
        assert exchange is not None
        return exchange.contribution(key)

    def meet(self, peers: Sequence[Any], name: str) -> None:
        """Learn which actors are the replicas of these groups, this one included, in their order.

        For a collective exchange they all join the new group `name`.
        """
        for hosted in self.hosted.values():
            if hosted.exchange is not None:
                hosted.exchange.peers = list(peers)
            if hosted.collective is not None:
                hosted.collective.join(name)

    def whole(self) -> bool:
        """Return whether every collective group here has been joined, and no exchange in it is unfinished."""
        found = [hosted.collective for hosted in self.hosted.values() if hosted.collective is not None]
        return all(one.name and one.whole for one in found)

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


def critic_actor(
    groups: int, ranks: int, replicas: int = 1, messages: int = 2, transport: Transport = "object_store"
) -> Any:
    """Return the actor class of a host of `groups` critic groups that `ranks` trainers ask at once.

    Judging has threads of its own, enough for every rank to wait with `messages` to each group at once (those
    of a step, and of the next one where it is asked ahead), and so have the `replicas` that fetch gradients;
    state, digests and loading answer on others, so that a stuck step can be ended.
    """
    concurrency = {"judging": groups * ranks * messages, "peers": max(1, groups * (replicas - 1))}
    threads: dict[str, Any] = {"concurrency_groups": concurrency, "max_concurrency": 4}
    if transport == "nixl":
        threads["enable_tensor_transport"] = True
    return ray.remote(max_restarts=-1, max_task_retries=0, **threads)(CriticHost)
