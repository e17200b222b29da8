"""Every claim's path, cut short: its models, its arms and what is made of their figures."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from counterpoint.data import DataConfig, load_data
from jobs import claim_work, reproduce
from jobs.claim import methods, read_claim
from jobs.claim_plan import planned
from jobs.claim_results import outcome, read_outcomes
from jobs.reproduce import ReproduceConfig, sets_of_images

CLAIMS = Path(__file__).parent.parent / "configs" / "claims"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where runs are kept that claims share."""
    return str(tmp_path_factory.mktemp("claims"))


def smoke(method: str, images: str, root: str) -> dict[str, Any]:
    """Do a claim's smoke test in this process, one run after the other, and return its outcome."""
    claim = read_claim(CLAIMS, method)
    plan = planned(claim, sets_of_images(claim, smoke=True)[images], root)
    found = {run.uri: claim_work.do(run) for run in plan.runs}
    return outcome(claim, plan, found, f"python -m jobs.reproduce {method} --smoke", at_once=1)


@pytest.mark.parametrize("method", methods(CLAIMS))
def test_a_claim_runs_from_nothing_to_a_verdict(method: str, root: str) -> None:
    result = smoke(method, "digits", root)
    claim = read_claim(CLAIMS, method)
    assert set(result["arms"]) == set(claim.arms)
    assert len(result["pairs"]) == 1 + len(claim.also)
    for figures in result["arms"].values():
        assert all(np.isfinite(summary["mean"]) for summary in figures.values())


def idx_file(array: np.ndarray) -> bytes:
    """Unsigned bytes in MNIST's format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_a_claim_is_measured_on_images_of_ones_own(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(DataConfig(limit=200))
    for part, prefix in ((data.train, "train"), (data.test, "t10k")):
        pixels = ((part.images[:, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx_file(pixels))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_file(part.labels.numpy().astype(np.uint8)))
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    result = smoke("immiscible-diffusion", "idx", root)
    assert result["arms"]["plain"]["fd_halfway"]["mean"] > 0.0


def test_arms_run_over_the_cluster_and_are_not_run_again(
    ray_cluster: Any, tiny_teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stated = {
        "paper": {"title": "A paper", "arxiv": "2006.11239", "claim": "more steps are better"},
        "claim": "eight steps are better than one",
        "base": {"job": "evaluate", "config": {"run": tiny_teacher, "evaluation": {"samples": 40}}},
        "arms": {"eight": {"config": {"steps": [8]}}, "one": {"config": {"steps": [1]}}},
        "seeds": [0, 1], "metric": "fd", "compare": {"arm": "eight", "to": "one"},
    }  # fmt: skip
    claims = tmp_path / "claims"
    claims.mkdir()
    (claims / "steps.yaml").write_text(yaml.safe_dump(stated))
    config = ReproduceConfig(methods=("steps",), claims=claims, run=str(tmp_path / "runs"), at_once=2)
    first = reproduce.main(config)
    kept = read_outcomes(claims, "steps")["digits"]
    assert first["verdicts"] == {"steps, digits": kept["verdict"]}
    assert "verdict: " in capsys.readouterr().err
    assert kept["arms"]["one"]["fd"]["mean"] != kept["arms"]["eight"]["fd"]["mean"]
    done = sorted((tmp_path / "runs").rglob("claim.json"))
    assert len(done) == 4
    before = [path.stat().st_mtime_ns for path in done]
    # One is lost: it is run again, to the same figures; the others are not.
    lost = json.loads(done[0].read_text())
    done[0].unlink()
    reproduce.main(config)
    assert json.loads(done[0].read_text())["headline"] == lost["headline"]
    assert [path.stat().st_mtime_ns for path in done[1:]] == before[1:]
