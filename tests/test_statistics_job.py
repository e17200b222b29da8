"""The job of a model's statistics: kept by weights and settings, the same on workers, and usable."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import RunStore
from counterpoint.solvers.empirical_statistics import load_statistics
from jobs import evaluate, statistics
from jobs.evaluate import EvaluateConfig
from jobs.runs import load_pipeline, read_results
from jobs.statistics import StatisticsConfig

SETTINGS = {"samples": 4, "intervals": 20, "batch_size": 2}


def config(run: Path, model: str, workers: int = 0, **options: Any) -> StatisticsConfig:
    return StatisticsConfig.model_validate(
        {"run": str(run), "model": model, "estimation": SETTINGS}
        | {"workers": {"count": workers, "cpus_per_worker": 0.1}}
        | options
    )


@pytest.fixture(scope="module")
def made(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of the job in this process, and its headline."""
    run = tmp_path_factory.mktemp("statistics") / "run"
    return run, statistics.main(config(run, tiny_teacher))


def test_a_second_call_finds_what_the_first_has_made(made: Any, tiny_teacher: str) -> None:
    run, first = made
    assert not first["cached"]
    assert read_results(RunStore(str(run)))["headline"] == first
    assert Path(first["statistics"]) == run / "statistics.safetensors"
    again = statistics.main(config(run, tiny_teacher))
    assert again == first | {"cached": True, "seconds": 0.0}
    read = load_statistics(first["statistics"])
    assert read.made_for["samples"] == "4"
    assert read.shape == (1, 8, 8)
    named = list(run.glob(f"statistics-{read.made_for['weights']}-*.safetensors"))
    assert len(named) == 1


def test_a_run_that_holds_other_statistics_is_refused(made: Any, tiny_teacher: str) -> None:
    run = made[0]
    with pytest.raises(ValueError, match="is a run already"):
        statistics.main(config(run, tiny_teacher, seed=1))
    with pytest.raises(ValueError, match=r"seed=1 but the run at .* was made with 0"):
        statistics.main(config(run, tiny_teacher, seed=1, resume=True))
    with pytest.raises(ValueError, match="is a run already"):
        statistics.main(config(Path(tiny_teacher), tiny_teacher))


def test_a_sampler_takes_the_file(made: Any, tiny_teacher: str) -> None:
    options = {"statistics": made[1]["statistics"]}
    figures = evaluate.main(
        EvaluateConfig.model_validate(
            {
                "run": tiny_teacher,
                "steps": [3],
                "sampler": {"scheduler": "DPMSolverV3Scheduler", "options": options},
                "reference_steps": 20,
                "reference_samples": 4,
                "evaluation": {"workers": 0, "samples": 20},
            }
        )
    )
    assert figures["fd_3"] > 0
    assert 0 < figures["error_3"] < 10
    assert load_pipeline(RunStore(tiny_teacher)).scheduler.config.get("statistics") is None


def test_workers_find_what_one_process_finds(
    made: Any, tiny_teacher: str, tmp_path: Path, ray_cluster: Any
) -> None:
    found = statistics.main(config(tmp_path / "run", tiny_teacher, workers=2))
    here, there = (load_statistics(file["statistics"]) for file in (made[1], found))
    assert here.made_for == there.made_for
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name), atol=1e-4, rtol=1e-3)
