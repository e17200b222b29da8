"""The verbs that look at a run from another process, on one that hangs and is then killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tiny_jobs import UNET

from cluster import identity
from cluster.checkpoint_names import FOLDER
from cluster.checkpoints import MANIFEST
from cluster.leftovers import is_session_root, session_processes
from cluster.node_tasks import _told
from cluster.storage import RunStore
from jobs import logs, reap, stacks, status
from jobs.run_state import newest_checkpoint
from jobs.watched import bare

pytestmark = pytest.mark.timeout(900)
HERE = Path(__file__).parent
ENV = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
CONFIG = {
    "teacher.steps": 12, "teacher.batch_size": 16, "trainer.workers": 1, "trainer.threads": 1,
    "trainer.checkpoint_every": 2, "unet.block_out_channels": UNET["block_out_channels"],
    "unet.norm_num_groups": UNET["norm_num_groups"],
}  # fmt: skip


@pytest.fixture(scope="module")
def stuck_run():
    """A run whose only rank hangs before step 3; its driver is a process with a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        run = f"{folder}/run"
        told = Path(folder) / "told"
        options = [f"{key}={json.dumps(value)}" for key, value in CONFIG.items()]
        with told.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "slow_run.py"), f"run={run}", *options],
                env=ENV, stdout=file, stderr=file,
            )  # fmt: skip
        try:
            store = RunStore(run)
            deadline = time.monotonic() + 600
            while not (store.exists("placement.json") and newest_checkpoint(store).step == 2):
                assert process.poll() is None, told.read_text()
                assert time.monotonic() < deadline, told.read_text()
                time.sleep(0.2)
            yield store, process, told
        finally:
            process.kill()
            process.wait()


