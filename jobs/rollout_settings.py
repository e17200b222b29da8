"""The configuration of a comparison: policies, rules, and the seeds on which all of them are played."""

from typing import Literal

from pydantic import Field, model_validator

from actors.rollouts import WorkersConfig
from actors.sampler import SamplersConfig
from counterpoint.environments.config import EnvironmentConfig
from counterpoint.environments.running import Scripted
from counterpoint.section import Section
from counterpoint.selection.config import SelectionConfig
from jobs.rollout_cells import Cell, slug
from jobs.rollout_videos import VideosConfig
from jobs.run_names import RunUri
from jobs.train_policy import PolicyTrainConfig

PLACEHOLDER = "{seed}"
SCRIPTED: tuple[Scripted, ...] = ("random", "expert")


class PolicyArm(Section):
    """A policy, trained once or with several seeds."""

    name: str = Field(min_length=1)
    """Name in tables and of the folders of its episodes."""
    run: RunUri
    """URI of the run that trained it, in which {seed} stands for the training seed."""
    seeds: tuple[int, ...] = ()
    """Training seeds; empty for a run without {seed}."""
    train: PolicyTrainConfig | None = None
    """How to train it where `run` has no policy yet; `run` and `seed` are filled in."""

    @model_validator(mode="after")
    def _check(self) -> "PolicyArm":
        if bool(self.seeds) != (PLACEHOLDER in self.run):
            raise ValueError(
                f"run={self.run} and seeds={list(self.seeds)} do not go together: give training seeds and "
                f"a run with {PLACEHOLDER}, or neither"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a training seed twice: give each once")
        return self

    def uri(self, training_seed: int | None) -> str:
        """Return the URI of the run of a training seed."""
        return self.run if training_seed is None else self.run.replace(PLACEHOLDER, str(training_seed))

    @property
    def training_seeds(self) -> tuple[int | None, ...]:
        """The training seeds; None alone for a policy that was trained once."""
        return self.seeds or (None,)


class RuleArm(Section):
    """A rule by which actions are chosen."""

    name: str = Field(min_length=1)
    """Name in tables and of the files of its episodes."""
    selection: SelectionConfig = SelectionConfig()
    """Candidates, and which of them is kept."""
    policies: tuple[str, ...] = ()
    """Names of the policies that are played with it; empty for all."""


class RolloutConfig(Section):
    """Play the same episodes with several policies and several rules, and compare."""

    run: RunUri = "runs/vla/rollout"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    resume: bool = False
    """Go on with the run that is there: what it has played is used again; without it a used `run` is
    refused."""
    seed: int = 0
    """Seed of the candidates' random numbers; with an episode's seed it names those of a decision."""
    first_seed: int = Field(default=20_000_000, ge=0)
    """Environment seed of the first episode; the others follow one by one. Seeds that a policy has learned
    from, as demonstrations or as scenes, are refused."""
    episodes: int = Field(default=200, ge=1)
    """Episodes of each policy under each rule; all have the same environment seeds."""
    split: str = ""
    """What these seeds are for, such as calibration or report; stands beside the figures."""
    policies: tuple[PolicyArm, ...] = Field(default=(), min_length=1)
    """The policies; others are compared with the first."""
    rules: tuple[RuleArm, ...] = Field(default=(RuleArm(name="greedy"),), min_length=1)
    """The rules."""
    baseline: str = "greedy"
    """Name of the rule that others are compared with."""
    scripted: tuple[Scripted, ...] = SCRIPTED
    """What is played besides on the same seeds: random (uniform actions, a floor), expert (a ceiling)."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """The environment."""
    samplers: SamplersConfig = SamplersConfig()
    """Where policies run."""
    workers: WorkersConfig = WorkersConfig()
    """Where environments run."""
    videos: VideosConfig = VideosConfig()
    """Which episodes are filmed."""
    trace_seeds: tuple[int, ...] | Literal["first"] = "first"
    """Environment seeds whose decisions are all kept with their images, of each policy's first training."""

    @model_validator(mode="after")
    def _check(self) -> "RolloutConfig":
        _check_names("policies", [arm.name for arm in self.policies], SCRIPTED)
        _check_names("rules", [arm.name for arm in self.rules], ())
        rules, policies = [arm.name for arm in self.rules], [arm.name for arm in self.policies]
        if self.baseline not in rules:
            raise ValueError(f"baseline={self.baseline} is not a rule: give one of {', '.join(rules)}")
        for arm in self.rules:
            unknown = [name for name in arm.policies if name not in policies]
            if unknown:
                raise ValueError(
                    f"rules: {arm.name} is for the policy {unknown[0]}, which is not there: "
                    f"give names of {', '.join(policies)}"
                )
        return self

    @property
    def seeds(self) -> range:
        """The environment seeds."""
        return range(self.first_seed, self.first_seed + self.episodes)

    @property
    def traced(self) -> frozenset[int]:
        """The environment seeds whose decisions are kept."""
        return frozenset((self.first_seed,) if self.trace_seeds == "first" else self.trace_seeds)

    @property
    def filmed(self) -> frozenset[int]:
        """The environment seeds that are filmed."""
        return frozenset(self.seeds[: self.videos.among]) | self.traced

    def cells(self) -> list[Cell]:
        """Return everything that is to be played, the scripted policies first."""
        found = [Cell(name, None, name, scripted=name) for name in self.scripted]
        for arm in self.policies:
            for seed in arm.training_seeds:
                found += [
                    Cell(arm.name, seed, rule.name, arm.uri(seed), rule.selection)
                    for rule in self.rules_of(arm.name)
                ]
        return found

    def rules_of(self, policy: str) -> list[RuleArm]:
        """Return the rules with which a policy is played."""
        return [rule for rule in self.rules if policy in (rule.policies or (policy,))]

    def is_shown(self, cell: Cell) -> bool:
        """Say whether the cell's episodes are filmed and traced: those of a policy's first training seed."""
        first = {arm.name: arm.training_seeds[0] for arm in self.policies}
        return cell.training_seed == first.get(cell.policy)


def _check_names(field: str, names: list[str], reserved: tuple[str, ...]) -> None:
    slugs = [slug(name) for name in names]
    for name, short in zip(names, slugs, strict=True):
        if not short or short in reserved or slugs.count(short) > 1:
            raise ValueError(
                f"{field}: the name {name!r} is taken, or has no letter or digit: choose another one"
            )
