"""A claim: a paper's headline effect as an inequality between two arms, which are ordinary configurations."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from counterpoint.section import Section
from jobs.config_errors import ConfigError, describe
from jobs.config_fields import fields_of
from jobs.config_source import read_file

RESULTS_SUFFIX = ".results.json"


class PaperConfig(Section):
    """What the paper says."""

    title: str
    """Its title."""
    arxiv: str
    """Its number on arXiv."""
    claim: str
    """Its headline effect with its own figures, in one sentence."""


class SharedRunConfig(Section):
    """A run that arms build upon, made once for each seed and shared by all claims that ask for the same."""

    job: str
    """The verb, a module of `jobs`."""
    config: dict[str, Any] = {}
    """Its configuration; may extend a file. {name} in a text is the URI of a model that stands before it."""


class ArmConfig(Section):
    """One arm."""

    says: str = ""
    """What the arm is, in a few words."""
    config: dict[str, Any] = {}
    """What is laid over the configuration that all arms have in common."""


class CompareConfig(Section):
    """The inequality that is judged."""

    arm: str
    """The arm that is claimed to be better."""
    to: str
    """The arm that it is compared with."""
    metric: str = ""
    """Figure of the job's headline that is compared; the claim's own unless given."""
    better: Literal["lower", "higher"] | None = None
    """Which way is better; the claim's own unless given."""
    margin: float = Field(default=0.0, ge=0.0)
    """By how much the arm must be better, in the metric's unit."""


class VariationConfig(Section):
    """What another set of images, or a quick run, changes."""

    models: dict[str, dict[str, Any]] = {}
    """What is laid over the configuration of models, by name."""
    config: dict[str, Any] = {}
    """What is laid over the configuration of every arm."""
    arms: dict[str, dict[str, Any]] = {}
    """What is laid over the configuration of single arms, by name."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of the claim's."""


class ClaimConfig(Section):
    """A claim, as `configs/claims/<method>.yaml` states it."""

    paper: PaperConfig
    """The paper."""
    claim: str
    """The inequality, in one sentence."""
    models: dict[str, SharedRunConfig] = {}
    """Runs that arms build upon, in the order in which they are made."""
    base: SharedRunConfig
    """What all arms have in common."""
    arms: dict[str, ArmConfig] = Field(min_length=2)
    """The arms, by name."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds; arms are compared seed by seed."""
    metric: str
    """Figure of the job's headline that is compared."""
    better: Literal["lower", "higher"] = "lower"
    """Which way is better."""
    compare: CompareConfig
    """The pair that the verdict is about."""
    also: tuple[CompareConfig, ...] = ()
    """Other pairs that are reported beside it."""
    figures: tuple[str, ...] = ()
    """Other figures of the headline that are reported of every arm."""
    note: str = ""
    """What a reader should know of the outcome: why it may not show, and under what it might."""
    smoke: VariationConfig = VariationConfig()
    """What `--smoke` changes, so that the path is run in a minute; its figures mean nothing."""
    idx: VariationConfig | None = None
    """What changes for the images that COUNTERPOINT_DATA names, in the files of MNIST and its relatives."""

    @model_validator(mode="after")
    def _check(self) -> "ClaimConfig":
        for pair in (self.compare, *self.also):
            unknown = [name for name in (pair.arm, pair.to) if name not in self.arms]
            if unknown:
                raise ValueError(f"compare names {unknown[0]}; give one of the arms {', '.join(self.arms)}")
        for kind, variation in (("smoke", self.smoke), ("idx", self.idx or VariationConfig())):
            for part, known in (("models", self.models), ("arms", self.arms)):
                stray = sorted(set(getattr(variation, part)) - set(known))
                if stray:
                    raise ValueError(f"{kind}.{part} has {stray[0]}; give one of {', '.join(known)}")
        return self

    def pairs(self) -> list[CompareConfig]:
        """Return all pairs with their metric and direction filled in, the judged one first."""
        return [
            pair.model_copy(
                update={"metric": pair.metric or self.metric, "better": pair.better or self.better}
            )
            for pair in (self.compare, *self.also)
        ]


def read_claim(folder: Path, method: str) -> ClaimConfig:
    """Return the claim of a method; ConfigError, one line, if there is none or it is wrong."""
    path = folder / f"{method}.yaml"
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", method) or not path.is_file():
        known = ", ".join(methods(folder)) or f"names of files {folder}/NAME.yaml"
        raise ConfigError(f"methods = {method}: give some of {known}")
    data = read_file(path)
    try:
        return ClaimConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, data, fields_of(ClaimConfig))}") from None


def methods(folder: Path) -> list[str]:
    """Return the names of the claims that a folder holds."""
    return sorted(path.stem for path in folder.glob("*.yaml"))
