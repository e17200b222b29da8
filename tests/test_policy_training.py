"""Training of the compact policy: what each stage moves, what is learnt, and that cuts do not matter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from vla_parts import COLOURS, WORDS, inputs_of, policy, squares, tokens_of, words

from counterpoint.optimization import OptimizerConfig
from counterpoint.place import Place
from counterpoint.policies.compact import CompactPolicy
from counterpoint.policies.perception import PerceptionConfig, PerceptionData, pixel_errors
from counterpoint.policies.training import ConditionDropout, PolicyTrainer, PolicyTrainingConfig
from counterpoint.policies.vision import VisionConfig
from counterpoint.seeds import generator
from counterpoint.strategies import whole
from counterpoint.strategies.learner import Learner

DATA = squares(6)
QUICK = OptimizerConfig(warmup_steps=1, ema_decay=0.9)
DROPOUT = ConditionDropout(text=0.2, state=0.2, both=0.2)


def trainer(
    network: CompactPolicy | None = None, place: Place | None = None, accumulate: int = 1, **options: Any
):
    config = {
        "steps": 3,
        "batch_size": 8,
        "optimizer": QUICK,
        "condition_dropout": DROPOUT,
        "perception": PerceptionConfig(steps=3, batch_size=4, optimizer=QUICK),
    }
    return PolicyTrainer(
        network or policy(),
        DATA,
        tokens_of(DATA.actions),
        words,
        PolicyTrainingConfig(**config | options),
        seed=2,
        place=place or Place(),
        accumulate=accumulate,
    )


def parameters(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def moved(before: dict[str, Tensor], network: torch.nn.Module) -> set[str]:
    """The parts of a policy that a step has changed."""
    return {
        "vision" if name.startswith("vision.") else "policy"
        for name, p in network.named_parameters()
        if not torch.equal(p, before[name])
    }


def gradients(monkeypatch: pytest.MonkeyPatch, one: PolicyTrainer, step: int) -> dict[str, Tensor]:
    """The gradients that one step hands to the optimizer."""
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", lambda self, step: (0.0, 0.0))
        one.step(step)
    return {name: p.grad.clone() for name, p in one.policy.named_parameters() if p.grad is not None}


def test_perception_moves_vision_alone_and_the_policy_the_rest() -> None:
    one = trainer()
    assert one.total_steps == 6
    for step in range(6):
        before = parameters(one.policy)
        stage = "perception" if step < 3 else "policy"
        figures = one.step(step)
        assert figures["stage"] == stage
        # The step that enters the policy's stage also takes over the average of vision.
        assert moved(before, one.policy) == (
            {"vision"} if step < 3 else {"policy"} | ({"vision"} if step == 3 else set())
        )
        assert ("perception_error" in figures) is (stage == "perception")
        assert ("token_accuracy" in figures) is (stage == "policy")
        assert one.samples_per_step(step) == (4 if step < 3 else 8)


def test_the_policy_sees_the_average_of_vision_which_is_part_of_the_weights() -> None:
    one = trainer()
    for step in range(3):
        one.step(step)
    statistics = {"vision.mean", "vision.std"}
    average = {
        name: x for name, x in one.weights().items() if name.startswith("vision.") and name not in statistics
    }
    for step in range(3, 6):
        one.step(step)
    weights = one.weights()
    assert all(torch.equal(weights[name], x) for name, x in average.items())
    fresh = policy(seed=9)
    fresh.load_state_dict(weights)
    with torch.no_grad():
        known = fresh.encode(inputs_of(DATA))
    for name, x in one.known.items():
        torch.testing.assert_close(known[name], x, atol=1e-5, rtol=1e-5)
    found = torch.cat([known[name].flatten(0, 1) for name in ("pointer", "null_pointer", "slots")])
    torch.testing.assert_close(found.mean(0), torch.zeros(50), atol=1e-4, rtol=0)
    variance = found.var(0, correction=0)
    torch.testing.assert_close(variance[:2], torch.ones(2), atol=1e-3, rtol=0)
    assert float(variance[2:].sum()) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(weights["state_mean"], DATA.states.mean(0), rtol=1e-5)
    np.testing.assert_allclose(weights["state_std"][:2], DATA.states.std(0)[:2], rtol=1e-5)
    assert weights["state_std"][2] == 1  # an entry that never varies


def test_patches_train_end_to_end_without_a_stage_before() -> None:
    one = trainer(policy("patches"))
    assert one.total_steps == 3
    for step in range(3):
        before = parameters(one.policy)
        assert one.step(step)["stage"] == "policy"
        assert moved(before, one.policy) == {"vision", "policy"}


@pytest.mark.parametrize("kind", ["pointer", "patches"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit_wherever_it_was_cut(kind: str) -> None:
    unbroken, states, figures = trainer(policy(kind)), [], []
    total = unbroken.total_steps
    for step in range(total):
        states.append(unbroken.state())
        figures.append(unbroken.step(step))
    end = unbroken.state()
    for cut in range(total):
        resumed = trainer(policy(kind))
        resumed.load(states[cut], cut)
        torch.rand(3)
        assert [resumed.step(step) for step in range(cut, total)] == figures[cut:]
        for name, part in resumed.state().items():
            assert part.keys() == end[name].keys()
            assert all(torch.equal(x, end[name][key]) for key, x in part.items()), (cut, name)


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("end_token", [None, 8])
def test_ranks_and_micro_batches_average_to_the_whole_batchs_gradients(
    monkeypatch: pytest.MonkeyPatch, step: int, end_token: int | None
) -> None:
    def begun(**options: Any) -> PolicyTrainer:
        one = trainer(policy(end_token=end_token), **options)
        # Unequal lengths: what ranks and parts weigh must not depend on who has the longer chunks.
        if end_token is not None:
            one.tokens[::2, 2], one.tokens[::2, 3:] = end_token, -100
        if step > 3:
            one.load(halfway, 3)
            gradients(monkeypatch, one, 3)
            one.learner.optimizer.zero_grad()
        return one

    halfway_run = trainer(policy(end_token=end_token))
    for before in range(3):
        halfway_run.step(before)
    halfway = halfway_run.state()
    whole = gradients(monkeypatch, begun(), step)
    parts = gradients(monkeypatch, begun(accumulate=2), step)
    ranks = [gradients(monkeypatch, begun(place=Place(rank=rank, ranks=2)), step) for rank in range(2)]
    assert whole
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, gradient, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_cross_entropy_of_action_tokens_alone() -> None:
    network = policy("patches", end_token=8)
    one = trainer(network, feature_noise=0.0, batch_size=200, condition_dropout=ConditionDropout())
    one.tokens[::2, 2], one.tokens[::2, 3:] = 8, -100
    with torch.no_grad():
        logits = network.logits(network.encode(inputs_of(DATA)), "none", one.tokens.clamp_min(0))
    each = F.cross_entropy(logits.mT, one.tokens, ignore_index=-100, reduction="none")
    counted = one.tokens != -100
    assert counted[0].tolist() == [True] * 3 + [False] * 2  # two tokens and the end
    rows = torch.randint(len(DATA), (200,), generator=generator(2, "frames", 0))
    expected = sum(each[row].sum() for row in rows) / sum(counted[row].sum() for row in rows)
    right = sum(((logits.argmax(-1) == one.tokens) & counted)[row].sum() for row in rows)
    figures = one.step(0)
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert figures["token_accuracy"] == pytest.approx(
        int(right) / int(sum(counted[row].sum() for row in rows))
    )


def test_conditions_are_dropped_at_their_rates() -> None:
    text, state = ConditionDropout(text=0.1, state=0.2, both=0.3).hide((torch.arange(1000) + 0.5) / 1000)
    assert [int((text & ~state).sum()), int((state & ~text).sum()), int((text & state).sum())] == [
        100,
        200,
        300,
    ]
    assert not any(flags.any() for flags in ConditionDropout().hide(torch.zeros(5)))
    with pytest.raises(ValueError, match=r"exceed 1 together"):
        ConditionDropout(text=0.5, state=0.5, both=0.1)
    with pytest.raises(ValueError, match=r"mask=state hides state, which this policy is never told"):
        trainer(policy(state=False))


def test_perception_learns_to_find_what_words_name_in_unseen_pictures() -> None:
    network, frames = policy(), squares(150, 2)
    config = PolicyTrainingConfig(
        steps=1, optimizer=QUICK, perception=PerceptionConfig(steps=120, batch_size=32)
    )
    one = PolicyTrainer(network, frames, tokens_of(frames.actions), words, config, seed=0)
    for step in range(120):
        one.step(step)
    network.load_state_dict(one.weights())
    unseen = PerceptionData(squares(100, 1, seed=9), words, VisionConfig()).draw(0, 0, 100)
    with torch.no_grad():
        looks = network.vision(unseen.images, unseen.words)
    # The wrong square is 13 pixels away on average.
    assert float(pixel_errors(looks, unseen).median()) < 3


def test_views_ask_every_instruction_where_meanings_are_fixed_and_their_own_where_not() -> None:
    data = PerceptionData(DATA, words, VisionConfig())
    views = data.draw(0, 0, 10)
    texts = sorted(set(DATA.instructions))
    assert views.words.shape == (10, len(texts), 5)
    rows = [
        next(i for i in range(len(DATA)) if np.array_equal(DATA.images[i], image))
        for image in views.images.numpy()
    ]
    points = torch.from_numpy(DATA.keypoints) / 32 * 2 - 1
    for row, asked, coordinates in zip(rows, views.words, views.coordinates, strict=True):
        for query, ids in enumerate(asked):
            named = [
                i
                for i, colour in enumerate(COLOURS)
                if torch.equal(words([f"pick up the {colour} block"])[0], ids)
            ]
            torch.testing.assert_close(coordinates[0, query], points[row, 0, named[0]])
        torch.testing.assert_close(coordinates[0, -4:], points[row, 0])
        assert any(torch.equal(coordinates[0, -5], points[row, 0, i]) for i in np.unique(DATA.targets))
    mixed = replace(DATA, instructions=np.full(len(DATA), "pick up the block"))
    assert PerceptionData(mixed, words, VisionConfig()).draw(0, 0, 10).words.shape == (10, 1, 5)


def test_what_is_out_of_sight_or_unknown_teaches_nothing() -> None:
    keypoints = DATA.keypoints.copy()
    keypoints[:, :, 3] = 40
    hidden = PerceptionData(replace(DATA, keypoints=keypoints), words, VisionConfig()).draw(0, 0, 6)
    assert hidden.known.all((0, 1))[-4:].tolist() == [True, True, True, False]
    assert not hidden.known[..., -1].any()
    unknown = replace(DATA, targets=np.where(DATA.targets == 0, -1, DATA.targets))
    views = PerceptionData(unknown, words, VisionConfig()).draw(0, 0, 6)
    red = (views.words == WORDS.index("red")).any(-1)
    assert torch.equal(views.known[:, 0, : red.shape[1]], ~red)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoints": DATA.keypoints[:, :, :2]}, r"vision\.keypoints=4, but each frame of the data has 2"),
        ({"keypoints": DATA.keypoints[:, :, :0]}, r"has 0 per camera: .* vision\.kind=patches"),
        ({"targets": np.full(len(DATA), -1)}, r"no frame says which keypoint"),
        ({"targets": np.full(len(DATA), 4)}, r"target 4 is not one of the 4 keypoints"),
        ({"cameras": ("wrist",)}, r"the data's cameras are wrist and the policy's front"),
        ({"states": DATA.states[:, :2]}, r"the data's state has 2 entries and the policy's 3"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyTrainer(
            policy(), replace(DATA, **change), tokens_of(DATA.actions), words, PolicyTrainingConfig(), 0
        )


@pytest.mark.parametrize("tokens", [[[]], [[8]], [[0] * 5], [[0], [0]]])
def test_tokens_that_do_not_fit_are_refused(tokens: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"encode"):
        PolicyTrainer(policy(), DATA.pick(np.array([0])), tokens, words, PolicyTrainingConfig(), 0)


@pytest.mark.parametrize("kind", ["pointer", "patches"])
def test_data_parallel_wrapping_uses_every_weight_that_learns(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DistributedDataParallel refuses the next step if a weight that learns had no part in the last.
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = trainer(policy(kind))
        monkeypatch.setattr(whole, "averages", lambda place: True)
        wrapped = trainer(policy(kind), accumulate=2)
        for step in range(plain.total_steps):
            assert wrapped.step(step)["loss"] == pytest.approx(plain.step(step)["loss"], rel=1e-3)
            assert isinstance(wrapped.learner.wrapped, DistributedDataParallel)
    finally:
        dist.destroy_process_group()
