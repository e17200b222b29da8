"""What is done on a node for somebody who looks from elsewhere; sent by value, it needs nothing of ours."""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any


def log_tails(folder: str, pids: list[int], size: int, others: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the last `size` bytes of the logs of processes, and of other files, by name.

    Args:
        folder: the directory of Ray's logs on this node; "" finds it, in a worker of Ray.
        pids: process ids of workers.
        size: bytes of each.
        others: further patterns of names in the folder.
    """
    folder = folder or _logs_here()
    patterns = [f"worker-*-{pid}.{end}" for pid in pids for end in ("out", "err")]
    tails = {}
    for pattern in (*patterns, *others):
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern))):
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - size))
                tails[os.path.basename(path)] = file.read().decode(errors="replace")
    return tails


def dump_stacks(pid: int, files: str = "", limit_s: float = 10.0) -> dict[str, Any]:
    """Return the stacks of a process: from py-spy, else from the handler that it registered (see `dumpable`).

    The result has `how` and `threads` (each with name, active and frames of name, file and line, innermost
    first), or `error`. The process is held up for milliseconds. `files` is where such handlers write; ""
    finds it, in a worker of Ray.
    """
    spy = shutil.which(
        "py-spy", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    )
    why = "py-spy is not installed"
    if spy:
        try:
            told = subprocess.run(
                [spy, "dump", "--json", "--pid", str(pid)], capture_output=True, text=True, timeout=limit_s
            )
            if told.returncode == 0:
                return {"how": "py-spy", "threads": _spied(json.loads(told.stdout))}
            why = "py-spy: " + " ".join(told.stderr.split())[:200]
        except (subprocess.TimeoutExpired, ValueError) as error:
            why = f"py-spy: {error}"
    return _signalled(pid, files, limit_s, why)


def _spied(threads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": thread.get("thread_name") or str(thread.get("os_thread_id")),
            "active": bool(thread.get("active")),
            "frames": [[f["name"], f["filename"], f["line"]] for f in thread["frames"]],
        }
        for thread in threads
    ]


def _signalled(pid: int, files: str, limit_s: float, why: str) -> dict[str, Any]:
    path = os.path.join(files or _logs_here(), f"stacks-{pid}.txt")
    # Without the handler the signal would end the process.
    if not os.path.exists(path) or not _catches(pid, signal.SIGUSR2):
        return {"error": f"{why}; and the process answers no signal"}
    begin = os.path.getsize(path)
    os.kill(pid, signal.SIGUSR2)
    deadline, size, text = time.monotonic() + limit_s, -1, ""
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = os.path.getsize(path)
        if now > begin and now == size:
            break
        size = now
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        text = file.read()
    return {"how": "signal", "threads": _told(text)} if text else {"error": f"{why}; no answer to a signal"}


def _logs_here() -> str:
    import ray._private.worker as worker

    node: Any = worker._global_node
    return str(node.get_logs_dir_path())


def _catches(pid: int, number: int) -> bool:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            mask = next(line.split()[1] for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(mask, 16) >> (number - 1) & 1)


def _told(text: str) -> list[dict[str, Any]]:
    """The threads in what the standard library's `faulthandler` writes."""
    threads: list[dict[str, Any]] = []
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            threads.append(
                {"name": line.split()[-5 if "most recent" in line else -1], "active": False, "frames": []}
            )
        elif line.startswith('  File "') and threads:
            path, _, rest = line[8:].partition('", line ')
            number, _, name = rest.partition(" in ")
            threads[-1]["frames"].append([name, path, int(number) if number.isdigit() else 0])
    return threads
