"""The panel that trainers talk to: critic groups in actors, asked at once, outliving any of them."""

import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from torch import Tensor

from actors.assembly import Behind
from actors.wire import (
    COLLECTIVE,
    Message,
    Transport,
    WireDtype,
    pack,
    pack_state,
    unpack_state,
    unpack_verdict,
)
from cluster.failures import Failure, classify, failure, retrying
from cluster.waiting import WaitTimeout, get, unwrapped
from counterpoint.critics.group import Samples
from counterpoint.critics.panel import PanelVerdict, group_name, merge, route
from counterpoint.critics.pool import Pool

Key = tuple[int, int]
RETRY_S = 0.5
"""Seconds between attempts to reach a host that is being restarted."""


@dataclass(frozen=True)
class HostHandle:
    """A host of critic groups, as the driver made it."""

    name: str
    groups: tuple[int, ...]
    actor: Any
    replica: int = 0
    """Which share of the trainer's ranks asks this host: the ranks from replica * ranks / replicas on."""
    replicas: int = 1
    """How many hosts have these groups."""
    wire_dtype: WireDtype = "float32"
    """What samples and gradients cross as."""
    transport: Transport = "object_store"
    """nixl carries the gradients of the samples, gloo what replicas exchange. Samples, which are kept to be
    sent again to a restarted host, always take the object store."""


def introduce(hosts: Sequence[HostHandle], everyone: Sequence[HostHandle], timeout: float) -> None:
    """Tell `hosts` which of `everyone` host the same groups; a restarted one is told again by a trainer.

    The replicas then hold handles of each other: they live until they are killed or their placement group is
    removed.
    """
    again = uuid.uuid4().hex[:8]
    refs = {}
    for host in hosts:
        if host.replicas > 1:
            name = f"critics-{'-'.join(map(str, host.groups))}-{again}"
            refs[host.name] = host.actor.meet.remote(peers(everyone, host), name)
    get(refs, timeout=timeout, what="introduction of the critics' replicas")


def peers(hosts: Sequence[HostHandle], host: HostHandle) -> list[Any]:
    """Return the actors of all replicas of `host`'s groups, itself included, in their order."""
    same = [other for other in hosts if other.groups == host.groups]
    return [other.actor for other in sorted(same, key=lambda other: other.replica)]


def received(ref: Any, timeout: float, what: str) -> Message:
    """Wait for the answer that `ref` stands for; raises the error that came of sending, if `ref` is one."""
    if isinstance(ref, Exception):
        raise ref
    message: Message = get(ref, timeout=timeout, what=what)
    return message


@dataclass
class Timings:
    """Where the time of asking went, in seconds since `start`."""

    compute_s: float = 0.0
    """Judging inside the hosts, the slowest host of each step."""
    wire_s: float = 0.0
    """Packing and unpacking in this process."""
    wait_s: float = 0.0
    """Blocked on answers, beyond the slowest host's judging: transport, queueing, other ranks."""

    def add(self, compute: float, wire: float, blocked: float) -> None:
        """Add one step's share."""
        self.compute_s += compute
        self.wire_s += wire
        self.wait_s += max(0.0, blocked - compute)


@dataclass
class _Line:
    """What this rank has sent to one group, as far as the group might need it again."""

    sent: deque[tuple[Key, Message]] = field(default_factory=deque)
    last: Key | None = None
    answered: Key | None = None
    durable: int | None = None
    """Panel step of the group's last snapshot."""


