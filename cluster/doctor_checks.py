"""From what nodes told to findings: pure functions on records, so that every verdict is tested on data."""

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.doctor_findings import Finding, fail, grouped, named, ok, warn
from cluster.doctor_network import Link
from cluster.doctor_probe import Machine
from cluster.doctor_storage import DRIVER, Sharing
from cluster.placement import NodeView

GIB = 2**30
OPEN_FILES = 8192
STORE_BYTES = 2**30
DISK_FREE = 5 * GIB
DISK_FULL = 0.95
"""Ray creates no more objects on a disk that is this full."""
DISK_NEARLY = 0.90
SKEW_WARN, SKEW_FAIL = 0.5, 30.0
SLOW_LINK = 0.1
"""GB/s below which gradients wait: less than a 1 Gb/s network."""
HEAD = "node:__internal_head__"
INSTALL = "install constraints.txt on every node, or start all from one image"


def nodes_answer(
    nodes: Sequence[NodeView], failures: Mapping[str, str], expected: int | None
) -> list[Finding]:
    """Whether there are as many nodes as were expected, and each ran a task."""
    findings = [
        fail("nodes", f"{name} ran no task: {why}", "look at its raylet.out, or restart it with `ray start`")
        for name, why in failures.items()
    ]
    if expected is not None and len(nodes) != expected:
        findings.append(
            fail(
                "nodes",
                f"{len(nodes)} are alive, {expected} expected: {named([n.name for n in nodes], 8)}",
                "look at the log of `ray start` on the missing ones: it must reach the head's port",
            )
        )
    if not findings:
        findings.append(ok("nodes", f"{len(nodes)} alive and answering: {named([n.name for n in nodes], 8)}"))
    return findings


def versions_agree(machines: Mapping[str, Machine]) -> list[Finding]:
    """Whether all run one Python, the same libraries and this project's same sources, the driver included.

    Builds of one release (`2.13.0+cpu` beside `2.13.0+cu130`) are told and let pass: a head often has no GPU.
    """
    findings = []
    pythons = {name: machine.python for name, machine in machines.items()}
    if len({version.rsplit(".", 1)[0] for version in pythons.values()}) > 1:
        findings.append(fail("versions", f"python is {grouped(pythons)}", "use one Python on every node"))
    elif len(set(pythons.values())) > 1:
        findings.append(warn("versions", f"python is {grouped(pythons)}", "use one patch release everywhere"))
    libraries = sorted({library for machine in machines.values() for library in machine.versions})
    for library in libraries:
        found = {name: machine.versions.get(library) or "missing" for name, machine in machines.items()}
        if len({_release(version) for version in found.values()}) > 1:
            findings.append(fail("versions", f"{library} is {grouped(found)}", INSTALL))
        elif len(set(found.values())) > 1:
            findings.append(
                warn(
                    "versions",
                    f"builds of {library} differ: {grouped(found)}",
                    "fine if the head has no GPU",
                )
            )
    for part in ("cuda", "nccl"):
        tools = {name: m.toolkit[part] for name, m in machines.items() if m.toolkit.get(part)}
        if len(set(tools.values())) > 1:
            findings.append(fail("versions", f"{part} of torch is {grouped(tools)}", INSTALL))
    sources = {name: machine.project for name, machine in machines.items()}
    if "absent" in sources.values() or len(set(sources.values())) > 1:
        findings.append(
            fail(
                "project",
                f"its sources differ: {grouped(sources)}",
                "remove older copies from the nodes, or submit with --working-dir",
            )
        )
    if not findings:
        first = next(iter(machines.values()))
        told = ", ".join(
            f"{name} {first.versions[name]}" for name in ("ray", "torch") if name in first.versions
        )
        known = f"{len(libraries)} libraries and the project's sources ({first.project})"
        findings.append(ok("versions", f"equal everywhere: python {first.python}, {told}, {known}"))
    return findings


def _release(version: str) -> str:
    return version.partition("+")[0]


