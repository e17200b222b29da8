"""Perturbed-attention guidance (PAG, Ahn et al. 2024, arXiv 2403.17377), with all branches in one batch.

The sample is pushed away from what the network says when chosen layers of self-attention have the identity in
place of their attention map, so that each token sees itself alone (eq. 13). It takes neither training nor a
condition. diffusers' own guider hooks whole layers and costs a forward pass a branch; here single rows of a
batch are perturbed, so that requests with other guidance, or none, may share it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

SHORTHANDS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
"""Parts of a UNet. Of a stack of transformer blocks "mid" is the middle one."""
STACK = "transformer_blocks"

# Which rows of which layers are perturbed belongs to the thread that asks for it; the layers are everybody's.
_MARKED: ContextVar[Mapping[Attention, Tensor] | None] = ContextVar("_MARKED", default=None)
_INSTALLING = threading.Lock()


class BatchedPerturbedAttentionGuidance(BaseGuidance):
    """eps = guided + s (cond - perturbed), where guided is classifier-free guidance in diffusers' convention.

    Guided is null + guidance_scale (cond - null), which is the paper's eq. 14 with w = guidance_scale - 1; at
    guidance_scale 1 the null branch is not heard, which leaves eq. 10. The perturbed branch hears the
    conditional input. An unconditional model is one whose labels are the null class everywhere.

    Args:
        guidance_scale: 1 for no classifier-free guidance.
        perturbed_guidance_scale: the paper's s, at least 0; 0 is none. (Its ADM code has g = s + 1.)
        layers: self-attention layers to perturb, see `self_attention`.
        start: fraction of the steps after which guidance of both kinds starts.
        stop: fraction of the steps after which it stops.
        enabled: False is the plain conditional model.

    Raises ValueError for no layers and a negative scale.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_cond_skip"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        perturbed_guidance_scale: float = 1.0,
        layers: Sequence[str | int] = ("mid",),
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        if not layers or isinstance(layers, str):
            raise ValueError(f"layers={layers!r}: give a list of one layer or more, such as [mid]")
        if perturbed_guidance_scale < 0:
            raise ValueError(f"perturbed_guidance_scale={perturbed_guidance_scale}: give 0 (none) or more")
        self.guidance_scale, self.perturbed_guidance_scale = guidance_scale, perturbed_guidance_scale
        self.layers = tuple(layers)

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list[Any]:
        """Return a state for each of `branches`, with the first entries of `data`, or the second for null."""
        return [self._prepare_batch(data, int(branch == "pred_uncond"), branch) for branch in self.branches]

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_skip: Tensor | None = None
    ) -> GuiderOutput:
        """Combine the branches' outputs, each [B,...]; those that were not heard are None."""
        pred = pred_cond
        if pred_uncond is not None:
            pred = pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_cond_skip is not None:
            pred = pred + self.perturbed_guidance_scale * self.direction(pred_cond, pred_cond_skip)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def direction(self, conditional: Tensor, perturbed: Tensor) -> Tensor:
        """Return where the sample is pushed to: away from the perturbed branch."""
        return conditional - perturbed

    @contextlib.contextmanager
    def perturbing(self, network: nn.Module, rows: Tensor) -> Iterator[None]:
        """Perturb `layers` of `network` for the marked `rows`; see `perturbed_rows`."""
        with perturbed_rows(self_attention(network, self.layers), rows):
            yield

    @property
    def branches(self) -> list[str]:
        """What is heard at the present step, by diffusers' names."""
        within = self._enabled and (
            self._num_inference_steps is None
            or int(self._start * self._num_inference_steps)
            <= self._step
            < int(self._stop * self._num_inference_steps)
        )
        null = ["pred_uncond"] if within and self.guidance_scale != 1.0 else []
        perturbed = ["pred_cond_skip"] if within and self.perturbed_guidance_scale != 0.0 else []
        return ["pred_cond", *null, *perturbed]

    @property
    def is_conditional(self) -> bool:
        """Whether the branch that is being prepared hears the condition."""
        return self.branches[max(self._count_prepared - 1, 0)] != "pred_uncond"

    @property
    def num_conditions(self) -> int:
        """How many branches there are."""
        return len(self.branches)


