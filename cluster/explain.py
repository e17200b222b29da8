"""Why a plan does or does not fit a cluster: what was asked, what there is, which setting to lower."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.placement import Bundle, ClusterView, NodeView, Plan, Pool, pack

SHOWN_NODES = 4
GIB = 2**30


@dataclass(frozen=True)
class PoolFit:
    """How much of one pool fits, with the rest of the plan in place."""

    pool: Pool
    now: tuple[str, ...]
    """Nodes of the actors that fit into what is free, by index."""
    ever: tuple[str, ...]
    """Nodes of the actors that would fit if nobody else held anything, by index."""
    alone: int
    """How many would fit if the cluster held nothing but this pool."""


@dataclass(frozen=True)
class Explanation:
    """A plan against a cluster; its text is a verdict and a table of a few lines."""

    plan: Plan
    view: ClusterView
    pools: tuple[PoolFit, ...]

    @property
    def fits(self) -> bool:
        """True when the whole plan fits into what is free now."""
        return all(len(fit.now) == fit.pool.count for fit in self.pools)

    @property
    def feasible(self) -> bool:
        """True when the whole plan would fit if nobody else held anything."""
        return all(len(fit.ever) == fit.pool.count for fit in self.pools)

    @property
    def remedies(self) -> str:
        """Which settings to lower to what: each that is enough alone, else all together; "" if all fits."""
        if self.fits:
            return ""
        hopeless = [_hopeless(fit.pool) for fit in self.pools if fit.pool.count and fit.alone == 0]
        if hopeless:
            return "; ".join(hopeless)
        view = self.view if self.feasible else self.view.emptied()
        single = [
            _lowered(pool, count) for pool in self.plan.pools if (count := _fewer(self.plan, pool, view))
        ]
        return " or ".join(single) or _all_lowered(self.plan, view)

    @property
    def verdict(self) -> str:
        """The outcome and the remedy in one line."""
        if self.fits:
            return "the plan fits"
        if self.feasible:
            return (
                f"the plan fits this cluster but not now, others hold what it needs: wait, or {self.remedies}"
            )
        return f"the plan can never fit this cluster: {self.remedies}"

    @property
    def in_one_line(self) -> str:
        """The plan's fate in one line: what was asked, how much of it fits, what there is, what to lower."""
        if self.fits:
            return self.verdict
        short = []
        for fit in self.pools:
            room = len(fit.now if self.feasible else fit.ever)
            if room < fit.pool.count:
                each = amounts(fit.pool.each) + _selectors(fit.pool)
                asked = f"{_setting(fit.pool)}={fit.pool.count}: pool {fit.pool.name}"
                short.append(f"{asked} asks {fit.pool.count} times for {each}, and {room} fit")
        there = _nodes(self)[-1]
        remedy = f"wait for what others hold, or {self.remedies}" if self.feasible else self.remedies
        return f"{'; '.join(short)} ({there}): {remedy}"

    def __str__(self) -> str:
        rows = [("pool", "each", "asked", "fit now", "fit empty", "where", "setting")]
        rows += [
            (
                fit.pool.name,
                amounts(fit.pool.each) + _selectors(fit.pool),
                str(fit.pool.count),
                str(len(fit.now)),
                str(len(fit.ever)),
                _counted(fit.now or fit.ever),
                fit.pool.setting or "-",
            )
            for fit in self.pools
        ]
        return "\n".join([self.verdict, *_table(rows), *(f"  {line}" for line in _nodes(self))])


def explain(plan: Plan, view: ClusterView) -> Explanation:
    """Pack a plan into a cluster, as it is now and as it would be empty; pure, nothing is reserved."""
    empty = view.emptied()
    now, ever = (pack(plan.bundles(), one, plan.strategy) for one in (view, empty))
    fits = []
    for pool in plan.pools:
        bundles = [Bundle(pool, index) for index in range(pool.count)]
        alone = len(pack(bundles, empty, plan.strategy))
        fits.append(PoolFit(pool, _names(bundles, now), _names(bundles, ever), alone))
    return Explanation(plan, view, tuple(fits))


