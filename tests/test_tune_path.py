"""Sweeps from end to end: ordinary runs, early stops, failures, losses, a killed driver."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file
from tiny_jobs import CRITICS

from cluster.checkpoints import latest_checkpoint
from cluster.identity import read_facts
from cluster.metrics_log import read_metrics
from cluster.storage import RunStore
from jobs import distill, tune
from jobs.runs import read_results
from jobs.settings import DistillConfig
from jobs.tune_ledger import Ledger, TrialRecord
from jobs.tune_room import run_pools
from jobs.tune_settings import TuneConfig
from jobs.tune_space import laid_over, resolved
from jobs.tune_trial import SweepTrial

WEIGHT, RATE = "adversarial.adversarial_weight", "critics.refresh_rate"
SPACE: dict[str, Any] = {RATE: {"loguniform": [0.001, 0.1]}, WEIGHT: {"uniform": [0.01, 0.5]}}
ROOT = Path(__file__).resolve().parent.parent


def base_of(teacher: str, steps: int, **options: Any) -> dict[str, Any]:
    """A student of a few steps against the panel, trained in the process of its trial."""
    base: dict[str, Any] = {
        "teacher": teacher, "pairs": {"count": 64, "chunk": 32, "steps": 4}, "warmup": {"steps": 0},
        "adversarial": {"heads_alone": 2, "steps": steps - 2, "batch_size": 16}, "steps": [1],
        "critics": CRITICS | {"actors": 0}, "evaluation": {"workers": 0, "samples": 80},
        "trainer": {"workers": 0, "threads": 1, "checkpoint_every": 3, "cpus_per_worker": 0.9},
    }  # fmt: skip
    return base | options


def sweep_of(run: Path, base: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A sweep over the refresh rate and the panel's weight, compared by the regression loss."""
    objective = {"metric": "student_1_train_fd", "progress": "regression_loss", "every": 3}
    return {
        "run": str(run), "base": base, "space": SPACE, "objective": objective, "trials": 2,
    } | options  # fmt: skip


def by_itself(run: Path, config: TuneConfig, record: TrialRecord) -> float:
    """What the job makes of a trial's parameters without any sweep."""
    data = laid_over(config.base, {**record.params, "run": str(run)})
    return float(distill.main(DistillConfig.model_validate(data))[config.objective.metric])


def process_of(config: dict[str, Any], folder: Path, address: str) -> subprocess.Popen[bytes]:
    """Start the sweep as a process of its own; with an address on that cluster, else on its own."""
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(config))
    env = {**os.environ, "RAY_ADDRESS": address} if address else dict(os.environ)
    with (folder / "driver.log").open("ab") as log:
        command = [sys.executable, "-m", "jobs.tune", str(file), "resume=true"]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def await_rows(run: str, rows: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
    """Wait until a run has logged so many steps; what goes before it in its sweep counts too."""
    deadline = time.monotonic() + 500
    while len(read_metrics(RunStore(run))) < rows:
        assert time.monotonic() < deadline, f"{run} has no {rows} rows"
        assert process is None or process.poll() is None, "the driver ended"
        time.sleep(0.02)


def groups() -> set[str]:
    """Ids of the placement groups that are there."""
    return {id for id, group in placement_group_table().items() if group["state"] != "REMOVED"}


def kill_host(run: str) -> None:
    """Kill the process that does a run, once it has taken some steps."""
    await_rows(run, 5)
    os.kill(read_facts(RunStore(run))["pid"], signal.SIGKILL)


@pytest.mark.timeout(900)
def test_a_sweep_outlives_its_driver_a_host_and_a_failed_trial_and_is_extended(
    ray_cluster, tiny_teacher, tmp_path
):
    run, steps = tmp_path / "sweep", 40
    # The second cell's teacher is found missing only when the run begins.
    space = SPACE | {"teacher": {"grid": [tiny_teacher, str(tmp_path / "nowhere")]}}
    settings = sweep_of(run, base_of(tiny_teacher, steps), space=space, concurrent=1)
    config = TuneConfig.model_validate(settings)
    driver = process_of(settings, tmp_path, ray_cluster.address)
    try:
        await_rows(f"{run}/trials/0000/seed-0", 5, driver)
    finally:
        driver.kill()
        driver.wait()
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_host, f"{run}/trials/0002/seed-0")
        result = tune.main(config.model_copy(update={"resume": True, "trials": 3}))
        killed.result()  # raises what went wrong there
    assert (result["trials"], result["done"], result["failed"]) == (3, 2, 1)
    good, failed, last = Ledger(RunStore(str(run))).in_order()
    assert (good.state, good.lives, failed.state, last.state) == ("done", 2, "failed", "done")
    assert "nowhere" in failed.error
    assert "Traceback" in failed.error
    for record in (good, last):
        store = RunStore(record.runs[0])
        assert store.exists("report.html")
        assert read_results(store)["headline"]["student_1_train_fd"] == record.value
        assert by_itself(tmp_path / f"alone-{record.index}", config, record) == pytest.approx(
            record.value, rel=1e-6
        )
    # A sweep that is whole has nothing to do, and says the same.
    begun = {record.index: record.lives for record in (good, failed, last)}
    again = tune.main(config.model_copy(update={"resume": True, "trials": 3}))
    assert {r.index: r.lives for r in Ledger(RunStore(str(run))).in_order()} == begun
    assert again["best_student_1_train_fd"] == result["best_student_1_train_fd"]
    best = yaml.safe_load(RunStore(str(run)).read_text("best.yaml"))
    assert DistillConfig.model_validate(best).critics.refresh_rate in [
        record.params[RATE] for record in (good, last)
    ]
    with pytest.raises(ValueError, match="made with"):
        tune.main(config.model_copy(update={"resume": True, "seed": 5}))


