"""A driver starts Ray or attaches to it, its workers find the packages, a wrong address ends at once."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import connect
from cluster.kinds import classify

ROOT = Path(connect.__file__).parent.parent
DRIVER = """
import json, logging, os, sys, ray
from cluster.connect import connected
from cluster import waiting

@ray.remote(num_cpus=1)
def where():
    import counterpoint.section
    return os.getcwd(), counterpoint.section.__file__

if __name__ == "__main__":
    try:
        with connected(num_cpus=2) as connection:
            cpus = ray.cluster_resources()["CPU"]
            told = waiting.get(where.remote(), 60, "a task")
        left = connection.started and os.path.exists(connection.logs)
        facts = [connection.started, connection.namespace, cpus, told[1], left, ray.is_initialized()]
        print(json.dumps(facts))
    except (ConnectionError, ValueError) as error:
        print(json.dumps(str(error)))
"""


def driver(cwd: Path, **env: str) -> list:
    """What a driver says that runs `DRIVER` in `cwd`, with the packages on its own path only."""
    script = cwd / "driver.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{DRIVER}")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_without_an_address_a_private_cluster_is_started_and_ended(tmp_path):
    started, namespace, cpus, module, left, connected = driver(tmp_path)
    assert (started, namespace, cpus) == (True, "counterpoint", 2.0)
    assert module == str(ROOT / "counterpoint" / "section.py")
    assert not left
    assert not connected


def test_with_an_address_the_running_cluster_is_used_and_gets_the_packages(ray_cluster, tmp_path):
    started, namespace, cpus, module, _, connected = driver(tmp_path, RAY_ADDRESS=ray_cluster.address)
    assert (started, namespace, cpus) == (False, "counterpoint", 4.0)
    assert Path(module).name == "section.py"
    assert not str(module).startswith(str(ROOT))
    assert not connected


def test_process_that_is_connected_keeps_its_connection(ray_cluster):
    import ray

    with connect.connected(num_cpus=1) as connection:
        assert (connection.started, connection.namespace) == (False, "test")
        assert connection.address == ray_cluster.address
    assert ray.is_initialized()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("127.0.0.1:{port}", ConnectionError, "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:{port}"),
        ("http://127.0.0.1:{port}", ValueError, "needs host:port"),
        ("ray://127.0.0.1:{port}", ValueError, "needs host:port"),
        ("localhost", ValueError, "RAY_ADDRESS=localhost"),
    ],
)
def test_wrong_address_is_named_at_once(monkeypatch, address, error, message):
    port = free_port()
    start = time.monotonic()
    with pytest.raises(error, match=message.format(port=port)) as caught:
        connect._knock(address.format(port=port))
    assert time.monotonic() - start < 2
    assert "\n" not in str(caught.value)


def test_refused_token_is_told_from_a_silent_cluster():
    silent = ConnectionError("Failed to connect")
    refused = ConnectionError("Failed to connect")
    refused.__cause__ = RuntimeError("ray.exceptions.AuthenticationError: InvalidAuthToken")
    assert "RAY_AUTH_MODE=token" in connect._why_not("h:1", refused)
    assert "RAY_AUTH_MODE" not in connect._why_not("h:1", silent)


def test_session_root_is_short_wherever_temporary_files_go(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    for where in (str(deep), str(tmp_path / "absent")):
        monkeypatch.setenv("RAY_TMPDIR", where)
        root = connect._session_root()
        assert root.is_dir()
        assert len(os.fsencode(root)) <= connect.LONGEST_SOCKET_ROOT
        root.rmdir()
    assert list(deep.iterdir()) == []


def test_thread_env_counts_for_every_library_and_lets_waiting_threads_sleep():
    env = connect.thread_env(3)
    assert {env[name] for name in env if name.endswith("_NUM_THREADS")} == {"3"}
    assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} < set(env)
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"
    with pytest.raises(ValueError, match="threads=0"):
        connect.thread_env(0)


LATE = Exception("The current node timed out during startup. This could happen because ...")


def starts(monkeypatch, *answers):
    """Let Ray's starts end one after the other as given."""
    left = list(answers)

    def start_once(options):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(connect, "_start_once", start_once)


def test_a_start_that_is_too_slow_is_tried_once_more(monkeypatch):
    starts(monkeypatch, LATE, "connected")
    assert connect._start({}) == "connected"
    starts(monkeypatch, LATE, LATE, "connected")
    with pytest.raises(TimeoutError, match="Ray did not start here, twice; the machine may be too") as caught:
        connect._start({})
    assert classify(caught.value) == "infrastructure"


def test_a_start_that_is_refused_is_not_tried_again(monkeypatch):
    starts(monkeypatch, ValueError("num_cpus=-1"), "connected")
    with pytest.raises(ValueError, match="num_cpus=-1"):
        connect._start({})
