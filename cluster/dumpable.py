"""Letting a process be asked for its stacks by a signal, where py-spy may not attach to it."""

import contextlib
import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

import ray

_files: list[Any] = []
"""Files that the handler writes to; they must stay open."""


def dumpable() -> None:
    """Have SIGUSR2 write the stacks of all threads beside Ray's logs, whatever the process is busy with.

    Nothing runs in Python for it: a thread that hangs in native code, or holds the interpreter, is shown too.
    Does nothing outside Ray, and at a second call.
    """
    if _files or not ray.is_initialized():
        return
    # A process that cannot be asked for its stacks works as well as any other.
    with contextlib.suppress(Exception):
        import ray._private.worker as worker

        node: Any = worker._global_node
        path = Path(node.get_logs_dir_path()) / f"stacks-{os.getpid()}.txt"
        _files.append(path.open("w", encoding="utf-8"))
        faulthandler.register(signal.SIGUSR2, file=_files[0], all_threads=True)
