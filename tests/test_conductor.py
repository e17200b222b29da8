"""The driver learns how far workers are, they learn that it wants to stop, and nobody waits for anybody."""

import os
import signal
import time

import pytest
import ray

from actors.conductor import Baton, Conductor, start_conductor
from cluster.waiting import get, ready


class Busy(Conductor):
    """A conductor that takes its time, and can be found by its process."""

    def report(self, figures):
        time.sleep(figures.get("sleep", 0.0))
        return super().report(figures)

    def pid(self):
        return os.getpid()


@pytest.fixture
def conductor(ray_cluster):
    actor = ray.remote(Busy).options(num_cpus=0, max_restarts=-1).remote()
    ready({"conductor": actor}, timeout=240.0, what="start of the conductor")
    yield actor
    ray.kill(actor)


def until(true, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_conductor_keeps_the_newest_figures_and_passes_the_wish_on():
    conductor = Conductor()
    assert conductor.poll(stop=False) == {}
    assert conductor.report({"step": 1}) is False
    assert conductor.report({"step": 2}) is False
    assert conductor.poll(stop=True) == {"step": 2}
    assert conductor.report({"step": 3}) is True
    conductor.poll(stop=False)
    assert conductor.report({"step": 4}) is False


def test_figures_and_wish_cross_processes(ray_cluster):
    conductor = start_conductor()
    baton = Baton(conductor)
    assert baton({"step": 1}) is False
    until(lambda: get(conductor.poll.remote(True), timeout=240.0, what="poll") == {"step": 1})
    until(lambda: baton({"step": 2}))
    ray.kill(conductor)


def test_baton_does_not_wait_for_a_conductor_that_is_busy(conductor):
    baton = Baton(conductor)
    assert baton({"step": 0, "sleep": 20.0}) is False
    begun = time.monotonic()
    for step in range(1, 200):
        assert baton({"step": step}) is False
    assert time.monotonic() - begun < 10.0
    assert len(baton._asked) <= 4


def test_baton_outlives_its_conductor(conductor):
    baton = Baton(conductor)
    baton({"step": 0})
    os.kill(get(conductor.pid.remote(), timeout=240.0, what="pid"), signal.SIGKILL)
    for step in range(1, 20):
        assert baton({"step": step}) is False
        time.sleep(0.02)
    # Ray restarts it, the driver's wish is sent with every poll, and the next answers bring it.
    until(lambda: poll(conductor, stop=True) is not None)
    until(lambda: baton({"step": 20}))


def poll(conductor, stop):
    try:
        return get(conductor.poll.remote(stop), timeout=5.0, what="poll")
    except Exception:
        return None