def self_attention(network: nn.Module, layers: Sequence[str | int]) -> dict[str, Attention]:
    """Return the self-attention layers that `layers` mean, by their names in `network`.

    An entry is the exact name of a module, which is such a layer or holds some (all of them are meant); or
    down, mid, up (see SHORTHANDS); or the index of a transformer block. So 1 is never also block 10.
    Raises ValueError, with the names there are, for an entry that means no layer.
    """
    there = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention
    }
    found: dict[str, Attention] = {}
    for entry in layers:
        name = _full_name(network, entry)
        meant = {key: layer for key, layer in there.items() if f"{key}.".startswith(f"{name}.")}
        if not meant:
            names = ", ".join(there) or "none at all"
            raise ValueError(f"layers has {entry}, where the network has no self-attention: it has {names}")
        found |= meant
    return found


@contextlib.contextmanager
def perturbed_rows(layers: Mapping[str, Attention], rows: Tensor) -> Iterator[None]:
    """Put the identity in place of the attention map of `layers` for the marked `rows` (bool [n]) of a batch.

    Only the thread, and the asyncio task, that entered the context sees a difference. Contexts may be nested:
    a row is perturbed in a layer if any of them marks it. The layers have their own processors back at the
    end. Raises ValueError for a layer whose processor has an attention map of its own kind.
    """
    before = _MARKED.get() or {}
    marks = {layer: before[layer] | rows if layer in before else rows for layer in layers.values()}
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(_install(name, layer))
        token = _MARKED.set({**before, **marks})
        stack.callback(_MARKED.reset, token)
        yield


class PerturbedAttnProcessor:
    """diffusers' processor of a layer, perturbed for the rows that the present context marks."""

    def __init__(self, processor: AttnProcessor2_0) -> None:
        self.processor = processor
        self.users = 0

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the layer's output for `hidden_states` [n,...], in which the marks are of the first axis."""
        rows = (_MARKED.get() or {}).get(attn)
        context = contextlib.nullcontext() if rows is None else _OwnValues(rows)
        with context:
            output: Tensor = self.processor(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, **options
            )
        return output


class _OwnValues(TorchFunctionMode):
    """Within it, softmax attention gives the marked rows' tokens their own values; for this thread only.

    The other rows have the very bits that they have without it.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not scaled_dot_product_attention:
            return output
        value = args[2]
        return torch.where(self.rows.to(value.device)[:, None, None, None], value, output)


def _full_name(network: nn.Module, entry: str | int) -> str:
    if isinstance(entry, int):
        return f"{STACK}.{entry}"
    stack = getattr(network, STACK, None)
    if entry == "mid" and stack is not None:
        return f"{STACK}.{len(stack) // 2}"
    return SHORTHANDS.get(entry, entry)


def _install(name: str, layer: Attention) -> Callable[[], None]:
    """Give `layer` a processor that perturbs, unless it has one, and return what takes it away again.

    The last of those who use it at the same time takes it away.
    """
    with _INSTALLING:
        if not isinstance(layer.processor, PerturbedAttnProcessor):
            if type(layer.processor) is not AttnProcessor2_0:
                raise ValueError(
                    f"layers has {name}, whose attention is computed by {type(layer.processor).__name__}: "
                    "only AttnProcessor2_0's, which is softmax attention, can be perturbed"
                )
            layer.set_processor(PerturbedAttnProcessor(layer.processor))
        processor = layer.processor
        processor.users += 1

    def uninstall() -> None:
        with _INSTALLING:
            processor.users -= 1
            if not processor.users:
                layer.set_processor(processor.processor)

    return uninstall
