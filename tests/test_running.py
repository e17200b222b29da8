"""Episodes are the same next to any others, and what goes wrong in one stays in it."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from toy_environment import INSTRUCTIONS, SPACE, ToyEnvironment, ToySampler, decision, toy, toy_decision

from counterpoint.actions.tokenizer import Undecodable
from counterpoint.data.demonstrations import to_table
from counterpoint.environments.demonstrating import demonstrate, scene
from counterpoint.environments.running import NO_ACTION, Runner, Unfinished, play_scripted

SEEDS = range(40, 60)


def chooser(observations, streams):
    return [toy_decision(o, s) for o, s in zip(observations, streams, strict=True)]


def by_hand(seed, oracle=False):
    """Play one episode with a plain loop: what the runner must find."""
    environment = ToyEnvironment()
    observation = environment.start(seed)
    frames, steps, decisions, step = [observation.images["top"]], 0, 0, None
    while step is None or not step.over:
        made = toy_decision(observation, type("S", (), {"seed": seed, "decision": decisions}))
        chunk = made.candidates[environment.nearest_to_expert(made.candidates)] if oracle else made.actions
        decisions += 1
        for action in chunk[: SPACE.execute]:
            step = environment.act(action)
            observation = step.observation
            frames.append(observation.images["top"])
            steps += 1
            if step.over:
                break
    outcome = "success" if step.success else step.outcome or "time is up"
    return {
        "seed": seed, "instruction": observation.instruction, "success": step.success, "outcome": outcome,
        "steps": steps, "decisions": decisions, "rejected": decisions // 2, "fallbacks": 0,
        "clipped": decisions,
    }, np.stack(frames)  # fmt: skip


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("count", [1, 3, 32])
def test_episodes_are_those_of_a_plain_loop_whatever_runs_beside_them(count, oracle):
    runner = Runner(toy(), count)
    episodes = {e.seed: e for e in runner.run(SEEDS, chooser, oracle=oracle, traced=SEEDS, filmed=[41, 59])}
    assert episodes.keys() == set(SEEDS)
    outcomes = set()
    for seed, episode in episodes.items():
        expected, frames = by_hand(seed, oracle)
        found = asdict(episode)
        assert {name: found[name] for name in expected} == expected
        assert len(episode.trace) == episode.decisions
        if seed in (41, 59):
            assert np.array_equal(episode.frames, frames)
        else:
            assert episode.frames is None
        outcomes.add(episode.outcome)
    assert len(outcomes) > 1


def test_all_environments_ask_in_one_call_and_stay_busy():
    sizes = []

    def counting(observations, streams):
        sizes.append(len(observations))
        return chooser(observations, streams)

    list(Runner(toy(), 4).run(SEEDS, counting))
    alone = sum(by_hand(seed)[0]["decisions"] for seed in SEEDS)
    assert sum(sizes) == alone
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[: len(sizes) // 2] == [4] * (len(sizes) // 2)


def test_the_oracle_keeps_the_choice_where_no_candidate_can_be_used():
    blank = np.full((2, 3, 2), np.nan)

    def fallback(observations, streams):
        return [decision(np.zeros((3, 2)), blank, chosen=-1) for _ in observations]

    (episode,) = Runner(toy()).run([3], fallback, oracle=True, traced=[3])
    assert episode.fallbacks == episode.decisions == 6
    assert all((made.actions == 0).all() for made in episode.trace)


@pytest.mark.parametrize(
    ("confidences", "tied"),
    [((2.0, 2.0), True), ((2.0, 2.5), False), ((np.nan, np.nan), False), ((2.0,), False)],
)
def test_decisions_that_leave_nothing_to_choose_are_counted(confidences, tied):
    def equal(observations, streams):
        made = decision(np.zeros((3, 2)), np.zeros((len(confidences), 3, 2)))
        return [replace(made, confidences=np.array(confidences)) for _ in observations]

    (episode,) = Runner(toy()).run([3], equal)
    assert episode.tied == (episode.decisions if tied else 0)


def test_execute_may_be_another_than_the_environments():
    (episode,) = Runner(toy()).run([3], chooser, execute=1)
    assert episode.decisions == episode.steps
    (unfinished,) = Runner(toy()).run([3], chooser, execute=4)
    assert unfinished.reason.startswith("ValueError at step 0: execute=4 exceeds the 3 steps of a chunk")


@pytest.mark.parametrize(("at", "told"), [("start", ""), (0, " at step 0"), (3, " at step 3")])
def test_what_an_environment_raises_ends_its_episode_alone(at, told):
    built = []

    def build():
        built.append(ToyEnvironment({44: ("raise", at)}))
        return built[-1]

    outcomes = {e.seed: e for e in Runner(build, 3).run(SEEDS, chooser)}
    assert outcomes.pop(44) == Unfinished(44, f"RuntimeError{told}: the motor is stuck")
    assert len(built) == 4
    assert [environment.closed for environment in built].count(True) == 1
    for seed, episode in outcomes.items():
        assert episode.steps == by_hand(seed)[0]["steps"]


def test_a_refused_observation_ends_its_episode_alone():
    outcomes = {e.seed: e for e in Runner(toy({47: ("nan", 2)}), 5).run(SEEDS, chooser)}
    assert outcomes[47].reason.startswith("ValueError at step 2: observation.state is not finite in x")
    assert sum(isinstance(e, Unfinished) for e in outcomes.values()) == 1


def test_an_episode_without_a_decodable_action_counts_as_failed():
    def mute(observations, streams):
        if any(s.seed == 50 and s.decision == 1 for s in streams):
            raise Undecodable("token 3 of 5 is no number")
        return chooser(observations, streams)

    runner = Runner(toy(), 4)
    episode = next(e for e in runner.run(SEEDS, mute) if e.seed == 50)
    assert (episode.success, episode.outcome, episode.steps) == (False, NO_ACTION, 2)


def test_other_errors_of_the_chooser_are_raised_and_the_runner_lives_on():
    def broken(observations, streams):
        raise ConnectionError("no sampler")

    runner = Runner(toy(), 3)
    with pytest.raises(ConnectionError, match="no sampler"):
        list(runner.run(SEEDS, broken))
    assert len(list(runner.run(SEEDS, chooser))) == len(SEEDS)
    runner.close()


def test_every_deed_is_guarded():
    seen, inside = [], []

    class Guard:
        def __init__(self, deed, seed, step):
            self.note = (deed, seed, step)

        def __enter__(self):
            inside.append(self.note)

        def __exit__(self, *_):
            seen.append(inside.pop())

    class Watched(ToyEnvironment):
        def start(self, seed):
            assert inside == [("start", seed, 0)]
            return super().start(seed)

        def act(self, action):
            assert inside == [("act", self.seed, self.steps)]
            return super().act(action)

    (episode,) = Runner(Watched, 2, Guard).run([5], chooser)
    assert seen == [("build", 5, 0), ("start", 5, 0), *(("act", 5, step) for step in range(episode.steps))]
    seen.clear()
    recording = demonstrate(Watched(), 5, guard=Guard)
    assert seen == [("start", 5, 0), *(("act", 5, step) for step in range(len(recording.frames)))]


def test_the_expert_succeeds_and_random_actions_mostly_do_not():
    expert = [play_scripted(ToyEnvironment(), seed, "expert") for seed in SEEDS]
    random = [play_scripted(ToyEnvironment(), seed, "random", filmed=True) for seed in SEEDS]
    assert all(episode.success for episode in expert)
    assert sum(episode.success for episode in random) < len(SEEDS) / 2
    assert all(len(episode.frames) == episode.steps + 1 for episode in random)
    again = play_scripted(ToyEnvironment(), SEEDS[3], "random")
    assert again.steps == random[3].steps


def test_demonstrations_execute_noise_and_record_the_expert():
    executed = []

    class Noting(ToyEnvironment):
        def act(self, action):
            executed.append((self.expert_action(), action))
            return super().act(action)

    recordings = [demonstrate(Noting(), seed, noise=0.12) for seed in range(200)]
    frames = [frame for recording in recordings for frame in recording.frames]
    assert len(frames) == len(executed)
    assert all(
        (frame.action == clean.astype(np.float32)).all()
        for frame, (clean, _) in zip(frames, executed, strict=True)
    )
    # The expert stays three deviations from the bounds, so the noise shows as it is.
    difference = np.array([action - clean for clean, action in executed])
    assert difference.std(0) == pytest.approx([0.12, 0.24], rel=0.15)
    assert np.abs(difference.mean(0)).max() < 0.05
    first = recordings[7].frames
    assert [frame.step for frame in first] == list(range(len(first)))
    assert {(frame.episode, frame.kind) for frame in first} == {(7, "demonstration")}
    assert INSTRUCTIONS[first[0].target] == first[0].instruction
    assert first[0].keypoints.shape == (3, 2)


def test_scenes_are_single_images_after_two_to_five_random_actions():
    scenes = [scene(ToyEnvironment(), seed) for seed in range(60)]
    assert all(len(recording.frames) == 1 for recording in scenes)
    steps = {int(recording.frames[0].images["top"][..., 2].min()) for recording in scenes}
    assert steps == {2, 3, 4, 5}
    assert to_table([recording.frames[0] for recording in scenes]).num_rows == 60


def test_a_recording_follows_from_its_seed():
    one, other = (demonstrate(ToyEnvironment(), 11) for _ in range(2))
    assert to_table(one.frames).equals(to_table(other.frames))
    assert not to_table(demonstrate(ToyEnvironment(), 12).frames).equals(to_table(one.frames))


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="count=0: pass at least 1 environment"):
        Runner(toy(), 0)


def test_the_toy_sampler_is_the_toy_decision():
    environment = ToyEnvironment()
    observation = environment.start(1)
    stream = type("S", (), {"seed": 1, "decision": 0})
    (made,) = ToySampler().act([observation], [stream], None)
    assert np.array_equal(made.candidates, toy_decision(observation, stream).candidates)
