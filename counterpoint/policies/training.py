"""Training a compact policy by imitation: perception first, frozen, then the policy on what it finds.

The policy's loss is the token cross-entropy of joint imitation learning: conditions are dropped at random,
so that what masked conditions leave is what the policy was trained for (arXiv 2510.05681, section 3.3).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.data.demonstrations import Demonstrations
from counterpoint.optimization import OptimizerConfig, load_weights, rank_slices, weights_of
from counterpoint.place import ALONE, Place
from counterpoint.policies.compact import CompactPolicy
from counterpoint.policies.perception import (
    PerceptionConfig,
    PerceptionData,
    Words,
    perception_loss,
    pixel_errors,
)
from counterpoint.policies.policy import check_mask
from counterpoint.policies.vision import PointerVision
from counterpoint.schedules import Scheduled, bounds, progress_at, value_at
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.strategies.build import build_learner

Stage = Literal["perception", "policy"]
NO_TOKEN = -100
FRAMES_AT_ONCE = 256


class ConditionDropout(Section):
    """Which share of the samples is not told a condition; MG-Select* takes 0.1 each (its appendix A.1)."""

    text: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a sample has no instruction, but its state."""
    state: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a sample has no state, but its instruction."""
    both: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a sample has neither."""

    @model_validator(mode="after")
    def _check(self) -> "ConditionDropout":
        if self.text + self.state + self.both > 1:
            raise ValueError(
                f"text={self.text}, state={self.state} and both={self.both} exceed 1 together: lower them"
            )
        return self

    def hide(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Return which samples are not told text and state, by their uniform `draw` [B]."""
        text = draw < self.text
        state = (draw >= self.text) & (draw < self.text + self.state)
        both = (draw >= self.text + self.state) & (draw < self.text + self.state + self.both)
        return text | both, state | both


class PolicyTrainingConfig(Section):
    """How long and on what a compact policy trains."""

    steps: int = Field(default=1500, ge=1)
    """Optimizer steps of the policy, after those of perception."""
    batch_size: int = Field(default=64, ge=1)
    """Frames per optimizer step, over all workers and micro-batches."""
    feature_noise: Annotated[Scheduled, bounds(ge=0.0)] = 0.08
    """Standard deviation of Gaussian noise on the pointer's standardised findings, against learning frames by
    heart; 0.08 of a coordinate's deviation is about 0.7 pixels of 64. Patches get none. May change over
    the policy's steps."""
    condition_dropout: ConditionDropout = ConditionDropout()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=100, ema_decay=0.99)
    """AdamW, schedule, clipping and EMA."""
    perception: PerceptionConfig = PerceptionConfig()
    """Training of the pointer vision; patches have no such stage."""


class PolicyTrainer:
    """One replica of a policy's training: `step` is the algorithm, `state` and `load` its whole memory."""

    def __init__(
        self,
        policy: CompactPolicy,
        demonstrations: Demonstrations,
        tokens: Sequence[Sequence[int]],
        words: Words,
        config: PolicyTrainingConfig,
        seed: int,
        views: Demonstrations | None = None,
        place: Place = ALONE,
        accumulate: int = 1,
    ) -> None:
        """Imitate `demonstrations`, whose chunks are `tokens` (one list per frame, without end tokens).

        `words` turns instructions into ids as the policy's bundle does. Perception learns from `views`, by
        default from the demonstrations too. Raises ValueError where these do not fit.
        """
        self.policy = policy.to(place.device).train()
        self.config, self.seed, self.place, self.accumulate = config, seed, place, accumulate
        self.pointing = isinstance(policy.vision, PointerVision)
        self.boundary = config.perception.steps if self.pointing else 0
        self.total_steps = self.boundary + config.steps
        self.slices = {
            stage: rank_slices(part.batch_size, place.rank, place.ranks, accumulate)
            for stage, part in self._parts().items()
        }
        for mask in ("text", "state", "both"):
            if getattr(config.condition_dropout, mask) > 0:
                check_mask(mask, policy.conditions)
        self.tokens = _padded(tokens, len(demonstrations), policy)
        self.inputs = _inputs(demonstrations, words, policy)
        std, mean = torch.std_mean(self.inputs["state"], 0, correction=0)
        if "state" in policy.conditions:
            policy.standardise_state(mean, std)
        self.perception: PerceptionData | None = None
        if self.boundary > 0:
            text = words if "text" in policy.conditions else None
            self.perception = PerceptionData(views or demonstrations, text, policy.config.vision)
        self._enter(self.stage(0))

    def stage(self, step: int) -> Stage:
        """Return the stage that `step` belongs to."""
        return "perception" if step < self.boundary else "policy"

    def step(self, step: int) -> dict[str, Any]:
        """Take step `step` (from 0) and return its figures."""
        stage = self.stage(step)
        if step == self.boundary:
            self._begin_policy()
        figures = self._look(step) if stage == "perception" else self._imitate(step - self.boundary)
        rate, norm = self.learner.step(step if stage == "perception" else step - self.boundary)
        return {"stage": stage, **figures, "learning_rate": rate, "gradient_norm": norm}

    def samples_per_step(self, step: int) -> int:
        """Return the frames that all ranks together learn from in step `step`."""
        return self._parts()[self.stage(step)].batch_size

    def weights(self) -> dict[str, Tensor]:
        """Return the policy's weights on rank 0, statistics included: the average of what is trained."""
        average = self.learner.averaged()
        return weights_of(self.policy) | average if self.place.rank == 0 else {}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's share of all that the future depends on, besides the step number."""
        rest = weights_of(self.policy) if self.place.rank == 0 else {}
        held = {self.learner.prefix + name for name in self.learner.entries}
        weights = {name: tensor for name, tensor in rest.items() if name not in held}
        return {"policy": weights | self.learner.weights(), "optimizer": self.learner.state()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Return to a stored state, after which `step` comes next."""
        self._enter(self.stage(max(step - 1, 0)))
        load_weights(self.policy, dict(state["policy"]))
        self.learner.load(state["policy"], state["optimizer"])
        if step > self.boundary:
            self._remember()

    def _parts(self) -> dict[Stage, PerceptionConfig | PolicyTrainingConfig]:
        return {"perception": self.config.perception, "policy": self.config}

    def _enter(self, stage: Stage) -> None:
        """Let the stage's weights learn, and theirs only, with a fresh optimizer.

        `policy` is whole on every rank; what a strategy shards is a copy, which becomes it when a stage ends.
        """
        self.policy.requires_grad_(stage == "policy")
        self.policy.vision.requires_grad_(stage == "perception" or not self.pointing)
        part, looking = self._parts()[stage], stage == "perception"
        module: nn.Module = self.policy.vision if looking else self.policy
        if self.place.strategy.sharded:
            module = copy.deepcopy(module)
        prefix = "vision." if looking else ""
        self.learner = build_learner(
            module, part.optimizer, max(1, part.steps), self.place, self.accumulate, prefix
        )

    def _begin_policy(self) -> None:
        """Freeze perception at its average and look at all frames once."""
        if self.boundary > 0:
            load_weights(self.policy, weights_of(self.policy) | self.learner.averaged(everywhere=True))
        self.learner.end()
        if isinstance(self.policy.vision, PointerVision):
            self._remember()
            found = [self.known[name].flatten(0, 1) for name in _found(self.known)]
            self.policy.vision.standardise(torch.cat(found))
        self._remember()
        self._enter("policy")

    @torch.no_grad()
    def _remember(self) -> None:
        """Keep what perception finds in every frame; with patches, the frames themselves."""
        self.known = self.inputs
        if self.pointing:
            starts = range(0, len(self.tokens), FRAMES_AT_ONCE)
            parts = [self.policy.encode(self._of(slice(i, i + FRAMES_AT_ONCE), self.inputs)) for i in starts]
            self.known = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _of(self, rows: slice | Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self.place.device
        return {
            name: (x[rows] if isinstance(rows, slice) else x[rows.to(x.device)]).to(device)
            for name, x in inputs.items()
        }

    def _look(self, step: int) -> dict[str, Any]:
        """Add the gradients of one step of perception."""
        assert self.perception is not None
        config, slices = self.config.perception, self.slices["perception"]
        views = self.perception.draw(self.seed, step, config.batch_size)
        share = self.place.ranks / max(1, int(views.known.sum()))
        total, errors = 0.0, []
        for micro, part in enumerate(slices):
            mine = views.part(part, self.place.device)
            with self.learner.accumulating(micro == len(slices) - 1):
                looks = self.learner.network(mine.images, mine.words)
                loss = share * perception_loss(looks, mine, config.coordinate_weight)
                self.learner.backward(loss)
            total += float(loss.detach())
            errors.append(pixel_errors(looks, mine).detach())
        return {"loss": total, "perception_error": float(torch.cat(errors).median())}

    def _imitate(self, step: int) -> dict[str, Any]:
        """Add the gradients of one step of the policy."""
        size, slices = self.config.batch_size, self.slices["policy"]
        rows = torch.randint(len(self.tokens), (size,), generator=generator(self.seed, "frames", step))
        drawn = torch.rand(size, generator=generator(self.seed, "condition_dropout", step))
        hide = self.config.condition_dropout.hide(drawn)
        inputs, tokens = self._noisy(self._of(rows, self.known), step), self.tokens[rows]
        share = self.place.ranks / int((tokens != NO_TOKEN).sum())
        total, right, count = 0.0, 0, 0
        for micro, part in enumerate(slices):
            wanted = tokens[part].to(self.place.device)
            hidden = [flags[part].to(self.place.device) for flags in hide]
            mine = {name: x[part] for name, x in inputs.items()}
            with self.learner.accumulating(micro == len(slices) - 1):
                logits = self.learner.network(mine, wanted.clamp_min(0), *hidden)
                cross = F.cross_entropy(
                    logits.flatten(0, 1), wanted.flatten(), ignore_index=NO_TOKEN, reduction="sum"
                )
                self.learner.backward(share * cross)
            total += share * float(cross.detach())
            right += int((logits.argmax(-1) == wanted).sum())
            count += int((wanted != NO_TOKEN).sum())
        return {"loss": total, "token_accuracy": right / count}

    def _noisy(self, inputs: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        size = value_at(self.config.feature_noise, progress_at(step, self.config.steps))
        if size == 0:
            return inputs
        stream = generator(self.seed, "feature_noise", step)
        noise = {name: torch.randn(inputs[name].shape, generator=stream) for name in _found(inputs)}
        return inputs | {name: inputs[name] + size * x.to(self.place.device) for name, x in noise.items()}


def _found(inputs: dict[str, Tensor]) -> list[str]:
    """The inputs that perception found."""
    return [name for name in ("pointer", "null_pointer", "slots") if name in inputs]


def _inputs(frames: Demonstrations, words: Words, policy: CompactPolicy) -> dict[str, Tensor]:
    cameras, entries = policy.observation_space.cameras, len(policy.observation_space.state)
    if frames.cameras != tuple(cameras):
        raise ValueError(
            f"the data's cameras are {', '.join(frames.cameras)} and the policy's {', '.join(cameras)}: "
            "train with the cameras that were collected, in their order"
        )
    if entries not in (0, frames.states.shape[1]):
        raise ValueError(
            f"the data's state has {frames.states.shape[1]} entries and the policy's {entries}: "
            "train with the state that was collected"
        )
    inputs = {
        "images": torch.from_numpy(frames.images),
        "state": torch.from_numpy(frames.states),
    }
    return inputs | ({"words": words(frames.instructions.tolist())} if "text" in policy.conditions else {})


def _padded(tokens: Sequence[Sequence[int]], frames: int, policy: CompactPolicy) -> Tensor:
    """Each frame's tokens and the end token, if there is one and room, int64 [F,L]."""
    if len(tokens) != frames:
        raise ValueError(
            f"{len(tokens)} lists of tokens for {frames} frames: encode every frame's chunk once"
        )
    end = [] if policy.end_token is None else [policy.end_token]
    rows = []
    for frame, row in enumerate(tokens):
        most = policy.max_tokens - len(end)
        if not 0 < len(row) <= most or not all(0 <= token < policy.vocabulary for token in row):
            raise ValueError(
                f"frame {frame} has the action tokens {list(row)}, the policy emits 1 to {most} of 0 to "
                f"{policy.vocabulary - 1}: encode with the policy's own tokenizer"
            )
        rows.append(torch.tensor([*row, *end]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_TOKEN)
