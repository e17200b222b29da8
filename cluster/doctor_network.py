"""How fast pairs of nodes reduce a tensor together: gloo between all, NCCL between those with GPUs."""

import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import ray

from cluster import waiting
from cluster.doctor_findings import reason
from cluster.everywhere import pinned
from cluster.placement import NodeView

Backend = Literal["gloo", "nccl"]
Pair = tuple[str, str]
ALL_PAIRS = 16
"""Up to so many nodes every pair is measured; of more a ring, and `RANDOM_ROUNDS` random matchings."""
RANDOM_ROUNDS = 3
MEET_SECONDS = 15.0
START_SECONDS = 45.0
FIRST_BYTES, MOST_BYTES = 2**20, 2**26
AIM_SECONDS = 0.25
LATENCY_ROUNDS, BANDWIDTH_ROUNDS = 10, 3


class Link(NamedTuple):
    """What one pair measured."""

    pair: Pair
    backend: Backend
    gigabytes_per_second: float = 0.0
    """Bytes of the tensor over the best time, which for two ranks is what each sends and receives."""
    latency_ms: float = 0.0
    """Median time to reduce four bytes."""
    trouble: str = ""
    """Why nothing was measured; empty otherwise."""


class Peer:
    """One end of a pair; joins one process group of two after the other."""

    def __init__(self, device: int | None = None) -> None:
        """Use the GPU with the index `device` of the machine, or none."""
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(device)  # Ray hides all from an actor that asks for none
        self._store: Any = None

    def open(self, seconds: float) -> tuple[str, int]:
        """Bind a port that the system chooses and keep it for the rendezvous: nothing else can take it."""
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        limit = timedelta(seconds=seconds)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        return host, self._store.port

    def measure(
        self, host: str, port: int, rank: int, backend: Backend, seconds: float
    ) -> tuple[float, float]:
        """Meet the other end within `seconds` and return (bytes per second, seconds of latency).

        Raises RuntimeError, as torch does, when the other end does not come or the transport fails.
        """
        import torch
        import torch.distributed as dist

        limit = timedelta(seconds=seconds)
        store = self._store if rank == 0 else dist.TCPStore(host, port, is_master=False, timeout=limit)
        place = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
        try:
            small = torch.ones(1, device=place)
            latency = statistics.median([_seconds(small) for _ in range(LATENCY_ROUNDS + 1)][1:])
            first = _seconds(torch.ones(FIRST_BYTES // 4, device=place))
            wanted = torch.tensor([FIRST_BYTES * AIM_SECONDS / first], device=place)
            dist.broadcast(wanted, 0)  # both ends must reduce tensors of one size
            size = int(min(max(float(wanted), FIRST_BYTES), MOST_BYTES)) // 4
            big = torch.ones(size, device=place)
            best = min(_seconds(big) for _ in range(BANDWIDTH_ROUNDS))
            expected = 2.0**BANDWIDTH_ROUNDS
            if not bool((big == expected).all()):
                raise RuntimeError(f"a sum of the two ranks is not {expected:g} everywhere")
            return 4 * size / best, latency
        finally:
            dist.destroy_process_group()
            self._store = None


def _seconds(tensor: Any) -> float:
    """The time of one all-reduce, which is done on the device too when this returns."""
    import torch
    import torch.distributed as dist

    begun = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def rounds_of_pairs(names: Sequence[str], seed: int = 0) -> list[list[Pair]]:
    """Rounds of disjoint pairs: all pairs of few nodes, a ring and random matchings of many.

    No name is in two pairs of a round, so that a round may be measured at once.
    """
    names = list(names)
    if len(names) < 2:
        return []
    if len(names) <= ALL_PAIRS:
        return _tournament(names)
    ring = [(names[i], names[(i + 1) % len(names)]) for i in range(len(names))]
    rounds = [ring[0 : len(names) - 1 : 2], ring[1 : len(names) - 1 : 2], ring[-1:]]
    if len(names) % 2 == 0:
        rounds = [ring[0::2], ring[1::2]]
    generator = random.Random(seed)
    for _ in range(RANDOM_ROUNDS):
        shuffled = generator.sample(names, len(names))
        rounds.append(list(zip(shuffled[0::2], shuffled[1::2], strict=False)))
    return rounds


def _tournament(names: list[str]) -> list[list[Pair]]:
    """All pairs in as few rounds as there are (the circle method: one stays, the others move on)."""
    seats: list[str | None] = [*names, None] if len(names) % 2 else [*names]
    rounds = []
    for _ in range(len(seats) - 1):
        faced = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append([(one, other) for one, other in faced if one is not None and other is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measured(
    nodes: Sequence[NodeView], backend: Backend, deadline: float, devices: Mapping[str, int] | None = None
) -> Iterator[list[Link]]:
    """Measure round after round of pairs until `deadline` (of `time.monotonic`); yields each round's links.

    Args:
        nodes: the nodes; fewer than two yield nothing.
        backend: what to measure with.
        deadline: no round is begun after it, and none runs much longer.
        devices: the GPU that each node uses with nccl, by its name.
    """
    ids = {node.name: node.id for node in nodes}
    peers: dict[str, Any] = {}
    try:
        for pairs in rounds_of_pairs(list(ids)):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for name in {name for pair in pairs for name in pair} - peers.keys():
                peers[name] = ray.remote(Peer).options(**pinned(ids[name])).remote((devices or {}).get(name))
            links = _round(pairs, peers, backend, min(left, START_SECONDS))
            for link in links:
                if link.trouble:  # a group half made cannot be trusted again: take new processes
                    for name in link.pair:
                        ray.kill(peers.pop(name))
            yield links
    finally:
        for peer in peers.values():
            ray.kill(peer)


def _round(pairs: Sequence[Pair], peers: Mapping[str, Any], backend: Backend, limit: float) -> list[Link]:
    """Measure disjoint pairs at once: all open, then all meet."""
    deadline, meet = time.monotonic() + limit, min(MEET_SECONDS, limit)
    opened = {pair: peers[pair[0]].open.remote(meet) for pair in pairs}
    links, meeting = [], {}
    for pair, ref in opened.items():
        try:
            host, port = waiting.get(ref, max(1.0, deadline - time.monotonic()), f"a port on {pair[0]}")
            meeting[pair] = [
                peers[name].measure.remote(host, port, rank, backend, meet) for rank, name in enumerate(pair)
            ]
        except Exception as error:
            links.append(Link(pair, backend, trouble=f"{pair[0]} could not open a port: {reason(error)}"))
    for pair, refs in meeting.items():
        left = max(1.0, deadline - time.monotonic())
        try:
            ends = waiting.get(refs, left, f"{backend} between {pair[0]} and {pair[1]}")
            speed, latency = min(end[0] for end in ends), max(end[1] for end in ends)
            links.append(Link(pair, backend, speed / 1e9, latency * 1e3))
        except Exception as error:
            links.append(Link(pair, backend, trouble=reason(error)))
            for ref in refs:
                with suppress(Exception):
                    ray.cancel(ref)
    return links
