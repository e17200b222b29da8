"""The whole path on the cluster: demonstrations, a policy with joint training, episodes under MG-Select."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_policies import collect_config, policy_config

from actors.sampler import load_policy
from cluster.storage import RunStore
from counterpoint.data.demonstrations import read_demonstrations
from jobs import collect, rollout, train_policy
from jobs.rollout_settings import RolloutConfig
from jobs.runs import read_results

RULES: list[dict[str, Any]] = [
    {"name": "greedy"},
    {"name": "MG-Select", "selection": {"rule": "masked_condition", "mask": "both", "candidates": 3}},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("vla")
    workers = {"count": 1, "cpus_per_worker": 0.5, "environments": 5}
    demonstrations = collect_config(folder / "demos", episodes=10, scenes=10, workers=workers)
    collected = collect.main(demonstrations)
    trained = train_policy.main(
        policy_config(folder / "policy", folder / "demos", collect=None, trainer={"workers": 1, "threads": 1})
    )
    played = rollout.main(
        RolloutConfig.model_validate(
            {
                "run": str(folder / "rollout"), "episodes": 10, "rules": RULES,
                "policies": [{"name": "joint", "run": str(folder / "policy")}], "workers": workers,
                "samplers": {"count": 1, "cpus_per_actor": 0.5},
            }
        )
    )  # fmt: skip
    return {"folder": folder, "collected": collected, "trained": trained, "played": played}


def test_the_expert_shows_ten_episodes(path: dict[str, Any]) -> None:
    assert path["collected"]["episodes"] == 10
    assert path["collected"]["expert_success_rate"] == 1.0
    shown = read_demonstrations(f"{path['folder']}/demos/{collect.FOLDER}")
    assert len(shown.of_kind("demonstration")) == path["collected"]["frames"]
    assert len(shown.of_kind("scene")) == 10


def test_the_policy_learns_from_them(path: dict[str, Any]) -> None:
    bundle = load_policy(f"{path['folder']}/policy")
    shown = read_demonstrations(f"{path['folder']}/demos/{collect.FOLDER}").of_kind("demonstration")
    assert bundle.tokenizer.statistics.fingerprint == shown.fingerprint()
    assert path["trained"]["episodes"] == 10
    assert math.isfinite(path["trained"]["loss"])


def test_ten_episodes_are_played_under_each_rule(path: dict[str, Any]) -> None:
    headline = path["played"]
    assert headline["episodes"] >= 20
    assert headline["expert_success_rate"] == 1.0
    assert 0.0 <= headline["greedy_success_rate"] <= 1.0
    assert headline["mean_batch_size"] > 1.0
    assert headline["set_aside"] == 0
    assert Path(headline["report"]).read_text().startswith("<!DOCTYPE html>")
    json.dumps(read_results(RunStore(f"{path['folder']}/rollout")), allow_nan=False)
