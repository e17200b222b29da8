"""The repeated blocks of a network: what is gathered, and what is computed again, one at a time."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks, inner ones before those that contain them.

    They are what the model itself names (`_no_split_modules`), else the entries of its outermost ModuleLists.
    """
    named = getattr(network, "_no_split_modules", None)
    if named:
        return [m for m in reversed(list(network.modules())) if type(m).__name__ in named]
    found: list[nn.Module] = []
    for child in network.children():
        inner = list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
        # Lists of diffusers hold None where a block has no attention.
        found += [block for block in inner if block is not None]
    return found


def checkpoint_activations(network: nn.Module) -> None:
    """Make `network` compute its blocks' activations again in the backward pass.

    Models of diffusers do so by themselves; other blocks' forward is replaced, and no parameter is renamed.
    """
    if getattr(network, "_supports_gradient_checkpointing", False):
        enable: Callable[[], None] = getattr(network, "enable_gradient_checkpointing", lambda: None)
        enable()
        return
    for block in blocks_of(network):
        if not hasattr(block, "checkpointed"):
            block.forward = _checkpointed(block.forward)
            block.checkpointed = True  # type: ignore[assignment]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def again(*args: Any, **options: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options)

    return again
