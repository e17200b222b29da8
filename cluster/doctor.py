"""The self-test of a cluster, in two minutes: one line a finding, with its remedy.

    RAY_ADDRESS=HOST:6379 python -m cluster.doctor --storage s3://bucket/runs --expect-nodes 4

Exit code 0 if nothing would break a run, 1 otherwise. Progress goes to standard error. Nothing is left on the
cluster, and nothing is reserved there: a cluster that is at work may be tested.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ray

from cluster import doctor_checks as checks
from cluster.connect import Connection, connected
from cluster.doctor_exposure import dashboard_address, who_is_let_in, without_token
from cluster.doctor_findings import Finding, as_json, fail, merged, ok, reason, warn
from cluster.doctor_network import ALL_PAIRS, Backend, Link, measured, rounds_of_pairs
from cluster.doctor_probe import Machine, clock, describe
from cluster.doctor_storage import DRIVER, share
from cluster.everywhere import on_every_node
from cluster.placement import ClusterView, NodeView

SECONDS = 120.0
ANSWER_SECONDS = 45.0
STORAGE_SECONDS = 20.0
CLOCK_ROUNDS = 4


@dataclass
class Examination:
    """One run of the self-test."""

    nodes: Sequence[NodeView]
    deadline: float
    """In `time.monotonic`'s seconds."""
    tell: Callable[[str], None]
    """Is told what is done next."""
    answer_seconds: float = ANSWER_SECONDS
    """How long a node may take for its first task, which starts a process there."""
    findings: list[Finding] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)
    """What the driver and the nodes that answer told of themselves."""

    def left(self, most: float) -> float:
        """Seconds for the next thing: `most`, or what is left of the whole."""
        return max(1.0, min(most, self.deadline - time.monotonic()))

    @property
    def answering(self) -> list[NodeView]:
        """The nodes that ran the first task."""
        return [node for node in self.nodes if node.name in self.machines]


