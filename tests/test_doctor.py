"""The self-test and the preflight on a running cluster, one of whose nodes has real faults of its own.

The faulty node is a raylet in a mount namespace: a private folder lies over the path of the storage, another
release of a library on its Python path, and its limit of open files is low.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray

from cluster import doctor, doctor_network
from cluster.connect import _why_not
from cluster.doctor_findings import Finding
from cluster.doctor_network import measured
from cluster.everywhere import on_every_node
from cluster.placement import ClusterView
from cluster.preflight import check_nodes
from cluster.waiting import WaitTimeout

BIN = Path(sys.executable).parent


def subjects(findings, level):
    return Counter(finding.subject for finding in findings if finding.level == level)


def nothing_left(folder):
    return not [path for path in folder.rglob("*") if path.is_file()]


def free_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def node(address, ports, shell=""):
    """A node that `ray start` adds, in a mount namespace of its own after `shell` was run there."""
    command = [
        str(BIN / "ray"), "start", f"--address={address}", "--num-cpus=1", "--block", "--labels=faulty=yes",
        f"--dashboard-agent-listen-port={ports[0]}", f"--metrics-export-port={ports[1]}",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["unshare", "--mount", "--fork", "--kill-child", "sh", "-ec", f'{shell}\nexec "$@"', "sh", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in family:
            with suppress(psutil.NoSuchProcess):  # with its parent, which was killed just before
                one.kill()
        process.kill()
        process.wait(30)


def await_node(process):
    """The name of the faulty node, once it is alive."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for one in ClusterView.from_ray().nodes:
            if one.labels.get("faulty") == "yes":
                return one.name
        assert process.poll() is None, "ray start ended"
        time.sleep(0.1)
    raise AssertionError("the faulty node did not come")


def can_unshare():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def healthy(fake_cluster, tmp_path_factory):
    """The findings of the self-test on three sound nodes, two of which claim GPUs that are not there."""
    storage = tmp_path_factory.mktemp("sound")
    said: list[str] = []
    findings = doctor.examine(str(storage), expected=3, tell=said.append)
    return findings, storage, said


def test_three_sound_nodes_fail_only_where_gpus_are_fake(healthy):
    findings, storage, said = healthy
    assert subjects(findings, "FAIL") - Counter(token=1) == {"gpus": 2}  # Ray counts 2 on one, 1 on the other
    sound = subjects(findings, "OK")
    assert all(sound[subject] == 1 for subject in ("nodes", "versions", "storage", "clock", "gloo"))
    assert any("Ray counts 2 GPUs, torch 0" in finding.found for finding in findings)
    assert nothing_left(storage)
    assert said
    assert not [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]


def test_each_pair_of_nodes_was_measured(healthy):
    (found,) = (finding for finding in healthy[0] if finding.subject == "gloo" and finding.level == "OK")
    assert "all 3 pairs" in found.found
    assert "GB/s" in found.found


def test_a_cluster_without_tokens_is_reported(healthy):
    (found,) = (finding for finding in healthy[0] if finding.subject == "token")
    assert found.level != "OK"
    assert "RAY_AUTH_MODE=token" in found.remedy


def test_a_head_that_works_too_is_reported(healthy):
    assert subjects(healthy[0], "WARN")["head"] == 1


