"""Candidates of an autoregressive policy from one prefill, scored along the way.

The observations are read once with all conditions and once with those masked, in one pass. Their key-value
caches are repeated for the candidates, and candidates and references advance in one batch; the references
leave it as soon as their last aggregated token is scored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.policies.masks import Mask
from counterpoint.policies.policy import Inputs, TokenPolicy
from counterpoint.seeds import generator
from counterpoint.selection.confidence import (
    log_likelihood,
    log_probabilities,
    masked_condition_divergence,
    negative_entropy,
    self_certainty,
)
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream


@dataclass(frozen=True)
class Candidates:
    """Sampled token sequences and their terms of confidence."""

    tokens: Tensor
    """int64 [B,N,L]; behind a sequence's end, the end token again."""
    alive: Tensor
    """Positions that a sequence has, its end token included, bool [B,N,L]."""
    terms: Tensor
    """What the rule aggregates, float32 [B,N,K]; zero where a sequence had ended, K=0 for rules without."""


Sampler = Callable[[TokenPolicy, Inputs, Tensor | None, SelectionConfig], Candidates]
"""Draws candidates from a policy as `sample_candidates` does."""


def predraw(streams: Sequence[Stream], seed: int, candidates: int, tokens: int) -> Tensor:
    """Return the uniform numbers that decide the candidates' tokens, float64 [B,N,L] in [0,1).

    A decision's numbers follow from `seed` and its stream alone, and the first of N candidates get the same
    ones whatever N is.
    """
    drawn = [
        torch.rand(
            candidates,
            tokens,
            dtype=torch.float64,
            generator=generator(seed, "action", stream.seed, stream.decision),
        )
        for stream in streams
    ]
    return torch.stack(drawn)


def scored_tokens(selection: SelectionConfig, max_tokens: int) -> int:
    """Return K, the number of tokens whose terms the rule aggregates."""
    if selection.rule in ("greedy", "random", "oracle"):
        return 0
    if selection.rule == "likelihood" or selection.first_tokens is None:
        return max_tokens
    return min(selection.first_tokens, max_tokens)


def masks_of(selection: SelectionConfig) -> list[Mask]:
    """Return the hearings that the rule needs, that with all conditions first."""
    return ["none", selection.mask] if selection.mask is not None else ["none"]


@torch.inference_mode()
def sample_candidates(
    policy: TokenPolicy, inputs: Inputs, uniforms: Tensor | None, selection: SelectionConfig
) -> Candidates:
    """Return N candidates of each of B decisions, sampled by inverse CDF from `uniforms` float64 [B,N,L].

    Without `uniforms` the likeliest token is taken each time, N=1. A candidate depends on its own numbers
    only, not on how many others there are nor on what else is in the batch, to within rounding of its logits.
    `selection` must not mask a condition that the policy lacks, see `check_mask`.
    """
    masks = masks_of(selection)
    prefix = policy.prefill(policy.encode(inputs), masks)
    decisions, length = prefix.rows // len(masks), policy.max_tokens
    device = prefix.logits.device
    uniforms = None if uniforms is None else uniforms.to(device)
    count = 1 if uniforms is None else uniforms.shape[1]
    scored = scored_tokens(selection, length)
    end = policy.end_token
    tokens = torch.full((decisions, count, length), end or 0, device=device)
    alive = torch.zeros((decisions, count, length), dtype=torch.bool, device=device)
    terms = torch.zeros((decisions, count, scored), device=device)
    going = torch.ones((decisions, count), dtype=torch.bool, device=device)
    hearings = len(masks)
    for i in range(length):
        # [hearings,B,1 or N,V]: before its first token, a decision has one row for all of its candidates.
        logits = prefix.logits.unflatten(0, (hearings, decisions, -1))
        drawn = draw(logits[0], None if uniforms is None else uniforms[:, :, i], selection.temperature)
        if i < scored:
            terms[:, :, i] = term(selection, logits, drawn).masked_fill(~going, 0.0)
        alive[:, :, i] = going
        if end is not None:
            drawn = drawn.masked_fill(~going, end)
            going = going & (drawn != end)
        tokens[:, :, i] = drawn
        if i + 1 == length or (end is not None and not going.any()):
            break
        if hearings > 1 and i + 1 >= scored:
            prefix, hearings = prefix.pick(slice(decisions * logits.shape[2])), 1
        if i == 0:
            prefix = prefix.repeat(count)
        prefix = policy.advance(prefix, drawn.flatten().repeat(hearings))
    return Candidates(tokens, alive, terms)


def draw(logits: Tensor, uniforms: Tensor | None, temperature: float) -> Tensor:
    """Return tokens int64 [B,N] by inverse CDF of `uniforms` [B,N] from `logits` [B,1,V] or [B,N,V].

    A token is where the cumulative distribution, in float64, first exceeds the uniform number, so that one
    without probability is never drawn. Without `uniforms` it is the likeliest, the first among equals.
    """
    if uniforms is None:
        return logits.argmax(-1)
    heights = log_probabilities(logits, temperature).exp().cumsum(-1, dtype=torch.float64)
    wanted = uniforms.unflatten(1, (logits.shape[1], -1)) * heights[..., -1:]
    drawn = torch.searchsorted(heights, wanted, right=True).flatten(1)
    return drawn.clamp_max(logits.shape[-1] - 1)


def term(selection: SelectionConfig, logits: Tensor, drawn: Tensor) -> Tensor:
    """Return the rule's term of one token, float32 [B,N] or, where all candidates share it, [B,1].

    `logits` [hearings,B,1 or N,V] are those with all conditions and, if the rule has a mask, with that;
    `drawn` int64 [B,N] are the tokens drawn from the first.
    """
    policy, temperature = logits[0], selection.policy_temperature
    match selection.rule:
        case "masked_condition":
            return masked_condition_divergence(
                policy, logits[1], temperature, selection.reference_temperature
            )
        case "self_certainty":
            return self_certainty(policy, temperature)
        case "entropy":
            return negative_entropy(policy, temperature)
        case "likelihood":
            return log_likelihood(policy.expand(-1, drawn.shape[1], -1), drawn)
        case rule:
            raise ValueError(f"rule={rule} has no confidence: nothing to compute")
