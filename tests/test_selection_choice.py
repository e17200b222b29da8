"""The kept candidate: ties, rejections, numbers that are none, and the naive implementation's choice."""

import numpy as np
import pytest
import torch
from selection_policies import TinyBundle, TinyPolicy, observed

from counterpoint.actions.tokenizer import Undecodable
from counterpoint.selection.choice import choose, decide, first_alike
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream
from counterpoint.selection.decoding import Candidates
from counterpoint.selection.naive import sample_candidates_naively

STREAMS = [Stream(3, 0), Stream(3, 1), Stream(8, 0)]
MASKED = SelectionConfig(rule="masked_condition", mask="both", temperature=1.0)
GREEDY = SelectionConfig(rule="greedy")


def decided(bundle, selection, **options):
    return decide(bundle, observed(1, 2, 3), STREAMS, selection, 0, **options)


@pytest.mark.parametrize("end_token", [None, 4])
@pytest.mark.parametrize(
    "selection",
    [
        MASKED,
        MASKED.model_copy(update={"mask": "state", "aggregate": "mean", "candidates": 6}),
        SelectionConfig(rule="likelihood", temperature=1.0),
        SelectionConfig(rule="entropy", temperature=1.0),
        SelectionConfig(rule="self_certainty", temperature=1.0),
        SelectionConfig(rule="random", temperature=1.0),
        GREEDY,
    ],
    ids=lambda s: s.rule,
)
def test_the_choice_is_the_naive_implementations(selection, end_token):
    forbidden = frozenset[int]() if selection.rule == "greedy" else frozenset({9})
    bundle = TinyBundle(TinyPolicy(end_token=end_token, sharpness=3.0), forbidden)
    ours = decided(bundle, selection)
    naive = decided(bundle, selection, sampler=sample_candidates_naively)
    for one, other in zip(ours, naive, strict=True):
        assert (one.chosen, one.tokens, one.rejected) == (other.chosen, other.tokens, other.rejected)
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_allclose(one.confidences, other.confidences, atol=1e-4)


def test_the_largest_confidence_of_the_decodable_is_kept():
    bundle = TinyBundle(TinyPolicy(sharpness=3.0), forbidden=frozenset({9}))
    decisions = decided(bundle, MASKED.model_copy(update={"candidates": 16}))
    assert sum(decision.rejected for decision in decisions) > 0
    for decision in decisions:
        undecodable = [9 in tokens for tokens in decision.tokens]
        assert decision.rejected == sum(undecodable)
        assert (decision.confidences[undecodable] == -np.inf).all()
        assert np.isnan(decision.candidates[undecodable]).all()
        assert decision.chosen == decision.confidences.argmax()
        kept = decision.tokens[decision.chosen]
        np.testing.assert_array_equal(decision.actions, bundle.decode(kept)[0])
        np.testing.assert_array_equal(decision.actions, decision.candidates[decision.chosen])
        assert decision.clipped == bundle.decode(kept)[1]
        sound = ~np.array(undecodable)
        np.testing.assert_allclose(
            decision.confidences[sound], decision.token_confidences[sound].sum(-1, dtype=np.float64)
        )
        assert decision.token_confidences.shape == (16, 5)
        assert decision.actions.dtype == np.float32
        assert decision.confidences.dtype == np.float64


def test_one_candidate_is_the_first_of_many_and_the_random_one():
    bundle = TinyBundle(TinyPolicy())
    alone = decided(bundle, MASKED.model_copy(update={"candidates": 1}))
    many = decided(bundle, MASKED)
    plain = decided(bundle, SelectionConfig(rule="random", temperature=1.0))
    for one, other, third in zip(alone, many, plain, strict=True):
        assert one.tokens == other.tokens[:1]
        assert one.chosen == third.chosen == 0
        assert one.tokens[0] == third.tokens[0]
        np.testing.assert_array_equal(one.actions, third.actions)
    assert any(decision.chosen > 0 for decision in many)


def test_decisions_do_not_depend_on_what_they_are_batched_with():
    bundle = TinyBundle(TinyPolicy(end_token=4, sharpness=3.0))
    together = decided(bundle, MASKED)
    for number, stream, decision in zip((1, 2, 3), STREAMS, together, strict=True):
        (alone,) = decide(bundle, observed(number), [stream], MASKED, 0)
        assert (alone.chosen, alone.tokens) == (decision.chosen, decision.tokens)
        np.testing.assert_allclose(alone.confidences, decision.confidences, atol=1e-4)
    assert decide(bundle, [], [], MASKED, 0) == []
    with pytest.raises(ValueError, match="1 observations have 3 streams"):
        decide(bundle, observed(1), STREAMS, MASKED, 0)


