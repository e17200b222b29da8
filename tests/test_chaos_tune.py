"""The drill that kills a sweep's driver: what it compares, what it refuses, and that a sweep outlives it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_parts import trial
from test_tune_path import base_of, sweep_of

from jobs import chaos_tune
from jobs.chaos_tune import TuneChaosConfig, compared
from jobs.tune_ledger import Ledger, TrialRecord


def drill(run: Path, teacher: str, **options: Any) -> TuneChaosConfig:
    """A drill of a sweep of a few trials of some seconds each."""
    sweep = sweep_of(run, base_of(teacher, 60), trials=4, concurrent=2)
    return TuneChaosConfig.model_validate({"run": str(run), "sweep": sweep} | options)


def test_a_trial_is_the_same_if_all_that_it_found_is_whatever_it_took() -> None:
    peace = [trial(0), trial(1), trial(2)]
    first = peace[1].reports[0]
    off = replace(peace[1], reports=(replace(first, value=first.value + 1e-12), *peace[1].reports[1:]))
    war = [replace(peace[0], lives=3, seconds=9.0, steps=5000), off, replace(peace[2], state="failed")]
    assert [row["same"] for row in compared(peace, war)] == [True, False, False]
    with pytest.raises(RuntimeError, match="in peace there are 3 trials, in war 2"):
        compared(peace, war[:2])


@pytest.mark.parametrize("part", [{"scheduler": {"kind": "asha"}}, {"searcher": {"kind": "tpe"}}])
def test_a_sweep_whose_trials_wait_for_each_other_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which one reports first; set none and random"):
        TuneChaosConfig.model_validate({"sweep": {"space": {"steps": {"grid": [[1]]}}} | part})


def test_kills_come_at_drawn_steps_and_a_finished_trial_that_is_done_again_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the sweep ends a trial in each life, the rest in the last, and does the first again."""
    config = drill(tmp_path, "t", kills=2, delay_s=(0.0, 0.0))

    def begin(sweep: Any) -> subprocess.Popen[str]:
        ledger = Ledger(chaos_tune.RunStore(sweep.run))
        whole = Path(sweep.run).name == "peace" or len(ledger.trials) == 2
        for index in range(4) if whole else [len(ledger.trials)]:
            ledger.put(TrialRecord(index, {}, "done", value=float(index), lives=1 + (index == 0 and whole)))
        command = "pass" if whole else "import time; time.sleep(60)"
        return subprocess.Popen([sys.executable, "-c", command], text=True)

    monkeypatch.setattr(chaos_tune, "begin", begin)
    monkeypatch.setattr(chaos_tune, "reached", lambda sweep: 10)
    told = chaos_tune.main(config)
    assert {key: told[key] for key in ("kills", "trials", "same", "repeated", "lives")} == {
        "kills": 2, "trials": 4, "same": 4, "repeated": 1, "lives": 5,
    }  # fmt: skip


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "war").mkdir()
    (tmp_path / "war" / "config.yaml").touch()
    with pytest.raises(ValueError, match=f"run={tmp_path} has a drill already"):
        chaos_tune.main(drill(tmp_path, "t"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_driver_killed_five_times_ends_with_the_undisturbed_table(
    tiny_teacher: str, tmp_path: Path
) -> None:
    told = chaos_tune.main(drill(tmp_path / "drill", tiny_teacher))
    assert (told["kills"], told["trials"], told["same"], told["repeated"]) == (5, 4, 4, 0)
    assert told["lives"] > told["trials"]
