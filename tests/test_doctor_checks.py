"""The verdicts of the cluster's self-test, on records of nodes that need not exist."""

import json
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest

from cluster import doctor_checks as checks
from cluster import preflight
from cluster.doctor import arguments, write
from cluster.doctor_exposure import Exposure, who_is_let_in
from cluster.doctor_findings import fail, merged, ok, warn
from cluster.doctor_network import ALL_PAIRS, RANDOM_ROUNDS, Link, rounds_of_pairs
from cluster.doctor_probe import Gpu, Machine
from cluster.doctor_storage import Sharing
from cluster.everywhere import Answers
from cluster.placement import NodeView

GIB = 2**30
VERSIONS = {"ray": "2.60.0", "torch": "2.13.0", "deepspeed": "0.19.8"}
SOUND = Machine(
    python="3.11.9", versions=VERSIONS, project="abc123", open_files=65536, shm_bytes=64 * GIB,
    session="/tmp/ray/session", disk_free=500 * GIB, disk_total=1000 * GIB,
)  # fmt: skip
H100 = tuple(Gpu(i, "NVIDIA H100", 81920, 80000) for i in range(8))


def view(name, **total):
    return NodeView(name, {"CPU": 8.0, "object_store_memory": 20.0 * GIB, **total}, {}, {"rack": "0"}, name)


def levels(findings):
    return [finding.level for finding in findings]


def only(findings, level="FAIL"):
    (found,) = (finding for finding in findings if finding.level == level)
    return str(found)


def test_nodes_that_are_equal_give_one_line():
    told = checks.versions_agree({"driver": SOUND, "a": SOUND, "b": SOUND})
    assert levels(told) == ["OK"]
    assert "torch 2.13.0" in str(told[0])


@pytest.mark.parametrize("library", VERSIONS)
def test_another_release_on_one_node_is_named_with_both_values(library):
    other = replace(SOUND, versions=VERSIONS | {library: "1.2.3"})
    line = only(checks.versions_agree({"driver": SOUND, "a": SOUND, "b": other}))
    assert f"{library} is {VERSIONS[library]} on driver, a; 1.2.3 on b" in line
    assert "constraints.txt" in line
    assert "\n" not in line


def test_a_library_that_one_node_lacks_is_named():
    bare = replace(SOUND, versions={**VERSIONS, "torch": None})
    assert "torch is 2.13.0 on a; missing on b" in only(checks.versions_agree({"a": SOUND, "b": bare}))


def test_a_head_without_gpus_may_have_torch_of_another_build():
    cpu = replace(SOUND, versions=VERSIONS | {"torch": "2.13.0+cpu"})
    gpu = replace(SOUND, versions=VERSIONS | {"torch": "2.13.0+cu130"})
    assert "FAIL" not in levels(checks.versions_agree({"driver": cpu, "head": cpu, "a": gpu, "b": gpu}))


@pytest.mark.parametrize("part", ["cuda", "nccl"])
def test_toolkits_are_compared_among_the_nodes_that_have_them(part):
    tools = {"cuda": "13.0", "nccl": "2.28.3"}
    a, b = (replace(SOUND, toolkit=tools), replace(SOUND, toolkit=tools | {part: "1.0"}))
    assert levels(checks.versions_agree({"driver": SOUND, "a": a, "b": a})) == ["OK"]
    assert f"{part} of torch" in only(checks.versions_agree({"driver": SOUND, "a": a, "b": b}))


def test_another_python_fails_and_another_patch_of_it_warns():
    assert "python" in only(checks.versions_agree({"a": SOUND, "b": replace(SOUND, python="3.12.1")}))
    assert "WARN" in levels(checks.versions_agree({"a": SOUND, "b": replace(SOUND, python="3.11.2")}))


@pytest.mark.parametrize("project", ["def456", "absent"])
def test_other_sources_of_this_project_are_found(project):
    line = only(checks.versions_agree({"driver": SOUND, "a": replace(SOUND, project=project)}))
    assert f"{project} on a" in line


def test_a_project_that_is_nowhere_is_no_agreement():
    bare = replace(SOUND, project="absent")
    assert levels(checks.versions_agree({"driver": bare, "a": bare})) == ["FAIL"]


def test_missing_and_silent_nodes_are_counted():
    nodes = [view("a"), view("b")]
    assert levels(checks.nodes_answer(nodes, {}, None)) == ["OK"]
    assert levels(checks.nodes_answer(nodes, {}, 2)) == ["OK"]
    assert "2 are alive, 3 expected" in only(checks.nodes_answer(nodes, {}, 3))
    assert "b ran no task" in only(checks.nodes_answer(nodes, {"b": "no answer"}, 2))