def test_candidates_alike_in_what_counts_tie_whatever_rounding_says():
    tokens = torch.tensor([[5, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 9], [1, 1, 2, 0]])
    noisy = ([1.0, 2.0, 1.0, 1.0 + noise] for noise in (0.0, 1e-6, 2e-6))
    terms = torch.tensor([[1.0, 1.0, 1.0, 1.0], *noisy])

    def sampler(policy, inputs, uniforms, selection):
        return Candidates(tokens[None], torch.ones(1, 4, 4, dtype=torch.bool), terms[None])

    bundle = TinyBundle(TinyPolicy(max_tokens=4))
    selection = MASKED.model_copy(update={"first_tokens": 4})
    (decision,) = decide(bundle, observed(1), STREAMS[:1], selection, 0, sampler=sampler)
    assert decision.chosen == 1
    assert decision.confidences.tolist() == [4.0, 5.0, 5.0, 5.0]
    assert (decision.token_confidences[1:] == decision.token_confidences[1]).all()
    likelihood = SelectionConfig(rule="likelihood")
    (decision,) = decide(bundle, observed(1), STREAMS[:1], likelihood, 0, sampler=sampler)
    assert decision.chosen == 3  # the last token, too, counts for a likelihood
    rejecting = TinyBundle(TinyPolicy(max_tokens=4), forbidden=frozenset({3}))
    (decision,) = decide(rejecting, observed(1), STREAMS[:1], selection, 0, sampler=sampler)
    assert (decision.chosen, decision.rejected) == (2, 2)


def test_one_scored_token_makes_all_candidates_tie():
    decisions = decided(TinyBundle(TinyPolicy()), MASKED.model_copy(update={"first_tokens": 1}))
    assert [decision.chosen for decision in decisions] == [0, 0, 0]
    assert first_alike(np.array([[1, 2], [3, 4], [1, 2], [3, 5], [3, 4]])).tolist() == [0, 1, 0, 3, 1]
    assert first_alike(np.empty((3, 0), dtype=np.int64)).tolist() == [0, 0, 0]


def test_a_confidence_that_is_no_number_never_wins():
    chunk = (np.zeros((1, 1), np.float32), 0)
    assert choose(np.array([np.nan, 1.0, 2.0, np.nan]), [chunk] * 4) == 2
    assert choose(np.array([np.nan, 1.0, 2.0, np.nan]), [chunk, chunk, None, chunk]) == 1
    assert choose(np.array([3.0, -np.inf]), [None, chunk]) == 1
    assert choose(np.array([1.0, 1.0]), [chunk, chunk]) == 0
    assert choose(np.array([np.nan, 5.0]), [chunk, None]) == -1


@pytest.mark.parametrize("rule", ["random", "oracle"])
def test_rules_without_confidence_keep_the_first_decodable(rule):
    bundle = TinyBundle(TinyPolicy(sharpness=3.0), forbidden=frozenset({3, 9}))
    decisions = decided(bundle, SelectionConfig(rule=rule, temperature=1.0, candidates=16))
    assert any(decision.chosen > 0 for decision in decisions)
    for decision in decisions:
        sound = [not {3, 9} & set(tokens) for tokens in decision.tokens]
        assert decision.chosen == sound.index(True)
        assert np.isnan(decision.confidences[sound]).all()
        assert decision.token_confidences.shape == (16, 0)
        assert decision.candidates.shape == (16, 1, 7)


def test_where_nothing_decodes_the_greedy_chunk_is_taken():
    policy = TinyPolicy(sharpness=3.0)
    greedy = decided(TinyBundle(policy), GREEDY)
    spoken = {token for decision in greedy for token in decision.tokens[0]}

    class Picky(TinyBundle):
        def decode(self, tokens):
            if tuple(tokens) not in {decision.tokens[0] for decision in greedy}:
                raise Undecodable("not greedy")
            return super().decode(tokens)

    decisions = decided(Picky(policy), MASKED)
    for decision, plain in zip(decisions, greedy, strict=True):
        assert (decision.chosen, decision.rejected) == (-1, 4)
        np.testing.assert_array_equal(decision.actions, plain.actions)
        assert np.isnan(decision.candidates).all()
        assert (decision.confidences == -np.inf).all()
    for selection in (MASKED, GREEDY):
        with pytest.raises(Undecodable, match="forbidden"):
            decided(TinyBundle(policy, forbidden=frozenset(range(11)) | spoken), selection)


def test_a_mask_of_a_condition_that_the_policy_lacks_is_refused():
    bundle = TinyBundle(TinyPolicy())
    bundle.policy.conditions = frozenset({"text"})
    with pytest.raises(ValueError, match="mask=both hides state, which this policy is never told"):
        decided(bundle, MASKED)
    assert bundle.policy.calls["encode"] == 0


def test_a_policy_that_yields_no_numbers_still_acts_greedily():
    bundle = TinyBundle(TinyPolicy())
    torch.nn.init.constant_(bundle.policy.head.weight, torch.nan)
    for decision in decided(bundle, MASKED):
        assert (decision.chosen, decision.rejected) == (-1, 0)
        assert np.isnan(decision.confidences).all()
        assert decision.actions.shape == (1, 7)
