"""What each of N processes holds under a strategy, and what each of them sends: the arithmetic of sharding.

ZeRO (arXiv 1910.02054, section 5 and 7): stage 1 shares out the optimizer's state, 2 the gradients too, 3 the
weights too; FSDP2 is stage 3 block by block. Collectives are counted as rings, in which a rank sends
(N - 1) / N of a tensor for a reduce-scatter or an all-gather, and twice that for an all-reduce.
"""

from dataclasses import dataclass, replace

from counterpoint.footprint.learner import LearnerTrace
from counterpoint.strategies.config import StrategyConfig

FP32 = 4
ZERO_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size: parameters whose gradients wait in one buffer."""
ZERO_LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: gathered parameters that stage 3 may hold at once."""
CUDA_CONTEXT = 1 << 30
"""Assumed, not computed: the CUDA context and the workspaces of cuDNN, cuBLAS and NCCL in one process."""


@dataclass(frozen=True)
class Holding:
    """What one process holds, in bytes; `device` and `host` are the totals at the worst moment of a step."""

    parameters: int = 0
    fixed: int = 0
    """Weights that do not learn, and buffers."""
    gradients: int = 0
    optimizer: int = 0
    """Moments, and the fp32 copy of the weights where they are bf16 otherwise."""
    average: int = 0
    """The moving average of the weights."""
    activations: int = 0
    """Activations, and what operations need on their way."""
    exchange: int = 0
    """Buffers of collectives, and weights that are gathered for a while."""
    context: int = 0
    data: int = 0
    """Samples that the process keeps in the host's memory."""
    offloaded: int = 0
    """What lies in the host's memory of all the above, for a process on a GPU."""
    device: int = 0
    host: int = 0


def ring_all_reduce(size: int, ranks: int) -> int:
    """Return the bytes that each rank sends to sum `size` bytes over `ranks`."""
    return 2 * _part(size, ranks)


def ring_all_gather(size: int, ranks: int) -> int:
    """Return the bytes that each rank sends to gather, or reduce and scatter, `size` bytes over `ranks`."""
    return _part(size, ranks)


def exchanged_per_step(trained: int, strategy: StrategyConfig, ranks: int, micros: int = 1) -> int:
    """Return the bytes that each rank sends to the others in one optimizer step of `trained` parameters."""
    wide, narrow = FP32 * trained, compute_bytes(strategy) * trained
    if strategy.name == "ddp":
        return ring_all_reduce(wide, ranks)
    gather = ring_all_gather(narrow, ranks)
    if strategy.name == "fsdp":
        # Weights are gathered for each pass, forward and backward; gradients are summed in fp32, once.
        return 2 * micros * gather + ring_all_gather(wide, ranks)
    if strategy.zero_stage == 3:
        return 3 * micros * gather
    reductions = 1 if strategy.zero_stage == 1 else micros
    return (1 + reductions) * gather


def compute_bytes(strategy: StrategyConfig) -> int:
    """Return the bytes of a parameter as it is gathered and computed with; ddp keeps fp32 under autocast."""
    return 2 if strategy.precision == "bf16" and strategy.sharded else FP32


def share_out(
    trace: LearnerTrace, strategy: StrategyConfig, ranks: int, micros: int = 1, gpu: bool = False
) -> Holding:
    """Return what each of `ranks` processes holds of a network that one process was seen to hold whole.

    AdamW on a GPU works on all its tensors at once and takes a copy of the second moments on its way.
    """
    parts = _parts(trace, strategy, ranks, micros, gpu)
    update = FP32 * trace.trained // (ranks if strategy.sharded else 1) if gpu else trace.update
    moving = trace.beside if parts.gradients < trace.gradients else trace.step
    scratch = 0 if gpu else trace.scratch
    parts = replace(
        parts,
        activations=trace.beside + scratch,
        context=CUDA_CONTEXT if gpu else 0,
    )
    if strategy.offload:
        parts = replace(parts, offloaded=_offloaded(parts, strategy))
        update = 0
    states = parts.parameters + parts.fixed + parts.optimizer + parts.average - parts.offloaded
    states += parts.gradients if parts.offloaded and strategy.name == "fsdp" else 0
    worst = max(moving + scratch, parts.gradients + update)
    total = states + worst + parts.exchange + parts.context
    return replace(
        parts, device=total if gpu else 0, host=parts.offloaded if gpu else total + parts.offloaded
    )


def _parts(trace: LearnerTrace, strategy: StrategyConfig, ranks: int, micros: int, gpu: bool) -> Holding:
    """What is held without activations, each part at its most."""
    count, wide = trace.trained, FP32 * trace.trained
    narrow = compute_bytes(strategy)
    whole = Holding(trace.parameters, trace.fixed, trace.gradients, trace.optimizer, trace.average)
    if not strategy.sharded:
        return replace(whole, exchange=wide if ranks > 1 else 0)
    share = replace(whole, optimizer=trace.optimizer // ranks, average=wide // ranks)
    if strategy.name == "fsdp":
        # The block at work, on a GPU the next one on its way, and a block's gradients and their sum.
        blocks = ((3 if gpu else 2) * narrow + FP32) * trace.largest + narrow * trace.root
        # Between micro-batches gradients are not exchanged, so every rank sums up whole ones.
        gradients = wide if micros > 1 else wide // ranks
        return replace(
            share, parameters=wide // ranks, fixed=trace.fixed // ranks, gradients=gradients,
            exchange=min(blocks, (2 * narrow + FP32) * count),
        )  # fmt: skip
    fixed = trace.fixed * narrow // FP32
    # A buffer of a bucket's full size is taken on a GPU; on the host only what is written to counts.
    bucket = narrow * (ZERO_BUCKET if gpu else min(count, ZERO_BUCKET))
    master = wide // ranks
    share = replace(share, fixed=fixed, optimizer=share.optimizer + master)
    if strategy.zero_stage == 3:
        live = narrow * min(count, ZERO_LIVE)
        return replace(
            share, parameters=narrow * count // ranks, fixed=fixed // ranks,
            gradients=(narrow + FP32) * count // ranks, exchange=live + bucket,
        )  # fmt: skip
    kept = narrow * count if strategy.zero_stage == 1 else narrow * count // ranks
    return replace(share, parameters=narrow * count, gradients=kept + wide // ranks, exchange=bucket)


def _offloaded(parts: Holding, strategy: StrategyConfig) -> int:
    """What lies in the host's memory instead of the GPU's."""
    states = parts.optimizer + parts.average
    if strategy.name == "fsdp":
        return states + parts.parameters + parts.gradients
    return states + (parts.parameters if strategy.zero_stage == 3 else 0)


def _part(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks
