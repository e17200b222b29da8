"""What a computation holds in memory, found out on paper: tensors with shapes and lifetimes, but no numbers.

The real modules run under `FakeTensorMode`, in which a tensor has shape, dtype and storage size but no data,
so that a step of billions of parameters is followed on any machine. Every storage is counted from the
operation that makes it until Python or autograd drops it, as an eager allocator would see it: what autograd
saves, what backward needs on its way and what is freed again need no formulas of their own.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is entered, on paper or for real."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held since the start, or since the last `mark`."""
        self.aside = 0
        """Bytes of those held now that are accounted for elsewhere (gradients, once they are whole)."""
        self.kept = 0.0
        """Share of what is set aside that counts all the same: the shard that this process keeps."""
        self.peak_beside = 0
        """Most bytes held at once, of those set aside only the share `kept`."""
        self.scratch = 0
        """Most bytes of input, weight and output of one convolution: what a library may copy into a layout of
        its own while it runs, which no tensor shows."""
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and enter what it made."""
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
            if func is aten._local_scalar_dense.default:
                return _number(args[0].dtype)
            args = tree_map(_without_masks, args) if func is aten.index.Tensor else args
            if func is aten.bincount.default:
                length = (kwargs or {}).get("minlength", args[-1])
                func, args, kwargs = aten.new_zeros.default, (args[0], [length]), {}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.enter_tensor(leaf)
        if func is aten.convolution.default:
            self.scratch = max(self.scratch, sum(t.numel() * t.element_size() for t in (*args[:2], made)))
        return made

    def enter_tensor(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is dropped."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._drop, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_beside = max(self.peak_beside, self._beside())

    def mark(self) -> int:
        """Forget the peaks so far and return the bytes held now."""
        self.peak, self.peak_beside = self.live, self._beside()
        return self.live

    def _beside(self) -> int:
        return self.live - int(self.aside * (1.0 - self.kept))

    def _drop(self, size: int) -> None:
        self.live -= size


@contextlib.contextmanager
def on_paper() -> Iterator[Ledger]:
    """Make every tensor inside one without data, and count them.

    Modules must be built inside too. What code reads from tensors is made up: a floating point number is 1,
    an integer 0, a truth value true, and a mask of rows takes them all. `Module.to` leaves a module as it is:
    torch cannot move a tensor without data, not even to where it is already.
    """
    move = nn.Module.to
    nn.Module.to = _stay  # type: ignore[method-assign,assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
            yield ledger
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def _stay(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
    return module


def _number(dtype: torch.dtype) -> float | int | bool:
    return 1.0 if dtype.is_floating_point else True if dtype is torch.bool else 0


def _without_masks(index: Any) -> Any:
    """Replace a mask by the numbers of all its rows: how many it would take is not known on paper."""
    if isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() == 1:
        return torch.arange(len(index), device=index.device)
    return index
