"""The collector writes the same shards whoever works, keeps what is there, and leaves out what failed."""

import json

import pytest
from toy_environment import ToyEnvironment, toy

from cluster.storage import RunStore
from counterpoint.data.demonstrations import read_demonstrations
from counterpoint.environments.demonstrating import demonstrate
from jobs import collect
from jobs.collect import CollectConfig


def config(run, **options):
    base = {
        "run": str(run), "episodes": 10, "scenes": 7, "episodes_per_shard": 4, "first_seed": 20,
        "workers": {"count": 0},
    }  # fmt: skip
    return CollectConfig.model_validate(base | options)


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """A function that collects from toy environments, and returns the headline and all files' bytes."""

    def run(name="run", build=None, **options):
        monkeypatch.setattr(collect, "build_environment", lambda _: (build or toy())())
        headline = collect.main(config(tmp_path / name, **options))
        folder = tmp_path / name / "demonstrations"
        return headline, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return run


def test_a_collection_is_what_the_expert_did(collected, tmp_path):
    headline, files = collected()
    assert [name for name in files if name.endswith(".parquet")] == [
        "demonstrations-00000020-00000023.parquet", "demonstrations-00000024-00000027.parquet",
        "demonstrations-00000028-00000029.parquet", "scenes-01000000-01000003.parquet",
        "scenes-01000004-01000006.parquet",
    ]  # fmt: skip
    data = read_demonstrations(headline["run"])
    demonstrations, scenes = data.of_kind("demonstration"), data.of_kind("scene")
    expected = [f for seed in range(20, 30) for f in demonstrate(ToyEnvironment(), seed).frames]
    assert demonstrations.actions.tolist() == [frame.action.tolist() for frame in expected]
    assert demonstrations.episodes.tolist() == [frame.episode for frame in expected]
    assert (demonstrations.images[5, 0] == expected[5].images["top"]).all()
    assert scenes.episodes.tolist() == list(range(1_000_000, 1_000_007))
    seconds = headline.pop("seconds")
    assert headline == {
        "run": str(tmp_path / "run"), "episodes": 10, "frames": len(expected), "scenes": 7,
        "expert_success_rate": 1.0, "mean_steps": len(expected) / 10, "set_aside": 0,
    }  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["headline"]["seconds"] == seconds


def test_resuming_keeps_shards_and_makes_the_missing_ones_again(collected, tmp_path):
    first, files = collected()
    lost = ["demonstrations-00000024-00000027.parquet", "scenes-01000004-01000006.json"]
    (tmp_path / "run" / "demonstrations" / lost[0].replace("parquet", "json")).unlink()
    for name in lost:
        (tmp_path / "run" / "demonstrations" / name).unlink()
    built = []

    def counting():
        built.append(ToyEnvironment({20: ("raise", 0), 29: ("raise", 0), 1_000_000: ("raise", 0)}))
        return built[-1]

    again, same = collected(build=counting, resume=True, workers={"count": 0, "environments": 2})
    assert same == files
    assert again | {"seconds": 0} == first | {"seconds": 0}
    assert built
    built.clear()
    collected(build=counting, resume=True)
    assert not built


def test_a_used_run_is_refused_without_resume(collected):
    collected(episodes=1, scenes=0)
    with pytest.raises(ValueError, match="is a run already: add resume=true"):
        collected(episodes=1, scenes=0)
    with pytest.raises(ValueError, match=r"noise=0\.5 but the run at .* was made with 0.12"):
        collected(episodes=1, scenes=0, noise=0.5, resume=True)


class Clumsy(ToyEnvironment):
    """Its expert goes to the wrong corner in every third episode."""

    def expert_action(self):
        action = super().expert_action()
        return -action if self.seed % 3 == 0 else action


def test_failures_of_the_expert_are_left_out_and_counted(collected):
    headline, files = collected(build=Clumsy, scenes=3)
    assert headline["episodes"] == 7
    assert headline["expert_success_rate"] == 0.7
    data = read_demonstrations(headline["run"])
    kept = set(data.of_kind("demonstration").episodes.tolist())
    assert kept == {20, 22, 23, 25, 26, 28, 29}
    assert len(data.of_kind("scene")) == 3
    assert json.loads(files["demonstrations-00000020-00000023.json"])["failed"] == [21]


def test_a_shard_of_nothing_is_a_shard_too(collected):
    headline, files = collected(build=Clumsy, first_seed=21, episodes=1, scenes=0)
    assert list(files) == ["demonstrations-00000021-00000021.json"]
    assert (headline["episodes"], headline["expert_success_rate"], headline["mean_steps"]) == (0, 0.0, None)


def test_seeds_that_fail_twice_are_set_aside_and_told(collected, tmp_path):
    faults = {21: ("raise", 1), 1_000_005: ("raise", "start")}
    headline, _ = collected(build=toy(faults))
    assert (headline["episodes"], headline["scenes"], headline["set_aside"]) == (9, 6, 2)
    assert headline["expert_success_rate"] == 1.0
    results = json.loads(RunStore(headline["run"]).read_text("results.json"))
    assert results["set_aside"] == {
        "21": "RuntimeError: the motor is stuck", "1000005": "RuntimeError: the motor is stuck",
    }  # fmt: skip


def test_two_workers_write_what_one_process_writes(ray_cluster, collected, tmp_path):
    """In the true environment, whose images come from a renderer in each worker."""
    options = {"episodes": 4, "scenes": 2, "episodes_per_shard": 2, "environment": {"image_size": 32}}
    parts = []
    for name, workers in (("one", {"count": 0}), ("two", {"count": 2, "cpus_per_worker": 0.1})):
        headline = collect.main(config(tmp_path / name, workers=workers, **options))
        assert headline["episodes"] == 4
        files = (tmp_path / name / "demonstrations").iterdir()
        parts.append({path.name: path.read_bytes() for path in files})
    assert parts[0] == parts[1]
