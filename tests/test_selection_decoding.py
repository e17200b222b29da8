"""Candidates from one prefill: the ones that separate forwards give, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from selection_policies import TinyPolicy, some_inputs

from counterpoint.selection.confidence import aggregate, masked_condition_divergence
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream
from counterpoint.selection.decoding import draw, predraw, sample_candidates, scored_tokens
from counterpoint.selection.naive import sample_candidates_naively

STREAMS = [Stream(3, 0), Stream(3, 1), Stream(8, 0)]
MASKED = SelectionConfig(rule="masked_condition", mask="text", temperature=1.0)


def sampled(policy, selection, batch=3, candidates=4, sampler=sample_candidates):
    uniforms = predraw(STREAMS[:batch], 0, candidates, policy.max_tokens)
    return sampler(policy, some_inputs(batch), uniforms, selection)


SELECTIONS = [
    *(MASKED.model_copy(update={"mask": mask}) for mask in ("text", "state", "both")),
    MASKED.model_copy(update={"first_tokens": None, "policy_temperature": 0.8}),
    MASKED.model_copy(update={"first_tokens": 1}),
    SelectionConfig(rule="likelihood", temperature=1.0),
    SelectionConfig(rule="entropy", temperature=1.0),
    SelectionConfig(rule="self_certainty", first_tokens=3, temperature=1.0),
    SelectionConfig(rule="random", temperature=0.5),
]


@pytest.mark.parametrize("end_token", [None, 4])
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s.rule}-{s.mask}-{s.first_tokens}")
def test_one_prefill_gives_what_separate_uncached_forwards_give(selection, end_token):
    policy = TinyPolicy(end_token=end_token, sharpness=3.0)
    shared = sampled(policy, selection, batch=2)
    naive = sampled(policy, selection, batch=2, sampler=sample_candidates_naively)
    assert torch.equal(shared.alive, naive.alive)
    assert torch.equal(shared.tokens * shared.alive, naive.tokens * naive.alive)
    assert shared.terms.shape == (2, 4, scored_tokens(selection, policy.max_tokens))
    torch.testing.assert_close(shared.terms, naive.terms, atol=1e-5, rtol=1e-5)
    if end_token is not None:
        assert not shared.alive.all()
        assert len(shared.alive.sum(-1).unique()) > 1


def test_greedy_takes_the_likeliest_token_each_time():
    policy = TinyPolicy()
    greedy = SelectionConfig(rule="greedy")
    found = sample_candidates(policy, some_inputs(), None, greedy).tokens
    tokens = torch.zeros(3, 7, dtype=torch.long)
    for i in range(7):
        tokens[:, i] = policy.logits(policy.encode(some_inputs()), "none", tokens)[:, i].argmax(-1)
    assert torch.equal(found[:, 0], tokens)
    naive = sample_candidates_naively(policy, some_inputs(), None, greedy)
    assert torch.equal(found, naive.tokens)


def test_low_temperature_is_greedy():
    policy = TinyPolicy()
    cold = sampled(policy, SelectionConfig(rule="random", temperature=1e-4)).tokens
    greedy = sample_candidates(policy, some_inputs(), None, SelectionConfig(rule="greedy")).tokens
    assert torch.equal(cold, greedy.expand(-1, 4, -1))


@pytest.mark.parametrize("selection", [MASKED, SelectionConfig(rule="random", temperature=1.0)])
def test_a_candidate_does_not_depend_on_the_batch_or_on_the_other_candidates(selection):
    policy = TinyPolicy(end_token=4, sharpness=3.0)
    whole = sampled(policy, selection, candidates=16)
    for b, stream in enumerate(STREAMS):
        alone = {name: tensor[b : b + 1] for name, tensor in some_inputs().items()}
        for count in (1, 4):
            few = sample_candidates(policy, alone, predraw([stream], 0, count, 7), selection)
            assert torch.equal(few.tokens[0], whole.tokens[b, :count])
            torch.testing.assert_close(few.terms[0], whole.terms[b, :count], atol=1e-5, rtol=1e-5)
    assert len({tuple(row.tolist()) for row in whole.tokens[0]}) > 4


def test_streams_name_their_numbers():
    many, few = predraw(STREAMS, 0, 16, 7), predraw(STREAMS[1:], 0, 3, 7)
    assert torch.equal(many[1:, :3], few)
    assert many.dtype == torch.float64
    assert len(many.unique()) == many.numel()
    assert not torch.equal(many, predraw(STREAMS, 1, 16, 7))


def test_images_are_encoded_once_and_references_leave_when_they_are_scored():
    policy = TinyPolicy()
    sampled(policy, MASKED.model_copy(update={"first_tokens": 5}), candidates=4)
    assert policy.calls == {"encode": 1, "prefill": 1, "advance": 6}
    assert policy.rows_advanced == [
        24,
        24,
        24,
        24,
        12,
        12,
    ]  # position 0 needs no candidates, and 4 advances do
    policy.rows_advanced.clear()
    sampled(policy, MASKED.model_copy(update={"first_tokens": 1}), candidates=4)
    assert policy.rows_advanced == [12] * 6
    policy.rows_advanced.clear()
    sampled(policy, MASKED.model_copy(update={"first_tokens": None}), candidates=4)
    assert policy.rows_advanced == [24] * 6


def test_decoding_stops_when_all_have_ended():
    policy = TinyPolicy(end_token=4, sharpness=3.0)
    torch.nn.init.zeros_(policy.head.weight)
    early = torch.full((3, 4, 7), 4.5 / 11, dtype=torch.float64)  # of eleven equal tokens, the fifth
    found = sample_candidates(policy, some_inputs(), early, MASKED)
    assert policy.calls["advance"] == 0
    assert found.alive.sum().item() == 12
    assert (found.tokens == 4).all()


def test_the_end_token_counts_and_what_follows_does_not():
    policy = TinyPolicy(end_token=4, sharpness=3.0)
    found = sampled(policy, MASKED.model_copy(update={"first_tokens": None}), candidates=16)
    ended = (found.tokens == 4) & found.alive
    assert ended.any()
    assert (ended.sum(-1) <= 1).all()
    assert (found.terms[~found.alive] == 0).all()
    assert (found.terms[ended] > 0).all()
    for row, there in zip(found.tokens.flatten(0, 1), found.alive.flatten(0, 1), strict=True):
        ends = (row == 4).nonzero().flatten()
        assert there.sum().item() == (ends[0].item() + 1 if len(ends) else 7)


def test_the_first_term_is_the_same_number_for_all_candidates():
    terms = sampled(TinyPolicy(), MASKED, candidates=16).terms
    assert (terms[:, :, 0] == terms[:, :1, 0]).all()
    assert len(terms[0, :, 1].unique()) > 1
    assert len(terms[:, 0, 0].unique()) == 3


def test_the_last_aggregated_token_and_later_ones_do_not_matter():
    policy = TinyPolicy()
    uniforms = predraw(STREAMS, 0, 8, 7)
    changed = uniforms.clone()
    changed[:, :, 4:] = 1 - uniforms[:, :, 4:]
    ones = [sample_candidates(policy, some_inputs(), u, MASKED) for u in (uniforms, changed)]
    assert not torch.equal(ones[0].tokens[:, :, 4], ones[1].tokens[:, :, 4])
    assert torch.equal(ones[0].terms, ones[1].terms)
    changed[:, :, 3] = 1 - uniforms[:, :, 3]
    other = sample_candidates(policy, some_inputs(), changed, MASKED)
    assert not torch.equal(ones[0].terms[..., 4], other.terms[..., 4])
    assert torch.equal(ones[0].terms[..., :4], other.terms[..., :4])


def test_nothing_masked_at_equal_temperatures_is_no_divergence():
    same = MASKED.model_copy(update={"mask": "none", "reference_temperature": 1.0})
    found = sampled(TinyPolicy(), same)
    assert found.terms.abs().max() < 1e-5
    assert sampled(TinyPolicy(), MASKED).terms.min() > 1e-3


def test_candidates_follow_the_tempered_distribution():
    logits = torch.tensor([0.3, -torch.inf, 1.2, -0.5])[None, None]
    uniforms = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[None]
    drawn = draw(logits, uniforms, 0.5)
    share = torch.bincount(drawn.flatten(), minlength=4) / 4000
    torch.testing.assert_close(share, torch.softmax(logits[0, 0] / 0.5, -1), atol=1e-3, rtol=0)
    for edge in (0.0, np.nextafter(1.0, 0.0)):
        token = draw(logits, torch.full((1, 1), edge, dtype=torch.float64), 0.5).item()
        assert token == (0 if edge == 0.0 else 3)


def test_position_zero_draws_as_later_positions_do():
    logits = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    uniforms = predraw(STREAMS[:2], 0, 5, 1)[:, :, 0]
    assert torch.equal(draw(logits, uniforms, 1.0), draw(logits.expand(-1, 5, -1), uniforms, 1.0))


def test_terms_are_the_divergence_of_teacher_forced_logits():
    policy = TinyPolicy()
    found = sampled(policy, MASKED, candidates=2)
    encoded = policy.encode(some_inputs())
    for n in range(2):
        own, masked = (policy.logits(encoded, mask, found.tokens[:, n]) for mask in ("none", "text"))
        expected = masked_condition_divergence(own, masked, 1.0, 4.0)[:, :5]
        torch.testing.assert_close(found.terms[:, n], expected.detach(), atol=1e-5, rtol=1e-5)
        total = aggregate(found.terms, found.alive[..., :5], "sum")[:, n]
        torch.testing.assert_close(total, expected.detach().double().sum(-1), atol=1e-4, rtol=0)
