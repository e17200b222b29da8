"""The learner of a network under the strategy that its place names."""

from torch import nn

from counterpoint.optimization import OptimizerConfig
from counterpoint.place import ALONE, Place
from counterpoint.strategies.blocks import checkpoint_activations
from counterpoint.strategies.learner import Frozen, Learner
from counterpoint.strategies.sharded import ShardedLearner
from counterpoint.strategies.whole import WholeLearner
from counterpoint.strategies.zero import ZeroLearner


def build_learner(
    module: nn.Module,
    config: OptimizerConfig,
    total: int,
    place: Place = ALONE,
    micros: int = 1,
    prefix: str = "",
    frozen: Frozen = "stored",
) -> Learner:
    """Take `module` under `place.strategy`: what of it requires gradients learns for `total` steps.

    Each step has `micros` micro-batches; `prefix` goes before the names of the weights in checkpoints, which
    hold what does not learn unless it is `frozen="rebuilt"` (see `Learner`).

    A strategy that shards the weights takes the module over: use `Learner.network` from then on. Every rank
    must call with equal weights.
    """
    if place.strategy.activation_checkpointing:
        checkpoint_activations(module)
    kinds: dict[str, type[Learner]] = {"ddp": WholeLearner, "fsdp": ShardedLearner, "deepspeed": ZeroLearner}
    return kinds[place.strategy.name](module, config, total, place, micros, prefix, frozen)
