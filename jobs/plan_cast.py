"""What each actor of a job holds and sends: a trainer, a host of critic groups, an evaluation worker."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from counterpoint.critics.config import CriticsConfig
from counterpoint.footprint.group import GroupTrace, trace_group
from counterpoint.footprint.learner import LearnerTrace, trace_learner
from counterpoint.footprint.micro_steps import student_micro_step, teacher_micro_step
from counterpoint.footprint.sharding import CUDA_CONTEXT, Holding, exchanged_per_step, share_out
from counterpoint.footprint.tracing import on_paper
from counterpoint.footprint.wire import PanelTraffic, panel_traffic
from counterpoint.optimization import OptimizerConfig
from counterpoint.strategies.config import StrategyConfig
from counterpoint.student import MAX_STEPS
from jobs.plan_networks import Network
from jobs.plan_settings import DistillPlan, MachinesConfig, TextPlan, TrainPlan
from jobs.settings import HostedCriticsConfig
from jobs.stage import shares

NUMBERS = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Role:
    """One kind of actor."""

    name: str
    count: int
    holding: Holding
    """What each holds, the fullest of them."""
    setting: str
    """The configuration key that sets `count`."""


@dataclass(frozen=True)
class CastPlan:
    """The actors of a job, and what they send each other in a step."""

    roles: tuple[Role, ...]
    trace: LearnerTrace
    """The trainer's step as one process would take it."""
    heads: int
    """Heads of the pool; 0 without one."""
    exchange: int
    """Bytes that each trainer sends to other trainers."""
    panel: PanelTraffic

    @property
    def trained(self) -> int:
        """Parameters that learn."""
        return self.trace.trained

    @property
    def snapshot(self) -> int:
        """Bytes of the weights that are offered to evaluation workers."""
        return 4 * self.trained


@dataclass(frozen=True)
class Sizes:
    """The batch arithmetic of one planned job, for one trainer."""

    workers: int
    accumulate: int
    batches: dict[str, int]
    """Samples per optimizer step over all workers, by the name of their field."""

    @property
    def micro(self) -> int:
        """Samples of the largest micro-batch of one worker."""
        return max(self.batches.values()) // (self.workers * self.accumulate)


def sizes_of(config: Any) -> Sizes:
    """Return the batch arithmetic of a planned job, which its own configuration has checked already."""
    workers = max(1, config.trainer.workers)
    if isinstance(config, TrainPlan):
        batches = {"teacher.batch_size": config.teacher.batch_size}
    else:
        stages = {"warmup": config.warmup, "adversarial": config.adversarial}
        batches = {f"{name}.batch_size": part.batch_size for name, part in stages.items() if part.steps}
    return Sizes(workers, config.trainer.accumulate, batches)


def plan_cast(config: MachinesConfig, network: Network) -> CastPlan:
    """Estimate every actor of a planned job."""
    assert isinstance(config, DistillPlan | TextPlan | TrainPlan)
    sizes, gpu = sizes_of(config), config.gpus > 0
    trace = trace_trainer(config, network)
    strategy = config.trainer.strategy
    trainer = share_out(trace, strategy, sizes.workers, sizes.accumulate, gpu)
    trainer = _with_data(trainer, _kept_samples(config, network))
    roles = []
    exchange = exchanged_per_step(trace.trained, strategy, sizes.workers, sizes.accumulate)
    panel, heads = PanelTraffic(0, 0, 0), 0
    if not isinstance(config, TrainPlan):
        roles.append(Role("trainer making pairs", 0, _making_pairs(config, network, gpu), "pairs.chunk"))
        if config.adversarial.uses_panel:
            group = _trace_group(config, network, sizes)
            panel, heads = (
                _traffic(config, network, group, sizes),
                group.heads * len(config.critics.noise_levels),
            )
            trainer = _with_waiting(trainer, config, network, sizes, gpu)
            hosts = _hosted(config.critics, group, gpu)
            if config.critics.actors:
                count = config.critics.actors * config.critics.replicas
                roles.append(Role("critics", count, hosts, "critics.actors"))
            else:
                trainer = _together(trainer, hosts)
    if isinstance(config, DistillPlan | TrainPlan) and config.evaluation.workers:
        evaluator = sampling(network.frozen, network.shape, config.evaluation.batch_size, gpu)
        roles.append(Role("evaluator", config.evaluation.workers, evaluator, "evaluation.workers"))
    roles.insert(0, Role("trainer", sizes.workers, trainer, "trainer.workers"))
    return CastPlan(tuple(roles), trace, heads, exchange, panel)


def trace_trainer(config: Any, network: Network) -> LearnerTrace:
    """Follow one step of the planned job's trainer in one process."""
    sizes = sizes_of(config)
    optimizer: OptimizerConfig
    if isinstance(config, TrainPlan):
        optimizer = config.teacher.optimizer
        micro_step = teacher_micro_step(network.noise, network.shape, sizes.micro)
    else:
        optimizer = config.adversarial.optimizer
        micro_step = student_micro_step(network.noise, network.shape, sizes.micro, config.student)
    strategy: StrategyConfig = config.trainer.strategy
    with on_paper() as ledger:
        module = network.build().train()
        return trace_learner(ledger, module, micro_step, optimizer, strategy, sizes.accumulate, sizes.workers)