def test_a_path_of_the_head_alone_is_named_by_reader_and_writer():
    sharing = Sharing("/data/run", unseen={"b": {"driver": "no such file", "a": "no such file"}}, asked=3)
    line = only(checks.storage_shared(sharing))
    assert "b cannot see what driver wrote to /data/run: no such file (one of 2 such pairs with b)" in line
    assert "s3://" in line
    assert not sharing.shared


def test_a_node_with_storage_of_its_own_is_one_finding_and_disks_of_everyone_are_nearly_as_many_as_nodes():
    names = ["driver", "a", "b", "c", "d"]
    lone = {name: {"d": "no such file"} for name in names if name != "d"}
    lone["d"] = dict.fromkeys(names[:-1], "no such file")
    (told,) = checks.storage_shared(Sharing("/data", unseen=lone, asked=5))
    assert "d cannot see what" in told.found
    assert "8 such pairs with d" in told.found
    apart = {name: dict.fromkeys((n for n in names if n != name), "no such file") for name in names}
    assert len(checks.storage_shared(Sharing("/data", unseen=apart, asked=5))) == 4


def test_the_same_of_several_nodes_is_one_line():
    found = [warn("open files", f"{name}: at most 1024", "ulimit") for name in "abcdef"]
    other = [warn("open files", "g: at most 512", "ulimit"), ok("clock", "fine"), ok("nodes", "fine")]
    told = merged([*found, *other])
    assert [one.found for one in told] == [
        "a, b, c, d and 2 more: at most 1024",
        "g: at most 512",
        "fine",
        "fine",
    ]


def test_storage_that_refuses_or_hangs_is_named():
    told = checks.storage_shared(Sharing("/d", refusals={"a": "PermissionError"}, silent={"b": "60 s"}))
    assert levels(told) == ["FAIL", "FAIL"]
    assert "a cannot use /d" in str(told[0])
    assert "b got no answer from /d" in str(told[1])


@pytest.mark.parametrize(
    ("ray", "torch", "tool", "level"),
    [
        (8, 8, 8, "OK"),
        (8, 0, 8, "FAIL"),
        (8, 7, 8, "FAIL"),
        (0, 8, 8, "WARN"),
        (0, 0, 1, "WARN"),
        (0, 0, 0, "OK"),
    ],
)
def test_ray_torch_and_the_driver_must_count_the_same_gpus(ray, torch, tool, level):
    machine = replace(SOUND, gpus=H100[:tool], torch_devices=torch)
    assert levels(checks.gpus_seen([view("a", GPU=float(ray))], {"a": machine})) == [level]


def test_why_torch_sees_no_gpu_is_told():
    machine = replace(SOUND, gpus=H100, trouble="RuntimeError: driver too old")
    assert "driver too old" in only(checks.gpus_seen([view("a", GPU=8.0)], {"a": machine}))


def test_links_that_fail_or_crawl_are_named_and_the_rest_is_summed_up():
    fast = [Link(pair, "gloo", 10.0, 0.1) for pair in (("a", "b"), ("a", "c"), ("b", "c"))]
    assert levels(checks.links_carry(fast, 3, True)) == ["OK"]
    slow = [*fast[:2], Link(("b", "c"), "gloo", 1.0, 0.1)]
    assert "b and c: 1 GB/s" in only(checks.links_carry(slow, 3, True), "WARN")
    broken = [*fast[:2], Link(("b", "c"), "gloo", trouble="RuntimeError: timed out")]
    line = only(checks.links_carry(broken, 3, True))
    assert "b and c cannot reduce together: RuntimeError: timed out" in line
    assert "GLOO_SOCKET_IFNAME" in line
    assert levels(checks.links_carry(broken[2:], 2, True)) == ["FAIL"]


@pytest.mark.parametrize(
    ("ahead", "unsure", "level"), [(0.0, 0.01, "OK"), (0.6, 0.3, "OK"), (-0.9, 0.01, "WARN"), (99, 1, "FAIL")]
)
def test_a_clock_is_blamed_for_no_more_than_is_certain(ahead, unsure, level):
    assert levels(checks.clocks_agree({"a": (ahead, unsure)})) == [level]


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "OK", "to spill to"),
        ({"shm_bytes": 64 * 2**20}, "WARN", "/dev/shm"),
        ({"open_files": 1024}, "WARN", "ulimit"),
        ({"disk_free": 40 * GIB}, "FAIL", "creates no objects"),
        ({"disk_free": 80 * GIB}, "WARN", "--temp-dir"),
        ({"disk_free": GIB, "disk_total": 8 * GIB}, "WARN", "1.0 GiB free"),
    ],
)
def test_memory_and_limits(change, level, words):
    told = checks.memory_suffices([view("a")], {"a": replace(SOUND, **change)})
    assert words in only(told, level)


