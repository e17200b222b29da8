"""How sure a policy is of its action tokens, one number per token, and how the numbers are put together.

All are of distributions over the action vocabulary alone, from log-softmax in float32 whatever the type of
the logits. Except in `log_likelihood`, a token's number is one of the distribution that it was drawn from,
which rests on the tokens before it and not on the token itself.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log-softmax of `logits` [...,V] over `temperature`, float32."""
    logits = logits.float()
    return torch.log_softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)


def masked_condition_divergence(
    policy_logits: Tensor,
    reference_logits: Tensor,
    policy_temperature: float = 1.0,
    reference_temperature: float = 4.0,
) -> Tensor:
    """Return KL(Q || P) of the reference Q, whose conditions are masked, from the policy P: [...] of [...,V].

    MG-Select's confidence of a token, arXiv 2510.05681: C_i = sum_v Q_i(v) [log Q_i(v) - log P_i(v)], the
    reference first.
    """
    policy = log_probabilities(policy_logits, policy_temperature)
    reference = log_probabilities(reference_logits, reference_temperature)
    terms = reference.exp() * (reference - policy)
    # 0 log 0 is 0; elsewhere a NaN is a fault of the logits and must stay visible.
    terms = terms.masked_fill(reference == -torch.inf, 0.0)
    return terms.sum(-1).clamp_min(0.0)


def self_certainty(policy_logits: Tensor, policy_temperature: float = 1.0) -> Tensor:
    """Return KL(U || P) of the uniform distribution U from the policy P: [...] of [...,V].

    The direction is that of self-certainty, arXiv 2502.18581: -(1/V) sum_v log(V P(v)). It is also what
    `masked_condition_divergence` tends to as the reference's temperature grows.
    """
    policy = log_probabilities(policy_logits, policy_temperature)
    return (-policy.mean(-1) - math.log(policy.shape[-1])).clamp_min(0.0)


def negative_entropy(policy_logits: Tensor, policy_temperature: float = 1.0) -> Tensor:
    """Return sum_v P(v) log P(v), at most 0 and larger the sharper P is: [...] of [...,V]."""
    return -torch.special.entr(log_probabilities(policy_logits, policy_temperature).exp()).sum(-1)


def log_likelihood(policy_logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log P of `tokens` int64 [...] at temperature 1, given logits [...,V]."""
    return log_probabilities(policy_logits).gather(-1, tokens[..., None]).squeeze(-1)


def aggregate(
    terms: Tensor, alive: Tensor, how: Literal["sum", "mean"], first_tokens: int | None = None
) -> Tensor:
    """Return the sum or mean of a sequence's first terms, float64 [...] of `terms` [...,L].

    `alive` bool [...,L] says which positions the sequence has: up to its end token, which is one of its
    tokens because it was drawn from a distribution like any other. Those behind contribute nothing and do not
    count in a mean. All are taken where `first_tokens` is None.
    """
    terms, alive = terms[..., :first_tokens], alive[..., :first_tokens]
    total = terms.double().masked_fill(~alive, 0.0).sum(-1)
    return total if how == "sum" else total / alive.sum(-1).clamp_min(1)