class RemotePanel:
    """A `Panel` whose critic groups live in `CriticHost` actors; one per trainer rank.

    A host that dies is restarted by Ray and goes back to its last snapshot; the messages since then are kept
    here and sent again, so the panel's state is the one of an undisturbed run. Other failures, and hosts
    that do not come back within `patience` seconds, are raised as `Failure`.
    """

    def __init__(
        self, pool: Pool, hosts: Sequence[HostHandle], rank: int = 0, ranks: int = 1, patience: float = 120.0
    ) -> None:
        replicas = max(host.replicas for host in hosts)
        if ranks % replicas:
            raise ValueError(
                f"critics.replicas={replicas} does not divide the {ranks} ranks that share them: "
                "choose a divisor"
            )
        self.pool = pool
        self.everyone = tuple(hosts)
        """The hosts of all replicas."""
        self.hosts = {
            index: host for host in hosts for index in host.groups if host.replica == rank * replicas // ranks
        }
        """Whom this rank asks, by group."""
        self.rank, self.ranks, self.patience = rank, ranks, patience
        self.seat, self.seats = rank % (ranks // replicas), ranks // replicas
        """This rank's place among those that ask the same hosts."""
        self.timings = Timings()
        self.recoveries = 0
        """Times a group had to be sent earlier messages again."""
        self.stamps: dict[int, tuple[float, float]] = {}
        """When each group of the newest verdict began and ended judging, by its host's `time.time()`."""
        self._lines = {index: _Line() for index in self.hosts}

    @property
    def durable(self) -> int | None:
        """Panel step of the oldest of the groups' last snapshots; None before any has answered."""
        return min((one.durable for one in self._lines.values() if one.durable is not None), default=None)

    def ask(self, samples: Samples, groups: Tensor) -> "Asked":
        """Send the samples to their groups and return without waiting; see `Panel.ask`."""
        begun = time.perf_counter()
        routed = route(samples, groups)
        refs = {}
        for group, (_, part) in routed.items():
            line = self._lines[group]
            key = (part.step, part.micro)
            known = {"after": line.last, "answered": line.answered}
            message = pack(part, self.hosts[group].wire_dtype) | known
            line.sent.append((key, message))
            line.last = key
            refs[group] = self._send(group, message)
        positions = {group: where for group, (where, _) in routed.items()}
        return Asked(self, samples, positions, refs, time.perf_counter() - begun)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return every group's state by name, after all that this rank has asked."""
        return {group_name(group): unpack_state(self._state_of(group)) for group in self.hosts}

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        """Return every group to a stored state; rank 0 does it for all, and nobody asks before it is done."""
        self._lines = {index: _Line() for index in self.hosts}
        if self.rank != 0:
            return
        self._renew()
        packed = ray.put({name: pack_state(part) for name, part in state.items()})
        self._all("load", packed, step)

    def _renew(self) -> None:
        """Begin anew with hosts whose collective group is broken; all of a group's replicas are restarted."""
        hosts = [host for host in self.everyone if host.transport in COLLECTIVE and host.replicas > 1]
        if not hosts:
            return
        whole = dict(zip((host.name for host in self.everyone), self._all("whole"), strict=True))
        broken = {host.groups for host in hosts if not whole[host.name]}
        hosts = [host for host in hosts if host.groups in broken]
        if not hosts:
            return
        before, deadline = set(self._pids(hosts)), time.monotonic() + self.patience
        for host in hosts:
            ray.kill(host.actor, no_restart=False)
        # A process that is about to die may still answer.
        while before & set(self._pids(hosts)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"replicas {[host.name for host in hosts]} were not restarted in time")
            time.sleep(RETRY_S)
        introduce(hosts, self.everyone, self.patience)

    def _pids(self, hosts: Sequence[HostHandle]) -> list[tuple[str, int]]:
        """Return which processes the hosts live in, by name: numbers repeat on other nodes."""
        found = zip(self.everyone, self._all("pid"), strict=True)
        return [(host.name, pid) for host, pid in found if host in hosts]

    def digests(self) -> dict[str, str]:
        """Return each group's digest of its heads; RuntimeError if replicas hold different ones."""
        found: dict[str, str] = {}
        for host, answer in zip(self.everyone, self._all("digests"), strict=True):
            for name, digest in answer.items():
                if found.setdefault(name, digest) != digest:
                    raise RuntimeError(f"{host.name} holds other heads of {name} than its replicas do")
        return found

    def answer(self, group: int, ref: Any, key: Key) -> Message:
        """Wait for a group's answer to message `key`, bringing it back first if it died; used by `Asked`."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                what = f"verdict of {self.hosts[group].name}"
                message: Message = received(ref, max(1.0, deadline - time.monotonic()), what)
                break
            except Exception as error:
                ref = self._recover(group, error, deadline, key)
        line = self._lines[group]
        line.answered = key
        line.durable = message["durable"]
        while line.sent and line.sent[0][0] < (message["durable"], 0):
            line.sent.popleft()
        return message

    def _state_of(self, group: int) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience
        host = self.hosts[group]
        while True:
            try:
                ref = host.actor.state.remote(group, self._lines[group].last)
                state: dict[str, Any] = get(ref, timeout=self.patience, what=f"state of {host.name}")
                return state
            except Exception as error:
                last = self._lines[group].last or (0, 0)
                self.answer(group, self._recover(group, error, deadline, last), last)

    def _recover(self, group: int, error: Exception, deadline: float, key: Key) -> Any:
        """Bring a group up to message `key` after `error` and return a reference to its answer to that.

        Anything but the loss of the host, or of what it had been told, is raised as a `Failure`; so is
        whatever comes after `deadline`, at which every wait below ends.
        """
        line = self._lines[group]
        while True:
            cause = unwrapped(error)
            behind = isinstance(cause, Failure) and cause.original.endswith(Behind.__name__)
            gone = classify(error) == "infrastructure" and not isinstance(cause, Failure)
            gone = gone and self.hosts[group].transport not in COLLECTIVE
            # A wait is given what is left until the deadline, and may be told a moment early that it is over.
            late = time.monotonic() > deadline or isinstance(cause, WaitTimeout)
            if late or not (behind or gone) or not line.sent:
                raise failure(error, self.hosts[group].name, key[0] if line.last else None) from error
            try:
                return self._send_again(group, deadline, key)
            except Exception as another:
                error = another

    def _send_again(self, group: int, deadline: float, key: Key) -> Any:
        """Send a group what it lacks up to message `key`, and return a reference to its answer to that.

        A later message that was lost too is sent again when its own answer is waited for.
        """
        expected = self._expected(group, deadline)
        introduce([self.hosts[group]], self.everyone, max(1.0, deadline - time.monotonic()))
        self.recoveries += 1
        sent = self._lines[group].sent
        again = [message for one, message in sent if expected <= one < key]
        for message in again:
            # One at a time: a host's threads may take up calls in any order.
            left = max(1.0, deadline - time.monotonic())
            received(self._send(group, message), left, f"repeated verdict of {self.hosts[group].name}")
        return self._send(group, next(message for one, message in sent if one == key))

    def _expected(self, group: int, deadline: float) -> Key:
        """Wait until a host answers again, and return the first key that it has not judged."""
        host = self.hosts[group]
        while True:
            left = max(1.0, deadline - time.monotonic())
            try:
                expected: Key = get(
                    host.actor.expects.remote(group), timeout=left, what=f"return of {host.name}"
                )
                return expected
            except Exception as error:
                if classify(error) != "infrastructure" or time.monotonic() + RETRY_S > deadline:
                    raise failure(error, host.name) from error
                time.sleep(RETRY_S)

    def _send(self, group: int, message: Message) -> Any:
        """Return a reference to the answer, or, if the host is found to be gone on the way, the error."""
        host = self.hosts[group]
        judge = host.actor.judge
        if host.transport != "nixl":
            return judge.remote(group, self.seat, self.seats, message)
        try:
            # Asks the host first whether it can do this.
            return judge.options(tensor_transport=host.transport).remote(
                group, self.seat, self.seats, message
            )
        except RayError as error:
            return error

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Call a method that may be repeated on every host, waiting for hosts that are being restarted."""
        hosts = {host.name: host.actor for host in self.everyone}

        def call() -> list[Any]:
            refs = {name: getattr(actor, method).remote(*args) for name, actor in hosts.items()}
            return list(get(refs, timeout=self.patience, what=f"{method} of the critic hosts").values())

        attempts = max(2, int(self.patience / RETRY_S))
        return retrying(call, what=method, attempts=attempts, backoff=RETRY_S, budget=self.patience)


@dataclass(frozen=True)
class Asked:
    """A question on its way to several groups."""

    panel: RemotePanel
    samples: Samples
    positions: dict[int, Tensor]
    refs: dict[int, Any]
    packing_s: float

    def result(self) -> PanelVerdict:
        """Wait for all groups and merge their verdicts."""
        begun = time.perf_counter()
        key = (self.samples.step, self.samples.micro)
        answers = {group: self.panel.answer(group, ref, key) for group, ref in self.refs.items()}
        blocked = time.perf_counter() - begun
        verdicts = {group: unpack_verdict(answer) for group, answer in answers.items()}
        merged = merge(self.samples, self.positions, verdicts)
        unpacking = time.perf_counter() - begun - blocked
        slowest = max(answer["seconds"] for answer in answers.values())
        self.panel.stamps = {group: (one["begun"], one["ended"]) for group, one in answers.items()}
        self.panel.timings.add(slowest, self.packing_s + unpacking, blocked)
        return merged
