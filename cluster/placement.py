"""Placement as a small declared plan: pools of equal actors, and what of them fits on a cluster's nodes.

All is pure but for `ClusterView.from_ray`, so that a plan can be explained on data, before anything runs.
`cluster.explain` turns the packing into words, `cluster.reserve` holds a plan on a live cluster.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import ray

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
SLACK = 1e-6  # Ray counts resources in steps of 1e-4, so anything far below that is rounding


@dataclass(frozen=True)
class Pool:
    """`count` equal actors, each with its own share of one node.

    Raises:
        ValueError: when a field is out of range.
    """

    name: str
    count: int
    """How many actors; 0 leaves the pool out."""
    cpus: float
    """Logical CPUs of each."""
    gpus: float = 0.0
    """GPUs of each: a part of one device below 1, whole devices above."""
    memory: int = 0
    """Bytes of each, in Ray's book-keeping; 0 asks for none."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Node labels that each needs, as Ray's selectors: "a", "!a", "in(a, b)" or "!in(a, b)"."""
    setting: str = ""
    """The configuration key that sets `count`, for the error message."""
    reserved_by: Literal["us", "train"] = "us"
    """Who makes the placement group: `reserve`, or Ray Train by itself."""

    def __post_init__(self) -> None:
        where = f"pool {self.name!r}"
        if self.count < 0:
            raise ValueError(f"{where}: count={self.count}; pass 0 or more")
        if min(self.cpus, self.gpus, self.memory) < 0 or not (self.cpus or self.gpus or self.memory):
            raise ValueError(
                f"{where}: cpus={self.cpus}, gpus={self.gpus}, memory={self.memory}; "
                "pass 0 or more, one above 0"
            )
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"{where}: gpus={self.gpus}; pass a part of one device or a whole number")

    @property
    def each(self) -> dict[str, float]:
        """What one actor asks for, as Ray names it."""
        asked = {"CPU": float(self.cpus), "GPU": float(self.gpus), "memory": float(self.memory)}
        return {resource: amount for resource, amount in asked.items() if amount}


@dataclass(frozen=True)
class Bundle:
    """The place of one actor of a pool."""

    pool: Pool
    index: int


@dataclass(frozen=True)
class Plan:
    """Pools and how our own bundles (not Ray Train's) lie on the nodes."""

    pools: tuple[Pool, ...]
    strategy: Strategy = "PACK"

    def pools_of(self, reserved_by: str) -> tuple[Pool, ...]:
        """The pools that "us" or "train" reserves."""
        return tuple(pool for pool in self.pools if pool.reserved_by == reserved_by)

    def bundles(self, reserved_by: str | None = None) -> tuple[Bundle, ...]:
        """All bundles by pool, then index; only those that `reserved_by` reserves if it is given."""
        pools = self.pools if reserved_by is None else self.pools_of(reserved_by)
        return tuple(Bundle(pool, index) for pool in pools for index in range(pool.count))


def plan(pools: Iterable[Pool], strategy: Strategy = "PACK") -> Plan:
    """Declare a plan.

    Args:
        pools: the pools, in the order in which messages list them.
        strategy: Ray's strategy for the bundles that we reserve: PACK and SPREAD are wishes, the STRICT ones
            demands (one node for all; one node for each).

    Raises:
        ValueError: when names repeat or the strategy is unknown.
    """
    pools = tuple(pools)
    twice = [name for name, times in Counter(pool.name for pool in pools).items() if times > 1]
    if twice:
        raise ValueError(f"pool names {twice} repeat; name each pool once")
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy={strategy!r}; pass one of {', '.join(get_args(Strategy))}")
    return Plan(pools, strategy)


@dataclass(frozen=True)
class NodeView:
    """One node: what it has, and what of that nobody holds."""

    name: str
    total: Mapping[str, float]
    available: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class ClusterView:
    """The nodes of a cluster at one moment, in a fixed order."""

    nodes: tuple[NodeView, ...]

    @classmethod
    def from_ray(cls) -> Self:
        """The live nodes of the connected cluster, by address and id; free resources lag by about 0.1 s."""
        alive = sorted(
            (node for node in ray.nodes() if node["Alive"]),
            key=lambda node: (node["NodeManagerAddress"], node["NodeID"]),
        )
        free = ray._private.state.available_resources_per_node()
        shared = Counter(node["NodeName"] for node in alive)
        return cls(tuple(_node_view(node, free, shared[node["NodeName"]] > 1) for node in alive))

    def emptied(self) -> Self:
        """The same nodes as they would be if nobody held anything."""
        return type(self)(tuple(NodeView(n.name, n.total, n.total, n.labels, n.id) for n in self.nodes))


def pack(bundles: Sequence[Bundle], view: ClusterView, strategy: Strategy = "PACK") -> dict[Bundle, NodeView]:
    """Where bundles fit among what is free, by first fit of the largest first; what does not fit is absent.

    Equal bundles are packed as well as possible, mixed ones nearly so. A part of a GPU is of one device, and
    as many as possible of a node's free GPUs are taken to be whole, since Ray tells only the sum. PACK and
    SPREAD do not change what fits; the STRICT ones bind the bundles that we reserve, not Ray Train's.
    """
    homes = view.nodes if strategy == "STRICT_PACK" and view.nodes else (None,)
    return max((_packed(bundles, view, strategy, home) for home in homes), key=len)


def matches(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node with `labels` satisfies every selector of `wanted`."""
    return all(_matches(labels.get(key), selector.strip()) for key, selector in wanted.items())


class _Room:
    """What is left of one node while bundles are packed."""

    def __init__(self, node: NodeView) -> None:
        self.node = node
        self.cpus = node.available.get("CPU", 0.0)
        self.memory = node.available.get("memory", 0.0)
        gpus = node.available.get("GPU", 0.0) + SLACK
        self.devices = [1.0] * int(gpus) + [gpus % 1.0]
        self.ours = 0

    def open_to(self, pool: Pool, strategy: Strategy, home: NodeView | None) -> bool:
        """Whether labels and the strategy, which binds our pools only, let the pool in."""
        barred = (home is not None and self.node is not home) or (strategy == "STRICT_SPREAD" and self.ours)
        return not (barred and pool.reserved_by == "us") and matches(self.node.labels, pool.labels)

    def take(self, pool: Pool) -> bool:
        """Make room for one of a pool, if there is room."""
        if pool.cpus > self.cpus + SLACK or pool.memory > self.memory + SLACK:
            return False
        devices = self._devices(pool.gpus)
        if devices is None:
            return False
        for device in devices:
            self.devices[device] -= min(pool.gpus, 1.0)
        self.cpus -= pool.cpus
        self.memory -= pool.memory
        self.ours += pool.reserved_by == "us"
        return True

    def _devices(self, gpus: float) -> list[int] | None:
        """The fullest device with room for a part of one, or the first free devices."""
        share, needed = min(gpus, 1.0), max(int(gpus), 1) if gpus else 0
        fitting = [i for i, free in enumerate(self.devices) if free + SLACK >= share]
        fitting.sort(key=lambda i: self.devices[i])
        return fitting[:needed] if len(fitting) >= needed else None


def _packed(
    bundles: Sequence[Bundle], view: ClusterView, strategy: Strategy, home: NodeView | None
) -> dict[Bundle, NodeView]:
    rooms = [_Room(node) for node in view.nodes]
    places: dict[Bundle, NodeView] = {}
    first = Counter[str]()  # a room that refused one bundle refuses its equals too, as rooms only get fuller
    for bundle in sorted(bundles, key=lambda b: (-b.pool.gpus, -b.pool.cpus, -b.pool.memory)):
        pool = bundle.pool
        while first[pool.name] < len(rooms):
            room = rooms[first[pool.name]]
            if room.open_to(pool, strategy, home) and room.take(pool):
                places[bundle] = room.node
                break
            first[pool.name] += 1
    return places


def _matches(value: str | None, selector: str) -> bool:
    if selector.startswith("!"):
        return not _matches(value, selector[1:])
    if selector.startswith("in(") and selector.endswith(")"):
        return value in [option.strip() for option in selector[3:-1].split(",")]
    return value == selector


def _node_view(node: Mapping[str, Any], free: Mapping[str, Mapping[str, float]], shared: bool) -> NodeView:
    name = f"{node['NodeName']}#{node['NodeID'][:4]}" if shared else node["NodeName"]
    return NodeView(name, node["Resources"], free.get(node["NodeID"], {}), node["Labels"], node["NodeID"])
