"""Made-up observations, and what a policy computes for them: by these a loaded policy is tried."""

import contextlib
import hashlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from counterpoint.actions.tokenizer import Undecodable
from counterpoint.exactness import Evaluate
from counterpoint.policies.masks import Mask
from counterpoint.policies.observation import Observation
from counterpoint.policies.policy import Inputs, TokenPolicy
from counterpoint.policies.prefix import Prefix
from counterpoint.policies.words import PAD, UNKNOWN
from counterpoint.seeds import seed_of
from counterpoint.selection.choice import spoken
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream
from counterpoint.selection.decoding import predraw, sample_candidates

if TYPE_CHECKING:
    from counterpoint.policies.bundle import PolicyBundle


def made_up(bundle: "PolicyBundle", index: int, seed: int = 0) -> Observation:
    """Return observation `index` of a stream of noise that fits the policy, in words that it knows."""
    noise = np.random.default_rng(seed_of(seed, "probe", index))
    images = {
        camera: noise.integers(0, 256, (*size, 3), np.uint8)
        for camera, size in bundle.observation_space.cameras.items()
    }
    state = noise.normal(0.0, 1.0, len(bundle.observation_space.state)).astype(np.float32)
    words = sorted(set(bundle.words.get_vocab()) - {PAD, UNKNOWN})
    count = int(noise.integers(1, bundle.words_length + 1))
    return Observation(images, state, " ".join(noise.choice(words, count)))


def policy_rows(bundle: "PolicyBundle", selection: SelectionConfig, seed: int = 0) -> Evaluate:
    """Return an `evaluate` for `exactness.exact_sizes`: decisions on made-up observations.

    A result is a digest of all that a decision rests on: its candidates' tokens, the terms of their
    confidence, and every logit that a token was drawn from or compared with. Logits behind a candidate's end
    do not count, as there are as many of them as the neighbours need.
    """
    observations: dict[int, Observation] = {}

    def evaluate(rows: Sequence[int]) -> list[Hashable]:
        for row in rows:
            if row not in observations:
                observations[row] = made_up(bundle, row, seed)
        policy = _Listened(bundle.policy)
        inputs = bundle.prepare([observations[row] for row in rows])
        uniforms = None
        if selection.rule != "greedy":
            streams = [Stream(row, 0) for row in rows]
            uniforms = predraw(streams, seed, selection.candidates, policy.max_tokens)
        sampled = sample_candidates(policy, inputs, uniforms, selection)
        tokens, alive, terms = sampled.tokens.cpu(), sampled.alive.cpu(), sampled.terms.cpu()
        return [
            _digest([tokens[b], terms[b], *_of_decision(policy.heard, alive[b], b, len(rows))])
            for b in range(len(rows))
        ]

    return evaluate


def check_finite(bundle: "PolicyBundle") -> None:
    """Let a policy choose on noise; raises ValueError, in one line, unless its logits and actions are finite.

    That noise leads to tokens which cannot be decoded is no fault.
    """
    policy = _Listened(bundle.policy)
    sampled = sample_candidates(policy, bundle.prepare([made_up(bundle, 0)]), None, SelectionConfig())
    (tokens,) = spoken(sampled.tokens[0].cpu(), sampled.alive[0].cpu(), policy.end_token)
    finite = all(bool(torch.isfinite(logits).all()) for logits in policy.heard)
    with contextlib.suppress(Undecodable):
        finite = finite and bool(np.isfinite(bundle.decode(tokens)[0]).all())
    if not finite:
        raise ValueError("the policy's actions are not finite: its weights are damaged or training diverged")


def _of_decision(heard: Sequence[Tensor], alive: Tensor, b: int, decisions: int) -> list[Tensor]:
    """Return the logits of decision `b`, where its candidates `alive` bool [N,L] had not ended.

    `heard` holds each step's logits [hearings*B*(1 or N),V]: before the first token, candidates share a row.
    """
    found = []
    for i, logits in enumerate(heard):
        copies = 1 if i == 0 else len(alive)
        own = logits.unflatten(0, (-1, decisions, copies))[:, b]
        found.append(own if i == 0 else own[:, alive[:, i]])
    return found


def _digest(tensors: Sequence[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()


class _Listened:
    """A `TokenPolicy` that keeps the logits it gives, on the CPU."""

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.conditions, self.vocabulary = policy.conditions, policy.vocabulary
        self.end_token, self.max_tokens = policy.end_token, policy.max_tokens
        self.heard: list[Tensor] = []

    def encode(self, inputs: Inputs) -> Inputs:
        return self.policy.encode(inputs)

    def prefill(self, encoded: Inputs, masks: Sequence[Mask]) -> Prefix:
        return self._keep(self.policy.prefill(encoded, masks))

    def advance(self, prefix: Prefix, tokens: Tensor) -> Prefix:
        return self._keep(self.policy.advance(prefix, tokens))

    def logits(self, encoded: Inputs, mask: Mask, tokens: Tensor) -> Tensor:
        return self.policy.logits(encoded, mask, tokens)

    def _keep(self, prefix: Prefix) -> Prefix:
        self.heard.append(prefix.logits.to("cpu", torch.float32))
        return prefix
