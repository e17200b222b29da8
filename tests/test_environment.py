"""The block-lifting environment: what follows from a seed, what ends an episode, what the expert does."""

import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from pydantic import ValidationError

from counterpoint.environments.blocks import BlocksEnv, scattered
from counterpoint.environments.config import CAMERA, CameraConfig, EnvironmentConfig, build_environment
from counterpoint.environments.expert import REACH
from counterpoint.environments.rendering import mujoco
from counterpoint.policies.observation import Observation

CONFIG = EnvironmentConfig()
OPEN = np.array([0.0, 0.0, 0.0, 1.0])


@pytest.fixture(scope="module")
def env() -> Iterator[BlocksEnv]:
    built = build_environment(CONFIG)
    yield built
    built.close()


def simulation(env: BlocksEnv) -> np.ndarray:
    """All that the simulation goes by, down to the solver's warm start and what is derived."""
    data = env._data
    state = np.zeros(mujoco.mj_stateSize(env._scene().model, mujoco.mjtState.mjSTATE_INTEGRATION.value))
    mujoco.mj_getState(env._scene().model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION.value)
    return np.concatenate([state, data.xpos.ravel(), data.xquat.ravel(), data.site_xpos.ravel(), data.qacc])


def same(one: Observation, other: Observation) -> bool:
    return (
        np.array_equal(one.images[CAMERA], other.images[CAMERA])
        and np.array_equal(one.state, other.state)
        and one.instruction == other.instruction
    )


def run_expert(env: BlocksEnv, seed: int, noise: float = 0.0) -> tuple[bool, str, int]:
    env.start(seed)
    random = np.random.default_rng(seed)
    for steps in range(1, env.max_steps + 1):
        step = env.act(env.expert_action() + noise * random.normal(size=4))
        if step.over:
            return step.success, step.outcome, steps
    raise AssertionError("the episode did not end")