def test_a_run_does_not_start_where_a_disk_is_too_full_to_spill_to(monkeypatch):
    """Of nodes that need not exist; what is merely little is no reason."""
    nodes = [view("a"), view("b")]
    seen = SimpleNamespace(from_ray=lambda: SimpleNamespace(nodes=nodes))
    monkeypatch.setattr(preflight, "ClusterView", seen)
    monkeypatch.setattr(preflight, "describe", lambda: SOUND)
    monkeypatch.setattr(preflight, "share", lambda *_: Sharing("s3://bucket/run", asked=3))
    machines = {"a": SOUND, "b": replace(SOUND, disk_free=80 * GIB)}
    monkeypatch.setattr(preflight, "on_every_node", lambda *_: Answers(machines, {}))
    preflight.check_nodes("s3://bucket/run")
    machines["b"] = replace(SOUND, disk_free=40 * GIB)
    with pytest.raises(
        ValueError, match=r"spill disk: b: 40\.0 GiB free \(96% used\).*: free some"
    ) as caught:
        preflight.check_nodes("s3://bucket/run")
    assert "\n" not in str(caught.value)


def test_a_tiny_object_store_is_told():
    assert "object store" in only(
        checks.memory_suffices([view("a", object_store_memory=1e8)], {"a": SOUND}), "WARN"
    )


def test_a_head_that_works_too_is_told_only_where_there_are_others():
    head, idle = view("head", **{checks.HEAD: 1.0}), view("head", **{checks.HEAD: 1.0, "CPU": 0.0})
    assert "WARN" in levels(checks.head_is_spared([head, view("a")]))
    assert "WARN" not in levels(checks.head_is_spared([head]))
    assert "WARN" not in levels(checks.head_is_spared([idle, view("a")]))


@pytest.mark.parametrize(
    ("exposure", "expected"),
    [
        (Exposure("10.0.0.1:6379", "open", "10.0.0.1:8265", "open", "open"), ["FAIL", "FAIL", "WARN"]),
        (Exposure("10.0.0.1:6379", "token", "127.0.0.1:8265", "token", "token"), ["OK", "OK"]),
        (Exposure("127.0.0.1:6379", "open", "127.0.0.1:8265", "open", "unreachable"), ["WARN", "WARN"]),
        (Exposure("10.0.0.1:6379", "token", "", "unreachable", "unreachable"), ["OK", "OK"]),
        (Exposure("10.0.0.1:6379", "token", "10.0.0.1:8265", "token", "unreachable"), ["OK", "OK"]),
    ],
)
def test_open_doors(exposure, expected):
    assert levels(who_is_let_in(exposure)) == expected


@pytest.mark.parametrize("count", range(2, ALL_PAIRS + 1))
def test_every_pair_of_few_nodes_is_measured_once(count):
    names = [f"n{i}" for i in range(count)]
    rounds = rounds_of_pairs(names)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert sorted(map(sorted, pairs)) == sorted(map(sorted, combinations(names, 2)))
    assert len(rounds) == (count if count % 2 else count - 1)


@pytest.mark.parametrize("count", [ALL_PAIRS + 1, ALL_PAIRS + 2, 101])
def test_of_many_nodes_a_ring_and_random_pairs_are(count):
    names = [f"n{i}" for i in range(count)]
    rounds = rounds_of_pairs(names)
    met = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert {frozenset((names[i], names[i - 1])) for i in range(count)} <= met
    assert len(rounds) <= 3 + RANDOM_ROUNDS


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 17, 40])
def test_no_node_is_in_two_pairs_at_once(count):
    for pairs in rounds_of_pairs([f"n{i}" for i in range(count)]):
        busy = [name for pair in pairs for name in pair]
        assert len(busy) == len(set(busy)) > 0


def test_findings_are_lines_and_json_and_an_exit_code(capsys):
    findings = [ok("nodes", "3 alive"), warn("clock", "a bit\noff", "start chrony")]
    assert write(findings, 1.0, json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "WARN  clock         a bit off -> start chrony"
    assert lines[-1] == "0 failed, 1 to look at, in 1 s"
    assert write([*findings, fail("storage", "x", "y")], 1.0, json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is False
    assert told["counts"] == {"OK": 1, "WARN": 1, "FAIL": 1}
    assert told["findings"][2] == {"level": "FAIL", "subject": "storage", "found": "x", "remedy": "y"}


def test_the_command_line_is_what_the_documentation_says():
    given = arguments(["--storage", "s3://b/r", "--expect-nodes", "4", "--json"])
    assert (given.storage, given.expect_nodes, given.json, given.seconds) == ("s3://b/r", 4, True, 120.0)
