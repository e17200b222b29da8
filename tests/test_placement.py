"""A plan fits, or says what it asked for, what there is and which setting to lower; nothing stays held."""

import itertools
import os
import pickle
import random
import re
import signal
import threading
import time

import pytest
import ray
from ray.util.placement_group import placement_group_table, remove_placement_group
from test_mistakes import refusal, written

from cluster import waiting
from cluster.explain import explain
from cluster.failures import classify
from cluster.placement import Bundle, ClusterView, NodeView, Plan, Pool, matches, pack, plan
from cluster.reserve import PlacementError, PlacementTimeout, reserve


def node(name: str, cpus: float, free: float | None = None, gpus: float = 0, **labels: str) -> NodeView:
    total = {"CPU": cpus, "GPU": gpus, "memory": 8 * 2**30}
    return NodeView(name, total, {**total, "CPU": cpus if free is None else free}, labels)


def critics(count: int, cpus: float = 1, **rest) -> Pool:
    return Pool("critics", count, cpus, setting="critics.actors", **rest)


def judges(count: int, cpus: float = 1, **rest) -> Pool:
    return Pool("judges", count, cpus, setting="judges.count", **rest)


def trainer(count: int = 1, cpus: float = 1, **rest) -> Pool:
    return Pool("trainer", count, cpus, setting="trainer.workers", reserved_by="train", **rest)


def held() -> list[str]:
    return [key for key, row in placement_group_table().items() if row["state"] != "REMOVED"]


def free_cpus() -> float:
    return sum(one.available.get("CPU", 0.0) for one in ClusterView.from_ray().nodes)


def settled(cpus: float, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while free_cpus() != cpus and time.monotonic() < deadline:
        time.sleep(0.05)
    return free_cpus() == cpus


@ray.remote(num_cpus=1)
class Seat:
    def where(self) -> tuple[str, tuple[int, ...]]:
        return ray.get_runtime_context().get_node_id(), tuple(int(gpu) for gpu in ray.get_gpu_ids())


# --- the plan, on data


def test_bundles_come_by_pool_then_index():
    declared = plan([trainer(), critics(2)])
    expected = [("trainer", 0), ("critics", 0), ("critics", 1)]
    assert [(b.pool.name, b.index) for b in declared.bundles()] == expected
    assert [b.pool.name for b in declared.bundles("us")] == ["critics", "critics"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: critics(-1), "pool 'critics': count=-1"),
        (lambda: critics(1, cpus=0), "one above 0"),
        (lambda: critics(1, gpus=1.5), "gpus=1.5"),
        (lambda: critics(1, memory=-1), "memory=-1"),
        (lambda: plan([critics(1), critics(2)]), "'critics'.*repeat"),
        (lambda: plan([], strategy="NEAR"), "strategy='NEAR'.*STRICT_PACK"),
    ],
)
def test_bad_pool_or_plan_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def optimum(pools: list[Pool], nodes: list[NodeView]) -> int:
    """The most bundles that fit, by trying every node for every bundle (CPUs only)."""
    bundles = plan(pools).bundles()
    best = 0
    for choice in itertools.product([None, *range(len(nodes))], repeat=len(bundles)):
        used = [0.0] * len(nodes)
        for bundle, home in zip(bundles, choice, strict=True):
            if home is not None:
                used[home] += bundle.pool.cpus
        if all(used[i] <= one.available["CPU"] for i, one in enumerate(nodes)):
            best = max(best, sum(home is not None for home in choice))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_packing_of_equal_bundles_is_the_best_there_is(seed):
    rng = random.Random(seed)
    nodes = [node(str(i), 4, free=rng.choice([0, 1, 1.5, 2, 3, 4])) for i in range(3)]
    pool = critics(rng.randint(1, 6), cpus=rng.choice([0.5, 1, 1.5, 2]))
    assert len(pack(plan([pool]).bundles(), ClusterView(tuple(nodes)))) == optimum([pool], nodes)