def storage_shared(sharing: Sharing) -> list[Finding]:
    """Whether everyone wrote to the storage and read what the others wrote."""
    subject, uri = "storage", sharing.uri
    findings = [
        fail(subject, f"{name} cannot use {uri}: {why}", "give each node write access to it and credentials")
        for name, why in sharing.refusals.items()
    ]
    findings += [
        fail(subject, f"{name} got no answer from {uri}: {why}", "look at its mount or its network")
        for name, why in sharing.silent.items()
    ]
    findings += [
        fail(subject, found, "use a path that is mounted on every node, or s3://")
        for found in _who_is_apart(sharing)
    ]
    if not findings:
        slowest = f"write, append and replace in at most {sharing.write_seconds * 1e3:.0f} ms"
        findings.append(ok(subject, f"{uri}: all {sharing.asked} write there and read each other; {slowest}"))
    return findings


def _who_is_apart(sharing: Sharing) -> list[str]:
    """Pairs of (reader, writer) that do not see each other, told by as few nodes as have all pairs."""
    pairs = {(reader, name): why for reader, told in sharing.unseen.items() for name, why in told.items()}
    lines = []
    while pairs:
        counts = Counter(name for pair in pairs for name in pair)
        apart = max(counts, key=lambda name: (counts[name], name != DRIVER))
        its = {pair: why for pair, why in pairs.items() if apart in pair}
        (reader, writer), why = max(its.items(), key=lambda item: item[0][0] == apart)
        more = f" (one of {len(its)} such pairs with {apart})" if len(its) > 1 else ""
        lines.append(f"{reader} cannot see what {writer} wrote to {sharing.uri}: {why}{more}")
        pairs = {pair: why for pair, why in pairs.items() if pair not in its}
    return lines


def gpus_seen(nodes: Sequence[NodeView], machines: Mapping[str, Machine]) -> list[Finding]:
    """Whether Ray, torch and the driver's tool count the same GPUs on each node."""
    findings, fine = [], []
    for node in nodes:
        machine = machines.get(node.name)
        if machine is None:
            continue
        ray, tool, torch = int(node.total.get("GPU", 0)), len(machine.gpus), machine.torch_devices or 0
        said = f"{node.name}: Ray counts {ray} GPUs, torch {torch}, nvidia-smi {tool}"
        said += f" ({machine.trouble})" if machine.trouble else ""
        if ray > torch:
            remedy = "install a CUDA build of torch and the driver there, or start Ray with --num-gpus less"
            findings.append(fail("gpus", said, remedy))
        elif torch > ray or tool > ray:
            findings.append(
                warn("gpus", said, "start Ray there with --num-gpus, or leave them idle on purpose")
            )
        elif ray:
            memory = min(gpu.memory_mib for gpu in machine.gpus) / 1024 if machine.gpus else 0.0
            free = min(gpu.free_mib for gpu in machine.gpus) / 1024 if machine.gpus else 0.0
            kinds = named(sorted({gpu.name for gpu in machine.gpus}))
            fine.append(ok("gpus", f"{node.name}: {ray} of {kinds}, {memory:.0f} GiB each, {free:.0f} free"))
    if not findings and not fine:
        return [ok("gpus", "none, and Ray counts none")]
    return findings + fine


