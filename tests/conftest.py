"""Fixtures that own Ray: one warm single-node cluster for the session, and a fake one of several nodes."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
RAY_FILES = tempfile.mkdtemp(prefix="ray-")  # pytest's own directories are too long for Ray's unix sockets
FORKED = ROOT / "tests" / "forked"
IMPORTABLE = (str(ROOT), str(ROOT / "tests"), str(FORKED), os.environ.get("PYTHONPATH"))

# The hundreds of processes that tests start read the project's modules compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Ray reads its environment when it is first imported, and only fixtures import it.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(
    RAY_TMPDIR=RAY_FILES,
    PYTHONPATH=os.pathsep.join(filter(None, IMPORTABLE)),
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_AUTO_CONNECT="0",  # merely asking Ray something must not start a cluster
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # a process for every training, for what no test does
    RAY_prestart_worker_first_driver="0",  # a process for every CPU, each some seconds of work
    RAY_worker_niceness="0",  # a worker at 15 starves beside the processes of three modules of tests
    RAY_worker_register_timeout_seconds="300",  # machines that run tests may be slow
    RAY_USAGE_STATS_ENABLED="0",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)

NAMESPACE = "test"
LONGEST = (
    "test_serve_path", "test_submit", "test_tune_path", "test_strategies", "test_text_path",
    "test_training_ray", "test_jobs", "test_panel_actors", "test_panel_replicas", "test_verbs", "test_doctor",
    "test_vla_path", "test_notebook", "test_placement", "test_job_lines", "test_rollout", "test_rollouts",
    "test_sampler", "test_plan", "test_footprint", "test_mistakes", "test_timeline", "test_telemetry",
    "test_evaluation_workers", "test_collect", "test_hosted_group",
)  # fmt: skip
"""Modules that take more than some ten seconds, longest first."""
FAKE_NODES = ({"num_cpus": 2, "num_gpus": 2}, {"num_cpus": 2, "num_gpus": 1})


@dataclass(frozen=True)
class RayCluster:
    """A running Ray cluster; tests start no other in this process."""

    address: str
    """`host:port`, for the RAY_ADDRESS of a subprocess."""
    namespace: str
    cluster: Any
    """The `ray.cluster_utils.Cluster`, with `add_node` and `remove_node`."""
    nodes: tuple[Any, ...] = ()
    """The nodes beside the head, in the order that they were added."""


def pytest_configure(config: pytest.Config) -> None:
    """Start, once for all of the session's processes, what Ray's workers are forked from."""
    if "COUNTERPOINT_FORKS" not in os.environ:
        path = os.path.join(RAY_FILES, "forks")
        process = subprocess.Popen(
            [sys.executable, str(FORKED / "fork_source.py"), path], start_new_session=True
        )
        config.add_cleanup(process.kill)
        os.environ["COUNTERPOINT_FORKS"] = path


def pytest_unconfigure() -> None:
    shutil.rmtree(RAY_FILES, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests without a GPU; begin with the longest modules, so that parallel workers end together."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def threads() -> None:
    """One torch thread, as each Ray worker has, so that sums do not depend on the machine."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """The session's Ray: one node of 4 logical CPUs, namespace "test", no dashboard."""
    with _running(num_cpus=4) as cluster:
        _attach(cluster.address)
        yield RayCluster(cluster.address, NAMESPACE, cluster)
        _detach()


@pytest.fixture(scope="module")
def fake_cluster(ray_cluster: RayCluster, request: pytest.FixtureRequest) -> Iterator[RayCluster]:
    """A head of 2 CPUs and two nodes with fake GPUs (2 and 1), labelled `rack: 0` and `rack: 1`.

    A module that needs other nodes beside the head names them in `NODES`.

    The process's connection moves here for a module and then back: actors that earlier modules left are gone.
    """
    _detach()
    shapes = getattr(request.module, "NODES", FAKE_NODES)
    with _running(num_cpus=2) as cluster:
        nodes = tuple(
            cluster.add_node(**shape, labels={"rack": str(rack)}, include_log_monitor=False)
            for rack, shape in enumerate(shapes)
        )
        cluster.wait_for_nodes()
        _attach(cluster.address)
        yield RayCluster(cluster.address, NAMESPACE, cluster, nodes)
        _detach()
    _attach(ray_cluster.address)


@contextmanager
def _running(num_cpus: int) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`: unlike `ray.init`'s own, it outlives this process's connection to it.

    A raylet whose agents take more than some 15 s to start ends itself, so a loaded machine has three tries.
    """
    from ray.cluster_utils import Cluster

    for tries_left in (2, 1, 0):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=num_cpus, include_dashboard=False, include_log_monitor=False)
            break
        except Exception:
            cluster.shutdown()
            if not tries_left:
                raise
    try:
        yield cluster
    finally:
        cluster.shutdown()


def _attach(address: str) -> None:
    import ray

    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="WARNING")


def _detach() -> None:
    import ray

    ray.shutdown()


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> str:
    """The folder `name`, which `make` has filled in one of the processes that share out this session's tests.

    Tests only read there, or copy it.
    """
    root = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    run = root / f"tiny-{name}" / "run"
    run.parent.mkdir(exist_ok=True)
    with FileLock(run.parent / "lock"):
        whole = run.parent / "whole"
        if not whole.exists():
            shutil.rmtree(run, ignore_errors=True)
            make(run)
            whole.touch()
    return str(run)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage URI of a finished teacher's run, trained for a few steps."""
    from tiny_jobs import train_config

    from jobs import train

    return _made_once(tmp_path_factory, "teacher", lambda run: train.main(train_config(run)))


@pytest.fixture(scope="session")
def tiny_run(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage URI of a finished student's run, through all three stages in a few steps."""
    from tiny_jobs import distill_config

    from jobs import distill

    return _made_once(
        tmp_path_factory, "student", lambda run: distill.main(distill_config(run, tiny_teacher))
    )


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage URI of a finished policy's run, trained for a few steps on a few demonstrations."""
    from tiny_policies import policy_config

    from jobs import train_policy

    return _made_once(
        tmp_path_factory, "policy", lambda run: train_policy.main(policy_config(run, run.parent / "demos"))
    )