def examine(
    storage: str | None = None,
    expected: int | None = None,
    seconds: float = SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Test the connected cluster.

    Args:
        storage: URI that jobs will be given as `run`; None leaves storage out.
        expected: how many nodes there should be; None for as many as there are.
        seconds: limit for everything; what is not reached is said.
        answer_seconds: limit for a node's first answer.
        tell: is told what is done next, a few words each.
    """
    nodes = ClusterView.from_ray().nodes
    exam = Examination(nodes, time.monotonic() + seconds, tell, answer_seconds)
    _describe(exam, expected)
    for step in (lambda: _clocks(exam), lambda: _exposure(exam), lambda: _storage(exam, storage)):
        if time.monotonic() > exam.deadline:
            break
        step()
    _links(exam, "gloo", exam.answering)
    with_gpus = [node for node in exam.answering if exam.machines[node.name].torch_devices]
    _links(exam, "nccl", with_gpus)
    if time.monotonic() > exam.deadline:
        message = f"the limit of {seconds:g} s ended the test early"
        exam.findings.append(warn("time", message, "give more with --seconds"))
    return merged(exam.findings)


def _describe(exam: Examination, expected: int | None) -> None:
    exam.tell(f"asking {len(exam.nodes)} nodes for versions, devices and memory")
    asked = {node.name: (True, int(node.total.get("GPU", 0))) for node in exam.nodes}
    limit = exam.left(exam.answer_seconds)
    answers = on_every_node(describe, exam.nodes, limit, "a first task", asked)
    exam.machines = {DRIVER: describe(), **answers.values}
    failures = {name: reason(error) for name, error in answers.failures.items()}
    machines = {name: machine for name, machine in exam.machines.items() if name != DRIVER}
    exam.findings += checks.nodes_answer(exam.nodes, failures, expected)
    exam.findings += checks.versions_agree(exam.machines)
    exam.findings += checks.head_is_spared(exam.nodes)
    exam.findings += checks.gpus_seen(exam.answering, machines)
    exam.findings += checks.memory_suffices(exam.answering, machines)


def _clocks(exam: Examination) -> None:
    """Offsets from the middle of round trips, the shortest of a few for each node, one node at a time."""
    exam.tell("comparing clocks")
    skews: dict[str, tuple[float, float]] = {}
    for _ in range(CLOCK_ROUNDS):
        for node in exam.answering:
            before = time.time()
            told = on_every_node(clock, [node], exam.left(5.0), "the clock").values.get(node.name)
            after = time.time()
            unsure = (after - before) / 2
            if told is not None and unsure < skews.get(node.name, (0.0, float("inf")))[1]:
                skews[node.name] = (told - (before + after) / 2, unsure)
        if time.monotonic() > exam.deadline or len(exam.answering) > ALL_PAIRS:
            break
    exam.findings += checks.clocks_agree(skews)


def _exposure(exam: Examination) -> None:
    exam.tell("knocking at the head as a stranger")
    heads = [node for node in exam.answering if checks.HEAD in node.total]
    arguments = (ray.get_runtime_context().gcs_address, dashboard_address())
    given = {node.name: arguments for node in heads}
    answers = on_every_node(without_token, heads, exam.left(30.0), "a look at the head", given)
    for exposure in answers.values.values():
        exam.findings += who_is_let_in(exposure)
    for name, error in answers.failures.items():
        exam.findings.append(warn("token", f"{name} could not look: {reason(error)}", "run this on the head"))


def _storage(exam: Examination, storage: str | None) -> None:
    if storage is None:
        exam.findings.append(
            warn("storage", "not tested", "pass --storage with the URI that jobs will use as `run`")
        )
        return
    exam.tell(f"writing to {storage} from every node and reading across")
    try:
        sharing = share(storage, exam.answering, exam.left(STORAGE_SECONDS))
    except ValueError as error:
        exam.findings.append(fail("storage", str(error), "pass a path, or a URI of an installed driver"))
        return
    exam.findings += checks.storage_shared(sharing)


def _links(exam: Examination, backend: Backend, nodes: Sequence[NodeView]) -> None:
    rounds = rounds_of_pairs([node.name for node in nodes])
    if not rounds:
        return
    devices: dict[str, int] = {}
    if backend == "nccl":
        for node in nodes:
            gpus = exam.machines[node.name].gpus
            devices[node.name] = max(gpus, key=lambda gpu: gpu.free_mib).index if gpus else 0
    links: list[Link] = []
    for number, found in enumerate(measured(nodes, backend, exam.deadline, devices), 1):
        exam.tell(f"{backend}: round {number} of {len(rounds)} measured")
        links += found
    exam.findings += checks.links_carry(links, len(nodes), all_pairs=len(nodes) <= ALL_PAIRS)
    pairs = sum(map(len, rounds))
    if len(links) < pairs:
        message = f"{len(links)} of {pairs} pairs measured before the limit"
        exam.findings.append(warn(backend, message, "give more with --seconds"))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--storage", metavar="URI", help="what jobs will be given as `run`: every node tries")
    parser.add_argument("--expect-nodes", type=int, metavar="N", help="how many nodes there should be")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for everything (%(default)g)")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Connect as a driver does, test, write the findings; return the exit code."""
    given, begun = arguments(argv), time.monotonic()

    def tell(words: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - begun:5.1f} s] {words}\n")
        sys.stderr.flush()

    try:
        tell("connecting")
        with connected(log_to_driver=False) as connection:
            findings = [_connection(connection)]
            findings += examine(given.storage, given.expect_nodes, given.seconds, tell=tell)
    except (ConnectionError, ValueError) as error:
        findings = [fail("connect", str(error), "see above; clients take RAY_ADDRESS=HOST:6379")]
    return write(findings, time.monotonic() - begun, given.json)


def write(findings: Sequence[Finding], seconds: float, json: bool) -> int:
    """Write the findings to standard output; return 1 if one of them is a FAIL, else 0."""
    failed = sum(one.level == "FAIL" for one in findings)
    warned = sum(one.level == "WARN" for one in findings)
    if json:
        sys.stdout.write(as_json(findings, seconds) + "\n")
    else:
        sys.stdout.write("".join(f"{finding}\n" for finding in findings))
        sys.stdout.write(f"{failed} failed, {warned} to look at, in {seconds:.0f} s\n")
    sys.stdout.flush()
    return 1 if failed else 0


def _connection(connection: Connection) -> Finding:
    if connection.started:
        found = "RAY_ADDRESS is not set: this is a private Ray of this machine alone"
        return warn("connect", found, "set RAY_ADDRESS=HOST:6379 to test a cluster")
    return ok("connect", f"{connection.address} (RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')})")


if __name__ == "__main__":
    sys.exit(main())
