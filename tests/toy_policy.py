"""A policy with random weights for the toy environment, saved as a run would save it."""

import numpy as np
from toy_environment import INSTRUCTIONS, OBSERVATION_SPACE, SPACE, ToyEnvironment

from counterpoint.actions.config import TokenizerConfig, build_tokenizer
from counterpoint.policies.bundle import PolicyBundle, new_bundle
from counterpoint.policies.compact import CompactConfig
from counterpoint.policies.vision import VisionConfig

LONGEST = 6
"""Words of the longest instruction."""


def toy_bundle(seed: int = 0) -> PolicyBundle:
    """A policy of 8 bins per step and dimension that has seen nothing."""
    chunks = np.random.default_rng(0).uniform(SPACE.low, SPACE.high, (64, SPACE.horizon, 2))
    tokenizer = build_tokenizer(TokenizerConfig(bins=8, quantiles=(0.0, 1.0)), chunks, "toy")
    network = CompactConfig(
        hidden=16, layers=1, heads=2, intermediate=16, vision=VisionConfig(kind="patches", patch=8)
    )
    bundle = new_bundle(
        network, OBSERVATION_SPACE, SPACE, tokenizer, INSTRUCTIONS, LONGEST, chunks, "toy", seed
    )
    bundle.policy.eval()
    return bundle


def save_toy_policy(run) -> str:
    """Save the policy where a run's samplers look for it, and return the run's URI."""
    toy_bundle().save(run / "policy")
    return str(run)


def observations(count: int):
    """First observations of different episodes."""
    return [ToyEnvironment().start(seed) for seed in range(count)]
