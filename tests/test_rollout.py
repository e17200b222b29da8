"""A whole comparison, from policies to the last line, on a small policy and short episodes."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.crew import LocalCrew
from actors.sampler import POLICY, SamplersConfig
from cluster.storage import RunStore
from counterpoint.environments.config import EnvironmentConfig
from counterpoint.policies.compact import CompactConfig
from counterpoint.seeds import seed_of
from jobs import rollout, rollout_play, rollout_policies, train_policy
from jobs.bench_rollout import RolloutBenchConfig, untrained_policy
from jobs.bench_rollout import main as bench
from jobs.collect import CollectConfig
from jobs.config import dump_config
from jobs.rollout_settings import RolloutConfig
from jobs.runs import read_results

ENVIRONMENT = {"image_size": 32, "max_steps": 6}
NETWORK = CompactConfig(hidden=16, layers=1, heads=2, intermediate=16)
NO_STATE = CompactConfig(hidden=16, layers=1, heads=2, intermediate=16, state=False)
HERE = {"workers": {"count": 0, "environments": 2}, "samplers": {"count": 0}}
RULES = [
    {"name": "greedy"},
    {"name": "random-of-3", "selection": {"rule": "random", "candidates": 3}},
    {"name": "text", "selection": {"rule": "masked_condition", "mask": "text", "candidates": 3}},
    {"name": "oracle", "selection": {"rule": "oracle", "candidates": 3}},
]


def make_policy(run: Path, seed: int = 0, network: CompactConfig = NETWORK) -> str:
    torch.manual_seed(seed)
    bundle = untrained_policy(EnvironmentConfig(**ENVIRONMENT), network)
    for parameter in bundle.policy.parameters():
        torch.nn.init.normal_(
            parameter, std=0.3, generator=torch.Generator().manual_seed(seed_of(seed, "weights"))
        )
    bundle.save(run / POLICY)
    return str(run)


def configured(folder: Path, **changes: Any) -> RolloutConfig:
    fields: dict[str, Any] = {
        "run": str(folder / "run"),
        "episodes": 4,
        "first_seed": 7,
        "environment": ENVIRONMENT,
        "policies": [{"name": "base", "run": str(folder / "policy")}],
        "rules": RULES,
        "videos": {"successes": 1, "failures": 1, "among": 2, "scale": 1},
    } | HERE
    return RolloutConfig.model_validate(fields | changes)


def cells(config: RolloutConfig) -> dict[str, list[dict[str, Any]]]:
    """The stored episodes of every finished cell."""
    store = RunStore(config.run)
    rows = {
        name: [json.loads(line) for line in store.read_text(name).splitlines()]
        for name in store.list("cells")
    }
    return {name: [row for row in lines if "success" in row] for name, lines in rows.items()}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[RolloutConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("comparison")
    make_policy(folder / "policy")
    config = configured(folder)
    return config, rollout.main(config)


def test_every_rule_and_every_scripted_policy_is_played_on_the_same_seeds(
    compared: tuple[RolloutConfig, dict[str, Any]],
) -> None:
    config, headline = compared
    found = cells(config)
    names = ["base/greedy", "base/oracle", "base/random-of-3", "base/text", "expert/expert", "random/random"]
    assert sorted(found) == [f"cells/{name}.jsonl" for name in names]
    assert all([row["seed"] for row in rows] == [7, 8, 9, 10] for rows in found.values())
    assert all(row["outcome"] == "time is up" for row in found["cells/base/greedy.jsonl"])
    assert headline["episodes"] == 24
    assert headline["set_aside"] == 0
    assert {"greedy_success_rate", "text_success_rate", "expert_success_rate"} < headline.keys()
    results = read_results(RunStore(config.run))
    assert [row["decisions"] for row in results["figures"]] == [8, 8, 8, 8]


def test_it_leaves_a_report_a_video_and_a_trace_of_each_rule(
    compared: tuple[RolloutConfig, dict[str, Any]],
) -> None:
    config, headline = compared
    store = RunStore(config.run)
    assert Path(headline["report"]).read_text().startswith("<!DOCTYPE html>")
    assert [name for name in store.list("videos") if name.startswith("videos/base/text")] == [
        "videos/base/text-failure-7.gif"
    ]
    assert [name for name in store.list("traces") if name.endswith(".json")] == [
        f"traces/base/{rule}-7.json" for rule in ("greedy", "oracle", "random-of-3", "text")
    ]
    trace = json.loads(store.read_text("traces/base/text-7.json"))
    assert [len(decision["candidates"]) for decision in trace["decisions"]] == [3, 3]
    best = [max(decision["confidences"]) for decision in trace["decisions"]]
    assert [d["confidences"][d["chosen"]] for d in trace["decisions"]] == best


def test_what_has_been_played_is_used_again(
    compared: tuple[RolloutConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, headline = compared
    with pytest.raises(ValueError, match="is a run already: add resume=true"):
        rollout.main(config)
    monkeypatch.setattr(rollout_play, "crew_on_stage", None)
    again = rollout.main(config.model_copy(update={"resume": True}))
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in headline.items() if k != "seconds"
    }


def test_an_interrupted_comparison_goes_on_where_it_was(
    compared: tuple[RolloutConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_policy(tmp_path / "policy")
    config = configured(tmp_path)
    played: list[int] = []
    run = LocalCrew.run

    def watched(self: LocalCrew, job: Any, seeds: Any, watch: Any, stop: int) -> Any:
        def told(episode: Any) -> None:
            if len(played) == stop:
                raise KeyboardInterrupt
            played.append(episode.seed)
            watch(episode)

        return run(self, job, seeds, told)

    monkeypatch.setattr(LocalCrew, "run", functools.partialmethod(watched, stop=10))
    with pytest.raises(KeyboardInterrupt):
        rollout.main(config)
    assert len(played) == 10
    monkeypatch.setattr(LocalCrew, "run", functools.partialmethod(watched, stop=-1))
    rollout.main(config.model_copy(update={"resume": True}))
    assert len(played) == 24
    assert cells(config) == cells(compared[0])


def test_a_policy_that_is_missing_is_trained_with_its_run_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []

    def train(config: train_policy.PolicyTrainConfig) -> dict[str, Any]:
        trained.append((config.run, config.seed))
        make_policy(Path(config.run), config.seed)
        return {}

    monkeypatch.setattr(train_policy, "main", train)
    make_policy(tmp_path / "policy-1", 1)
    arm = {"name": "base", "run": str(tmp_path / "policy-{seed}"), "seeds": [0, 1, 2], "train": {}}
    config = configured(tmp_path, policies=[arm], rules=RULES[:1], episodes=1, scripted=[])
    rollout.main(config)
    assert trained == [(str(tmp_path / "policy-0"), 0), (str(tmp_path / "policy-2"), 2)]
    (row,) = read_results(RunStore(config.run))["figures"]
    assert [seed["training_seed"] for seed in row["seeds"]] == [0, 1, 2]


def test_a_training_that_was_stopped_stops_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_policy, "main", lambda config: {"stopped_at_step": 3})
    arm = {"name": "base", "run": str(tmp_path / "policy"), "train": {}}
    with pytest.raises(KeyboardInterrupt):
        rollout.main(configured(tmp_path, policies=[arm]))


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    make_policy(tmp_path / "policy")
    make_policy(tmp_path / "blind", network=NO_STATE)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"policies": [{"name": "base", "run": "{folder}/none"}]},
            "the policy base has no run at .*none: train it",
        ),
        (
            {
                "policies": [{"name": "base", "run": "{folder}/blind"}],
                "rules": [
                    RULES[0],
                    {"name": "s", "selection": {"rule": "masked_condition", "mask": "state"}},
                ],
            },
            "mask=state hides state, which this policy is never told",
        ),
        (
            {"environment": ENVIRONMENT | {"image_size": 48}},
            r"expects images of \[32, 32\], the environment gives",
        ),
        ({"run": "memory://x", "workers": {"count": 1}}, "lives in this process's memory"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(
    policies: Path, changes: dict[str, Any], words: str
) -> None:
    changes = json.loads(json.dumps(changes).replace("{folder}", str(policies)))
    with pytest.raises(ValueError, match=words) as raised:
        rollout.main(configured(policies, **changes))
    assert "\n" not in str(raised.value)
    assert not RunStore(str(policies / "run")).exists("cells")


@pytest.mark.parametrize(
    ("first", "what"), [(37, "demonstrations"), (1_000_005, "scenes"), (97, "demonstrations")]
)
def test_a_policy_is_not_played_on_what_it_learned_from(policies: Path, first: int, what: str) -> None:
    demonstrations = CollectConfig(run=str(policies / "demos"), first_seed=40, episodes=60, scenes=9)
    RunStore(demonstrations.run).write_text("config.yaml", dump_config(demonstrations))
    trained = train_policy.PolicyTrainConfig(run=str(policies / "policy"), demonstrations=demonstrations.run)
    RunStore(trained.run).write_text("config.yaml", dump_config(trained))
    with pytest.raises(
        ValueError, match=f"first_seed={first}: 4 episodes from there meet the {what} of seeds"
    ):
        rollout_policies.train_missing(configured(policies, first_seed=first))
    for beside in (36, 100):
        rollout_policies.train_missing(configured(policies, first_seed=beside))


def test_a_policy_that_was_trained_anew_is_not_mixed_with_the_old_one(policies: Path) -> None:
    config = configured(policies, rules=RULES[:1], scripted=[], episodes=1)
    rollout.main(config)
    make_policy(policies / "policy", seed=5)
    with pytest.raises(ValueError, match="was played with policy="):
        rollout.main(config.model_copy(update={"resume": True}))


def test_workers_and_samplers_play_the_same_episodes(
    ray_cluster: Any, compared: tuple[RolloutConfig, dict[str, Any]], tmp_path: Path
) -> None:
    here = compared[0]
    changes = {"count": 1, "cpus_per_worker": 0.5, "environments": 2}
    config = configured(
        tmp_path,
        policies=[{"name": "base", "run": here.policies[0].run}],
        workers=changes,
        samplers={"count": 1},
    )
    headline = rollout.main(config)
    assert headline["mean_batch_size"] >= 1.0
    assert cells(config) == cells(here)


@pytest.mark.slow  # a whole benchmark
def test_the_bench_plays_the_same_work_with_each_number_of_workers(ray_cluster: Any) -> None:
    config = RolloutBenchConfig(
        workers=(0, 1),
        episodes=3,
        rounds=2,
        environments=2,
        network=NETWORK,
        environment=EnvironmentConfig(**ENVIRONMENT),
        samplers=SamplersConfig(count=0),
    )
    figures = bench(config)
    assert figures["episodes"] == 6
    assert figures["spread"][0] <= figures["ratio"] <= figures["spread"][1]
    assert figures["episodes_per_second_0"] > 0
    assert figures["episodes_per_second_1"] > 0
    assert figures["mean_batch_size_1"] is None
