"""DeepSpeed's ZeRO: optimizer state (1), gradients too (2), weights too (3) shared out over the processes.

One engine serves a network for its whole training: a change of stage sets its optimizer back in place, and no
second engine ever takes part in the same graph. DeepSpeed is imported when it is asked for.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from counterpoint.strategies.learner import MOMENTS, Learner, Shard
from counterpoint.strategies.whole import adamw


def load_deepspeed() -> Any:
    """Import DeepSpeed for training, which uses none of its compiled operators."""
    import deepspeed

    # By its name: as an attribute, deepspeed.comm.torch is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A collective of inference, which it would compile for minutes on a machine without a GPU.
    backend.build_shm_op = lambda: None
    return deepspeed


class ZeroLearner(Learner):
    """A network under a DeepSpeed engine, with torch's AdamW on this rank's flat fp32 partition.

    With precision bf16 the network's weights, those that do not learn included, are held as bf16.
    """

    def _share_out(self) -> None:
        deepspeed = load_deepspeed()
        self.stage = self.place.strategy.zero_stage
        self.dtypes = {name: tensor.dtype for name, tensor in self.module.state_dict().items()}
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.answer: type | None = None
        # Before DeepSpeed's own hook, which looks for what to gather weights for in tuples, lists and dicts.
        self.opening = self.module.register_forward_hook(self._opened)
        engine, _, _, _ = deepspeed.initialize(
            model=self.module, optimizer=adamw(self.parameters, self), config=self._settings(),
            dist_init_required=False,
        )  # fmt: skip
        self.engine: Any = engine
        self.zero: Any = engine.optimizer
        self.optimizer = self.zero.optimizer
        self.held = dict(self.module.named_parameters())
        self._forget()
        self.network = self._forward

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        strategy, cuda = self.place.strategy, self.place.device.type == "cuda"
        host = {"device": "cpu", "pin_memory": cuda}
        zero: dict[str, Any] = {"stage": self.stage}
        if strategy.offload:
            zero["offload_optimizer"] = host
            if self.stage == 3:
                zero["offload_param"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.micros,
            "gradient_clipping": self.max_norm,
            "bf16": {"enabled": strategy.precision == "bf16"},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def _forward(self, *args: Any, **options: Any) -> Any:
        if self.place.strategy.precision == "bf16":
            args, options = pytree.tree_map(_as_bf16, (args, options))
        found = self.engine(*args, **options)
        return found if self.answer is None else self.answer(*found)

    def _opened(self, _module: nn.Module, _args: Any, answer: Any) -> Any:
        """Turn an answer that is a dataclass into a tuple, of which `_forward` makes the dataclass again."""
        if not is_dataclass(answer) or isinstance(answer, dict):
            return None
        self.answer = type(answer)
        return tuple(getattr(answer, field.name) for field in fields(answer))

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Return a context whose micro-batch ends a step if it is the last."""
        return self._bounded(last)

    @contextmanager
    def _bounded(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def _update(self) -> float:
        # What the engine was made with is read where it is applied.
        self.zero.clip_grad = self.max_norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _where(self, index: int) -> tuple[Tensor, int, int] | None:
        """The flat partition that has this rank's piece, the piece's start there and its length."""
        p: Any = self.parameters[index]
        if self.stage == 3:
            group, start, _ = self.zero.grad_position[self.zero.get_param_id(p)]
            first, last = self._span(index)
            return self.zero.fp32_partitioned_groups_flat[group], start, last - first
        mapping = p._hp_mapping
        if mapping is None:
            return None
        address = mapping.get_hp_fragment_address()
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return flat, address.start, address.numel

    def _piece(self, index: int) -> Tensor:
        where = self._where(index)
        if where is None:
            return torch.zeros(0, device=self.place.device)
        flat, start, length = where
        return flat.detach().narrow(0, start, length)

    def _span(self, index: int) -> tuple[int, int]:
        if self.stage == 3:
            total = self.shapes[index].numel()
            part = -(-total // self.place.ranks)
            return min(self.place.rank * part, total), min((self.place.rank + 1) * part, total)
        mapping: Any = self.parameters[index]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def _moments(self, index: int) -> Shard:
        if not self._taken():
            return {}
        where = self._where(index)
        if where is None:
            return {key: torch.zeros(0, device=self.place.device) for key in MOMENTS}
        flat, start, length = where
        return {key: self.optimizer.state[flat][key].narrow(0, start, length) for key in MOMENTS}

    def _forget(self) -> None:
        self.optimizer.state.clear()
        self.engine.zero_grad()
        self.zero.zero_grad(set_to_none=True)

    def _remember(self, index: int, moments: Shard, steps: float) -> None:
        # A rank may hold no piece of any parameter, and its empty partition still takes part in each step.
        for flat in self._flats():
            if flat not in self.optimizer.state:
                fresh: dict[str, Any] = {key: torch.zeros_like(flat.data) for key in MOMENTS}
                self.optimizer.state[flat] = fresh | {"step": torch.tensor(steps)}
        for key, piece in self._moments(index).items():
            piece.copy_(moments[key])

    def _steps(self, index: int) -> float:
        return self._taken()

    def _taken(self) -> float:
        """How many steps AdamW has taken, from the first flat partition."""
        kept = self.optimizer.state.get(self._flats()[0], {})
        return float(kept.get("step", 0.0))

    def _flats(self) -> list[Tensor]:
        flats = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        return list(flats)

    def _untrained(self, name: str, owner: int | None) -> Tensor | None:
        import deepspeed

        dtype = self.dtypes[name]
        if self.stage < 3 or name not in self.held:
            whole = super()._untrained(name, owner)
            return None if whole is None else whole.to(dtype)
        with deepspeed.zero.GatheredParameters([self.held[name]]):
            if owner not in (None, self.place.rank):
                return None
            return self.held[name].detach().to("cpu", dtype, copy=True)

    def _set_untrained(self, name: str, value: Tensor) -> None:
        import deepspeed

        if self.stage < 3 or name not in self.held:
            super()._set_untrained(name, value)
            return
        with deepspeed.zero.GatheredParameters([self.held[name]], modifier_rank=0):
            if self.place.rank == 0:
                self.held[name].data.copy_(value)

    def _written(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def end(self) -> None:
        """Remove the engine's hooks and let its buffers go."""
        self.engine.destroy()
        self.opening.remove()


def _as_bf16(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
