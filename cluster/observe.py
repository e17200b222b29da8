"""Looking at a run's cluster from another process, and at its nodes; nothing here changes what runs."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import identity, node_tasks
from cluster.waiting import get

logger = logging.getLogger(__name__)

KNOCK_SECONDS = 3.0


class Unreachable(ConnectionError):  # noqa: N818 - a ConnectionError by name too
    """The cluster of a run does not answer; the message says why, and what else there is to look at."""


@contextlib.contextmanager
def observing(facts: Mapping[str, Any]) -> Iterator[None]:
    """Be connected to the cluster that a run's facts name, for the length of a block.

    A process that is connected to that cluster already stays so; RAY_ADDRESS stands in for an address that
    does not answer, if it leads to the same cluster: another one knows other jobs by the same numbers.
    Nothing is shipped to the cluster.

    Raises:
        Unreachable: in one line, when the run used no cluster, or it has ended or refuses this process.
    """
    if not facts.get("address"):
        raise Unreachable("the run uses no Ray cluster")
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if here != facts["address"]:
            raise Unreachable(f"this process is connected to another cluster ({here})")
        _check_session(facts)
        yield
        return
    address = _answering(facts)
    _take_token(facts)
    try:
        ray.init(
            address=address, namespace=facts["namespace"], log_to_driver=False, logging_level=logging.ERROR,
            configure_logging=False,
        )  # fmt: skip
    except Exception as error:
        ray.shutdown()
        raise Unreachable(
            f"the cluster at {address} refuses: {' '.join(str(error).split())[:200]}"
        ) from error
    try:
        _check_session(facts)
        yield
    finally:
        ray.shutdown()


def _check_session(facts: Mapping[str, Any]) -> None:
    """Raise Unreachable unless this process is connected to the very session of Ray that a run was in."""
    here = identity.cluster_facts()
    if not facts.get("session") or here.get("session") != facts["session"]:
        raise Unreachable(
            f"another cluster answers at {here.get('address')}: the run's has ended (its session was "
            f"{facts.get('session')})"
        )


def _answering(facts: Mapping[str, Any]) -> str:
    named = os.environ.get("RAY_ADDRESS", "")
    candidates = [facts["address"], *([named] if ":" in named and "://" not in named else [])]
    for address in candidates:
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
            return str(address)
    kind = "private cluster" if facts.get("private_root") else "cluster"
    raise Unreachable(
        f"the run's {kind} at {facts['address']} does not answer: it has ended, or cannot be reached from "
        f"{socket.gethostname()}"
    )


def _take_token(facts: Mapping[str, Any]) -> None:
    """Turn token authentication on if the run's cluster has it; Ray finds the token itself."""
    if facts.get("auth_mode") == "token" and "RAY_AUTH_MODE" not in os.environ:
        import ray._raylet as raylet

        os.environ["RAY_AUTH_MODE"] = "token"
        # Ray has read its environment when it was imported.
        getattr(raylet, "Config").initialize("")  # noqa: B009 - its stub does not know it


def actor_table() -> list[dict[str, Any]]:
    """Return the records of all actors that the cluster remembers; needs no dashboard."""
    import ray._private.state as state

    return list(state.actors().values())


def node_names() -> dict[str, str]:
    """Return the nodes' names by Ray's id: the machine's, and the beginning of the id."""
    return {node["NodeID"]: node_name(node["NodeManagerHostname"], node["NodeID"]) for node in ray.nodes()}


def node_name(host: str, node: str) -> str:
    """Return how a node is called in tables and messages."""
    return f"{host}/{node[:6]}"


def this_node() -> str:
    """Return the name of the node that this process runs on; the machine's alone without Ray."""
    host = socket.gethostname()
    return node_name(host, ray.get_runtime_context().get_node_id()) if ray.is_initialized() else host


def on_nodes(
    calls: Mapping[str, tuple[str, Callable[..., Any], tuple[Any, ...]]], timeout: float, what: str
) -> dict[str, Any]:
    """Call functions of `node_tasks` on nodes by id; a call that fails returns its exception instead.

    The functions travel by value: the nodes need not have this project.
    """
    ray.cloudpickle.register_pickle_by_value(node_tasks)
    try:
        refs = {
            name: ray.remote(num_cpus=0, max_retries=0)(call)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(*arguments)
            for name, (node, call, arguments) in calls.items()
        }
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_tasks)
    answers: dict[str, Any] = {}
    for name, ref in refs.items():
        try:
            answers[name] = get(ref, timeout=timeout, what=f"{what} of {name}")
        except Exception as error:
            answers[name] = error
    return answers
