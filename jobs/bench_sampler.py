"""Latency of one decision: MG-Select with N candidates against greedy decoding and against not sharing."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from counterpoint.actions.config import TokenizerConfig, build_tokenizer
from counterpoint.environments.config import EnvironmentConfig
from counterpoint.policies.bundle import PolicyBundle, new_bundle
from counterpoint.policies.compact import CompactConfig
from counterpoint.policies.observation import Observation
from counterpoint.policies.policy import Inputs, TokenPolicy
from counterpoint.section import Section
from counterpoint.seeds import seed_of
from counterpoint.selection.choice import decide
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream
from counterpoint.selection.decoding import Candidates, Sampler, sample_candidates
from counterpoint.selection.naive import sample_candidates_naively

GREEDY = SelectionConfig(rule="greedy")
CHUNKS = 512
"""Random chunks that the action statistics are made of."""


class SamplerBenchConfig(Section):
    """What is timed: from observations to decoded chunks; the weights are random, which costs the same."""

    network: CompactConfig = CompactConfig()
    """The policy."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """Whose images, states, instructions and actions it has; no simulator is started."""
    vocabulary: int = Field(default=256, ge=3)
    """Its action tokens: uniform bins, which always decode."""
    horizon: int = Field(default=4, ge=1)
    """Control steps of a chunk; it has as many tokens as they have dimensions together."""
    words_length: int = Field(default=8, ge=5)
    """Words of an instruction, padded."""
    selection: SelectionConfig = SelectionConfig(rule="masked_condition", mask="both")
    """The rule; its number of candidates is taken from `candidates`."""
    candidates: tuple[int, ...] = Field(default=(1, 4, 16, 64), min_length=1)
    """Numbers of candidates N."""
    rival_candidates: int = Field(default=4, ge=1)
    """N at which the naive implementation and one prefill per candidate are timed; one of `candidates`."""
    batch: int = Field(default=1, ge=1)
    """Observations that are decided on together."""
    rounds: int = Field(default=15, ge=1)
    """Rounds, in each of which all take turns; ratios are medians over rounds."""
    device: str = "cpu"
    """Where the policy is, such as cuda; the device is synchronised before the clock is read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; confidences are always float32."""
    threads: int = Field(default=1, ge=0)
    """Threads of the maths, by default as many as an action sampler has; 0 keeps torch's own default."""

    @model_validator(mode="after")
    def _check(self) -> "SamplerBenchConfig":
        if self.rival_candidates not in self.candidates:
            raise ValueError(
                f"rival_candidates={self.rival_candidates} is not among candidates={self.candidates}: add it"
            )
        return self


