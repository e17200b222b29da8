"""Stepping several environments at once under one chooser of actions, and recording what comes of it.

Whatever is random follows from an episode's seed alone, so an episode is the same next to any others.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

import numpy as np

from counterpoint.actions.tokenizer import Undecodable
from counterpoint.environments.episode import Environment, Episode, Step
from counterpoint.policies.observation import Observation
from counterpoint.seeds import seed_of
from counterpoint.selection.decision import Decision, Stream

logger = logging.getLogger(__name__)

T = TypeVar("T")

Build = Callable[[], Environment]
"""Makes an environment; picklable, so that any process can."""
Chooser = Callable[[list[Observation], list[Stream]], list[Decision]]
"""Chooses for all observations at once, each with its own stream of random numbers."""
Deed = Literal["build", "start", "act"]
"""What an environment is about to do."""
Scripted = Literal["expert", "random"]
"""What acts without a policy: the environment's expert, or uniform random actions."""


NO_ACTION = "no action could be decoded"


class Guard(Protocol):
    """Makes the context in which an environment does one deed, such as one with a deadline."""

    def __call__(self, deed: Deed, seed: int, step: int) -> contextlib.AbstractContextManager[object]:
        """Return the context of `deed` in the episode of `seed`, after `step` control steps."""
        ...


@dataclass(frozen=True)
class Unfinished:
    """An episode that could not be played to its end."""

    seed: int
    reason: str
    """What went wrong, in one line."""


def unguarded(deed: Deed, seed: int, step: int) -> contextlib.AbstractContextManager[object]:
    """Return a context without any deadline."""
    return contextlib.nullcontext()


@dataclass(eq=False)
class _Run:
    """An episode under way in one environment."""

    environment: Environment
    seed: int
    observation: Observation
    steps: int = 0
    decisions: int = 0
    rejected: int = 0
    fallbacks: int = 0
    clipped: int = 0
    tied: int = 0
    trace: list[Decision] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    last: Step | None = None

    def film(self) -> None:
        """Keep the image of the first camera."""
        camera = next(iter(self.environment.observation_space.cameras))
        self.frames.append(self.observation.images[camera])

    def episode(self) -> Episode:
        """Return what came of it."""
        success = self.last is not None and self.last.success
        said = self.last.outcome if self.last is not None else ""
        return Episode(
            self.seed, self.observation.instruction, success, "success" if success else said or "time is up",
            self.steps, self.decisions, self.rejected, self.fallbacks, self.clipped, self.tied,
            tuple(self.trace), np.stack(self.frames) if self.frames else None,
        )  # fmt: skip


