"""Nodes that are separate machines to one another: `ray start` processes, each in a network namespace."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from node_parts import until

from cluster.connect import ROOT

BIN = Path(sys.executable).parent
PORT = 6379


def why_not() -> str:
    """Why this process cannot make network namespaces; empty if it can."""
    if shutil.which("ip") is None:
        return "needs the ip command (iproute2)"
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"needs to make network namespaces: {made.stderr.strip()}"
    ip("netns", "delete", name)
    return ""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Machine:
    """A network namespace with one address on the common bridge, and what runs in it."""

    def __init__(self, name: str, bridge: str, address: str, token: str) -> None:
        self.name, self.address, self.wire = name, address, f"w{name}"
        self.files = tempfile.mkdtemp(prefix="ray-")
        self.environment = environment(token)
        ip("netns", "add", name)
        ip("link", "add", self.wire, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", self.wire, "master", bridge, "up")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", name, "link", "set", device, "up")

    def start(self, *command: str, **options) -> subprocess.Popen:
        """Start a command in the namespace."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], env=self.environment, **options)

    def join(self, head: str, cpus: int, gpus: int) -> None:
        """`ray start`: as the head if `head` is this machine's address."""
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        flags = role if head == self.address else [f"--address={head}:{PORT}"]
        self.ray = self.start(
            str(BIN / "ray"), "start", "--block", *flags, f"--node-ip-address={self.address}",
            f"--temp-dir={self.files}",
            f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--object-store-memory=150000000",
            "--disable-usage-stats", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Everything that runs here."""
        listed = subprocess.check_output(["ip", "netns", "pids", self.name], text=True)
        found = []
        for pid in listed.split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def actors(self) -> set[str]:
        """The classes of the actors that run here, by their processes' titles."""
        titles = set()
        for process in self.processes():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if command and command[0].startswith("ray::"):
                titles.add(command[0].removeprefix("ray::").split(".")[0].split(":")[0].strip())
        return titles

    def kill(self) -> None:
        """Lose everything that runs here at once."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue

    def unplug(self) -> None:
        """Cut the wire: packets vanish, and nobody is told."""
        ip("link", "set", self.wire, "down")

    def remove(self) -> None:
        """End what is left and give the namespace back."""
        self.kill()
        until(lambda: not self.processes(), 30, f"the end of {self.name}")
        ip("netns", "delete", self.name)
        shutil.rmtree(self.files, ignore_errors=True)


def environment(token: str) -> dict[str, str]:
    """What each machine's processes get."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    told = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PATH": os.pathsep.join([str(BIN), kept["PATH"]]),
    }  # fmt: skip
    return kept | told


@contextmanager
def machines(workers: int):
    """Ray, with a token, on a head without GPUs and `workers` machines of 2 CPUs and a logical GPU each."""
    stem, token = f"c{os.getpid() % 100000}", secrets.token_hex(16)
    bridge, subnet = f"b{stem}", f"10.{77 + os.getpid() % 100}.0"
    made = []
    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("link", "set", bridge, "up")
        for index in range(workers + 1):
            made.append(Machine(f"{stem}n{index}", bridge, f"{subnet}.{index + 1}", token))
        head = made[0]
        for machine in made:
            machine.join(head.address, cpus=2, gpus=0 if machine is head else 1)
            if machine is head:
                until(lambda: answers(head), 60, "the head")
        head.environment["RAY_ADDRESS"] = f"{head.address}:{PORT}"
        until(lambda: all_joined(made), 240, "all nodes")
        yield made
    finally:
        for machine in reversed(made):
            machine.remove()
        ip("link", "delete", bridge)


def all_joined(made: list[Machine]) -> bool:
    """Whether every machine is a node; one whose `ray start` gave up on a busy machine tries again."""
    head, *others = made
    for machine in others:
        if machine.ray.poll() is not None:
            machine.join(head.address, cpus=2, gpus=1)
    return nodes(head) == len(made)


def answers(head: Machine) -> bool:
    """Whether the control service listens."""
    code = f"import socket; socket.create_connection(('{head.address}', {PORT}), 2)"
    return head.start(sys.executable, "-c", code, stderr=subprocess.DEVNULL).wait() == 0


def nodes(head: Machine) -> int:
    """How many nodes the cluster has."""
    code = (
        "import json, ray; ray.init(log_to_driver=False, logging_level='ERROR'); "
        "print(json.dumps([node['Alive'] for node in ray.nodes()]))"
    )
    told = head.start(sys.executable, "-c", code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    lines = told.communicate(timeout=120)[0].decode().strip().splitlines()
    return sum(json.loads(lines[-1])) if lines else 0
