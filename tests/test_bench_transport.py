"""The transport benchmark brings the same samples by every way, and tells what it left out and why."""

import json

import pytest

from jobs import bench_transport
from jobs.bench_transport import TransportBenchConfig


@pytest.mark.slow  # a whole benchmark
def test_every_way_is_measured_against_numpy(ray_cluster, tmp_path):
    config = TransportBenchConfig(
        shapes=((4, 1, 8, 8),), megabytes=0, repeats=1, rounds=2, out=str(tmp_path / "told.json")
    )
    told = bench_transport.main(config)
    assert {"numpy", "numpy_bf16", "torch", "gloo"} <= set(told["ways"])
    assert set(told["ways"]) | set(told["left_out"]) == {
        "numpy",
        "numpy_bf16",
        "torch",
        "gloo",
        "nccl",
        "nixl",
    }
    assert told["left_out"]["nccl"] == "gpus_per_actor=0"
    assert told["numpy_s_2kb"] > 0
    for way in set(told["ways"]) - {"numpy"}:
        low, high = told[f"{way}_spread_2kb"]
        assert 0 < low <= told[f"{way}_ratio_2kb"] <= high
    stored = json.loads((tmp_path / "told.json").read_text())
    assert stored["label"] == "MEASURED"
    assert stored["figures"] == told
    (message,) = stored["seconds_of_a_message"]
    assert message["bytes_in_float32"] == 2048
    assert [set(seconds) for seconds in message["rounds"]] == [set(told["ways"])] * 2


def test_ratios_are_within_a_round_and_above_1_where_a_way_is_faster():
    rounds = [{"numpy": 2.0, "torch": 4.0}, {"numpy": 3.0, "torch": 2.0}, {"numpy": 1.0, "torch": 1.0}]
    assert bench_transport.described(100_000_000, rounds) == {
        "numpy_s_100mb": 2.0,
        "torch_ratio_100mb": 1.0,
        "torch_spread_100mb": [0.5, 1.5],
    }


def test_the_large_message_is_as_large_as_it_says():
    ((n, c, h, w),) = bench_transport.large(100)
    assert 2 * 4 * n * c * h * w == 100e6
    assert bench_transport.large(0) == []


def test_a_way_that_brings_something_else_is_found_out():
    taken = {"numpy": (1.0, 2.0), "numpy_bf16": (1.01, 1.99), "gloo": (1.0, 2.0)}
    bench_transport.check(taken)
    with pytest.raises(RuntimeError, match=r"gloo brought other samples than numpy: \(1.0, 2.1\)"):
        bench_transport.check(taken | {"gloo": (1.0, 2.1)})