@pytest.mark.parametrize("seed", range(12))
def test_packing_of_mixed_bundles_never_overfills_a_node(seed):
    rng = random.Random(seed)
    nodes = tuple(node(str(i), rng.randint(1, 4), gpus=rng.randint(0, 2)) for i in range(3))
    cpus, gpus = [0.5, 1, 2], [0, 0.3, 0.5, 1]
    pools = [Pool(str(i), rng.randint(0, 4), rng.choice(cpus), rng.choice(gpus)) for i in range(3)]
    places = pack(plan(pools).bundles(), ClusterView(nodes))
    for one in nodes:
        inside = [bundle.pool for bundle, home in places.items() if home is one]
        assert sum(pool.cpus for pool in inside) <= one.total["CPU"]
        assert sum(pool.gpus for pool in inside) <= one.total["GPU"] + 1e-9


def test_part_of_a_gpu_is_of_one_device():
    view = ClusterView((node("a", 8, gpus=2),))
    places = pack(plan([critics(3, gpus=0.6)]).bundles(), view)
    assert len(places) == 2  # the two remainders of 0.4 make 0.8, but on two devices
    assert len(pack(plan([critics(5, gpus=0.4)]).bundles(), view)) == 4
    assert len(pack(plan([critics(2, gpus=2)]).bundles(), view)) == 1


def test_strict_strategies_bind_our_bundles_and_not_those_of_train():
    view = ClusterView((node("a", 2), node("b", 3)))
    ours, theirs = critics(3), trainer(2)
    assert explain(plan([ours], "STRICT_PACK"), view).fits
    assert not explain(plan([ours], "STRICT_SPREAD"), view).feasible
    assert explain(plan([ours, theirs], "STRICT_PACK"), view).fits
    assert explain(plan([critics(2), theirs], "STRICT_SPREAD"), view).fits


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("a", True),
        ("b", False),
        ("!a", False),
        ("!b", True),
        ("in(b, a)", True),
        ("in(b)", False),
        ("!in(b)", True),
    ],
)
def test_label_selectors_as_ray_writes_them(selector, expected):
    assert matches({"rack": "a"}, {"rack": selector}) is expected
    assert matches({}, {"rack": selector}) is selector.startswith("!")


def test_explanation_tells_never_from_not_now():
    view = ClusterView((node("a", 4, free=1), node("b", 2)))
    never = explain(plan([trainer(), critics(8)]), view)
    assert (never.fits, never.feasible) == (False, False)
    assert never.verdict == "the plan can never fit this cluster: lower critics.actors from 8 to 5"
    busy = explain(plan([trainer(), critics(4)]), view)
    assert (busy.fits, busy.feasible) == (False, True)
    assert "not now" in busy.verdict
    assert "critics.actors from 4 to 2" in busy.verdict
    assert explain(plan([trainer(), critics(2)]), view).verdict == "the plan fits"


def test_explanation_is_a_table_of_what_was_asked_and_what_there_is():
    text = str(explain(plan([trainer(), critics(8, gpus=0.5)]), ClusterView((node("a", 4, free=3, gpus=1),))))
    assert text.splitlines() == [
        "the plan can never fit this cluster: lower critics.actors from 8 to 2",
        "  pool     each            asked  fit now  fit empty  where   setting",
        "  trainer  1 CPU           1      1        1          1 on a  trainer.workers",
        "  critics  1 CPU, 0.5 GPU  8      2        2          2 on a  critics.actors",
        "  node a: 4 CPU, 1 GPU in all, 3 CPU, 1 GPU free",
    ]


@pytest.mark.parametrize(
    ("pools", "verdict"),
    [
        ([critics(2, cpus=6)], "no node can hold even one of critics (6 CPU; critics.actors=2)"),
        ([critics(1, labels={"rack": "9"})], "(1 CPU, rack=9; critics.actors=1)"),
        ([critics(1, memory=9 * 2**30)], "(1 CPU, 9.0 GiB; critics.actors=1)"),
        ([Pool("x", 5, 1)], "fit this cluster: lower the count of x from 5 to 4"),
        ([critics(4), judges(1, 0.5)], "fit this cluster: lower critics.actors from 4 to 3"),
        ([critics(3), judges(2)], "lower critics.actors from 3 to 2 or lower judges.count from 2 to 1"),
        ([critics(4), judges(4)], "lower critics.actors from 4 to 2 and lower judges.count from 4 to 2"),
        ([critics(1, 3), judges(1, 2)], "together (critics.actors=1, judges.count=1)"),
    ],
)
def test_verdict_names_what_to_change(pools, verdict):
    assert verdict in explain(plan(pools), ClusterView((node("a", 4),))).verdict


