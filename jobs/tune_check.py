"""What a sweep must agree with in the job that it sweeps, found out before anything starts."""

from typing import Any

from counterpoint.section import Section
from jobs.tune_settings import AshaConfig, PbtConfig, TuneConfig
from jobs.tune_space import laid_over, resolved


def total_steps(config: Section) -> int:
    """Return the training steps of a run of any job; 0 for one that does not train."""
    settings: Any = config
    if hasattr(settings, "adversarial"):
        adversarial = settings.adversarial
        heads = adversarial.heads_alone if adversarial.uses_panel else 0
        return int(settings.warmup.steps + heads + adversarial.steps)
    if hasattr(settings, "teacher") and hasattr(settings.teacher, "steps"):
        return int(settings.teacher.steps)
    if hasattr(settings, "training"):
        vision = settings.network.vision.kind
        return int(settings.training.steps) + (
            int(settings.training.perception.steps) if vision == "pointer" else 0
        )
    return 0


def check_sweep(config: TuneConfig, base: Section) -> None:
    """Raise ValueError, in one line, where scheduler, objective and the base's configuration do not fit.

    Args:
        config: the sweep, whose `trials` is set.
        base: the resolved configuration of the job without any trial's parameters.
    """
    for place in range(len(config.confirm.seeds)):
        resolved(config.job, laid_over(config.base, config.confirm.of(place)))
    scheduler, total = config.scheduler, total_steps(base)
    if scheduler.kind == "none":
        return
    if total == 0:
        raise ValueError(
            f"scheduler.kind={scheduler.kind} with job={config.job}, which takes no training steps to "
            "compare trials by: set scheduler.kind=none"
        )
    if not config.objective.progress:
        raise ValueError(
            f"scheduler.kind={scheduler.kind} compares trials while they run: set objective.progress, such "
            "as steps_1.fd for a distillation"
        )
    first = scheduler.grace_steps if isinstance(scheduler, AshaConfig) else scheduler.interval
    name = "grace_steps" if isinstance(scheduler, AshaConfig) else "interval"
    if first >= total:
        raise ValueError(
            f"scheduler.{name}={first} leaves nothing to decide in runs of {total} steps: lower it below that"
        )
    if first % config.objective.every:
        raise ValueError(
            f"scheduler.{name}={first} is not a multiple of objective.every={config.objective.every}: no "
            "report would come at that step"
        )
    if isinstance(scheduler, PbtConfig):
        _check_population(config, scheduler, base)


def _check_population(config: TuneConfig, scheduler: PbtConfig, base: Any) -> None:
    if config.trials < 2:
        raise ValueError(
            f"trials={config.trials} is no population: set trials to 2 or more for scheduler.kind=pbt"
        )
    if config.searcher.kind != "random":
        raise ValueError(
            f"searcher.kind={config.searcher.kind} with scheduler.kind=pbt, which chooses by itself: leave "
            "searcher out"
        )
    every = {"trainer.checkpoint_every": base.trainer.checkpoint_every}
    evaluation = getattr(base, "evaluation", None)
    if evaluation is not None and evaluation.every and evaluation.workers:
        every["evaluation.every"] = evaluation.every
    for key, value in every.items():
        if scheduler.interval % value:
            raise ValueError(
                f"scheduler.interval={scheduler.interval} is not a multiple of base.{key}={value}, and there "
                f"would be nothing to take over from: set one to fit the other"
            )
