"""The configuration of a sweep: a job, what is tried, what counts, who chooses and who stops early."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from counterpoint.section import Section
from jobs.run_names import RunUri
from jobs.tune_space import Entry, check_space

Mode = Literal["min", "max"]


class ObjectiveConfig(Section):
    """What a trial is worth."""

    metric: str = "student_1_fd"
    """Name of a headline figure of the job, by which finished trials are ranked."""
    mode: Mode = "min"
    """Whether less of it is better, or more."""
    progress: str = ""
    """What trials are compared by while they run: the dotted key of a figure in a row of the run's
    `evaluations.jsonl`, else of `metrics.jsonl`, such as `steps_1.fd`; schedulers need it."""
    every: int = Field(default=1, ge=1)
    """Steps between reports: rows of steps that are no multiple are passed over. A key that every step has
    needs this, as Tune takes a good part of a second for each report."""
    seeds: int = Field(default=1, ge=1)
    """Runs of each trial, with the seeds seed, seed + 1, ... of the base; a trial's figures are their means.
    They go on side by side where a scheduler compares trials, else one after the other."""


class NoSchedulerConfig(Section):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"
    """No scheduler."""


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2020): at each rung only the best go on."""

    kind: Literal["asha"] = "asha"
    """ASHA."""
    grace_steps: int = Field(default=50, ge=1)
    """Steps of the first rung, before which no trial is stopped."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """One in so many goes on from a rung to the next, which lies so many times further."""


class PbtConfig(Section):
    """Population-based training (Jaderberg et al. 2017): the worst take over the best's state and perturb it.

    The trials are the population; keys of the space should be numbers that may change in mid-run, above all
    the parameters of schedules. All members have the base's seed, so that a learned schedule can be replayed.
    """

    kind: Literal["pbt"] = "pbt"
    """PBT."""
    interval: int = Field(default=50, ge=1)
    """Steps between perturbations, a multiple of the base's trainer.checkpoint_every and evaluation.every."""
    burn_in: int = Field(default=0, ge=0)
    """Steps before which nobody is replaced, such as those in which only the heads learn."""
    synchronous: bool = False
    """Members wait for each other after each interval: what is bred then does not depend on how fast each one
    is, at the price of stopping and starting all of them."""
    quantile: float = Field(default=0.25, gt=0.0, le=0.5)
    """Share of the population that is replaced, and that is taken over from."""
    resample: float = Field(default=0.25, ge=0.0, le=1.0)
    """Chance that a value is drawn anew instead of being perturbed."""
    factors: tuple[float, float] = (1.25, 0.8)
    """What a value is multiplied with, one or the other."""


Scheduler = Annotated[NoSchedulerConfig | AshaConfig | PbtConfig, Field(discriminator="kind")]


class SearcherConfig(Section):
    """Who chooses what is tried."""

    kind: Literal["random", "tpe"] = "random"
    """Independent draws, or Optuna's tree-structured Parzen estimator."""
    startup_trials: int = Field(default=8, ge=1)
    """Random trials before TPE begins to choose."""


class ConfirmConfig(Section):
    """Fresh runs of the best trial's configuration and of the base, side by side."""

    seeds: tuple[int, ...] = ()
    """Seeds that no trial had; none leaves this out."""
    metric: str = ""
    """Headline figure that is compared, on data that did not choose; the objective's unless set."""
    changes: dict[str, Any] | tuple[dict[str, Any], ...] = {}
    """What both arms have other than the trials had, by dotted key, such as a report's own episodes; a list
    has a mapping for each seed."""

    @model_validator(mode="after")
    def _check(self) -> "ConfirmConfig":
        if isinstance(self.changes, tuple) and len(self.changes) != len(self.seeds):
            raise ValueError(
                f"changes has {len(self.changes)} mappings for {len(self.seeds)} seeds: give one for each, "
                "or one for all"
            )
        return self

    def of(self, place: int) -> dict[str, Any]:
        """Return the changes of the seed at `place` among `seeds`."""
        return self.changes[place] if isinstance(self.changes, tuple) else self.changes


class PricedClusterConfig(Section):
    """A cluster that the sweep's cost is worked out for; it need not exist."""

    nodes: int = Field(default=1, ge=1)
    """Equal machines."""
    cpus: float = Field(default=16.0, gt=0.0)
    """CPUs of each."""
    gpus: float = Field(default=0.0, ge=0.0)
    """GPUs of each."""
    price: float = Field(default=0.0, ge=0.0)
    """Price of a machine's hour, in any currency."""
    speed: float = Field(default=1.0, gt=0.0)
    """How many times as fast as here a trial runs there: an assumption."""


class TuneConfig(Section):
    """Sweep over any job's configuration; every trial is an ordinary run of the job."""

    run: RunUri = "runs/digits/sweep"
    """URI of the sweep's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    resume: bool = False
    """Go on with the sweep that is there, or extend it by raising `trials`; without it a used `run` is
    refused."""
    seed: int = 0
    """Seed of what is tried; the seed of the runs is the base's."""
    job: Literal["train", "train_policy", "distill", "distill_text", "rollout"] = "distill"
    """The verb whose configuration is swept."""
    base: dict[str, Any] = {}
    """The job's configuration; may extend a file: `{extends: distill.yaml}`."""
    space: dict[str, Entry] = Field(default={}, min_length=1)
    """What is tried, by dotted key of the job's configuration; see `jobs.tune_space`."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What counts."""
    trials: int = Field(default=0, ge=0)
    """Trials in all; 0 means one for each cell of the space's grid."""
    concurrent: int = Field(default=0, ge=0)
    """Most trials at once; 0 means as many as the cluster has room for."""
    scheduler: Scheduler = NoSchedulerConfig()
    """Who stops trials early or changes them."""
    searcher: SearcherConfig = SearcherConfig()
    """Who chooses what is tried."""
    confirm: ConfirmConfig = ConfirmConfig()
    """Fresh seeds for the best and the base."""
    estimate: PricedClusterConfig = PricedClusterConfig()
    """What the report works the cost out for."""
    max_failures: int = Field(default=3, ge=0)
    """How often a trial is begun again after the loss of its own actor."""

    @model_validator(mode="after")
    def _check(self) -> "TuneConfig":
        check_space(self.space, self.job, self.base)
        return self
