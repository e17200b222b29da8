"""A task of a few numbers that behaves as an environment, and faults for the seeds that are asked for."""

import ctypes
import os
import time
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from counterpoint.actions.space import ActionSpace
from counterpoint.environments.episode import Step
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.selection.decision import Decision

SIZE = 16
SPACE = ActionSpace(names=("dx", "dy"), low=(-1.0, -2.0), high=(1.0, 2.0), horizon=3, execute=2)
OBSERVATION_SPACE = ObservationSpace(cameras={"top": (SIZE, SIZE)}, state=("x", "y"))
INSTRUCTIONS = ("go to the red corner", "go to the blue corner")
REACH = 0.25


class ToyEnvironment:
    """A point walks to the corner that it is told; `faults` says by seed what goes wrong, and at which step.

    Faults: "raise", "sleep", "hold" (sleeps in C with Python's lock), "exit", "nan". "... once" happens only
    while the file `marker`-seed does not exist, which it creates.
    """

    def __init__(self, faults=None, max_steps=12, marker=None):
        self.observation_space, self.action_space = OBSERVATION_SPACE, SPACE
        self.instructions, self.max_steps = INSTRUCTIONS, max_steps
        self.faults, self.marker = faults or {}, marker
        self.closed = False

    def start(self, seed):
        stream = np.random.default_rng(seed)
        self.seed, self.steps = seed, 0
        self.place = stream.uniform(0.3, 0.7, 2)
        self.goal = int(stream.integers(2))
        self.fail("start")
        return self.observe()

    def act(self, action):
        assert action.shape == (2,)
        assert (SPACE.clip(action) == action.astype(np.float32)).all()
        self.fail(self.steps)
        self.place = np.clip(self.place + 0.1 * action, 0.0, 1.0)
        self.steps += 1
        gaps = np.abs(self.corners() - self.place).max(1)
        success, wrong = gaps[self.goal] < REACH, gaps[1 - self.goal] < REACH
        over = bool(success or wrong or self.steps == self.max_steps)
        return Step(self.observe(), bool(success), over, "wrong corner" if wrong else "")

    def expert_action(self):
        return np.clip((self.corners()[self.goal] - self.place) * 8, (-0.6, -1.2), (0.6, 1.2))

    def nearest_to_expert(self, candidates):
        gaps = np.linalg.norm(candidates - self.expert_action(), axis=(1, 2))
        return -1 if np.isnan(gaps).all() else int(np.nanargmin(gaps))

    def keypoints(self):
        return np.vstack([self.corners(), self.place]).astype(np.float32) * SIZE

    def close(self):
        self.closed = True

    def corners(self):
        return np.array([[0.0, 0.0], [1.0, 1.0]])

    def observe(self):
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        column, row = (self.place * (SIZE - 1)).round().astype(int)
        image[row, column, :2] = 255
        image[..., 2] = self.steps
        state = self.place.astype(np.float32)
        if self.faults.get(self.seed) == ("nan", self.steps):
            state[0] = np.nan
        return Observation({"top": image}, state, INSTRUCTIONS[self.goal])

    def fail(self, now):
        fault, at = self.faults.get(self.seed, ("", None))
        if at != now:
            return
        if fault.endswith(" once"):
            path = f"{self.marker}-{self.seed}"
            if os.path.exists(path):
                return
            open(path, "w").close()
        match fault.removesuffix(" once"):
            case "raise":
                raise RuntimeError("the motor is stuck")
            case "sleep":
                time.sleep(600)
            case "hold":
                ctypes.PyDLL(None).sleep(600)
            case "exit":
                os._exit(3)


def toy(faults=None, **options):
    """Return a recipe of toy environments that pickles."""
    return partial(ToyEnvironment, faults, **options)


def decision(chunk, candidates=None, chosen=0, rejected=0, clipped=0):
    """Return a decision of which little but the chunk matters."""
    candidates = np.asarray([chunk] if candidates is None else candidates, np.float32)
    none = np.full(len(candidates), np.nan)
    return Decision(
        np.asarray(chunk, np.float32), chosen, candidates, ((0,),) * len(candidates), none,
        none[:, None].astype(np.float32), rejected, clipped,
    )  # fmt: skip


@dataclass
class ToySampler:
    """Walks towards the corner in the instruction, with noise that each stream names."""

    action_space: ActionSpace = SPACE
    pause: float = 0.0
    calls: list = field(default_factory=list)

    def act(self, observations, streams, selection, caller=0):
        time.sleep(self.pause)
        self.calls.append((len(observations), caller))
        return [toy_decision(o, s) for o, s in zip(observations, streams, strict=True)]

    def check(self, observation_space, action_space):
        pass


def toy_decision(observation, stream):
    """Return two candidates, of which the first is kept."""
    OBSERVATION_SPACE.check(observation)
    noise = np.random.default_rng((stream.seed, stream.decision)).normal(0, 1.0, (2, 3, 2))
    way = INSTRUCTIONS.index(observation.instruction) * 2.0 - 1.0
    candidates = SPACE.clip(way * 0.3 + noise)
    return decision(candidates[0], candidates, rejected=stream.decision % 2, clipped=1)
