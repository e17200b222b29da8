"""One full-size SDXL student step against the panel, beside the same step written plainly.

    python -m jobs.bench sdxl configs/bench/sdxl.yaml

Ours: an encoder pass serves heads and student, local views go through it together, and heads of one shape are
one computation. Plainly: heads learn from passes of their own, the student from another, each kind of view
apart, and heads are modules in a loop. Both take the same samples, noise, windows and heads, in one process;
weights are random, which costs the same.
"""

import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from counterpoint.critics.config import KINDS, CriticsConfig
from counterpoint.critics.group import CriticGroup, Samples
from counterpoint.critics.losses import critic_loss, generator_loss
from counterpoint.critics.pool import Pool
from counterpoint.critics.prompted_encoder import PromptedEncoder
from counterpoint.critics.views import Look, cut_windows, draw_looks, patch_side
from counterpoint.diffusion import NoiseConfig, add_noise, build_noise_scheduler
from counterpoint.schedules import value_at
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.student import student_x0
from jobs.bench_heads import as_module
from jobs.bench_sampler import device_name, now
from jobs.sdxl_parts import SDXL, TOKENS, MadePrompts, build_layout, build_network

FEWEST_HEADS = 160
Judge = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]
"""(step, group, fake, real, labels) to the gradient in the fake samples."""


class SdxlBenchConfig(Section):
    """What is timed: from noise to the student's optimizer step, critics included."""

    unet: dict[str, Any] = {}
    """What the network's configuration departs from SDXL's in."""
    critics: CriticsConfig = CriticsConfig(
        levels_per_step=4, panel="all", heads_per_slot=2, width=64, groups=8
    )
    """The panel; with these, 240 heads judge in a step."""
    fewest_heads: int = Field(default=FEWEST_HEADS, ge=1)
    """Heads that must judge in a step at least."""
    batch: int = Field(default=4, ge=1)
    """Samples of a step, dealt to the noise levels."""
    tokens: int = Field(default=TOKENS, ge=1)
    """Tokens of a prompt."""
    rounds: int = Field(default=5, ge=1)
    """Rounds, in each of which both take a step; figures are medians over rounds."""
    device: str = "cuda"
    """Where everything is, such as cuda or cpu."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the student and the encoder; heads are float32."""

    @model_validator(mode="after")
    def _check(self) -> "SdxlBenchConfig":
        if self.batch < self.critics.levels_per_step:
            raise ValueError(
                f"batch={self.batch} leaves some of critics.levels_per_step={self.critics.levels_per_step} "
                "noise levels without a sample: lower critics.levels_per_step"
            )
        return self


