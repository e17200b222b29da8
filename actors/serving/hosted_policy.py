"""A version of a robot policy that is ready to serve, and batches whose rows do not depend on one another."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.serving.policy_probe import check_finite, policy_rows
from counterpoint.exactness import exact_sizes
from counterpoint.policies.observation import Observation
from counterpoint.policies.policy import check_mask
from counterpoint.selection.choice import decide
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream
from counterpoint.selection.decoding import scored_tokens

if TYPE_CHECKING:
    from counterpoint.policies.bundle import PolicyBundle

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of decisions that are tried: few, as each costs some decisions of that many."""
MOST_SHAPES = 64
"""Selections whose sizes are kept: candidates, masks and scored tokens are the clients' to vary."""
GREEDY = SelectionConfig(rule="greedy", candidates=1)
Asked = tuple[Observation, Stream]


class HostedPolicy:
    """A loaded policy; two are the same only if they are one object. It may be asked from several threads.

    Args:
        bundle: the policy, in eval mode on its device.
        version: names the weights.
        largest: decisions of a batch, at most.
        exact: fill batches up to numbers of decisions at which each has the same bits whatever its
            neighbours, found out by trying; else it may differ in its last bits with them.
        seed: of the candidates, as in a rollout; what a client calls seed names the stream.
    """

    def __init__(
        self, bundle: "PolicyBundle", version: str, largest: int, exact: bool = True, seed: int = 0
    ) -> None:
        self.bundle, self.version = bundle, version
        self.largest, self.exact, self.seed = largest, exact, seed
        self._sizes: dict[SelectionConfig, tuple[int, ...]] = {}

    def fitted(self, observation: Observation, selection: SelectionConfig) -> Observation:
        """Return what of an observation the policy looks at, so that any two can share a batch.

        Raises ValueError, in one line, if it does not fit the policy, or the policy lacks what `selection`
        masks.
        """
        check_mask(selection.mask or "none", self.bundle.policy.conditions)
        space = self.bundle.observation_space
        images = {name: image for name, image in observation.images.items() if name in space.cameras}
        state = observation.state if space.state else np.zeros(0, np.float32)
        fitted = replace(observation, images=images, state=state)
        self.bundle.prepare([fitted])
        return fitted

    def decide(self, asked: Sequence[Asked], selection: SelectionConfig) -> list[Decision]:
        """Return a decision for each observation; what is random follows from the seed and its stream alone.

        Raises as `choice.decide` does: for all of them, if one of them is at fault.
        """
        torch.get_num_threads()  # limits this thread's maths, see `exact_sizes`
        sizes = self.sizes(selection)
        decisions: list[Decision] = []
        while len(decisions) < len(asked):
            part = list(asked[len(decisions) : len(decisions) + sizes[-1]])
            filled = part + part[:1] * (next(size for size in sizes if size >= len(part)) - len(part))
            observations, streams = [one[0] for one in filled], [one[1] for one in filled]
            decisions += decide(self.bundle, observations, streams, selection, self.seed)[: len(part)]
        return decisions

    def sizes(self, selection: SelectionConfig) -> tuple[int, ...]:
        """Return the numbers of decisions, rising, that batches of `selection` are made of.

        The first time that a selection of its shape is asked for, they are found out by some dozens of
        decisions on made-up observations.
        """
        if not self.exact:
            return tuple(range(1, self.largest + 1))
        shape = self._shape(selection)
        sizes = self._sizes.get(shape)
        if sizes is None:
            sizes = self._sizes[shape] = self._found(shape)
            for oldest in list(self._sizes)[:-MOST_SHAPES]:
                self._sizes.pop(oldest, None)
        return sizes

    def canary(self) -> None:
        """Ask for a greedy chunk on noise, and find the sizes of greedy batches.

        Raises ValueError, in one line without paths, if what the policy computes is not finite.
        """
        check_finite(self.bundle)
        self.sizes(GREEDY)

    def _shape(self, selection: SelectionConfig) -> SelectionConfig:
        """Return the selection without what has no influence on which numbers are computed together."""
        scored = scored_tokens(selection, self.bundle.policy.max_tokens)
        count = 1 if selection.rule == "greedy" else selection.candidates
        return SelectionConfig(
            rule=selection.rule, candidates=count, mask=selection.mask, first_tokens=scored or None
        )

    def _found(self, shape: SelectionConfig) -> tuple[int, ...]:
        try:
            sizes = exact_sizes(policy_rows(self.bundle, shape), self.largest, SIZES)
        except ValueError:
            logger.warning("%s: even a decision alone differs from one time to the next", self.version)
            sizes = (1,)
        if sizes[-1] < self.largest:
            logger.warning(
                "%s: batches of %d are not exact in every row; they have at most %d decisions",
                self.version, self.largest, sizes[-1],
            )  # fmt: skip
        return sizes
