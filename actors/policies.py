"""How any process builds the same policy and trainer, from stored demonstrations and the configuration."""

import functools
from dataclasses import dataclass

import numpy as np

from actors.worker import Report
from cluster.storage import RunStore
from counterpoint.actions.config import TokenizerConfig, build_tokenizer
from counterpoint.actions.space import ActionSpace
from counterpoint.data.demonstrations import Demonstrations, read_demonstrations
from counterpoint.place import Place
from counterpoint.policies.bundle import PolicyBundle, new_bundle
from counterpoint.policies.compact import CompactConfig
from counterpoint.policies.observation import ObservationSpace
from counterpoint.policies.training import PolicyTrainer, PolicyTrainingConfig
from counterpoint.policies.words import encode_words


@dataclass(frozen=True)
class PolicyRecipe:
    """Everything a policy's trainer is made of; small enough to send anywhere, to be called in a worker."""

    shards: str
    """URI of the folder with the demonstrations' Parquet shards."""
    demonstrations: int | None
    """Learn only from so many episodes, those of the lowest seeds; None takes all."""
    instructions: tuple[str, ...]
    """All instructions that the policy may be given."""
    observation_space: ObservationSpace
    action_space: ActionSpace
    tokenizer: TokenizerConfig
    network: CompactConfig
    words_length: int
    training: PolicyTrainingConfig
    seed: int
    accumulate: int = 1

    def __call__(self, place: Place, store: RunStore, report: Report) -> PolicyTrainer:
        """Build this rank's trainer."""
        shown, views, chunks = self.data()
        bundle = self.bundle(shown, chunks)
        words = functools.partial(encode_words, bundle.words, length=bundle.words_length)
        return PolicyTrainer(
            bundle.policy, shown, bundle.tokenizer.encode(chunks), words, self.training, self.seed, views,
            place, self.accumulate,
        )  # fmt: skip

    def data(self) -> tuple[Demonstrations, Demonstrations, np.ndarray]:
        """Return the demonstrations to imitate, frames to learn to see from (scenes too), and chunks [F,H,D].

        The chunks are of the demonstrations.
        """
        stored = read_demonstrations(self.shards)
        shown = stored.of_kind("demonstration")
        if self.demonstrations is not None:
            shown = stored.first_episodes(self.demonstrations)
        seen = (stored.kinds == "scene") | np.isin(stored.episodes, np.unique(shown.episodes))
        return shown, stored.pick(seen), shown.chunks(self.action_space.horizon)

    def bundle(self, shown: Demonstrations, chunks: np.ndarray) -> PolicyBundle:
        """Return the bundle before training: tokenizers and statistics of the data, new weights."""
        tokenizer = build_tokenizer(self.tokenizer, chunks, shown.fingerprint())
        return new_bundle(
            self.network, self.observation_space, self.action_space, tokenizer, self.instructions,
            self.words_length, chunks, self.shards, self.seed,
        )  # fmt: skip
