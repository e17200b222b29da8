"""A process that has imported what Ray's workers need, and forks one whenever a worker asks for it.

    python fork_source.py SOCKET

The process that Ray started stands in for its fork: it ends when the fork does, and the fork when it does.
"""

import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

LIBRARIES = (
    "numpy", "scipy.optimize", "scipy.stats", "PIL.Image", "pydantic", "yaml", "safetensors.torch", "torch",
    "torch.distributed", "diffusers", "diffusers.models.unets.unet_2d", "diffusers.models.modeling_utils",
    "diffusers.guiders", "diffusers.pipelines.pipeline_utils", "diffusers.schedulers.scheduling_ddim",
    "diffusers.training_utils", "peft", "transformers.modeling_utils",
)  # fmt: skip
"""None of them starts a thread or reads Ray's environment when it is imported."""
SURROUNDINGS = ("ns/mnt", "ns/net", "ns/pid", "ns/user", "root")
MOST = 1 << 20
"""Bytes of a request."""


def surroundings() -> list[str]:
    """Return what a fork would not have from who asks for it: namespaces, root and virtual environment."""
    return [os.readlink(f"/proc/self/{name}") for name in SURROUNDINGS] + [sys.prefix]


def stand_in(path: str) -> None:
    """Ask for a fork that goes on as this process, and end as it ends; return where none is to be had."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MOST)
    request = {
        "argv": sys.orig_argv, "path": sys.path, "environment": dict(os.environ), "cwd": os.getcwd(),
        "nice": os.nice(0), "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "surroundings": surroundings(),
    }  # fmt: skip
    try:
        channel.connect(path)
        socket.send_fds(channel, [json.dumps(request).encode()], [0, 1, 2])
        answer = channel.recv(64)
    except OSError:
        return
    if answer != b"forked":
        return
    status = channel.recv(64)
    code = int(status) if status else 1
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


class ForkSource:
    """The process that is forked; single-threaded."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(64)
        self.waiting = selectors.DefaultSelector()
        self.waiting.register(self.listener, selectors.EVENT_READ)
        self.forks: set[int] = set()
        self.ready = False

    def serve(self) -> dict[str, Any]:
        """Fork for whoever asks, for ever; returns only in a fork, with what it is to be."""
        while True:
            for key, _ in self.waiting.select():
                if key.fileobj is self.listener:
                    request = self._forked(self.listener.accept()[0])
                    if request is not None:
                        return request
                else:
                    self._ended(*key.data)

    def _forked(self, channel: socket.socket) -> dict[str, Any] | None:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * MOST)
        message, files, _, _ = socket.recv_fds(channel, MOST, 3)
        try:
            request: dict[str, Any] = json.loads(message)
            if request["surroundings"] != surroundings() or len(files) != 3:
                channel.close()
                return None
            self._import()
            pid = os.fork()
            if pid == 0:
                self._become(request, files, channel)
                return request
            self._watch(pid, channel)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"no fork: {error}\n")
            channel.close()
        finally:
            for file in files:
                with suppress(OSError):
                    os.close(file)
        return None

    def _import(self) -> None:
        """Import the libraries when the first worker asks, so that tests without any do not pay for it."""
        if not self.ready:
            for name in LIBRARIES:
                importlib.import_module(name)
            gc.collect()
            gc.freeze()  # a collection in a fork would copy the pages of all that it shares with the others
            self.ready = True

    def _watch(self, pid: int, channel: socket.socket) -> None:
        self.forks.add(pid)
        process = os.pidfd_open(pid)
        self.waiting.register(process, selectors.EVENT_READ, (pid, process, channel))
        self.waiting.register(channel, selectors.EVENT_READ, (pid, process, channel))
        with suppress(OSError):
            channel.send(b"forked")

    def _ended(self, pid: int, process: int, channel: socket.socket) -> None:
        """Part with a fork that has ended, or whose stand-in has: then it is killed."""
        if pid not in self.forks:  # both have ended since the last look, and one has been seen
            return
        self.forks.remove(pid)
        with suppress(ProcessLookupError):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found == 0:
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
            with suppress(OSError):
                channel.send(str(os.waitstatus_to_exitcode(status)).encode())
        for one in (process, channel):
            self.waiting.unregister(one)
        os.close(process)
        channel.close()

    def _become(self, request: dict[str, Any], files: list[int], channel: socket.socket) -> None:
        """Take on, in a fork, all that a process has from who starts it."""
        for key in list(self.waiting.get_map().values()):
            os.close(key.fileobj) if isinstance(key.fileobj, int) else key.fileobj.close()
        self.waiting.close()
        channel.close()
        os.setsid()
        for target, file in enumerate(files):
            os.dup2(file, target)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        os.nice(request["nice"] - os.nice(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, request["files"])


def go_on_as(request: dict[str, Any]) -> None:
    """Run the program that the fork was asked to be."""
    import numpy as np

    np.random.seed(None)  # noqa: NPY002 - a fork would go on with the source's state
    script = request["argv"][1]
    sys.orig_argv, sys.argv = request["argv"], request["argv"][1:]
    sys.path[:] = [os.path.dirname(script), *request["path"]]
    sys.path_importer_cache.clear()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    go_on_as(ForkSource(sys.argv[1]).serve())
