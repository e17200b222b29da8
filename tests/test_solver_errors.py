"""How far a sampler is from the exact solution of its equation, as `jobs.evaluate` tells it."""

import shutil
from pathlib import Path

import pytest

from cluster.storage import RunStore
from counterpoint.sampling import SamplerConfig
from jobs import evaluate
from jobs.evaluate import EvaluateConfig
from jobs.settings import EvaluatorsConfig

EXACT = SamplerConfig(options={"timestep_spacing": "trailing", "clip_sample": False})


def evaluated(run: Path, sampler: SamplerConfig, seed: int = 1234) -> dict[str, float]:
    """Figures of the tiny teacher at 2, 5 and 40 steps, beside 40 steps of DDIM."""
    return evaluate.main(
        EvaluateConfig(
            run=str(run), steps=(2, 5, 40), sampler=sampler, reference_steps=40, reference_samples=6,
            evaluation=EvaluatorsConfig(workers=0, samples=20, seed=seed),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny teacher, to which solutions may be added."""
    copied = tmp_path_factory.mktemp("solved") / "run"
    return Path(shutil.copytree(tiny_teacher, copied, ignore=shutil.ignore_patterns("solutions")))


def test_the_reference_itself_has_no_error_and_few_steps_have_the_most(run: Path) -> None:
    found = evaluated(run, EXACT)
    assert found["error_40"] == 0.0
    assert found["error_2"] > found["error_5"] > 0.0
    assert found["fd"] == found["fd_40"]


def test_samplers_are_compared_with_one_kept_solution_of_the_same_noise(run: Path) -> None:
    kept = RunStore(str(run)).list("solutions")
    assert len(kept) == 1
    found = evaluated(
        run, SamplerConfig(scheduler="DPMSolverMultistepScheduler", options={"solver_order": 2})
    )
    assert found["error_40"] < found["error_5"]
    assert RunStore(str(run)).list("solutions") == kept
    assert evaluated(run, EXACT, seed=7)["error_40"] == 0.0
    assert len(RunStore(str(run)).list("solutions")) == 2
