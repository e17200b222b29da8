"""Small exact policies and a bundle around them, for the tests of selection."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from counterpoint.actions.tokenizer import Undecodable
from counterpoint.policies.observation import Observation
from counterpoint.policies.policy import HIDES
from counterpoint.policies.prefix import Prefix, join, layers_of

WORDS, PIXELS, STATE, WIDTH = 3, 6, 2, 16


class TinyPolicy(nn.Module):
    """A random Llama over image, words and state; what is masked is left out: prefixes differ in length."""

    def __init__(self, vocabulary=11, max_tokens=7, end_token=None, sharpness=6.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conditions = frozenset({"text", "state"})
        self.vocabulary, self.max_tokens, self.end_token = vocabulary, max_tokens, end_token
        self.eye, self.feel = nn.Linear(PIXELS, WIDTH), nn.Linear(STATE, WIDTH)
        self.read, self.act = nn.Embedding(9, WIDTH), nn.Embedding(vocabulary, WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.model = LlamaModel(
            LlamaConfig(
                hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                vocab_size=1, max_position_embeddings=64, initializer_range=0.3,
            )
        )  # fmt: skip
        self.sharpness = sharpness
        self.calls: Counter[str] = Counter()
        self.rows_advanced: list[int] = []
        self.eval().requires_grad_(False)

    def encode(self, inputs):
        self.calls["encode"] += 1
        return dict(inputs) | {"image": self.eye(inputs["image"])}

    def prefill(self, encoded, masks):
        self.calls["prefill"] += 1
        return join([self._hear(encoded, mask) for mask in masks])

    def advance(self, prefix, tokens):
        self.calls["advance"] += 1
        self.rows_advanced.append(len(tokens))
        assert tokens.min() >= 0
        assert tokens.max() < self.vocabulary
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(prefix.rows, 1)], 1)
        cache = prefix.cache()
        hidden = self.model(
            inputs_embeds=self.act(tokens)[:, None],
            attention_mask=mask.long(),
            position_ids=prefix.positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return Prefix(self._heads(hidden[:, -1]), layers_of(cache), mask, prefix.positions + 1)

    def logits(self, encoded, mask, tokens):
        self.calls["logits"] += 1
        before = self._before(encoded, mask)
        sequence = torch.cat([before, self.act(tokens)], 1)
        hidden = self.model(inputs_embeds=sequence, use_cache=False).last_hidden_state
        return self._heads(hidden[:, before.shape[1] - 1 : -1])

    def _heads(self, hidden):
        return (self.sharpness * self.head(hidden)).float()

    def _before(self, encoded, mask):
        parts = {
            "image": encoded["image"][:, None],
            "text": self.read(encoded["words"]),
            "state": self.feel(encoded["state"])[:, None],
        }
        return torch.cat([part for name, part in parts.items() if name not in HIDES[mask]], 1)

    def _hear(self, encoded, mask):
        before = self._before(encoded, mask)
        read = self.model(inputs_embeds=before, use_cache=True)
        rows, length = before.shape[:2]
        return Prefix(
            self._heads(read.last_hidden_state[:, -1]),
            layers_of(read.past_key_values),
            torch.ones(rows, length, dtype=torch.bool),
            torch.full((rows,), length),
        )


def some_inputs(batch=3, seed=5):
    """Return random inputs of `TinyPolicy`."""
    stream = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(batch, PIXELS, generator=stream),
        "words": torch.randint(9, (batch, WORDS), generator=stream),
        "state": torch.randn(batch, STATE, generator=stream),
    }


@dataclass
class TinyBundle:
    """Decodes tokens as one row of numbers; sequences with a `forbidden` one do not decode."""

    policy: TinyPolicy
    forbidden: frozenset[int] = frozenset()

    def prepare(self, observations: Sequence[Observation]):
        rows = [some_inputs(1, seed=int(observation.state[0])) for observation in observations]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def decode(self, tokens):
        if self.forbidden & set(tokens):
            raise Undecodable(f"tokens {tokens} hold a forbidden one")
        chunk = np.zeros((1, self.policy.max_tokens), dtype=np.float32)
        chunk[0, : len(tokens)] = tokens
        return chunk, int(sum(tokens) % 5)


def observed(*numbers: int) -> list[Observation]:
    """Return an observation for each of `numbers`, from which `TinyBundle` makes its inputs."""
    return [Observation({}, np.array([number], dtype=np.float32), "go") for number in numbers]