def test_spaces_need_no_simulator_and_are_the_environment_s(env: BlocksEnv) -> None:
    code = (
        "import sys; from counterpoint.environments.config import EnvironmentConfig as C;"
        "C().observation_space(), C().action_space(); assert 'mujoco' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert env.observation_space == CONFIG.observation_space()
    assert env.action_space == CONFIG.action_space()
    for seed in range(3):
        observation = env.start(seed)
        env.observation_space.check(observation)
        assert observation.instruction in env.instructions
        assert observation.state.dtype == np.float32


def test_an_episode_follows_from_its_seed_alone(env: BlocksEnv) -> None:
    actions = np.random.default_rng(3).uniform(-1, 1, (6, 4))

    def episode(of: BlocksEnv, seed: int) -> tuple[list[Observation], np.ndarray]:
        return [of.start(seed), *(of.act(action).observation for action in actions)], simulation(of)

    first, state = episode(env, 7)
    run_expert(env, 8)
    other = build_environment(CONFIG)
    other.start(9)
    for again, of in ((env, 7), (other, 7)):
        seen, now = episode(again, of)
        assert all(map(same, first, seen))
        assert np.array_equal(state, now)
    assert not same(first[0], env.start(8))


def test_seeds_name_every_block_and_scatter_them_as_configured(env: BlocksEnv) -> None:
    named, offsets, yaws = [], [], []
    for seed in range(40):
        named.append(env.start(seed).instruction)
        scene = env._scene()
        offsets.append(scene.blocks(env._data)[:, :2] - scene.middle)
        quaternions = env._data.xquat[scene._blocks]
        yaws.append(2 * np.arctan2(quaternions[:, 3], quaternions[:, 0]))
    assert set(named) == {"pick up the red block", "pick up the green block", "pick up the blue block"}
    places = np.array(offsets)
    extent = np.abs(places).max(axis=(0, 1))
    assert (extent <= np.array(CONFIG.spread) + 1e-3).all()
    assert (extent > 0.85 * np.array(CONFIG.spread)).all()
    gaps = np.linalg.norm(places[:, [0, 0, 1]] - places[:, [1, 2, 2]], axis=-1)
    assert gaps.min() >= CONFIG.least_distance - 1e-3
    assert 0.2 < np.abs(yaws).max() <= CONFIG.yaw + 1e-3


@pytest.mark.parametrize("noise", [0.0, 0.12])
def test_the_expert_lifts_the_named_block(env: BlocksEnv, noise: float) -> None:
    results = [run_expert(env, seed, noise) for seed in range(100, 115)]
    assert all(success and outcome == "" for success, outcome, _ in results)
    assert 15 < np.mean([steps for *_, steps in results]) < 28


def test_the_expert_stays_within_its_reach_and_ends_at_the_configured_height(env: BlocksEnv) -> None:
    env.start(5)
    colour = env._named
    rest = env._scene().blocks(env._data)[:, 2]
    heights, over = [], False
    while not over:
        action = env.expert_action()
        assert action.dtype == np.float32
        assert np.abs(action[:3]).max() <= np.float32(REACH)
        over = env.act(action).over
        heights.append(env._scene().blocks(env._data)[:, 2] - rest)
    assert heights[-1][colour] > CONFIG.lift_height >= heights[-2][colour]
    assert np.abs(np.delete(heights, colour, axis=1)).max() < 0.01


def test_lifting_another_block_ends_the_episode_as_such(env: BlocksEnv) -> None:
    env.start(11)
    told, env._named = env._named, (env._named + 1) % 3
    actions = []
    while not actions or not env.act(actions[-1]).over:
        actions.append(env.expert_action())
    env.start(11)
    assert env._named == told
    steps = [env.act(action) for action in actions]
    assert (steps[-1].success, steps[-1].over, steps[-1].outcome) == (False, True, "wrong block")
    assert not any(step.over for step in steps[:-1])


def test_time_runs_out_and_an_ended_episode_is_not_continued() -> None:
    env = build_environment(EnvironmentConfig(max_steps=3))
    env.start(0)
    steps = [env.act(OPEN) for _ in range(3)]
    assert [(step.success, step.over, step.outcome) for step in steps] == [
        (False, False, ""),
        (False, False, ""),
        (False, True, ""),
    ]
    for use in (lambda: env.act(OPEN), env.expert_action, lambda: env.nearest_to_expert(np.zeros((1, 4, 4)))):
        with pytest.raises(RuntimeError, match="over after 3 steps: call start"):
            use()
    assert env.keypoints().shape == (4, 2)
    env.start(0)
    assert not env.act(OPEN).over


def test_looking_ahead_changes_nothing(env: BlocksEnv) -> None:
    """At every stage of a grasp, and the future is the one that then comes."""
    env.start(21)
    over, checked = False, 0
    while not over:
        before = simulation(env)
        env.nearest_to_expert(np.zeros((2, 4, 4)))
        assert np.array_equal(before, simulation(env))
        scene = env._scene()
        scene.copy(env._data, scene.spare)
        for _ in range(4):
            action = env.expert_action()
            scene.advance(scene.spare, action)
            over = over or env.act(action).over
            if over:
                break
        assert np.array_equal(env._data.qpos, scene.spare.qpos)
        assert np.array_equal(env._data.mocap_pos, scene.spare.mocap_pos)
        checked += 1
    assert checked >= 4


def test_the_nearest_chunk_is_the_one_nearest_to_what_the_expert_then_does(env: BlocksEnv) -> None:
    random = np.random.default_rng(0)
    for begin in (0, 9, 14):
        env.start(30 + begin)
        for _ in range(begin):
            env.act(env.expert_action())
        twin = build_environment(CONFIG)
        twin.start(30 + begin)
        for _ in range(begin):
            twin.act(twin.expert_action())
        coming = []
        for _ in range(4):
            coming.append(twin.expert_action())
            twin.act(coming[-1])
        candidates = np.stack(coming) + random.normal(size=(6, 4, 4)) * 0.2
        expected = min(range(6), key=lambda i: float(((candidates[i] - np.stack(coming)) ** 2).sum()))
        assert env.nearest_to_expert(candidates) == expected
        candidates[3] = coming
        assert env.nearest_to_expert(candidates.astype(np.float32)) == 3
        candidates[5] = coming
        candidates[3, 2, 1] = np.nan
        assert env.nearest_to_expert(candidates) == 5
        candidates[:, 0, 0] = np.nan
        assert env.nearest_to_expert(candidates) == -1


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 3), (0, 4, 4), (2, 0, 4)])
def test_a_misshapen_set_of_candidates_is_refused(env: BlocksEnv, shape: tuple[int, ...]) -> None:
    env.start(0)
    with pytest.raises(ValueError, match=r"candidates have shape .*give \[N, H, 4\]"):
        env.nearest_to_expert(np.zeros(shape))


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (np.zeros(3), r"action has shape \[3\]: give \[4\] \(dx, dy, dz, gripper\)"),
        (np.zeros((1, 4)), r"action has shape \[1, 4\]"),
        (np.array([0.0, np.nan, 0.0, 1.0]), r"action=\[0.0, nan, 0.0, 1.0\] is not finite"),
        (np.array([np.inf, 0.0, 0.0, 1.0]), "is not finite"),
    ],
)
def test_a_bad_action_is_refused_and_the_episode_goes_on(
    env: BlocksEnv, action: np.ndarray, said: str
) -> None:
    env.start(0)
    before = simulation(env)
    with pytest.raises(ValueError, match=said) as caught:
        env.act(action)
    assert "\n" not in str(caught.value)
    assert np.array_equal(before, simulation(env))
    env.act(OPEN)