def links_carry(links: Sequence[Link], nodes: int, all_pairs: bool) -> list[Finding]:
    """What pairs of nodes measured with one backend: failures by name, slow pairs, and the spread."""
    if not links:
        return []
    backend = links[0].backend
    findings = [
        fail(
            backend,
            f"{link.pair[0]} and {link.pair[1]} cannot reduce together: {link.trouble}",
            f"set {backend.upper()}_SOCKET_IFNAME to the interface of their addresses, open all ports "
            "between nodes",
        )
        for link in links
        if link.trouble
    ]
    good = sorted((link for link in links if not link.trouble), key=lambda link: link.gigabytes_per_second)
    if not good:
        return findings
    middle = good[len(good) // 2].gigabytes_per_second
    for link in good:
        speed = link.gigabytes_per_second
        if speed < SLOW_LINK or (len(good) > 2 and speed < middle / 4):
            found = f"{link.pair[0]} and {link.pair[1]}: {speed:.3g} GB/s, the median pair has {middle:.3g}"
            findings.append(
                warn(backend, found, "look for a slower network between them, or keep them apart")
            )
    which = "all" if all_pairs else f"a ring and random matchings of {nodes} nodes,"
    slowest, fastest = good[0].gigabytes_per_second, good[-1].gigabytes_per_second
    latencies = sorted(link.latency_ms for link in good)
    found = (
        f"{which} {len(good)} pairs: {slowest:.3g} to {fastest:.3g} GB/s, "
        f"latency {latencies[0]:.2g} to {latencies[-1]:.2g} ms"
    )
    return [*findings, ok(backend, found)]


def clocks_agree(skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Clocks against the driver's: (seconds ahead, uncertainty in seconds) by node."""
    findings = []
    for name, (ahead, unsure) in skews.items():
        certain = max(0.0, abs(ahead) - unsure)
        found = f"{name} is {abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} the driver"
        if certain > SKEW_FAIL:
            findings.append(
                fail("clock", found, "start chrony or ntpd: signed requests to storage will fail")
            )
        elif certain > SKEW_WARN:
            findings.append(warn("clock", found, "start chrony or ntpd: times in logs and metrics disagree"))
    if not findings and skews:
        worst = max(max(0.0, abs(ahead) - unsure) for ahead, unsure in skews.values())
        unsure = max(unsure for _, unsure in skews.values())
        findings.append(ok("clock", f"within {worst + unsure:.3f} s of the driver's on {len(skews)} nodes"))
    return findings


def memory_suffices(nodes: Sequence[NodeView], machines: Mapping[str, Machine]) -> list[Finding]:
    """Object stores, /dev/shm, the disk below which objects spill, and the limit of open files."""
    findings, stores = [], []
    for node in nodes:
        machine, store = machines.get(node.name), node.total.get("object_store_memory", 0.0)
        if machine is None:
            continue
        stores.append(store)
        if store > machine.shm_bytes:
            found = f"{node.name}: the store wants {_gib(store)}, /dev/shm has {_gib(machine.shm_bytes)}"
            findings.append(warn("object store", found, "enlarge /dev/shm: the store lies on disk otherwise"))
        elif store < STORE_BYTES:
            found = f"{node.name}: {_gib(store)}"
            findings.append(warn("object store", found, "start Ray with a larger --object-store-memory"))
        findings += _disk(node.name, machine)
        if machine.open_files < OPEN_FILES:
            found = f"{node.name}: at most {machine.open_files} open files"
            findings.append(warn("open files", found, "`ulimit -n 65536` before `ray start`"))
    if not findings and stores:
        free = min(machine.disk_free for name, machine in machines.items() if name != DRIVER)
        found = f"{_gib(min(stores))} to {_gib(max(stores))}, at least {_gib(free)} of disk to spill to"
        findings.append(ok("object store", found))
    return findings


def _disk(name: str, machine: Machine) -> list[Finding]:
    used = 1.0 - machine.disk_free / machine.disk_total if machine.disk_total else 0.0
    found = f"{name}: {_gib(machine.disk_free)} free ({used:.0%} used) at {machine.session or 'the temp dir'}"
    remedy = "free some, or start Ray with --temp-dir on a larger disk"
    if used >= DISK_FULL:
        return [fail("spill disk", f"{found}, Ray creates no objects above {DISK_FULL:.0%}", remedy)]
    if used >= DISK_NEARLY or machine.disk_free < DISK_FREE:
        return [warn("spill disk", found, remedy)]
    return []


def head_is_spared(nodes: Sequence[NodeView]) -> list[Finding]:
    """Whether the head of several nodes keeps out of the work, and what labels nodes have."""
    findings = []
    heads = [node for node in nodes if HEAD in node.total]
    if len(nodes) > 1 and any(node.total.get("CPU", 0.0) for node in heads):
        cpus = sum(node.total.get("CPU", 0.0) for node in heads)
        found = f"{heads[0].name} offers {cpus:g} CPUs to tasks beside the control service"
        remedy = "start the head with --num-cpus=0 on clusters that must stay up"
        findings.append(warn("head", found, remedy))
    for node in nodes:
        own = {name: value for name, value in node.labels.items() if not name.startswith("ray.io/node-id")}
        if own:
            found = f"{node.name}: {named([f'{name}={value}' for name, value in sorted(own.items())], 6)}"
            findings.append(ok("labels", found))
    return findings


def _gib(amount: float) -> str:
    return f"{amount / GIB:.1f} GiB"