class Bench:
    """One student and two panels of the same heads."""

    def __init__(self, config: SdxlBenchConfig) -> None:
        self.config, self.device = config, torch.device(config.device)
        unet, dtype = {**SDXL, **config.unet}, getattr(torch, config.dtype)
        prompts = MadePrompts(unet, max(2, config.batch), self.device, config.tokens)
        torch.manual_seed(0)
        teacher = build_network(unet, prompts, self.device, dtype)
        self.student = build_network(unet, prompts, self.device, dtype).train()
        self.encoder = PromptedEncoder(teacher, prompts)  # type: ignore[arg-type]
        # The up path is never run: without it, the memory is the one that a critic host needs.
        del teacher
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        self.pool, alphas = build_layout(self.encoder, config.critics)
        self.alphas = alphas.to(self.device)
        self.groups = [
            CriticGroup(self.pool, i, self.encoder, self.alphas) for i in range(len(self.pool.timesteps))
        ]
        self.plain = [PlainGroup(group, self.alphas) for group in self.groups]
        self.noise = build_noise_scheduler(NoiseConfig())
        self.shape = (
            config.batch,
            self.encoder.in_channels,
            self.encoder.sample_size,
            self.encoder.sample_size,
        )

    def ours(self, step: int, group: int, fake: Tensor, real: Tensor, labels: Tensor) -> Tensor:
        """Have a critic group judge, as hosts do."""
        gradient = self.groups[group].judge(Samples(step, fake, real, labels)).gradient
        assert gradient is not None
        return gradient

    def plainly(self, step: int, group: int, fake: Tensor, real: Tensor, labels: Tensor) -> Tensor:
        """Have the same heads judge, written plainly."""
        return self.plain[group].judge(step, fake, real, labels)

    def step(self, step: int, judge: Judge) -> tuple[dict[str, float], Tensor]:
        """Take the student's step `step`; return the seconds of its parts and the panel's gradient."""
        stream = generator(0, "sdxl", step)
        x_t = torch.randn(self.shape, generator=stream).to(self.device, self.student.dtype)
        real = torch.randn(self.shape, generator=stream).to(self.device)
        labels = torch.arange(len(x_t), device=self.device)
        times = torch.full((len(x_t),), 999, device=self.device)
        marks = [now(self.config.device)]
        fake = student_x0(self.student, x_t, times, labels, self.noise, 250)
        marks.append(now(self.config.device))
        gradient = torch.zeros(self.shape, device=self.device)
        groups = self.pool.assign_groups(step, len(x_t)).to(self.device)
        for group in groups.unique().tolist():
            mine = groups == group
            gradient[mine] = judge(step, group, fake.detach()[mine].float(), real[mine], labels[mine]) / len(
                x_t
            )
        marks.append(now(self.config.device))
        (fake.float() * gradient).sum().backward()
        marks.append(now(self.config.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(now(self.config.device))
        names = ("forward", "critics", "backward", "optimizer")
        return {name: marks[i + 1] - marks[i] for i, name in enumerate(names)}, gradient


class PlainGroup:
    """The heads of one noise level as modules, fed one view at a time."""

    def __init__(self, group: CriticGroup, alphas: Tensor) -> None:
        self.encoder, self.pool, self.index, self.timestep = (
            group.encoder,
            group.pool,
            group.index,
            group.timestep,
        )
        self.alphas = alphas
        spares = self.pool.config.heads_per_slot
        self.slots = [
            self.pool.slots[slot] for bank in group.banks for slot in bank.slots for _ in range(spares)
        ]
        rows = [(bank.shape, row) for bank in group.banks for row in bank.rows]
        self.heads = nn.ModuleList([as_module(shape, row.cpu()) for shape, row in rows]).to(alphas.device)
        config = self.pool.config
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=value_at(config.learning_rate, 0.0),
            betas=config.betas,
            weight_decay=value_at(config.weight_decay, 0.0),
        )

    def judge(self, step: int, fake: Tensor, real: Tensor, labels: Tensor) -> Tensor:
        """Let the heads learn, then return the student's gradient; all heads judge."""
        config = self.pool.config
        looks = draw_looks(config, self.pool.seed, (step, self.index), fake)
        with torch.no_grad():
            seen = [self._see(images, labels, look) for images, look in zip((fake, real), looks, strict=True)]
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(len(self.heads)):
            logits = [self._logits(number, features) for features in seen]
            critic_loss(config.loss, logits[1], logits[0]).mean().backward()
        self.optimizer.step()
        images = fake.detach().requires_grad_()
        features = self._see(images, labels, looks[0])
        votes = torch.stack([self._logits(number, features) for number in range(len(self.heads))], dim=1)
        losses = generator_loss(config.loss, votes)
        total = (losses.sum(1) if config.reduction == "sum" else losses.mean(1)).sum()
        (gradient,) = torch.autograd.grad(total, images)
        return gradient

    def _logits(self, number: int, features: list[list[Tensor]]) -> Tensor:
        slot, windows = self.slots[number], self.pool.config.patch_windows
        logits = self.heads[number](features[slot.kind][slot.level]).flatten()
        return logits.unflatten(0, (-1, windows)).mean(1) if KINDS[slot.kind].startswith("local") else logits

    def _see(self, images: Tensor, labels: Tensor, look: Look) -> list[list[Tensor]]:
        """Return the features of each kind of view, from a pass of its own."""
        config = self.pool.config
        times = torch.full((len(images),), self.timestep, device=images.device)
        x_t = add_noise(self.alphas, images, look.noise, times)
        seen: list[list[Tensor]] = [[] for _ in KINDS]
        for kind, name in enumerate(KINDS):
            if name not in config.kinds:
                continue
            if name.startswith("global"):
                seen[kind] = self.encoder(x_t, times, labels)
                continue
            patches = cut_windows(x_t, look.corners, patch_side(config, images.shape[-1]))
            owned = labels.repeat_interleave(config.patch_windows)
            owned = owned if kind == 1 else torch.full_like(owned, self.encoder.null_class)
            at = torch.full((len(patches),), self.timestep, device=images.device)
            seen[kind] = self.encoder(patches, at, owned, look.corners)
        return seen


def main(config: SdxlBenchConfig) -> dict[str, Any]:
    """Return `ratio` (seconds of the plain step over ours), both steps by part, and their peak memory.

    Raises ValueError if fewer heads than `fewest_heads` would judge, or without the device.
    """
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device} but torch sees no GPU: set device=cpu and a smaller unet")
    if (
        config.critics.panel != "all"
        or config.critics.refresh_rate
        or config.critics.order != "critics_first"
    ):
        config = config.model_copy(
            update={"critics": config.critics.model_copy(
                update={"panel": "all", "refresh_rate": 0.0, "order": "critics_first"}
            )}
        )  # fmt: skip
    bench = Bench(config)
    judging = bench.pool.heads_per_group * config.critics.levels_per_step
    if judging < config.fewest_heads:
        raise ValueError(
            f"critics.heads_per_slot={config.critics.heads_per_slot} makes {judging} heads judge in a step, "
            f"fewer than fewest_heads={config.fewest_heads}: raise it"
        )
    sides: dict[str, Judge] = {"ours": bench.ours, "plain": bench.plainly}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0.0)
    apart = 0.0
    for step in range(config.rounds + 1):
        made = {}
        for name, judge in sides.items():
            _reset_peak(config.device)
            seconds, made[name] = bench.step(step, judge)
            peaks[name] = max(peaks[name], _peak(config.device))
            parts[name] += [seconds] if step else []
        if step == 0:
            apart = float(
                (made["ours"] - made["plain"]).abs().max() / made["plain"].abs().max().clamp_min(1e-30)
            )
    return _told(config, bench.pool, parts, peaks) | {
        "heads_judging": judging,
        "first_gradients_apart": apart,
    }


def _told(
    config: SdxlBenchConfig, pool: Pool, parts: dict[str, list[dict[str, float]]], peaks: dict[str, float]
) -> dict[str, Any]:
    steps = {name: [sum(one.values()) for one in taken] for name, taken in parts.items()}
    ratios = [plain / ours for plain, ours in zip(steps["plain"], steps["ours"], strict=True)]
    told: dict[str, Any] = {
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "device": device_name(config.device),
        "batch": config.batch,
        "heads": pool.size,
        "label": "MEASURED",
    }
    for name, taken in parts.items():
        told[f"{name}_step_s"] = statistics.median(steps[name])
        told[f"{name}_parts_s"] = {part: statistics.median(one[part] for one in taken) for part in taken[0]}
        told[f"{name}_peak_gib"] = round(peaks[name], 3) or None
    return told


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> float:
    """Return the most GiB that were allocated; 0 where that is not known."""
    if torch.device(device).type != "cuda":
        return 0.0
    return float(torch.cuda.max_memory_allocated(device) / 2**30)
