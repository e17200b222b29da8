"""Candidates without any sharing: the plain meaning of the method, for checks and as a rival in benchmarks.

Every token of every candidate, and the reference of every scored one, has a forward pass of its own: batch of
one, no cache, images encoded anew.
"""

import torch
from torch import Tensor

from counterpoint.policies.masks import Mask
from counterpoint.policies.policy import Inputs, TokenPolicy
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decoding import Candidates, draw, masks_of, scored_tokens, term


@torch.inference_mode()
def sample_candidates_naively(
    policy: TokenPolicy, inputs: Inputs, uniforms: Tensor | None, selection: SelectionConfig
) -> Candidates:
    """Return what `decoding.sample_candidates` returns, on the CPU, one forward pass at a time."""
    decisions = len(next(iter(inputs.values())))
    count = 1 if uniforms is None else uniforms.shape[1]
    shape = (decisions, count, policy.max_tokens)
    tokens = torch.full(shape, policy.end_token or 0)
    alive = torch.zeros(shape, dtype=torch.bool)
    terms = torch.zeros((decisions, count, scored_tokens(selection, policy.max_tokens)))
    for b in range(decisions):
        alone = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
        for n in range(count):
            for i in range(policy.max_tokens):
                before = tokens[b, n, :i]
                masks = masks_of(selection) if i < terms.shape[-1] else masks_of(selection)[:1]
                logits = torch.stack([_next_logits(policy, alone, mask, before) for mask in masks])
                uniform = None if uniforms is None else uniforms[b : b + 1, n : n + 1, i]
                drawn = draw(logits[0], uniform, selection.temperature)
                if i < terms.shape[-1]:
                    terms[b, n, i] = term(selection, logits, drawn).squeeze()
                tokens[b, n, i], alive[b, n, i] = drawn.squeeze(), True
                if policy.end_token is not None and drawn.item() == policy.end_token:
                    break
    return Candidates(tokens, alive, terms)


def _next_logits(policy: TokenPolicy, inputs: Inputs, mask: Mask, before: Tensor) -> Tensor:
    """Return the logits of the token after `before` [i], float32 [1,1,V]."""
    device = next(iter(inputs.values())).device
    # The last entry of the tokens is seen by no logits; any valid token will do.
    tokens = torch.cat([before, before.new_zeros(1)])[None].to(device)
    return policy.logits(policy.encode(inputs), mask, tokens)[:, -1:].cpu()
