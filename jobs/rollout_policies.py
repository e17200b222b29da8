"""The policies of a comparison: trained where they are missing, checked, and told from one another."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import yaml

from actors.sampler import POLICY, check_environment, load_policy
from cluster.manifest import MANIFEST as SEAL
from cluster.storage import RunStore
from counterpoint.policies.policy import check_mask
from jobs import train_policy
from jobs.collect import CollectConfig
from jobs.rollout_settings import PolicyArm, RolloutConfig
from jobs.runs import CONFIG, read_config

logger = logging.getLogger(__name__)

MANIFEST = f"{POLICY}/policy.json"


def train_missing(config: RolloutConfig) -> None:
    """Train the policies whose runs have none, then check that every policy suits environment and rules.

    Raises ValueError for a policy that is missing and cannot be made, or that does not suit.
    """
    for arm, seed in _trainings(config):
        if not RunStore(arm.uri(seed)).exists(MANIFEST):
            train_one(arm, seed)
    observations, actions = config.environment.observation_space(), config.environment.action_space()
    for arm, seed in _trainings(config):
        bundle = load_policy(arm.uri(seed))
        check_environment(bundle, observations, actions)
        check_unseen(config, arm, seed)
        for rule in config.rules_of(arm.name):
            check_mask(rule.selection.mask or "none", bundle.policy.conditions)


def train_one(arm: PolicyArm, seed: int | None) -> None:
    """Train one policy of an arm, or go on with a training that was stopped."""
    uri = arm.uri(seed)
    if arm.train is None:
        raise ValueError(
            f"the policy {arm.name} has no run at {uri}: train it with `python -m jobs.train "
            f"configs/vla/policy.yaml run={uri}`, or give this arm a section `train`"
        )
    changes: dict[str, Any] = {"run": uri, "resume": RunStore(uri).exists(CONFIG)}
    changes |= {} if seed is None else {"seed": seed}
    logger.info("training the policy %s into %s", arm.name, uri)
    train_policy.main(arm.train.model_copy(update=changes))
    if not RunStore(uri).exists(MANIFEST):  # the training was asked to stop, and stopped in good order
        raise KeyboardInterrupt


def fingerprint(uri: str) -> str:
    """Return what tells a run's policy from any other: a digest of all its files, sealed or not."""
    store, digest = RunStore(uri), hashlib.sha256()
    for name in (name for name in store.list(POLICY) if name != f"{POLICY}/{SEAL}"):
        digest.update(name.encode() + b"\0" + hashlib.sha256(store.read_bytes(name)).digest())
    return digest.hexdigest()[:16]


def check_unseen(config: RolloutConfig, arm: PolicyArm, seed: int | None) -> None:
    """Raise ValueError if a policy learned from episodes or scenes on which it would be played.

    A policy whose training or demonstrations are no longer there is not checked.
    """
    store = RunStore(arm.uri(seed))
    trained = yaml.safe_load(store.read_text(CONFIG)) if store.exists(CONFIG) else {}
    demonstrations = RunStore(trained.get("demonstrations", arm.uri(seed)))
    if demonstrations.uri == store.uri or not demonstrations.exists(CONFIG):
        return
    seen: CollectConfig = read_config(demonstrations, CollectConfig)
    for what, first, count in (
        ("demonstrations", seen.first_seed, seen.episodes),
        ("scenes", seen.first_scene_seed, seen.scenes),
    ):
        if first < config.seeds.stop and config.seeds.start < first + count:
            raise ValueError(
                f"first_seed={config.first_seed}: {config.episodes} episodes from there meet the {what} of "
                f"seeds {first} to {first + count - 1} that {arm.name} learned from: choose another"
            )


def _trainings(config: RolloutConfig) -> Iterator[tuple[PolicyArm, int | None]]:
    return ((arm, seed) for arm in config.policies for seed in arm.training_seeds)
