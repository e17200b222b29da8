"""The block-lifting environment behind other faces: gymnasium's, another process's, a Ray actor's."""

import hashlib
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from conftest import RayCluster
from gymnasium.utils.env_checker import check_env

from counterpoint.environments.config import CAMERA, EnvironmentConfig, build_environment
from counterpoint.environments.gymnasium_env import GymnasiumEnv
from counterpoint.policies.observation import Observation

SEED, ACTION = 4, (0.3, -0.2, -0.5, 1.0)


def digest(observation: Observation) -> str:
    return hashlib.sha256(observation.images[CAMERA].tobytes() + observation.state.tobytes()).hexdigest()


def two_moments() -> list[str]:
    """What is seen at the start of an episode and after a step of it."""
    env = build_environment(EnvironmentConfig())
    seen = [digest(env.start(SEED)), digest(env.act(np.array(ACTION)).observation)]
    env.close()
    return seen


def test_gymnasium_finds_nothing_wrong() -> None:
    env = GymnasiumEnv(build_environment(EnvironmentConfig()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message=".*value is -?infinity"
        )  # the state's bounds: none are known
        warnings.filterwarnings("ignore", message=".*not having a spec")  # it goes by no registered name
        check_env(env)


def test_gymnasium_sees_the_same_episode_and_its_end() -> None:
    config = EnvironmentConfig(max_steps=40)
    env, face = build_environment(config), GymnasiumEnv(build_environment(config))
    shown, info = face.reset(seed=SEED)
    assert info == {"seed": SEED}
    assert np.array_equal(shown["images"][CAMERA], env.start(SEED).images[CAMERA])
    over = False
    while not over:
        action = env.expert_action()
        shown, reward, terminated, truncated, info = face.step(action)
        step = env.act(action)
        over = step.over
        assert np.array_equal(shown["images"][CAMERA], step.observation.images[CAMERA])
        assert (reward, terminated, truncated) == (float(step.success), step.over, False)
    assert info == {"success": True, "outcome": ""}
    assert np.array_equal(face.render(), shown["images"][CAMERA])
    _, first = face.reset()
    assert first != face.reset()[1]
    *_, terminated, truncated, info = [face.step(np.zeros(4, np.float32)) for _ in range(40)][-1]
    assert (terminated, truncated, info["success"]) == (False, True, False)
    face.close()
    env.close()


def test_another_process_sees_the_same_and_a_fork_is_told_to_spawn() -> None:
    """A fork of a process that has drawn would hang at its first image."""
    code = """if True:
        import os
        from test_environment_elsewhere import *
        open_to_the_end = build_environment(EnvironmentConfig())
        open_to_the_end.start(0)
        print(*two_moments(), flush=True)
        if os.fork() == 0:
            try:
                two_moments()
            except RuntimeError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
    """
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=240
    )
    drawn, refused = ran.stdout.splitlines()
    assert ran.stderr == ""
    assert drawn.split() == two_moments()
    assert "start processes by spawn, not by fork" in refused


def test_mujoco_without_a_backend_is_refused_rather_than_aborted() -> None:
    code = "import os; os.environ.pop('MUJOCO_GL', 0); import mujoco, counterpoint.environments.rendering"
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "set MUJOCO_GL=egl before Python starts" in ran.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="backends by name are Linux's")
@pytest.mark.parametrize("backend", ["glfw", "nonsense"])
def test_a_backend_that_cannot_draw_is_named_with_its_remedy(backend: str) -> None:
    code = """if True:
        from counterpoint.environments.config import EnvironmentConfig
        for _ in range(2):
            try:
                from counterpoint.environments.scene import Scene
                scene = Scene(EnvironmentConfig())
                scene.camera.draw(scene.beginning)
            except (ImportError, RuntimeError) as error:
                print(error)
    """
    environment = {"MUJOCO_GL": backend, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, timeout=240
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"MUJOCO_GL={backend} ")
        assert "install libegl1 libegl-mesa0" in line


def test_a_ray_actor_sees_the_same(ray_cluster: RayCluster) -> None:
    import ray

    from cluster.waiting import get

    class Worker:
        def look(self) -> Any:
            return two_moments()

    worker = ray.remote(num_cpus=0)(Worker).remote()
    seen = [get(worker.look.remote(), timeout=240, what="the worker") for _ in range(2)]
    ray.kill(worker)
    assert seen == [two_moments()] * 2
