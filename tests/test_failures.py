"""Every failure gets one of three kinds, where it happens, and keeps its story across processes."""

import errno
import gzip
import json
import os
import pickle
import signal
import time
import zlib

import pytest
import ray
from ray import exceptions as rex

from cluster import waiting
from cluster.failures import Failure, classify, failure, reporting, retrying
from cluster.waiting import NotReady, WaitTimeout


class UnreadableImageError(ValueError):
    """Stands for a data set's own error."""


class UnpicklableError(RuntimeError):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = __import__("threading").Lock()


class Message:
    def __init__(self, step: int) -> None:
        self.step = step


@ray.remote(num_cpus=0)
class Critic:
    @reporting(lambda self: self.name)
    def __init__(self, name: str = "critic/2", broken: bool = False) -> None:
        self.name = name
        if broken:
            raise EOFError("snapshot is truncated")

    @reporting(lambda self: self.name, data=(UnreadableImageError,))
    def judge(self, how: str, step: int) -> str:
        if how == "code":
            return {}["logit"]
        if how == "data":
            raise UnreadableImageError("img_7.png: 3 bytes")
        if how == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if how == "unpicklable":
            raise UnpicklableError("holds a lock")
        return "fine"

    @reporting("critic")
    def receive(self, message: Message) -> None:
        raise RuntimeError("shape")

    def pid(self) -> int:
        return os.getpid()

    def plain(self) -> None:
        raise ValueError("not decorated")

    def forever(self) -> None:
        time.sleep(600)


@ray.remote(num_cpus=0)
class Trainer:
    @reporting("trainer")
    def step(self, critic: ray.actor.ActorHandle) -> None:
        waiting.get(critic.judge.remote("disk", 9), 20, "verdict")


@ray.remote(num_cpus=0)
class Peer:
    """One of two processes that reduce over gloo."""

    def join(self, rank: int, store: str) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        self.reduce()

    @reporting("trainer/0")
    def reduce(self) -> None:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.ones(10))

    def end(self) -> None:
        os._exit(1)


@pytest.fixture(scope="module")
def critic(ray_cluster):
    actor = Critic.remote()
    waiting.ready({"critic/2": actor}, 30, "critic")
    return actor