def test_preflight_lets_sound_nodes_pass(fake_cluster, tmp_path):
    check_nodes(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_pair_that_cannot_meet_is_told_and_the_next_pairs_are_measured(fake_cluster, monkeypatch):
    """A peer dies between binding its port and the meeting, as a node that is lost then."""
    nodes = ClusterView.from_ray().nodes
    first = doctor_network.rounds_of_pairs([one.name for one in nodes])[0][0]
    real, killed = doctor_network._round, []

    def lossy(pairs, peers, backend, limit):
        if not killed:
            ray.kill(peers[first[1]])
            killed.append(first)
        return real(pairs, peers, backend, 8.0 if pairs[0] == first else limit)

    monkeypatch.setattr(doctor_network, "_round", lossy)
    links = [link for one in measured(nodes, "gloo", time.monotonic() + 60) for link in one]
    assert [link.pair for link in links if link.trouble] == [first]
    assert len([link for link in links if link.gigabytes_per_second > 0]) == 2


def test_storage_that_nobody_can_open_is_one_finding(fake_cluster):
    exam = doctor.Examination(ClusterView.from_ray().nodes, time.monotonic() + 30, lambda _: None)
    doctor._storage(exam, "nosuch://bucket/run")
    (found,) = exam.findings
    assert (found.level, found.subject) == ("FAIL", "storage")
    assert "nosuch" in found.found


def wait_here(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_a_node_that_does_not_answer_costs_its_limit_and_is_named(fake_cluster):
    nodes = ClusterView.from_ray().nodes
    slow = nodes[1].name
    given = {one.name: (60.0 if one.name == slow else 0.0,) for one in nodes}
    begun = time.monotonic()
    answers = on_every_node(wait_here, nodes, 5.0, "an answer", given)
    assert time.monotonic() - begun < 50
    assert sorted(answers.values) == sorted({one.name for one in nodes} - {slow})
    assert isinstance(answers.failures[slow], WaitTimeout)
    assert slow in str(answers.failures[slow])


def test_an_address_where_nothing_listens_is_one_finding(monkeypatch, capsys):
    ran = subprocess.run(
        [sys.executable, "-m", "cluster.doctor", "--json"],
        env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"},
        cwd=Path(doctor.__file__).parent.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    told = json.loads(ran.stdout)
    assert [finding["subject"] for finding in told["findings"]] == ["connect"]
    assert "no Ray cluster answers" in told["findings"][0]["found"]


def test_a_driver_of_other_versions_is_told_so(fake_cluster):
    """Ray's own check, on what a driver of another Ray would have said to this cluster."""
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "2.59.0", "python_version": "3.11.1"}, "this driver", True)
    line = _why_not("head:6379", mismatch.value)
    assert "\n" not in line
    assert "other versions" in line
    assert "2.59.0" in line
    assert ray.__version__ in line


@pytest.fixture(scope="module")
def faulty(fake_cluster, tmp_path_factory):
    """A fourth node with faults; yields (its name, its process, the storage that it has for itself)."""
    if not can_unshare():
        pytest.skip("needs unshare --mount, which needs root")
    storage, path = tmp_path_factory.mktemp("private"), tmp_path_factory.mktemp("libraries")
    other = path / "deepspeed-0.1.2.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.2\n")
    shell = f'mount -t tmpfs none "{storage}"\nulimit -Sn 4096\nexport PYTHONPATH="{path}:$PYTHONPATH"\n'
    with node(fake_cluster.address, (free_port(), free_port()), shell) as process:
        yield await_node(process), process, storage


def test_the_faults_of_one_node_are_named(faulty):
    name, _, storage = faulty
    exam = doctor.Examination(ClusterView.from_ray().nodes, time.monotonic() + 90, lambda _: None)
    doctor._describe(exam, 4)
    doctor._storage(exam, str(storage))
    failed = {finding.subject: finding for finding in exam.findings if finding.level == "FAIL"}
    assert "deepspeed is" in failed["versions"].found
    assert f"0.1.2 on {name}" in failed["versions"].found
    unseen = [one.found for one in exam.findings if one.subject == "storage" and one.level == "FAIL"]
    (line,) = unseen
    assert line.startswith(f"{name} cannot see what ")
    assert f"wrote to {storage}: no such file (one of 8 such pairs with {name})" in line
    assert f"{name}: at most 4096 open files" in [
        one.found for one in exam.findings if one.subject == "open files"
    ]
    assert nothing_left(storage)


def test_preflight_names_the_node_and_the_library(faulty, tmp_path):
    with pytest.raises(ValueError, match=rf"deepspeed is .*0\.1\.2 on {faulty[0]}.*constraints\.txt") as told:
        check_nodes(str(tmp_path))
    assert "\n" not in str(told.value)


def test_preflight_names_the_node_that_has_the_storage_for_itself(faulty, monkeypatch):
    monkeypatch.setattr("cluster.doctor_checks.versions_agree", lambda _: list[Finding]())
    with pytest.raises(ValueError, match=r"cannot see what .* wrote .*s3://"):
        check_nodes(str(faulty[2]))


def test_a_stopped_node_is_a_finding_and_the_others_are_tested(faulty):
    name, process, _ = faulty
    raylets = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            raylets += [one] if "raylet" in one.name() else []
    for one in raylets:
        one.send_signal(signal.SIGSTOP)
    try:
        assert raylets
        exam = doctor.Examination(
            ClusterView.from_ray().nodes, time.monotonic() + 120, lambda _: None, answer_seconds=40.0
        )
        doctor._describe(exam, 4)
    finally:
        for one in raylets:
            one.send_signal(signal.SIGCONT)
    silent = [one.found for one in exam.findings if one.subject == "nodes" and one.level == "FAIL"]
    assert [found.split(" ran no task")[0] for found in silent] == [name]
    assert len(exam.answering) == 3