def amounts(resources: Mapping[str, float]) -> str:
    """Resources in words, such as "2 CPU, 0.5 GPU, 3.0 GiB"; nothing else than these three."""
    words = [f"{round(resources[name], 4):g} {name}" for name in ("CPU", "GPU") if name in resources]
    if "memory" in resources:
        words.append(f"{resources['memory'] / GIB:.1f} GiB")
    return ", ".join(words) or "nothing"


def _fewer(plan: Plan, pool: Pool, view: ClusterView) -> int:
    """The largest lower count of one pool with which the whole plan fits, 0 if none does."""
    return bisect_left(range(1, pool.count), True, key=lambda count: not _fit(plan, {pool.name: count}, view))


def _all_lowered(plan: Plan, view: ClusterView) -> str:
    """Every pool lowered by the same part, but to one at least."""
    most = max(pool.count for pool in plan.pools)

    def counts(part: int) -> dict[str, int]:
        return {pool.name: min(pool.count, max(1, pool.count * part // most)) for pool in plan.pools}

    part = bisect_left(range(1, most), True, key=lambda part: not _fit(plan, counts(part), view))
    if part == 0:
        asked = ", ".join(f"{_setting(pool)}={pool.count}" for pool in plan.pools if pool.count)
        return f"not even one of each pool fits together ({asked}): ask for less each, or add a node"
    lower = counts(part)
    return " and ".join(
        _lowered(pool, lower[pool.name]) for pool in plan.pools if lower[pool.name] < pool.count
    )


def _fit(plan: Plan, counts: Mapping[str, int], view: ClusterView) -> bool:
    pools = tuple(replace(pool, count=counts.get(pool.name, pool.count)) for pool in plan.pools)
    bundles = Plan(pools, plan.strategy).bundles()
    return len(pack(bundles, view, plan.strategy)) == len(bundles)


def _hopeless(pool: Pool) -> str:
    asked = f"{amounts(pool.each)}{_selectors(pool)}; {_setting(pool)}={pool.count}"
    return f"no node can hold even one of {pool.name} ({asked}): ask for less each, or add a larger node"


def _lowered(pool: Pool, count: int) -> str:
    return f"lower {_setting(pool)} from {pool.count} to {count}"


def _setting(pool: Pool) -> str:
    return pool.setting or f"the count of {pool.name}"


def _names(bundles: Sequence[Bundle], places: Mapping[Bundle, NodeView]) -> tuple[str, ...]:
    return tuple(places[bundle].name for bundle in bundles if bundle in places)


def _counted(names: Sequence[str]) -> str:
    counts = [f"{times} on {name}" for name, times in Counter(names).items()]
    more = [f"{len(counts) - SHOWN_NODES} nodes more"] if len(counts) > SHOWN_NODES else []
    return ", ".join(counts[:SHOWN_NODES] + more) or "-"


def _selectors(pool: Pool) -> str:
    return "".join(f", {key}={value}" for key, value in pool.labels.items())


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _nodes(explanation: Explanation) -> list[str]:
    """The cluster, a line for each of the first nodes and one for the sum of all."""
    wanted = {resource for fit in explanation.pools for resource in fit.pool.each} | {"CPU"}
    nodes = explanation.view.nodes
    lines = [
        f"node {node.name}: {_free_of_total(node.available, node.total, wanted)}"
        for node in nodes[:SHOWN_NODES]
    ]
    if len(nodes) != 1:
        free, total = (
            {name: sum(getattr(node, part).get(name, 0.0) for node in nodes) for name in wanted}
            for part in ("available", "total")
        )
        lines.append(f"{len(nodes)} nodes in all: {_free_of_total(free, total, wanted)}")
    return lines


def _free_of_total(free: Mapping[str, float], total: Mapping[str, float], wanted: set[str]) -> str:
    shown = {name: total.get(name, 0.0) for name in wanted}
    return f"{amounts(shown)} in all, {amounts({name: free.get(name, 0.0) for name in wanted})} free"
