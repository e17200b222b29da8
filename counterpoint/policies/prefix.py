"""Rows of a language model that have read their prefix: the key-value cache and where each row stands.

Rows can be repeated without copying, joined whatever their lengths, and picked out: all that decoding several
candidates and their references from one prefill needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """What `R` rows have read, and what they expect next."""

    logits: Tensor
    """Of the next action token, float32 [R,V] over the action vocabulary only."""
    layers: Layers
    """Keys and values of each layer [R,heads,S,d]."""
    mask: Tensor
    """Which of the S cached positions a row may look at, bool [R,S]."""
    positions: Tensor
    """Position of each row's next token, int64 [R]."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def cache(self) -> DynamicCache:
        """Return a cache for the model to extend; the tensors here are never written to."""
        cache = DynamicCache()
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            # Handed over to the constructor, both would be copied.
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache

    def repeat(self, times: int) -> "Prefix":
        """Return each row `times` times, copies of a row side by side; keys and values are expanded views."""
        return self._map(lambda x: _repeat(x, times))

    def pick(self, rows: Tensor | slice) -> "Prefix":
        """Return the rows at the indices `rows` [n], or a view of those in a slice."""
        return self._map(lambda x: x[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Prefix":
        layers = tuple((change(keys), change(values)) for keys, values in self.layers)
        return Prefix(change(self.logits), layers, change(self.mask), change(self.positions))


def layers_of(cache: DynamicCache) -> Layers:
    """Return the keys and values of a model's cache."""
    return tuple((keys, values) for keys, values, _ in cache)


def join(prefixes: Sequence[Prefix]) -> Prefix:
    """Return the rows of all `prefixes` one after the other, the shorter ones padded on the left."""
    if len(prefixes) == 1:
        return prefixes[0]
    length = max(prefix.mask.shape[1] for prefix in prefixes)
    padded = [_pad(prefix, length) for prefix in prefixes]
    layers = tuple(
        (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
        for layer in zip(*(prefix.layers for prefix in padded), strict=True)
    )
    return Prefix(
        torch.cat([prefix.logits for prefix in padded]),
        layers,
        torch.cat([prefix.mask for prefix in padded]),
        torch.cat([prefix.positions for prefix in padded]),
    )


def _pad(prefix: Prefix, length: int) -> Prefix:
    missing = length - prefix.mask.shape[1]
    if missing == 0:
        return prefix
    layers = tuple(
        (F.pad(keys, (0, 0, missing, 0)), F.pad(values, (0, 0, missing, 0))) for keys, values in prefix.layers
    )
    return Prefix(prefix.logits, layers, F.pad(prefix.mask, (missing, 0), value=False), prefix.positions)


def _repeat(x: Tensor, times: int) -> Tensor:
    # Of one row this is a view; of several, `flatten` has to copy.
    return x[:, None].expand(-1, times, *x.shape[1:]).flatten(0, 1)
