"""Hold a plan on a live cluster: a Ray placement group for our pools, and room beside it for Ray Train's."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NoReturn, Self

import ray
from ray import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import identity, waiting
from cluster.explain import Explanation, explain
from cluster.placement import Bundle, ClusterView, NodeView, Plan

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0
"""How long Ray may prove the packing wrong, which finds no room for a plan even on an empty cluster."""
ARRIVAL_SECONDS = 5.0
REMOVAL_SECONDS = 10.0


class PlacementError(ValueError):
    """A plan that this cluster cannot hold; the first line is the verdict, `explanation` has the figures."""

    def __init__(self, message: str, explanation: Explanation | None = None) -> None:
        self.explanation = explanation
        super().__init__(message)

    @property
    def in_one_line(self) -> str:
        """The whole in one line, for a job's last word."""
        return self.explanation.in_one_line if self.explanation else str(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.explanation)


class PlacementTimeout(PlacementError, TimeoutError):  # noqa: N818 - a TimeoutError by name too
    """A plan that would fit if others let go of what they hold; retrying later or elsewhere may do."""


@dataclass
class Reservation:
    """A plan that is held until `release`; as a context manager, for the length of a block."""

    plan: Plan
    group: PlacementGroup | None
    places: dict[Bundle, int] = field(default_factory=dict)
    """The index of each actor's bundle within the group; an actor's index rises with its (node, device)."""
    nodes: dict[Bundle, str] = field(default_factory=dict)
    """The id of the node of each actor."""
    devices: dict[Bundle, tuple[int, ...]] = field(default_factory=dict)
    """The GPUs of each actor that has any."""

    def options(self, pool: str, index: int) -> dict[str, Any]:
        """Options that put actor `index` of `pool` on its place, for ``Actor.options(**...)``.

        It is named "<id of the run>/<pool>-<index>".
        Actors that it creates in turn are not captured by the group.

        Raises:
            ValueError: when the plan reserves no such actor, or the reservation was released.
        """
        bundle = next((b for b in self.places if (b.pool.name, b.index) == (pool, index)), None)
        if bundle is None or self.group is None:
            held = ", ".join(f"{p.name} ({p.count})" for p in self.plan.pools_of("us") if self.group)
            raise ValueError(f"no place for actor {index} of pool {pool!r}; held: {held or 'nothing'}")
        strategy = PlacementGroupSchedulingStrategy(
            self.group, self.places[bundle], placement_group_capture_child_tasks=False
        )
        asked = {"num_cpus": bundle.pool.cpus, "num_gpus": bundle.pool.gpus}
        if bundle.pool.memory:
            asked["memory"] = bundle.pool.memory
        devices = ",".join(str(device) for device in self.devices.get(bundle, ()))
        name = identity.actor_name(f"{pool}-{index}", f"gpu {devices}" if devices else "")
        return {**asked, "scheduling_strategy": strategy, "name": name}

    def release(self) -> None:
        """Give everything back, which ends the actors that are placed here; a second call does nothing."""
        group, self.group = self.group, None
        if group is not None and ray.is_initialized():
            _remove(group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def reserve(plan: Plan, timeout: float = 30.0) -> Reservation:
    """Reserve our pools of a plan and see to it that Ray Train's pools fit beside them.

    Whatever happens, an interrupt too, nothing stays reserved unless this returns.

    Args:
        plan: what to hold.
        timeout: seconds to wait for resources that others hold.

    Raises:
        PlacementError: within a few seconds, when the cluster could not hold the plan even if it were empty.
        PlacementTimeout: after `timeout`, when others hold what the plan needs.
    """
    deadline = time.monotonic() + timeout
    reservation = Reservation(plan, None)
    try:
        if bundles := plan.bundles("us"):
            reservation.group = placement_group(
                [bundle.pool.each for bundle in bundles],
                strategy=plan.strategy,
                bundle_label_selector=[dict(bundle.pool.labels) for bundle in bundles],
                name=identity.group_name(),
            )
            _await_group(plan, reservation.group, deadline)
            _assign(reservation, bundles, deadline)
        _await_room_for_train(reservation, deadline)
    except BaseException:
        reservation.release()
        raise
    return reservation


def groups_of_job() -> set[str]:
    """Ids of the placement groups that this driver's job holds or wants, whoever in it asked for them."""
    job = ray.get_runtime_context().get_job_id()  # an id ends in its job's
    table = placement_group_table()
    return {id for id, group in table.items() if id.endswith(job) and group["state"] != "REMOVED"}


def remove_groups(ids: Collection[str]) -> None:
    """Remove placement groups that nobody is left to remove.

    Ray Train leaves the group of workers that did not start to a helper that needs the dashboard, and to the
    end of the job.
    """
    for group in ids:
        logger.warning("removing the placement group %s that a failed worker group has left", group)
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _await_group(plan: Plan, group: PlacementGroup, deadline: float) -> None:
    """Return when the group is placed; Ray alone waits for ever for many bundles that each fit somewhere."""
    started = time.monotonic()
    while (table := placement_group_table(group))["state"] != "CREATED":
        state, now = table["stats"]["scheduling_state"], time.monotonic()
        if state == "INFEASIBLE" or now >= deadline:
            _refuse(explain(plan, ClusterView.from_ray()), now - started, state)
        if now >= started + GRACE_SECONDS:
            explanation = explain(plan, ClusterView.from_ray())
            if not explanation.feasible:
                _refuse(explanation, now - started, state)
        time.sleep(POLL_SECONDS)


def _await_room_for_train(reservation: Reservation, deadline: float) -> None:
    """Return when Ray Train's pools fit too; it would retry an impossible group for ever."""
    train = Plan(reservation.plan.pools_of("train"))
    started = time.monotonic()
    while train.bundles():
        view = ClusterView.from_ray()
        settled, now = all(_shows(node, reservation) for node in view.nodes), time.monotonic()
        if settled and explain(train, view).fits:
            return
        explanation = explain(reservation.plan, _as_if_released(view, reservation))
        if now >= deadline or (settled and not explanation.feasible):
            _refuse(explanation, now - started, "our pools placed, Ray Train's not")
        time.sleep(POLL_SECONDS)


def _refuse(explanation: Explanation, waited: float, state: str) -> NoReturn:
    seen = f"Ray's scheduler after {waited:.1f} s: {state}"
    if not explanation.feasible:
        raise PlacementError(f"{explanation}\n  {seen}", explanation)
    odd = "" if not explanation.fits else "Ray has not placed a plan that should fit; try again: "
    error = PlacementError if state == "INFEASIBLE" else PlacementTimeout
    raise error(f"{odd}{explanation}\n  {seen}", explanation)


def _assign(reservation: Reservation, bundles: Sequence[Bundle], deadline: float) -> None:
    """Number each pool's actors by (node, device): ranks do not depend on how Ray dealt the bundles."""
    group = reservation.group
    assert group is not None
    node_of = placement_group_table(group)["bundles_to_node_id"]
    order = {node.id: rank for rank, node in enumerate(ClusterView.from_ray().nodes)}
    devices = _devices(group, bundles, deadline)
    for pool in reservation.plan.pools_of("us"):
        mine = [index for index, bundle in enumerate(bundles) if bundle.pool.name == pool.name]
        mine.sort(key=lambda index: (order.get(node_of[index], len(order)), devices.get(index, ()), index))
        for rank, index in enumerate(mine):
            reservation.places[Bundle(pool, rank)] = index
            reservation.nodes[Bundle(pool, rank)] = node_of[index]
            if index in devices:
                reservation.devices[Bundle(pool, rank)] = devices[index]


def _devices(group: PlacementGroup, bundles: Sequence[Bundle], deadline: float) -> dict[int, tuple[int, ...]]:
    """The GPU indices of the bundles that have any; only a process within a bundle is told them."""
    probes = {
        str(index): _visible_devices.options(
            num_gpus=bundle.pool.gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group, index)
        ).remote()
        for index, bundle in enumerate(bundles)
        if bundle.pool.gpus
    }
    left = max(POLL_SECONDS, deadline - time.monotonic())
    return {
        int(index): devices for index, devices in waiting.get(probes, left, "devices of the bundles").items()
    }


