"""Batch sizes at which a row's bits are the same, whatever its place and neighbours: found out by trying.

Libraries of linear algebra choose their kernels, and with them the order of sums, by the batch's size, so
that a row computed alone may differ in its last bits from the same row in a batch. Batches that are filled up
to sizes known to agree make a result independent of who else is there. Which these are depends on the
network, the machine and the number of threads, so it is tried where the network is used, when it is loaded.
"""

import functools
import random
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from diffusers import UNet2DModel

from counterpoint.seeds import generator
from counterpoint.unet import null_class

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sizes that are tried: half as large again at most from one to the next, so that little is filled up."""
TRIALS = 4
"""Arrangements of each size: one differing bit in a row's thousands settles it, so few are enough."""

Evaluate = Callable[[Sequence[int]], Sequence[Hashable]]
"""From the ids of a batch's rows (any from 0, repeated ones too) to one result per row, such as its bytes."""


def exact_sizes(evaluate: Evaluate, largest: int, candidates: Sequence[int] = CANDIDATES) -> tuple[int, ...]:
    """Return the batch sizes, rising and at most `largest`, that agree in every row's results.

    They are `largest` and those `candidates` below it that give what `largest` gives, in other positions,
    beside other neighbours and copies of one row. Where `largest` by itself differs with the position, the
    next candidate below takes its part: at the end stands (1,), a row alone, which has no neighbours. Raises
    ValueError if even that differs from one time to the next, or `largest` is not positive.
    """
    if largest < 1:
        raise ValueError(f"largest={largest}: pass at least 1")
    # Torch limits a thread's maths only once it is asked in it, and a sum's order depends on the limit.
    torch.get_num_threads()
    tried = sorted({1, largest, *(size for size in candidates if 1 < size < largest)}, reverse=True)
    for position, size in enumerate(tried):
        expected = _expected(evaluate, size)
        if _agrees(evaluate, size, expected):
            smaller = [other for other in tried[position + 1 :] if _agrees(evaluate, other, expected)]
            return tuple(sorted([size, *smaller]))
    raise ValueError("a row evaluated alone gives other results each time: no batch size is exact")


def unet_rows(unet: UNet2DModel, seed: int = 0) -> Evaluate:
    """Return an `evaluate` for a class-conditional network: rows of noise at any timestep under any class.

    A result is a row of the output [C,H,W] as bytes. Row i depends on the seed and i alone.
    """
    weights = next(unet.parameters())
    side = unet.config.sample_size

    @functools.cache
    def row(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stream = generator(seed, "exactness", i)
        noise = torch.randn(unet.config.in_channels, side, side, generator=stream)
        timestep = torch.randint(1000, (), generator=stream)
        return noise.to(weights), timestep, torch.randint(null_class(unet) + 1, (), generator=stream)

    @torch.no_grad()
    def evaluate(rows: Sequence[int]) -> list[bytes]:
        noise, timesteps, labels = (torch.stack(part) for part in zip(*map(row, rows), strict=True))
        output = unet(noise, timesteps.to(noise.device), class_labels=labels.to(noise.device)).sample
        return [image.tobytes() for image in output.float().cpu().numpy()]

    return evaluate


def _expected(evaluate: Evaluate, size: int) -> list[Hashable]:
    """Return the results of rows 0 to 2 `size` - 1, in two batches."""
    return [result for start in (0, size) for result in evaluate(range(start, start + size))]


def _agrees(evaluate: Evaluate, size: int, expected: Sequence[Hashable]) -> bool:
    return all(
        list(evaluate(rows)) == [expected[row] for row in rows] for rows in _arrangements(size, len(expected))
    )


def _arrangements(size: int, rows: int) -> Iterator[list[int]]:
    """Yield batches of `size` out of `rows` rows: in new places beside others, then one with copies."""
    for trial in range(TRIALS):
        yield random.Random(trial).sample(range(rows), size)
    yield [min(row, (size - 1) // 2) for row in range(size)]