def main(config: SamplerBenchConfig) -> dict[str, Any]:
    """Return `over_greedy_at_<N>`, `over_naive_at_<N>`, `over_repeated_prefill_at_<N>` and milliseconds.

    The first is the latency of N candidates over that of greedy decoding, the others are the rivals'
    latencies over ours. Spreads are the least and largest ratio of a round.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    bundle = build_bundle(config)
    times: dict[str, list[float]] = {}
    agreed = 0
    with computing_in(config):
        for arm in arms(config, bundle).values():
            arm(0)
        for turn in range(config.rounds):
            made = {}
            for name, arm in arms(config, bundle).items():
                begun = now(config.device)
                made[name] = arm(turn)
                times.setdefault(name, []).append(now(config.device) - begun)
            agreed += alike(made["naive"], made[str(config.rival_candidates)])
    return {
        "parameters": sum(parameter.numel() for parameter in bundle.policy.parameters()),
        "tokens": bundle.policy.max_tokens,
        "vocabulary": bundle.policy.vocabulary,
        "device": device_name(config.device),
        "threads": torch.get_num_threads(),
        "batch": config.batch,
        "rounds_that_agree_with_naive": agreed / config.rounds,
        **{f"{name}_ms": round(1e3 * statistics.median(times[name]), 2) for name in ("greedy", "naive")},
        **ratios(config, times),
    }


def ratios(config: SamplerBenchConfig, times: dict[str, list[float]]) -> dict[str, Any]:
    """Return milliseconds and ratios of the arms from their seconds in each round."""
    told: dict[str, Any] = {}
    for count in config.candidates:
        ours = times[str(count)]
        told[f"ms_at_{count}"] = round(1e3 * statistics.median(ours), 2)
        told |= _ratio(f"over_greedy_at_{count}", ours, times["greedy"])
    count = config.rival_candidates
    for rival in ("naive", "repeated_prefill"):
        told |= _ratio(f"over_{rival}_at_{count}", times[rival], times[str(count)])
    return told


def build_bundle(config: SamplerBenchConfig) -> PolicyBundle:
    """Return a policy with random weights and all that stands around it."""
    space = config.environment.action_space(config.horizon, 1)
    chunks = np.random.default_rng(0).uniform(
        space.low, space.high, (CHUNKS, config.horizon, space.dimensions)
    )
    tokenizer = build_tokenizer(TokenizerConfig(bins=config.vocabulary), chunks, "uniform noise")
    with torch.device(config.device):
        bundle = new_bundle(
            config.network, config.environment.observation_space(), space, tokenizer,
            config.environment.instructions, config.words_length, chunks.astype(np.float32),
        )  # fmt: skip
    bundle.policy.to(dtype=getattr(torch, config.dtype)).eval()
    bundle.device = torch.device(config.device)
    return bundle


def arms(config: SamplerBenchConfig, bundle: PolicyBundle) -> dict[str, Callable[[int], list[Decision]]]:
    """Return what is timed, by name; each takes the round and decides on the same observations."""
    observations = random_observations(config)

    def arm(selection: SelectionConfig, sampler: Sampler) -> Callable[[int], list[Decision]]:
        def run(turn: int) -> list[Decision]:
            streams = [Stream(b, turn) for b in range(config.batch)]
            return decide(bundle, observations, streams, selection, 0, sampler)

        return run

    selections = {n: config.selection.model_copy(update={"candidates": n}) for n in config.candidates}
    ours = {str(n): arm(selection, sample_candidates) for n, selection in selections.items()}
    compared = selections[config.rival_candidates]
    rivals = {
        "naive": arm(compared, sample_candidates_naively),
        "repeated_prefill": arm(compared, sample_one_by_one),
    }
    return {"greedy": arm(GREEDY, sample_candidates)} | ours | rivals


def sample_one_by_one(
    policy: TokenPolicy, inputs: Inputs, uniforms: Tensor | None, selection: SelectionConfig
) -> Candidates:
    """Return what `sample_candidates` returns, with a cache, but an own prefill for every candidate."""
    assert uniforms is not None
    parts = [sample_candidates(policy, inputs, one, selection) for one in uniforms.split(1, dim=1)]
    return Candidates(
        torch.cat([part.tokens for part in parts], 1),
        torch.cat([part.alive for part in parts], 1),
        torch.cat([part.terms for part in parts], 1),
    )


def random_observations(config: SamplerBenchConfig) -> list[Observation]:
    """Return noise for the policy to look at."""
    space, instructions = config.environment.observation_space(), config.environment.instructions
    noise = np.random.default_rng(seed_of(0, "bench", "observations"))
    return [
        Observation(
            {name: noise.integers(0, 256, (*size, 3), np.uint8) for name, size in space.cameras.items()},
            noise.normal(size=len(space.state)).astype(np.float32),
            instructions[b % len(instructions)],
        )
        for b in range(config.batch)
    ]


def alike(one: list[Decision], other: list[Decision]) -> bool:
    """Return whether both made the same choices among the same candidates."""
    return [(d.chosen, d.tokens) for d in one] == [(d.chosen, d.tokens) for d in other]


@contextlib.contextmanager
def computing_in(config: SamplerBenchConfig) -> Iterator[None]:
    """Compute in the configured type; what an image or a state brings in float32 is converted."""
    kind = torch.device(config.device).type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
        yield


def now(device: str) -> float:
    """Return the clock in seconds, once the device has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: str) -> str:
    """Return the name of a GPU, or the device's own."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _ratio(name: str, above: list[float], below: list[float]) -> dict[str, Any]:
    rounds = [one / other for one, other in zip(above, below, strict=True)]
    spread = [round(min(rounds), 2), round(max(rounds), 2)]
    return {name: round(statistics.median(rounds), 2), f"spread_{name}": spread}