@pytest.mark.slow
def test_a_trial_that_is_stopped_leaves_nothing_reserved(ray_cluster, tiny_teacher, tmp_path):
    """One of Ray Train's workers and critics in an actor, stopped after its first report as ASHA would."""
    base = base_of(tiny_teacher, 2000)
    base["critics"] = CRITICS | {"actors": 1, "cpus_per_actor": 0.5}
    base["trainer"] = {"workers": 1, "threads": 1, "checkpoint_every": 10, "cpus_per_worker": 2.0}
    config = TuneConfig.model_validate(sweep_of(tmp_path / "sweep", base))
    job = resolved(config.job, config.base)
    order = tune.order_of(config, job, run_pools(config.job, job))
    record = Ledger(RunStore(config.run)).put(TrialRecord(0, {RATE: 0.01}))
    before = groups()
    trial = SweepTrial(config={"sweep": order, "params": dict(record.params), "index": 0})
    told = trial.step()
    assert told["step"] % 3 == 0
    assert not told.get("done")
    assert len(groups() - before) == 2  # ours and Ray Train's
    trial.cleanup()
    deadline = time.monotonic() + 240
    while groups() - before:
        assert time.monotonic() < deadline, "placement groups stay reserved"
        time.sleep(0.2)
    run = RunStore(f"{config.run}/trials/0000/seed-0")
    assert read_facts(run)["outcome"] == "stopped"
    assert latest_checkpoint(run) is not None


@pytest.mark.slow  # the search's arithmetic of a population is in test_tune_search
def test_what_a_population_learned_is_replayed_as_one_run(ray_cluster, tiny_teacher, tmp_path):
    config = TuneConfig.model_validate(
        sweep_of(
            tmp_path / "sweep", base_of(tiny_teacher, 18), concurrent=2,
            scheduler={"kind": "pbt", "interval": 9, "quantile": 0.5, "synchronous": True},
        )
    )  # fmt: skip
    assert tune.main(config)["done"] == 2
    records = Ledger(RunStore(config.run)).in_order()
    heir = next(record for record in records if len(record.segments) > 1)
    donor = records[1 - heir.index]
    assert [segment.step for segment in heir.segments] == [0, 9]
    assert heir.segments[0].params == donor.params
    assert heir.segments[1].source == donor.index
    learned = yaml.safe_load(RunStore(heir.runs[0]).read_text("config.yaml"))
    assert learned["critics"]["refresh_rate"]["kind"] == "piecewise"
    data = learned | {"run": str(tmp_path / "replayed"), "resume": False}
    distill.main(DistillConfig.model_validate(data))
    for name in ("unet", "weights", "optimizer", *(f"critics-{group}" for group in range(4))):
        file = f"checkpoints/step-00000018/{name}.safetensors"
        bred, alone = load_file(f"{heir.runs[0]}/{file}"), load_file(tmp_path / "replayed" / file)
        assert bred.keys() == alone.keys()
        assert all(bred[key].equal(alone[key]) for key in bred), name
