"""Confidences against SciPy and loops, in both directions of the divergence."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from counterpoint.selection.confidence import (
    aggregate,
    log_likelihood,
    log_probabilities,
    masked_condition_divergence,
    negative_entropy,
    self_certainty,
)


def some_logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("policy_temperature", "reference_temperature"), [(1.0, 4.0), (0.7, 1.0), (2.0, 2.0)]
)
def test_divergence_is_of_the_policy_from_the_reference(policy_temperature, reference_temperature):
    policy, reference = some_logits(2, 3, 9), some_logits(2, 3, 9, seed=1)
    found = masked_condition_divergence(policy, reference, policy_temperature, reference_temperature)
    p = softmax(policy.double().numpy() / policy_temperature, axis=-1)
    q = softmax(reference.double().numpy() / reference_temperature, axis=-1)
    np.testing.assert_allclose(found, entropy(q, p, axis=-1), rtol=1e-5)
    assert not np.allclose(found, entropy(p, q, axis=-1), rtol=0.05)
    assert found.dtype == torch.float32


def test_divergence_is_zero_of_itself_and_never_negative():
    logits = some_logits(50, 7)
    assert (masked_condition_divergence(logits, logits, 1.0, 1.0) == 0).all()
    almost = logits + 1e-6 * some_logits(50, 7, seed=2)
    assert (masked_condition_divergence(logits, almost, 1.0, 1.0) >= 0).all()
    assert (masked_condition_divergence(logits, logits, 1.0, 4.0) > 0).all()


def test_divergence_of_excluded_tokens_follows_the_definition():
    policy, reference = torch.tensor([1.0, 2.0, -torch.inf]), torch.tensor([0.5, -0.5, -torch.inf])
    expected = entropy(softmax([0.5, -0.5]), softmax([1.0, 2.0]))
    assert masked_condition_divergence(policy, reference, 1.0, 1.0).item() == pytest.approx(
        expected, rel=1e-5
    )
    assert masked_condition_divergence(policy, torch.zeros(3), 1.0, 1.0).item() == math.inf
    assert masked_condition_divergence(torch.tensor([1.0, torch.nan]), torch.zeros(2)).isnan()


def test_half_precision_logits_are_scored_in_single_precision():
    policy, reference = some_logits(4, 300).bfloat16(), some_logits(4, 300, seed=1).bfloat16()
    found = masked_condition_divergence(policy, reference)
    assert torch.equal(found, masked_condition_divergence(policy.float(), reference.float()))
    assert log_probabilities(policy).dtype == torch.float32
    far = torch.tensor([0.0, -120.0]).bfloat16()  # its probability underflows in every 16 or 32 bit type
    assert masked_condition_divergence(far, torch.zeros(2).bfloat16()).item() == pytest.approx(
        60 - math.log(2)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_self_certainty_and_entropy_are_scipys(temperature):
    logits = some_logits(5, 13)
    p = softmax(logits.double().numpy() / temperature, axis=-1)
    uniform = np.full(13, 1 / 13)
    certainty = [entropy(uniform, row) for row in p]
    np.testing.assert_allclose(self_certainty(logits, temperature), certainty, rtol=1e-5)
    np.testing.assert_allclose(negative_entropy(logits, temperature), -entropy(p, axis=-1), rtol=1e-5)
    assert (self_certainty(torch.ones(2, 5)) == 0).all()
    assert negative_entropy(torch.tensor([0.0, -torch.inf])).item() == 0


def test_a_reference_at_great_temperature_is_the_uniform_one():
    policy, reference = some_logits(6, 20), some_logits(6, 20, seed=1)
    limit = masked_condition_divergence(policy, reference, 1.0, 1e8)
    torch.testing.assert_close(limit, self_certainty(policy))


def test_log_likelihood_is_of_the_tokens_at_temperature_one():
    logits = some_logits(2, 3, 9)
    tokens = torch.tensor([[0, 8, 3], [1, 1, 7]])
    expected = log_softmax(logits.double().numpy(), axis=-1)
    for index in np.ndindex(2, 3):
        found = log_likelihood(logits, tokens)[index].item()
        assert found == pytest.approx(expected[(*index, tokens[index].item())], rel=1e-5)


@pytest.mark.parametrize("first_tokens", [None, 1, 3, 9])
def test_aggregates_are_those_of_a_loop_over_each_sequences_own_tokens(first_tokens):
    terms = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    lengths = [5, 3, 1, 0]
    alive = torch.arange(5) < torch.tensor(lengths)[:, None]
    terms[~alive] = torch.nan
    for row, length in enumerate(lengths):
        own = terms[row, :length][:first_tokens].double().tolist()
        assert aggregate(terms, alive, "sum", first_tokens)[row].item() == pytest.approx(sum(own))
        mean = sum(own) / max(len(own), 1)
        assert aggregate(terms, alive, "mean", first_tokens)[row].item() == pytest.approx(mean)