def sampling(build: Any, shape: tuple[int, int, int], samples: int, gpu: bool) -> Holding:
    """Return what a process holds that samples from a network, without the network that scores."""
    with on_paper() as ledger, torch.no_grad():
        module: nn.Module = build().eval()
        weights = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
        before = ledger.mark()
        zero = torch.zeros(samples, dtype=torch.long)
        module(torch.zeros(samples, *shape), zero, class_labels=zero)
        working = ledger.peak - before + (0 if gpu else ledger.scratch)
    context = CUDA_CONTEXT if gpu else 0
    total = weights + working + context
    return Holding(
        fixed=weights,
        activations=working,
        context=context,
        device=total if gpu else 0,
        host=0 if gpu else total,
    )


def _making_pairs(config: DistillPlan | TextPlan, network: Network, gpu: bool) -> Holding:
    doubled = 2 if config.pairs.guidance_scale != 1 else 1
    chunk = min(config.pairs.chunk, config.pairs.count)
    return sampling(network.frozen, network.shape, doubled * chunk, gpu)


def _kept_samples(config: Any, network: Network) -> int:
    """Bytes of the samples that each trainer keeps in the host's memory: images and pairs."""
    if isinstance(config, TrainPlan):
        return network.images
    channels, height, width = network.shape
    each = (2 + MAX_STEPS) * 4 * channels * height * width
    return network.images + int(config.pairs.count) * each


def _with_data(holding: Holding, data: int) -> Holding:
    return replace(holding, data=data, host=holding.host + data)


def _trace_group(config: DistillPlan | TextPlan, network: Network, sizes: Sizes) -> GroupTrace:
    parts = sizes.accumulate * config.critics.levels_per_step * config.critics.replicas
    samples = -(-config.adversarial.batch_size // parts)
    plain: CriticsConfig = config.critics.plain()
    alphas = network.noise.alphas_cumprod
    with on_paper() as ledger:
        return trace_group(ledger, network.encoder, plain, samples, alphas, sizes.accumulate)


def _with_waiting(holding: Holding, config: Any, network: Network, sizes: Sizes, gpu: bool) -> Holding:
    """Add what a trainer that asks a step ahead keeps of it: samples, real images and gradients."""
    channels, height, width = network.shape
    waiting = int(config.adversarial.staleness) * sizes.micro * sizes.accumulate
    waiting *= 3 * 4 * channels * height * width
    return replace(
        holding,
        exchange=holding.exchange + waiting,
        device=holding.device + (waiting if gpu else 0),
        host=holding.host + (0 if gpu else waiting),
    )


def _together(trainer: Holding, critics: Holding) -> Holding:
    """Return what a trainer holds that hosts the critics too: the sum, as heads judge on top of its graph."""
    context = max(trainer.context, critics.context)
    twice = trainer.context + critics.context - context
    both = {f.name: getattr(trainer, f.name) + getattr(critics, f.name) for f in fields(Holding)}
    device = both["device"] - (twice if both["device"] else 0)
    return Holding(**both | {"context": context, "device": device})


def _hosted(critics: HostedCriticsConfig, group: GroupTrace, gpu: bool) -> Holding:
    """Return what a host of critic groups holds: each group has an encoder of its own."""
    hosted = max(map(len, shares(len(critics.noise_levels), critics.actors))) if critics.actors else 0
    hosted = hosted or len(critics.noise_levels)
    # Groups of one host may judge at the same time.
    busy = min(hosted, critics.levels_per_step)
    holding = Holding(
        parameters=hosted * group.parameters,
        fixed=hosted * group.encoder,
        gradients=busy * group.gradients,
        optimizer=hosted * group.optimizer,
        activations=busy * group.activations + (0 if gpu else group.scratch),
        context=CUDA_CONTEXT if gpu else 0,
    )
    holding = _in_all(holding, gpu)
    if critics.replicas > 1:
        # Contributions are kept for peers to fetch since the last snapshot but one.
        holding = _with_data(holding, hosted * 2 * critics.snapshot_every * group.gradients)
    return holding


def _in_all(holding: Holding, gpu: bool) -> Holding:
    """Return a holding whose parts are all there at once, with its total."""
    total = holding.parameters + holding.fixed + holding.gradients + holding.optimizer
    total += holding.activations + holding.context
    return replace(holding, device=total if gpu else 0, host=0 if gpu else total)


def _traffic(
    config: DistillPlan | TextPlan, network: Network, group: GroupTrace, sizes: Sizes
) -> PanelTraffic:
    critics = config.critics
    if critics.actors == 0:
        return PanelTraffic(0, 0, 0)
    return panel_traffic(
        critics.plain(), network.shape, config.adversarial.batch_size, group.levels, group.judging,
        sizes.workers, sizes.accumulate, critics.replicas, NUMBERS[critics.wire_dtype],
    )  # fmt: skip