def test_explanation_of_a_large_cluster_stays_short():
    view = ClusterView(tuple(node(f"n{i}", 8, gpus=8) for i in range(200)))
    lines = str(explain(plan([critics(2000)]), view)).splitlines()
    assert len(lines) < 10
    assert lines[-1].strip() == "200 nodes in all: 1600 CPU in all, 1600 CPU free"
    assert max(len(line) for line in lines) < 160


# --- the reservation, on a live cluster of 2 CPUs, 2 CPUs with 2 GPUs (rack 0) and 2 CPUs with 1 GPU (rack 1)


def test_view_shows_resources_and_labels_of_every_node(fake_cluster):
    nodes = ClusterView.from_ray().nodes
    shapes = {(n.labels.get("rack", "head"), n.total["CPU"], n.total.get("GPU", 0.0)) for n in nodes}
    assert shapes == {("head", 2.0, 0.0), ("0", 2.0, 2.0), ("1", 2.0, 1.0)}
    assert len(nodes) == 3
    assert len({n.name for n in nodes}) == 3
    assert [n.id for n in nodes] == sorted(n.id for n in nodes)


@pytest.mark.parametrize(("share", "most"), [("1", 2), ("0.5", 4)])
def test_more_workers_than_gpus_are_refused_in_one_line_with_what_there_is(
    share, most, fake_cluster, tiny_teacher, tmp_path, capsys
):
    """Of three GPUs critics take one, and each trainer a share of the others."""
    line = refusal(
        capsys, written(tmp_path, tiny_teacher), "trainer.workers=16", "trainer.cpus_per_worker=0.1",
        "critics.gpus_per_actor=1", "warmup.batch_size=64", "adversarial.batch_size=64",
        f"trainer.gpus_per_worker={share}",
    )  # fmt: skip
    assert f"trainer.workers=16: pool trainer asks 16 times for 0.1 CPU, {share} GPU, and {most} fit" in line
    assert re.search(r"3 nodes in all: 6 CPU, 3 GPU in all, \d\S* CPU, 3 GPU free", line), line
    assert f"lower trainer.workers from 16 to {most}" in line
    assert held() == []


def test_impossible_panel_is_refused_and_leaves_nothing_held(fake_cluster):
    assert settled(6.0)
    start = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        reserve(plan([trainer(2), critics(16)]), timeout=300)
    assert time.monotonic() - start < 150
    assert str(caught.value).splitlines()[0] == (
        "the plan can never fit this cluster: lower critics.actors from 16 to 4"
    )
    assert "6 CPU in all" in str(caught.value)
    assert classify(caught.value) == "code"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert held() == []
    assert settled(6.0)


def test_actor_larger_than_any_node_is_refused_at_once(fake_cluster):
    start = time.monotonic()
    with pytest.raises(PlacementError, match=r"no node can hold even one of critics \(3 CPU"):
        reserve(plan([critics(1, cpus=3)]), timeout=300)
    assert time.monotonic() - start < 150
    assert held() == []


def test_trainers_that_do_not_fit_beside_the_panel_are_refused_before_train_starts(fake_cluster):
    with pytest.raises(PlacementError, match=r"never fit .*: lower critics\.actors from 6 to 4"):
        reserve(plan([critics(6), trainer(2)]), timeout=30)
    with pytest.raises(PlacementError, match="no node can hold even one of trainer"):
        reserve(plan([trainer(1, cpus=5)]), timeout=30)
    assert held() == []


def test_busy_cluster_is_waited_for_and_then_named_busy(fake_cluster):
    assert settled(6.0)
    with reserve(plan([Pool("others", 4, 1)])):
        start = time.monotonic()
        with pytest.raises(PlacementTimeout, match="but not now") as caught:
            reserve(plan([critics(3)]), timeout=1.0)
        assert 1.0 <= time.monotonic() - start < 150
        assert "lower critics.actors from 3 to 2" in str(caught.value)
        assert classify(caught.value) == "infrastructure"
        with pytest.raises(PlacementTimeout, match=r"lower trainer\.workers from 2 to 1"):
            reserve(plan([critics(1), trainer(2)]), timeout=1.0)
        assert len(held()) == 1
    assert held() == []


