"""What a run asks of nodes before it starts: equal versions, room to spill to, and storage that all see."""

from cluster import doctor_checks as checks
from cluster.doctor_findings import Finding
from cluster.doctor_probe import describe
from cluster.doctor_storage import DRIVER, share
from cluster.everywhere import on_every_node
from cluster.placement import ClusterView

SECONDS = 60.0


def check_nodes(storage_uri: str, timeout: float = SECONDS) -> None:
    """Raise unless the nodes of the connected cluster can take part in a run that writes to `storage_uri`.

    A cluster of one node is not asked. Nodes that join later are not either: `python -m cluster.doctor` tests
    those, and the network and the devices too.

    Raises:
        ValueError: in one line, with the node, what it has and what to do: another version of a library or of
            this project, a disk so full that Ray makes no objects, or storage that a node cannot write to, or
            cannot see what others wrote to.
        WaitTimeout: when a node gives no answer within `timeout` seconds.
    """
    nodes = ClusterView.from_ray().nodes
    if len(nodes) < 2:
        return
    answers = on_every_node(describe, nodes, timeout, "a first task on every node")
    for error in answers.failures.values():
        raise error
    _refuse(checks.versions_agree({DRIVER: describe(), **answers.values}))
    _refuse(checks.memory_suffices(nodes, answers.values))
    _refuse(checks.storage_shared(share(storage_uri, nodes, timeout)))


def _refuse(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.level == "FAIL":
            raise ValueError(f"{finding.subject}: {finding.found}: {finding.remedy}")