def test_a_run_is_seen_from_elsewhere_until_it_is_killed_and_reaped(stuck_run, capsys):
    store, process, told = stuck_run
    facts = identity.known_facts(store)
    looked = subprocess.run(
        [sys.executable, str(HERE / "look_at_run.py"), store.uri],
        env=ENV, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert looked.returncode == 0, looked.stderr
    seen = json.loads(looked.stdout.splitlines()[-1])

    assert seen["loaded"] == []  # who only looks waits for none of what trains
    rows = {f"{row['role']}-{row['rank']}": row for row in seen["status"]["rows"]}
    assert seen["status"]["state"] == "running"
    assert seen["status"]["checkpoint"] == 2
    assert seen["status"]["total"] == 12
    assert {name: row["state"] for name, row in rows.items()} == {
        "driver-0": "running", "trainer-0": "running", "conductor-0": "running",
    }  # fmt: skip
    assert rows["driver-0"]["pid"] == process.pid
    assert rows["trainer-0"]["version"] == 2
    assert "ERROR this rank hangs" in looked.stderr
    assert seen["logs"]["with_errors"] == ["trainer-0 err"]
    assert "stop_in_the_middle" in seen["stacks"]["doing"]["trainer-0"]
    assert process.poll() is None
    assert "what runs where" in told.read_text()

    with pytest.raises(ValueError, match="may be alive"):
        reap.main(reap.ReapConfig(run=store.uri, yes=True))
    root = facts["private_root"]
    # What has ended since it was found has no start any more.
    ours = {one.pid: start for one in session_processes(root) if (start := identity.started(one.pid))}
    assert rows["trainer-0"]["pid"] in ours
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.fs.touch(store.path(".results.json.tmp-12"))
    assert status.main(status.StatusConfig(run=store.uri))["state"] == "crashed"

    listed = reap.main(reap.ReapConfig(run=store.uri))
    assert listed["removed"] == []
    assert Path(root).exists()
    done = reap.main(reap.ReapConfig(run=store.uri, yes=True))
    assert done["removed"] == done["found"]
    assert done["failed"] == []
    assert {line.partition(":")[0] for line in done["found"]} >= {"private Ray cluster", "half-written file"}
    assert not Path(root).exists()
    assert session_processes(root) == []
    assert [pid for pid, start in ours.items() if identity.started(pid) == start] == []
    assert newest_checkpoint(store, verify=True).step == 2
    assert reap.main(reap.ReapConfig(run=store.uri))["found"] == []
    assert "are gone" in logs.main(logs.LogsConfig(run=store.uri))["from"]
    assert stacks.main(stacks.StacksConfig(run=store.uri))["doing"] == {}


def test_a_checkpoint_that_is_not_whole_is_told(tiny_teacher, tmp_path):
    source, store = RunStore(tiny_teacher), RunStore(str(tmp_path))
    for name in source.list(FOLDER):
        store.write_bytes(name, source.read_bytes(name))
    whole = newest_checkpoint(store, verify=True)
    assert (whole.step, whole.skipped) == (12, ())
    name = next(name for name in store.list(f"{FOLDER}/step-00000012") if MANIFEST not in name)
    content = store.read_bytes(name)
    store.write_bytes(name, content[:-1] + bytes([content[-1] ^ 1]))
    assert newest_checkpoint(store).step == 12
    assert newest_checkpoint(store, verify=True).step != 12
    store.write_bytes(name, content[:-1])
    damaged = newest_checkpoint(store)
    assert damaged.step != 12
    assert "instead of" in damaged.skipped[0]


def test_bare_words_are_the_run_and_the_role():
    assert bare(["runs/x", "critics", "--errors"], "run", "role") == [
        "run=runs/x",
        "role=critics",
        "--errors",
    ]
    assert bare(["--yes", "runs/x"], "run") == ["--yes", "run=runs/x"]


def test_only_a_session_of_ray_is_ever_deleted(tmp_path):
    assert not is_session_root("")
    assert not is_session_root(str(tmp_path))
    root = tmp_path / "ray-x"
    (root / "session_1").mkdir(parents=True)
    assert is_session_root(str(root))


def test_only_processes_of_the_very_cluster_are_found(tmp_path):
    root = tmp_path / "ray-x"
    folder = root / "session_1/logs"
    folder.mkdir(parents=True)
    (tmp_path / "ray-xy").mkdir()
    wait = "import time; time.sleep(100)"
    with (folder / "raylet.out").open("w") as log, (tmp_path / "ray-xy/err").open("w") as near:
        processes = [
            subprocess.Popen([sys.executable, "-c", wait], stderr=log),
            subprocess.Popen([sys.executable, "-c", wait], stderr=near),
            subprocess.Popen(["tail", "-f", str(folder / "raylet.out")], stdout=subprocess.DEVNULL),
            subprocess.Popen([sys.executable, "-c", wait, f"--session-dir={root}/session_1", "gcs_server"]),
        ]
    try:
        begun = identity.started(processes[0].pid)
        assert [one.pid for one in session_processes(str(root), begun)] == [processes[0].pid]
        # What is older than the driver was not started by it, whatever it writes to.
        assert session_processes(str(root), begun + 60.0) == []
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_what_a_thread_does_is_told_by_its_innermost_frame_of_ours():
    wait = [["Condition.wait", "/lib/threading.py", 320], ["submit", "/p/actors/assembly.py", 40]]
    told = stacks.doing({"name": "a", "active": False, "frames": wait})
    assert told == "waiting in submit (actors/assembly.py:40)"
    busy = [["linear", "/lib/torch.py", 1], ["judge", "/p/counterpoint/group.py", 9]]
    told = stacks.doing({"name": "a", "active": True, "frames": busy})
    assert told == "computing in judge (counterpoint/group.py:9)"
    idle = {"name": "a", "active": False, "frames": [["main_loop", "/lib/worker.py", 1]]}
    assert stacks.doing(idle) is None
    assert stacks.summary({"how": "py-spy", "threads": [idle]}) == "idle, waits to be called"
    assert stacks.summary({"error": "no permission"}) == "no stacks: no permission"


def test_a_process_that_py_spy_may_not_read_answers_a_signal(tmp_path):
    script = f"""
import faulthandler, signal, threading, time
file = open({str(tmp_path)!r} + "/stacks-" + str(__import__("os").getpid()) + ".txt", "w")
faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
def deep():
    print("ready", flush=True)
    time.sleep(100)
deep()
"""
    from cluster.node_tasks import _signalled

    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        answer = _signalled(process.pid, str(tmp_path), 20.0, "py-spy: no")
        assert answer["how"] == "signal"
        assert answer["threads"][0]["frames"][0][0] == "deep"
        assert process.poll() is None
        refused = _signalled(os.getpid(), str(tmp_path), 1.0, "py-spy: no")
        assert "answers no signal" in refused["error"]
    finally:
        process.kill()
        process.wait()
    assert _told("") == []