def test_reservation_gets_what_others_let_go_of_meanwhile(fake_cluster):
    assert settled(6.0)
    other = reserve(plan([Pool("others", 5, 1)]))
    threading.Timer(1.0, other.release).start()
    with reserve(plan([critics(4)]), timeout=20) as mine:
        assert len(mine.places) == 4
    assert held() == []


def test_actors_sit_on_their_bundles_in_the_order_of_node_and_device(fake_cluster):
    assert settled(6.0)
    pool = critics(6, cpus=0.5, gpus=0.5)
    with reserve(plan([pool]), timeout=30) as mine:
        seats = {str(i): Seat.options(**mine.options("critics", i)).remote() for i in range(6)}
        waiting.ready(seats, 30, "seats")
        found = waiting.get([seat.where.remote() for seat in seats.values()], 20, "seats")
        order = [one.id for one in ClusterView.from_ray().nodes]
        ranked = [(order.index(home), devices) for home, devices in found]
        assert ranked == sorted(ranked)
        assert len(set(ranked)) == 3  # three devices, two halves on each
        assert [mine.nodes[Bundle(pool, i)] for i in range(6)] == [home for home, _ in found]
    with pytest.raises(ValueError, match="no place for actor 0"):
        mine.options("critics", 0)
    assert held() == []
    assert settled(6.0)


def test_labels_choose_the_node(fake_cluster):
    rack = {one.labels.get("rack"): one.id for one in ClusterView.from_ray().nodes}
    with reserve(plan([critics(1, labels={"rack": "1"}), judges(1, labels={"rack": "!1"})])) as mine:
        homes = {bundle.pool.name: home for bundle, home in mine.nodes.items()}
    assert homes["critics"] == rack["1"]
    assert homes["judges"] != rack["1"]


def test_unknown_actor_of_a_reservation_is_named(fake_cluster):
    with reserve(plan([critics(2), trainer(1)])) as mine:
        for pool, index in (("critics", 2), ("trainer", 0), ("judges", 0)):
            with pytest.raises(ValueError, match=rf"actor {index} of pool '{pool}'; held: critics \(2\)"):
                mine.options(pool, index)


@pytest.mark.parametrize("where", ["_await_group", "_assign", "_await_room_for_train"])
def test_interrupt_while_reserving_leaves_nothing_held(fake_cluster, monkeypatch, where):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cluster.reserve.{where}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reserve(plan([critics(2)]))
    assert held() == []
    assert settled(6.0)


def test_ctrl_c_while_waiting_for_others_leaves_only_theirs(fake_cluster, request):
    assert settled(6.0)
    with reserve(plan([Pool("others", 5, 1)])):
        # pytest may have been started with SIGINT ignored, as background jobs of a shell are.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            reserve(plan([critics(3)]), timeout=30)
        assert time.monotonic() - start < 5
        assert len(held()) == 1
    assert settled(6.0)


def test_group_is_never_removed_on_its_way_to_a_place(fake_cluster, monkeypatch):
    """Ray would lose the resources of about one such group in a hundred (ray-project/ray#64693)."""

    def interrupted(*_):
        raise KeyboardInterrupt

    def remove(group):
        states.append(placement_group_table(group)["state"])
        remove_placement_group(group)

    states: list[str] = []
    assert settled(6.0)
    monkeypatch.setattr("cluster.reserve._await_group", interrupted)
    monkeypatch.setattr("cluster.reserve.remove_placement_group", remove)
    for count in range(1, 7):
        with pytest.raises(KeyboardInterrupt):
            reserve(plan([critics(count)]))
        assert settled(6.0)
    assert states == ["CREATED"] * 6


def test_plan_without_own_bundles_only_checks(fake_cluster):
    assert settled(6.0)
    with reserve(Plan((trainer(2), critics(0)))) as mine:
        assert mine.group is None
        assert held() == []


def test_removed_node_leaves_the_view_and_the_plan(fake_cluster):
    assert settled(6.0)
    before = explain(plan([critics(5)]), ClusterView.from_ray())
    assert before.fits
    fake_cluster.cluster.remove_node(fake_cluster.nodes[1])
    deadline = time.monotonic() + 120
    while len(ClusterView.from_ray().nodes) > 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not explain(plan([critics(5)]), ClusterView.from_ray()).feasible
    with pytest.raises(PlacementError, match=r"lower critics\.actors from 5 to 4"):
        reserve(plan([critics(5)]), timeout=30)
    assert held() == []
