"""One decision of a policy in the loop: sample candidates, drop what cannot be decoded, keep the best."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.actions.tokenizer import Undecodable
from counterpoint.policies.observation import Observation
from counterpoint.policies.policy import Inputs, TokenPolicy, check_mask
from counterpoint.selection.confidence import aggregate
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream
from counterpoint.selection.decoding import Sampler, predraw, sample_candidates

Chunk = tuple[np.ndarray, int]
"""An action chunk float32 [H,D] and how many of its entries were clipped."""

GREEDY = SelectionConfig(rule="greedy")


class Bundle(Protocol):
    """What a decision needs of a policy's bundle; see `PolicyBundle`."""

    @property
    def policy(self) -> TokenPolicy:
        """The network."""
        ...

    def prepare(self, observations: Sequence[Observation]) -> Inputs:
        """Return the observations as the policy's inputs."""
        ...

    def decode(self, tokens: Sequence[int]) -> Chunk:
        """Return the chunk that `tokens` stand for; raises Undecodable."""
        ...


def decide(
    bundle: Bundle,
    observations: Sequence[Observation],
    streams: Sequence[Stream],
    selection: SelectionConfig,
    seed: int,
    sampler: Sampler = sample_candidates,
) -> list[Decision]:
    """Return one decision per observation, whose random numbers follow from `seed` and its stream.

    The decodable candidate of largest confidence is kept, the first among equals; candidates whose
    confidences rest on the same tokens are equal whatever rounding says. "random" and "oracle" keep the first
    that is decodable: candidates are exchangeable, and the oracle's caller chooses among them afterwards.
    Where no candidate can be decoded, or none of those that can has a confidence other than NaN, the greedy
    chunk is taken.

    Raises ValueError if the mask hides a condition that the policy lacks or an observation does not fit, and
    Undecodable if the greedy chunk is needed and cannot be decoded either: then the policy has no action to
    offer, and the episode has failed. Decisions do not depend on one another, so a caller whose batch raises
    can make them one by one.
    """
    if len(observations) != len(streams):
        raise ValueError(f"{len(observations)} observations have {len(streams)} streams: give one to each")
    if not observations:
        return []
    policy = bundle.policy
    check_mask(selection.mask or "none", policy.conditions)
    inputs = bundle.prepare(observations)
    uniforms = None
    if selection.rule != "greedy":
        uniforms = predraw(streams, seed, selection.candidates, policy.max_tokens)
    sampled = sampler(policy, inputs, uniforms, selection)
    tokens, alive, terms = sampled.tokens.cpu(), sampled.alive.cpu(), sampled.terms.cpu()
    scored = terms.shape[-1]
    confidences = aggregate(terms, alive[..., :scored], selection.aggregate).numpy()
    decisions = []
    for b in range(len(streams)):
        sequences = spoken(tokens[b], alive[b], policy.end_token)
        chunks = [_decoded(bundle, sequence) for sequence in sequences]
        alike = first_alike(tokens[b, :, : rests_on(selection, scored)].numpy())
        totals = confidences[b, alike]
        chosen = choose(totals, chunks)
        kept = chunks[chosen] if chosen >= 0 else None
        if kept is None:
            alone = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
            kept = _greedy(bundle, alone)
        decisions.append(_decision(kept, chosen, chunks, sequences, totals, terms[b].numpy()[alike]))
    return decisions


def rests_on(selection: SelectionConfig, scored: int) -> int:
    """Return how many first tokens decide a confidence that aggregates `scored` terms.

    The last term of a distribution rests on the tokens before it; that of a likelihood also on its own.
    """
    return scored if selection.rule == "likelihood" else max(scored - 1, 0)


def first_alike(tokens: np.ndarray) -> NDArray[np.intp]:
    """Return for each row of `tokens` [N,k] the index of the first row that equals it."""
    return np.array([(tokens == row).all(-1).argmax() for row in tokens])


def choose(confidences: np.ndarray, chunks: Sequence[Chunk | None]) -> int:
    """Return the index of the first of the largest `confidences` [N]; -1 where there is none.

    Candidates that are None and confidences that are NaN are passed over.
    """
    eligible = np.flatnonzero([chunk is not None for chunk in chunks] & ~np.isnan(confidences))
    return int(eligible[confidences[eligible].argmax()]) if len(eligible) else -1


def spoken(tokens: Tensor, alive: Tensor, end_token: int | None) -> list[tuple[int, ...]]:
    """Return the action tokens of `tokens` [N,L] up to each row's end, without the end token."""
    return [
        tuple(token for token, there in zip(row, present, strict=True) if there and token != end_token)
        for row, present in zip(tokens.tolist(), alive.tolist(), strict=True)
    ]


def _greedy(bundle: Bundle, inputs: Inputs) -> Chunk:
    sampled = sample_candidates(bundle.policy, inputs, None, GREEDY)
    (sequence,) = spoken(sampled.tokens[0], sampled.alive[0], bundle.policy.end_token)
    return bundle.decode(sequence)


def _decoded(bundle: Bundle, sequence: tuple[int, ...]) -> Chunk | None:
    try:
        return bundle.decode(sequence)
    except Undecodable:
        return None


def _decision(
    kept: Chunk,
    chosen: int,
    chunks: Sequence[Chunk | None],
    sequences: Sequence[tuple[int, ...]],
    confidences: np.ndarray,
    terms: np.ndarray,
) -> Decision:
    nothing = np.full_like(kept[0], np.nan)
    lost = np.array([chunk is None for chunk in chunks])
    return Decision(
        actions=kept[0],
        chosen=chosen,
        candidates=np.stack([nothing if chunk is None else chunk[0] for chunk in chunks]),
        tokens=tuple(sequences),
        confidences=np.where(lost, -np.inf, confidences if terms.shape[1] else np.nan),
        token_confidences=terms,
        rejected=int(lost.sum()),
        clipped=kept[1],
    )