class Runner:
    """Keeps `count` environments, each of which plays one episode after the other.

    An environment that raises is closed, and a new one takes its place.
    """

    def __init__(self, build: Build, count: int = 1, guard: Guard = unguarded) -> None:
        if count < 1:
            raise ValueError(f"count={count}: pass at least 1 environment")
        self.build, self.count, self.guard = build, count, guard
        self._idle: list[Environment] = []

    def run(
        self,
        seeds: Iterable[int],
        chooser: Chooser,
        execute: int | None = None,
        oracle: bool = False,
        traced: Collection[int] = (),
        filmed: Collection[int] = (),
    ) -> Iterator[Episode | Unfinished]:
        """Play the episodes of `seeds`, and yield each as it ends.

        The chooser is asked for all environments in one call, and `execute` steps of each chunk are taken
        before it is asked again (None: as many as the environment's action space says). With `oracle` the
        candidate nearest to the expert replaces its choice. Seeds in `traced` keep their decisions, those in
        `filmed` their images. What an environment raises, and a ValueError by which the chooser refuses an
        observation, ends that episode alone; other errors of the chooser are raised.
        """
        waiting = iter(seeds)
        runs: list[_Run] = []
        try:
            while True:
                while len(runs) < self.count and (seed := next(waiting, None)) is not None:
                    begun = self._begin(seed, seed in filmed)
                    if isinstance(begun, Unfinished):
                        yield begun
                    else:
                        runs.append(begun)
                if not runs:
                    return
                for run, decision in zip(list(runs), _choose(chooser, runs), strict=True):
                    steps = execute or run.environment.action_space.execute
                    outcome = self._execute(
                        run, decision, steps, oracle, run.seed in traced, run.seed in filmed
                    )
                    if outcome is not None:
                        runs.remove(run)
                        yield outcome
        finally:
            self._idle.extend(run.environment for run in runs)

    def use(self, seed: int, deeds: Callable[[Environment, Guard], T]) -> T | Unfinished:
        """Have one environment do `deeds` in the episode of `seed`, and return what came of it."""
        environment: Environment | None = None
        try:
            environment = self._take(seed)
            done = deeds(environment, self.guard)
        except Exception as error:
            return self._spoilt(environment, seed, error)
        self._idle.append(environment)
        return done

    def environment(self) -> Environment:
        """Return an environment that is not in an episode, for its spaces."""
        if not self._idle:
            self._idle.append(self._take(0))
        return self._idle[-1]

    def close(self) -> None:
        """Close the environments."""
        while self._idle:
            self._idle.pop().close()

    def _take(self, seed: int) -> Environment:
        if self._idle:
            return self._idle.pop()
        with self.guard("build", seed, 0):
            return self.build()

    def _begin(self, seed: int, filmed: bool) -> "_Run | Unfinished":
        environment: Environment | None = None
        try:
            environment = self._take(seed)
            with self.guard("start", seed, 0):
                run = _Run(environment, seed, environment.start(seed))
        except Exception as error:
            return self._spoilt(environment, seed, error)
        if filmed:
            run.film()
        return run

    def _execute(
        self,
        run: _Run,
        decision: Decision | ValueError,
        steps: int,
        oracle: bool,
        traced: bool,
        filmed: bool,
    ) -> Episode | Unfinished | None:
        """Execute `steps` of a chunk; return the episode if it ended."""
        try:
            if isinstance(decision, Undecodable):
                # The policy's own failure, and no other than a wrong action: the episode counts.
                run.last = Step(run.observation, False, True, NO_ACTION)
                self._idle.append(run.environment)
                return run.episode()
            if isinstance(decision, ValueError):
                raise decision
            if oracle:
                with self.guard("act", run.seed, run.steps):
                    decision = _nearest(run.environment, decision)
            _count(run, decision, traced)
            for action in _first(decision.actions, steps):
                with self.guard("act", run.seed, run.steps):
                    run.last = run.environment.act(action)
                run.steps += 1
                run.observation = run.last.observation
                if filmed:
                    run.film()
                if run.last.over:
                    break
            else:
                return None
        except Exception as error:
            return self._spoilt(run.environment, run.seed, error, run.steps)
        self._idle.append(run.environment)
        return run.episode()

    def _spoilt(
        self, environment: Environment | None, seed: int, error: Exception, step: int | None = None
    ) -> Unfinished:
        """Give up an environment whose state nobody knows any more."""
        at = "" if step is None else f" at step {step}"
        reason = f"{type(error).__name__}{at}: {' '.join(str(error).split())}"
        logger.warning("episode of seed %d: %s", seed, reason)
        if environment is not None:
            with contextlib.suppress(Exception):
                environment.close()
        return Unfinished(seed, reason)


def _choose(chooser: Chooser, runs: Sequence[_Run]) -> list[Decision | ValueError]:
    """Ask for all at once; if that is refused, one by one, to find whose observation is at fault."""
    observations = [run.observation for run in runs]
    streams = [Stream(run.seed, run.decisions) for run in runs]
    try:
        return list(chooser(observations, streams))
    except ValueError as error:
        if len(runs) == 1:
            return [error]
    answers: list[Decision | ValueError] = []
    for observation, stream in zip(observations, streams, strict=True):
        try:
            answers += chooser([observation], [stream])
        except ValueError as error:
            answers.append(error)
    return answers


def _nearest(environment: Environment, decision: Decision) -> Decision:
    nearest = environment.nearest_to_expert(decision.candidates)
    if nearest < 0:
        return decision
    return replace(decision, chosen=nearest, actions=decision.candidates[nearest])


def _count(run: _Run, decision: Decision, traced: bool) -> None:
    run.decisions += 1
    run.rejected += decision.rejected
    run.fallbacks += decision.chosen < 0
    run.clipped += decision.clipped
    # A confidence is compared with itself too: NaN, which a rule without confidences has, never ties.
    run.tied += len(decision.confidences) > 1 and bool(
        (decision.confidences == decision.confidences[0]).all()
    )
    if traced:
        run.trace.append(decision)


def _first(actions: np.ndarray, steps: int) -> np.ndarray:
    if len(actions) < steps:
        raise ValueError(
            f"execute={steps} exceeds the {len(actions)} steps of a chunk: lower it, or use a policy with a "
            "longer horizon"
        )
    return actions[:steps]


def play_scripted(
    environment: Environment, seed: int, actor: Scripted, guard: Guard = unguarded, filmed: bool = False
) -> Episode:
    """Play an episode without a policy; random actions are uniform within the bounds."""
    stream = np.random.default_rng(seed_of(seed, "random actions"))
    space = environment.action_space
    with guard("start", seed, 0):
        run = _Run(environment, seed, environment.start(seed))
    while True:
        if filmed:
            run.film()
        if run.last is not None and run.last.over:
            return run.episode()
        with guard("act", seed, run.steps):
            action = (
                environment.expert_action() if actor == "expert" else stream.uniform(space.low, space.high)
            )
            run.last = environment.act(space.clip(action))
        run.steps, run.observation = run.steps + 1, run.last.observation
