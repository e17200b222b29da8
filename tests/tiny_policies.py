"""The smallest configurations that still lead from nothing to a policy's bundle."""

from pathlib import Path
from typing import Any

from jobs.collect import CollectConfig
from jobs.train_policy import PolicyTrainConfig


def collect_config(run: Path, **options: Any) -> CollectConfig:
    """A few demonstrations and scenes, collected in this process."""
    base: dict[str, Any] = {"run": str(run), "episodes": 6, "scenes": 20, "workers": {"count": 0}}
    return CollectConfig.model_validate(base | options)


def policy_config(run: Path, demonstrations: Path, **options: Any) -> PolicyTrainConfig:
    """A policy of a few steps with condition dropout, trained in this process; it collects what it needs."""
    base: dict[str, Any] = {
        "run": str(run), "demonstrations": str(demonstrations), "collect": collect_config(demonstrations),
        "words": 5, "tokenizer": {"bins": 32}, "network": {"hidden": 32, "layers": 2, "intermediate": 64},
        "training": {
            "steps": 10, "perception": {"steps": 5},
            "condition_dropout": {"text": 0.1, "state": 0.1, "both": 0.1},
        },
        "trainer": {"workers": 0, "threads": 1, "checkpoint_every": 10},
    }  # fmt: skip
    return PolicyTrainConfig.model_validate(base | options)