def test_an_action_beyond_the_bounds_is_clipped(env: BlocksEnv) -> None:
    states = []
    for scale in (1.0, 50.0):
        env.start(2)
        env.act(scale * np.array([1.0, -1.0, 1.0, 1.0]))
        states.append(simulation(env))
    assert np.array_equal(*states)


def test_closing_one_environment_leaves_the_others() -> None:
    alone = EnvironmentConfig(max_steps=17)
    one, other = build_environment(alone), build_environment(alone)
    assert one._scene() is other._scene()
    shared = weakref.ref(one._scene())
    with pytest.raises(RuntimeError, match="no episode has begun: call start first"):
        one.act(OPEN)
    first = one.start(0)
    one.close()
    one.close()
    with pytest.raises(RuntimeError, match="closed: build another"):
        one.start(0)
    assert same(first, other.start(0))
    assert shared() is not None
    other.close()
    assert shared() is None


def test_keypoints_lie_where_the_blocks_are_drawn() -> None:
    """Blocks apart from each other and before the arm, compared with the pixels of their colours."""
    env = build_environment(EnvironmentConfig(image_size=192))
    compared = 0
    for seed in range(6):
        image = env.start(seed).images[CAMERA].astype(int)
        points = env.keypoints()
        assert points.shape == (4, 2)
        assert points.dtype == np.float32
        for channel, point in enumerate(points[:3]):
            others = np.delete(image, channel, axis=2).max(axis=2)
            rows, columns = np.nonzero(image[..., channel] > 2 * others + 20)
            if len(rows) < 450:  # hidden by the arm or by another block
                continue
            assert abs(columns.mean() - point[0]) < 1.6
            assert abs(rows.mean() - point[1]) < 2.5
            compared += 1
    assert compared >= 12
    lowered = env.keypoints()[3, 1]
    env.act(np.array([0.0, 0.0, -1.0, 1.0]))
    assert env.keypoints()[3, 1] > lowered
    env.close()


def test_the_camera_moves_with_its_configuration() -> None:
    usual, turned = CONFIG, EnvironmentConfig(camera=CameraConfig(right=(0, -1, 0), up=(0.6, 0, 0.8)))
    views = []
    for config in (usual, turned):
        env = build_environment(config)
        env.start(0)
        views.append(env.keypoints())
        env.close()
    assert not np.allclose(*views)


def test_colours_are_configured() -> None:
    colours = {"yellow": (1.0, 0.9, 0.0), "white": (1.0, 1.0, 1.0)}
    env = build_environment(EnvironmentConfig(colours=colours, instruction="lift the {colour} cube"))
    assert env.instructions == ("lift the yellow cube", "lift the white cube")
    image = env.start(1).images[CAMERA].astype(int)
    assert ((image[..., 0] > 150) & (image[..., 1] > 120) & (image[..., 2] < 60)).sum() > 20
    assert env.keypoints().shape == (3, 2)
    env.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"instruction": "pick up the block"}, "does not name a block"),
        ({"colours": {"red": (255, 0, 0)}}, "divide by 255"),
        ({"colours": {}}, "at least 1"),
        ({"spread": (0.5, 0.1)}, "reaches badly"),
        ({"least_distance": 0.01}, "0.075"),
        ({"image_size": 8}, "16"),
        ({"max_steps": 0}, "1"),
    ],
)
def test_a_bad_configuration_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EnvironmentConfig(**fields)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 blocks at least least_distance=0\.3 apart do not fit"):
        scattered(np.random.default_rng(0), EnvironmentConfig(least_distance=0.3))


def test_another_thread_is_told_to_build_its_own(env: BlocksEnv) -> None:
    env.start(0)
    said: list[object] = []

    def elsewhere() -> None:
        try:
            env.start(0)
        except RuntimeError as error:
            said.append(str(error))
        own = build_environment(CONFIG)
        said.append(own.start(0))
        own.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(timeout=240)
    assert "another thread or process: build an environment where it is used" in str(said[0])
    assert isinstance(said[1], Observation)
    assert same(said[1], env.start(0))