@ray.remote(num_cpus=0, max_retries=0)
def _visible_devices() -> tuple[int, ...]:
    return tuple(int(device) for device in ray.get_gpu_ids())


def _shows(node: NodeView, reservation: Reservation) -> bool:
    """Whether the view of a node is new enough to show what our group holds on it."""
    group = reservation.group
    if group is None or node.id not in reservation.nodes.values():
        return True
    return any(name.endswith(f"_{group.id.hex()}") for name in node.available)


def _as_if_released(view: ClusterView, reservation: Reservation) -> ClusterView:
    """The view with our group's share of each node free again."""
    nodes = []
    for node in view.nodes:
        free = Counter(node.available)
        if _shows(node, reservation):
            for bundle, holder in reservation.nodes.items():
                free.update(bundle.pool.each if holder == node.id else {})
        nodes.append(replace(node, available=dict(free)))
    return ClusterView(tuple(nodes))


def _remove(group: PlacementGroup) -> None:
    """Remove a group and wait until it is gone.

    A group on its way to a place is let arrive first: Ray never gets back what was prepared for a group that
    is removed before it is committed (ray-project/ray#64693).
    """
    _await_state(group, _at_rest, ARRIVAL_SECONDS)
    remove_placement_group(group)
    if not _await_state(group, lambda table: table["state"] == "REMOVED", REMOVAL_SECONDS):
        logger.warning("placement group %s is not removed after %g s", group.id.hex(), REMOVAL_SECONDS)


def _at_rest(table: Mapping[str, Any]) -> bool:
    waits = table["stats"]["scheduling_state"] in ("NO_RESOURCES", "INFEASIBLE")
    return table["state"] in ("CREATED", "REMOVED") or (table["state"] == "PENDING" and waits)


def _await_state(group: PlacementGroup, reached: Callable[[Mapping[str, Any]], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not reached(placement_group_table(group)):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS / 10)
    return True
