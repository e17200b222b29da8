"""Counter-based seeds: a random stream is named by what it is for, never by what ran before it.

Any process can rebuild any stream (the noise of step 17, head 203's third life) from the run's seed
and the stream's name alone, so a resumed run, a restarted actor and a run spread over other actors all
draw the same numbers.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Simulators take seeds and no torch.
    import torch

Name = int | str


def seed_of(run_seed: int, *name: Name) -> int:
    """Return the 63-bit seed of the stream `name` of a run.

    The parts are hashed with their types and lengths (BLAKE2b), so that `("a", 12)` and `("a1", 2)` differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (run_seed, *name):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(run_seed: int, *name: Name) -> "torch.Generator":
    """Return a CPU generator at the start of the stream `name`.

    Draws are made on the CPU and moved, because the same seed gives other numbers on another device.
    """
    import torch

    return torch.Generator().manual_seed(seed_of(run_seed, *name))
