"""How replicas of a critic group exchange what they have learned: as equals, without a leader."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actors.assembly import Key, Superseded
from actors.wire import Message, pack_contribution, unpack_contribution
from cluster.failures import Failure, classify
from cluster.waiting import get, unwrapped
from counterpoint.critics.replicas import Contribution, added_up

POLL_S = 1.0
"""Seconds that a peer waits for its own contribution before it says that there is none yet."""
RETRY_S = 0.2
"""Seconds between attempts to reach a peer that is being restarted."""


class CollectiveExchange:
    """The same exchange as an all-gather of torch.distributed, by gloo, set up by Ray.

    Replicas are of one fate: a collective group cannot be joined anew, so that the loss of one of them fails
    the step on all, and their trainers begin a new group when they go back to a checkpoint.
    """

    def __init__(self, group: int, index: int, count: int) -> None:
        self.group, self.index, self.count = group, index, count
        self.name = ""
        """The collective group's; empty until `join`, and again after a restart."""
        self.whole = True
        """Whether no exchange is under way or has failed."""

    def join(self, name: str) -> None:
        """Become a member of a new collective group; every replica calls at the same time."""
        from ray.util import collective
        from ray.util.collective.types import Backend

        collective.init_collective_group(self.count, self.index, Backend("gloo"), name)
        self.name = name

    def exchange(self, key: Key, mine: Contribution) -> Contribution:
        """Bring this replica's part of `key`, wait for the others', and return the sum."""
        from ray.util import collective

        self.whole = False
        flat = _flat(mine)
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        collective.allgather(parts, flat, self.name)
        self.whole = True
        return added_up([_parted(part, mine) for part in parts])


def _flat(part: Contribution) -> Tensor:
    """Return a contribution as one float32 vector; counts are exact below 2^24."""
    counts = torch.tensor([part.samples, part.learned, part.critic_loss], dtype=torch.float32)
    tensors = (part.real_logits, part.fake_logits, *part.gradients)
    return torch.cat([counts, *(tensor.flatten().cpu() for tensor in tensors)])


def _parted(flat: Tensor, like: Contribution) -> Contribution:
    """Return the contribution in a vector, whose tensors have the shapes of those of `like`."""
    shapes = [like.real_logits.shape, like.fake_logits.shape, *(g.shape for g in like.gradients)]
    pieces = flat[3:].split([shape.numel() for shape in shapes])
    tensors = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return Contribution(
        int(flat[0]), int(flat[1]), float(flat[2]), tensors[0], tensors[1], tuple(tensors[2:])
    )


class PeerExchange:
    """One replica's side of the exchange of head gradients; a `Replication` of `CriticGroup`.

    Each replica keeps its contributions for the others to fetch, fetches theirs and adds all up in the order
    of the replicas, so that all get the same bits. Contributions are kept back to the last snapshot but one:
    a replica that died goes back to a snapshot, is sent the messages since by its trainers, finds its peers'
    contributions still here, and ends with the heads that it would have had. Thread-safe.
    """

    def __init__(self, group: int, index: int, count: int, patience: float) -> None:
        self.group, self.index, self.count, self.patience = group, index, count, patience
        self.peers: Sequence[Any] | None = None
        """The hosts of all replicas by index; None until `meet`, and again after a restart."""
        self._kept: dict[Key, Message] = {}
        self._changed = threading.Condition()
        self._life = 0
        """Counts resets, so that an exchange which one interrupts knows of it."""

    def exchange(self, key: Key, mine: Contribution) -> Contribution:
        """Bring this replica's part of `key`, wait for the others', and return the sum.

        Raises TimeoutError if a peer does not bring its part in time, Superseded after `reset`.
        """
        message = pack_contribution(mine)
        with self._changed:
            life = self._life
            self._kept[key] = message
            self._changed.notify_all()
        parts = {self.index: message}
        deadline = time.monotonic() + self.patience
        while len(parts) < self.count:
            missing = [index for index in range(self.count) if index not in parts]
            parts |= self._fetched(missing, key)
            if self._life != life:
                raise Superseded(f"step {key[0]}: the panel was set to another state")
            if time.monotonic() > deadline and len(parts) < self.count:
                raise TimeoutError(
                    f"step {key[0]}: replicas {missing} of critic group {self.group} brought no gradients "
                    f"within {self.patience:g} s"
                )
        return added_up([unpack_contribution(parts[index]) for index in range(self.count)])

    def contribution(self, key: Key, seconds: float = POLL_S) -> Message | None:
        """Return this replica's part of `key`, or None if it has none within `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._kept, seconds)
            return self._kept.get(key)

    def forget_before(self, step: int) -> None:
        """Drop the contributions of steps before `step`."""
        with self._changed:
            self._kept = {key: message for key, message in self._kept.items() if key[0] >= step}

    def reset(self) -> None:
        """Forget everything, and make an exchange under way end with Superseded."""
        with self._changed:
            self._kept = {}
            self._life += 1
            self._changed.notify_all()

    def _fetched(self, missing: Sequence[int], key: Key) -> dict[int, Message]:
        """Return what the peers `missing` have by now, by index."""
        assert self.peers is not None
        refs = {index: self.peers[index].contribution.remote(self.group, key) for index in missing}
        found = {}
        for index, ref in refs.items():
            try:
                answer = get(ref, timeout=self.patience, what=f"gradients of replica {index}")
            except Exception as error:
                if classify(error) != "infrastructure" or isinstance(unwrapped(error), Failure):
                    raise
                # Killed, and on its way back: until then there is nothing to wait for.
                time.sleep(RETRY_S)
                continue
            if answer is not None:
                found[index] = answer
        return found