def raised(ref) -> BaseException:
    with pytest.raises(Exception) as caught:
        waiting.get(ref, 30, "a failing call")
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WaitTimeout("x", 1, 0, 1), "infrastructure"),
        (TimeoutError("socket"), "infrastructure"),
        (BrokenPipeError("pipe"), "infrastructure"),
        (ConnectionResetError("peer"), "infrastructure"),
        (OSError(errno.ENOSPC, "full"), "infrastructure"),
        (OSError(errno.EIO, "bad sector"), "infrastructure"),
        (rex.ActorDiedError(), "infrastructure"),
        (rex.ActorUnavailableError("gone", None), "infrastructure"),
        (rex.RayActorError(actor_init_failed=True), "code"),
        (rex.WorkerCrashedError(), "infrastructure"),
        (rex.NodeDiedError("node"), "infrastructure"),
        (rex.OutOfMemoryError("oom"), "infrastructure"),
        (NotReady("panel", "critic/0", rex.ActorDiedError()), "infrastructure"),
        (NotReady("panel", "critic/0", KeyError("x")), "code"),
        (FileNotFoundError(errno.ENOENT, "weights"), "code"),
        (PermissionError(errno.EACCES, "weights"), "code"),
        (rex.AuthenticationError("token"), "code"),
        (ValueError("shape"), "code"),
        (AssertionError(), "code"),
        (Failure("data", "bad shard"), "data"),
        (EOFError("truncated"), "data"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_kind_of_an_exception(error, kind):
    assert classify(error) == kind


@pytest.mark.parametrize(
    "decode",
    [
        lambda: gzip.decompress(b"not gzip at all"),
        lambda: gzip.decompress(gzip.compress(b"digits" * 100)[:-20]),
        lambda: zlib.decompress(b"\x00\x01"),
        lambda: json.loads("{"),
        lambda: b"\xff\xfe\xfa".decode("utf-8"),
    ],
)
def test_broken_bytes_are_a_data_failure(decode):
    with pytest.raises(Exception) as caught:
        decode()
    assert classify(caught.value) == "data"


def test_errors_of_ray_train_are_opened_and_the_worst_worker_decides():
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal import exceptions as train

    died = train.WorkerHealthCheckFailedError("no answer", rex.ActorDiedError())
    bug = train.UserExceptionWithTraceback(KeyError("x"), "Traceback ...")
    reported = train.UserExceptionWithTraceback(Failure("data", "bad shard", "evaluator/0"), "Traceback ...")
    assert classify(WorkerGroupError("two died", {0: died, 1: died})) == "infrastructure"
    assert classify(WorkerGroupError("one broke", {0: died, 1: bug})) == "code"
    assert classify(WorkerGroupError("bad shard", {0: died, 1: reported})) == "data"
    assert failure(WorkerGroupError("bad shard", {0: died, 1: reported}), "driver").role == "evaluator/0"
    assert classify(ControllerError(train.WorkerGroupStartupTimeoutError(4))) == "infrastructure"
    assert classify(ControllerError(ValueError("storage_path"))) == "code"


def test_rank_whose_peer_died_has_an_infrastructure_failure(ray_cluster, tmp_path):
    peers = [Peer.remote(), Peer.remote()]
    store = str(tmp_path / "rendezvous")
    waiting.get([peer.join.remote(rank, store) for rank, peer in enumerate(peers)], 60, "rendezvous")
    peers[1].end.remote()
    error = raised(peers[0].reduce.remote())
    assert (error.kind, error.original) == ("infrastructure", "RuntimeError")


def test_failure_survives_pickling_with_every_field():
    first = Failure("data", "bad shard", "evaluator/1", 40, "pkg.Bad", "Traceback ...")
    copy = pickle.loads(pickle.dumps(first))
    assert type(copy) is Failure
    assert vars(copy) == vars(first)
    assert str(copy) == "evaluator/1 failed at step 40 (data): pkg.Bad: bad shard"


@pytest.mark.parametrize(
    ("how", "kind", "original"),
    [
        ("code", "code", "KeyError"),
        ("data", "data", "UnreadableImageError"),
        ("disk", "infrastructure", "OSError"),
        ("unpicklable", "code", "UnpicklableError"),
    ],
)
def test_exception_in_an_actor_arrives_classified_with_role_step_and_traceback(critic, how, kind, original):
    error = raised(critic.judge.remote(how, step=31))
    assert type(error) is Failure
    assert (error.kind, error.role, error.step) == (kind, "critic/2", 31)
    assert error.original.endswith(original)
    assert "in judge" in error.details


def test_step_is_read_from_a_message_and_a_good_call_is_untouched(critic):
    assert raised(critic.receive.remote(Message(5))).step == 5
    assert waiting.get(critic.judge.remote("fine", 1), 20, "good call") == "fine"


def test_undecorated_value_error_of_an_actor_is_code(critic):
    assert classify(raised(critic.plain.remote())) == "code"


def test_failure_keeps_the_role_that_failed_first_when_it_passes_through_another_actor(critic):
    error = raised(Trainer.remote().step.remote(critic))
    assert type(error) is Failure
    assert (error.kind, error.role, error.step) == ("infrastructure", "critic/2", 9)


def test_constructor_that_reports_keeps_its_kind(ray_cluster):
    broken = Critic.remote("critic/9", broken=True)
    with pytest.raises(NotReady) as caught:
        waiting.ready({"critic/9": broken}, 30, "panel")
    assert classify(caught.value) == "data"
    assert failure(caught.value, "driver").role == "critic/9"
    assert classify(raised(broken.pid.remote())) == "data"


@pytest.mark.parametrize("way", ["sigkill", "ray.kill"])
def test_killed_actor_is_an_infrastructure_failure(ray_cluster, way):
    victim = Critic.remote()
    pid = waiting.get(victim.pid.remote(), 30, "pid")
    call = victim.forever.remote()
    if way == "sigkill":
        os.kill(pid, signal.SIGKILL)
    else:
        ray.kill(victim)
    error = raised(call)
    assert classify(error) == "infrastructure"
    assert failure(error, "critic/0", 3).step == 3


def test_decorated_method_outside_ray_raises_the_same_failure():
    class Local:
        @reporting("sampler")
        def draw(self, step: int) -> None:
            raise KeyError("x")

    with pytest.raises(Failure, match=r"sampler failed at step 2 \(code\): KeyError: 'x'") as caught:
        Local().draw(2)
    assert isinstance(caught.value.__cause__, KeyError)


class Clock:
    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def failing(times: int, error: Exception):
    calls = []

    def call() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call, calls


def test_retrying_retries_infrastructure_with_doubling_pauses_and_says_so(caplog):
    clock = Clock()
    call, _ = failing(2, ConnectionError("reset"))
    assert retrying(call, "upload", attempts=3, backoff=0.5, sleep=clock.sleep, clock=clock) == 3
    assert clock.pauses == [0.5, 1.0]
    assert "upload: attempt 1 of 3 failed (infrastructure): reset" in caplog.text


def test_retrying_stops_at_once_for_code_and_after_the_last_attempt():
    clock = Clock()
    call, calls = failing(9, KeyError("bug"))
    with pytest.raises(KeyError):
        retrying(call, "step", attempts=5, sleep=clock.sleep, clock=clock)
    assert len(calls) == 1
    call, calls = failing(9, ConnectionError("reset"))
    with pytest.raises(ConnectionError) as caught:
        retrying(call, "step", attempts=3, backoff=1, sleep=clock.sleep, clock=clock)
    assert len(calls) == 3
    assert caught.value.__notes__ == ["step: gave up after 3 attempts in 3.0 s"]


def test_retrying_keeps_to_its_budget_and_refuses_no_attempts():
    clock = Clock()
    call, calls = failing(9, ConnectionError("reset"))
    with pytest.raises(ConnectionError):
        retrying(call, "step", attempts=9, backoff=1, budget=3.5, sleep=clock.sleep, clock=clock)
    assert (len(calls), clock.now) == (3, 3.0)
    with pytest.raises(ValueError, match="attempts=0"):
        retrying(call, "step", attempts=0)
