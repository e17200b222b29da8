"""Who is let in: whether the cluster's services ask for the token, and which addresses they listen on."""

import ipaddress
import urllib.error
import urllib.request
from contextlib import closing
from typing import Literal, NamedTuple

import grpc
import ray

from cluster.doctor_findings import Finding, fail, ok, warn

Answer = Literal["open", "token", "unreachable"]
SECONDS = 5.0
CLIENT_PORT = 10001
CONTROL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
CLIENT = "/ray.rpc.RayletDriver/ClusterInfo"
HARDEN = "set RAY_AUTH_MODE=token, and one RAY_AUTH_TOKEN_PATH, on every node and client before `ray start`"


class Exposure(NamedTuple):
    """What the services of the head answer to somebody without a token."""

    control_address: str
    control: Answer
    dashboard_address: str
    """`host:port`; empty without a dashboard."""
    dashboard: Answer
    client: Answer
    """Ray Client's server on its default port."""


def without_token(control_address: str, dashboard_address: str) -> Exposure:
    """Knock at the head's services as a stranger would; meant to run on the head, nearest to them."""
    host = control_address.rpartition(":")[0]
    return Exposure(
        control_address,
        _grpc(control_address, CONTROL),
        dashboard_address,
        _http(f"http://{dashboard_address}/api/jobs/") if dashboard_address else "unreachable",
        _grpc(f"{host}:{CLIENT_PORT}", CLIENT),
    )


def dashboard_address() -> str:
    """The dashboard's `host:port` as the cluster tells it; empty without one."""
    return ray._private.worker.get_dashboard_url() or ""


def who_is_let_in(exposure: Exposure) -> list[Finding]:
    """Verdicts on what `without_token` met."""
    findings = []
    address = exposure.control_address
    if exposure.control == "open":
        found = f"off: the control service at {address} answers anyone, and whoever reaches it runs code"
        findings.append(
            warn("token", found, HARDEN) if is_loopback(address) else fail("token", found, HARDEN)
        )
    elif exposure.control == "token":
        findings.append(ok("token", f"the control service at {address} refuses strangers"))
    else:
        findings.append(warn("token", f"{address} did not answer a stranger at all", "run this on the head"))
    findings += _dashboard(exposure)
    if exposure.client == "open":
        found = f"port {CLIENT_PORT} of the head takes Ray Client connections from anyone"
        findings.append(warn("ray client", found, f"`ray start --ray-client-server-port=0`, or {HARDEN}"))
    return findings


def _dashboard(exposure: Exposure) -> list[Finding]:
    address, subject = exposure.dashboard_address, "dashboard"
    if not address:
        return [ok(subject, "none")]
    if exposure.dashboard == "open" and not is_loopback(address):
        found = f"{address} takes jobs, which are code, from anyone who reaches it"
        return [fail(subject, found, f"`ray start --dashboard-host=127.0.0.1`, and {HARDEN}")]
    if exposure.dashboard == "open":
        return [warn(subject, f"{address} takes jobs without a token from anyone on the head", HARDEN)]
    if exposure.dashboard == "unreachable":
        return [warn(subject, f"{address} does not answer", "look at dashboard.log on the head")]
    where = "on loopback" if is_loopback(address) else "beyond loopback"
    return [ok(subject, f"{address}, {where}, asks for the token")]


def is_loopback(address: str) -> bool:
    """Whether `host:port` is reached from its own machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _http(url: str) -> Answer:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=SECONDS):
            return "open"
    except urllib.error.HTTPError as error:
        return "token" if error.code in (401, 403) else "open"
    except OSError:
        return "unreachable"


def _grpc(address: str, method: str) -> Answer:
    """Call a method with an empty message, past whatever token this process has."""
    with closing(grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return "token"
            silent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return "unreachable" if code in silent else "open"
    return "open"
