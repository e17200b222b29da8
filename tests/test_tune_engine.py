"""The parts of a sweep that need no cluster: room, checks, ledger, ASHA's memory, learned schedules."""

import math
import random
from types import SimpleNamespace

import pytest

from cluster.placement import ClusterView, NodeView, Pool
from cluster.storage import RunStore
from jobs.config import parse_config
from jobs.config_errors import ConfigError
from jobs.settings import DistillConfig
from jobs.tune_check import check_sweep, total_steps
from jobs.tune_confirm import compared
from jobs.tune_learned import learned
from jobs.tune_ledger import Ledger, Report, Segment, TrialRecord, ranked
from jobs.tune_room import check_fits, room_for, run_pools
from jobs.tune_schedulers import ResumedASHA
from jobs.tune_settings import AshaConfig, ConfirmConfig, TuneConfig
from jobs.tune_space import resolved
from jobs.tune_work import figure, take_over

SPACE = {"critics.refresh_rate": {"loguniform": [0.001, 0.1]}}


def sweep_config(**options):
    return TuneConfig.model_validate({"space": SPACE, "trials": 3} | options)


def view(*nodes):
    return ClusterView(
        tuple(
            NodeView(f"n{i}", {"CPU": cpus, "GPU": gpus}, {"CPU": cpus, "GPU": gpus})
            for i, (cpus, gpus) in enumerate(nodes)
        )
    )


def test_room_is_counted_from_the_configurations_own_actors():
    config = DistillConfig(
        critics={"actors": 2, "cpus_per_actor": 0.5}, evaluation={"workers": 1, "cpus_per_worker": 0.25}
    )
    pools = run_pools("distill", config)
    assert {pool.name: (pool.count, pool.cpus) for pool in pools} == {
        "critics": (2, 0.5), "evaluators": (1, 0.25), "trainer": (1, 1.0),
    }  # fmt: skip
    # 2.26 CPUs a trial: three fit into 7 of one machine, and as many as pack into pieces of three.
    assert room_for(pools, 1, view((7.0, 0))).trials == 3
    assert room_for(pools, 3, view((7.0, 0))).trials == 1
    assert room_for(pools, 1, view((1.0, 0), (1.3, 0))).trials == 1
    tight = room_for(pools, 1, view((0.9, 0), (0.9, 0), (0.9, 0)))
    assert tight.trials == 0  # 2.7 CPUs, but no machine has the trainer's whole one
    assert "2 critics, 1 evaluators, 1 trainer take 2.26 CPUs" in tight.why
    with pytest.raises(ValueError, match=r"no trial of the sweep fits.*lower critics.actors, evaluation"):
        check_fits(tight, pools)


def test_gpus_bound_the_room_too():
    pools = [Pool("trainer", 1, 1.0, 1.0), Pool("critics", 2, 0.5, 0.5)]
    assert room_for(pools, 1, view((64.0, 8.0))).trials == 4


def test_a_run_in_one_process_counts_as_one():
    config = DistillConfig(
        critics={"actors": 0}, evaluation={"workers": 0}, trainer={"workers": 0, "cpus_per_worker": 0.5}
    )
    assert [(pool.name, pool.cpus) for pool in run_pools("distill", config)] == [("process", 0.5)]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"scheduler": {"kind": "asha"}}, r"scheduler.kind=asha compares .* set objective.progress"),
        (
            {"scheduler": {"kind": "asha", "grace_steps": 5000}, "objective": {"progress": "steps_1.fd"}},
            r"scheduler.grace_steps=5000 leaves nothing to decide in runs of 1000 steps",
        ),
        (
            {"scheduler": {"kind": "pbt", "interval": 70}, "objective": {"progress": "steps_1.fd"}},
            r"scheduler.interval=70 is not a multiple of base.trainer.checkpoint_every=100",
        ),
        (
            {"scheduler": {"kind": "pbt"}, "objective": {"progress": "steps_1.fd"}, "trials": 1},
            r"trials=1 is no population",
        ),
        (
            {
                "scheduler": {"kind": "pbt"}, "objective": {"progress": "steps_1.fd"},
                "searcher": {"kind": "tpe"},
            },
            r"searcher.kind=tpe with scheduler.kind=pbt",
        ),
        (
            {
                "scheduler": {"kind": "asha", "grace_steps": 50},
                "objective": {"progress": "steps_1.fd", "every": 20},
            },
            r"grace_steps=50 is not a multiple of objective.every=20",
        ),
        ({"confirm": {"seeds": [1], "changes": {"evaluation.sample": 3}}}, r"evaluation.sample"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_work_is_refused_in_one_line(options, line):
    config = sweep_config(**options)
    with pytest.raises(ValueError, match=line) as refused:
        check_sweep(config, resolved(config.job, config.base))
    assert "\n" not in str(refused.value)


def test_confirm_has_changes_for_all_seeds_or_for_each():
    both = ConfirmConfig(seeds=(1, 2), changes=({"seed": 3}, {"seed": 4}))
    assert [both.of(0), both.of(1)] == [{"seed": 3}, {"seed": 4}]
    assert ConfirmConfig(seeds=(1, 2), changes={"a": 1}).of(1) == {"a": 1}
    with pytest.raises(ValueError, match="1 mappings for 2 seeds"):
        ConfirmConfig(seeds=(1, 2), changes=({"seed": 3},))


def test_a_mistake_in_the_file_is_one_line(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("space: {critics.refresh_rat: {uniform: [0.0, 0.1]}}\n")
    with pytest.raises(ConfigError, match=r"critics\.refresh_rat\b.*critics\.refresh_rate") as refused:
        parse_config(TuneConfig, [str(path)])
    assert "\n" not in str(refused.value)


def test_total_steps_of_jobs():
    base = {"adversarial": {"steps": 20, "heads_alone": 5}, "warmup": {"steps": 7}}
    assert total_steps(resolved("distill", base)) == 32
    base["adversarial"]["adversarial_weight"] = 0.0
    assert total_steps(resolved("distill", base)) == 27
    assert total_steps(resolved("train", {"teacher": {"steps": 11}})) == 11


def test_the_ledger_keeps_what_it_is_told(tmp_path):
    store = RunStore(str(tmp_path / "sweep"))
    ledger = Ledger(store)
    record = TrialRecord(
        3, {"a.b": 0.5, "c": None, "d": [1, 2]}, "stopped", ("x/seed-0",), (Report(5, 1.5, (1.0, 2.0)),),
        segments=(Segment(0, {"a.b": 0.5}, 3), Segment(5, {"a.b": 0.6}, 1)), error="line\nline",
    )  # fmt: skip
    ledger.put(record)
    ledger.put(TrialRecord(1, {}))
    ledger.change(1, state="done", value=2.0, values=(2.0,))
    again = Ledger(store)
    assert again.trials == ledger.trials
    assert [one.index for one in again.in_order()] == [1, 3]


def test_a_value_that_is_no_number_is_not_the_best():
    values = [3.0, math.nan, 1.0, math.inf, None, 1.0]
    records = [TrialRecord(i, {}, "done", value=value) for i, value in enumerate(values)]
    records.append(TrialRecord(6, {}, "stopped", value=0.0))
    assert [record.index for record in ranked(records, "min")] == [2, 5, 0]
    assert [record.index for record in ranked(records, "max")] == [0, 2, 5]


def test_asha_that_was_interrupted_decides_as_one_that_was_not():
    """Reports of twelve trials in a random order; at each moment a resumed scheduler takes over."""
    draws = random.Random(4)
    config, total = AshaConfig(grace_steps=2, reduction_factor=2), 40
    events = [(step, trial) for trial in range(12) for step in (2, 4, 8, 16, 32)]
    events.sort(key=lambda event: (event[0] + draws.random() * 9, event[1]))
    values = {trial: draws.random() for trial in range(12)}

    def life(scheduler, stopped, part, reports):
        trials = {}
        for step, index in part:
            if index in stopped:
                continue
            if index not in trials:
                trials[index] = SimpleNamespace(trial_id=f"new-{index}", config={"index": index})
                scheduler.on_trial_add(None, trials[index])
            value = values[index] + draws.random() * 0.0
            reports[index].append(Report(step, value, (value,)))
            told = {"step": step, "objective": value}
            if scheduler.on_trial_result(None, trials[index], told) == "STOP":
                stopped.append(index)

    whole, alone = [], {index: [] for index in values}
    life(ResumedASHA(config, "min", total, []), whole, events, alone)
    assert 3 < len(whole) < 12
    for cut in range(0, len(events), 7):
        stopped, reports = [], {index: [] for index in values}
        life(ResumedASHA(config, "min", total, []), stopped, events[:cut], reports)
        records = [
            TrialRecord(i, {}, "stopped" if i in stopped else "running", reports=tuple(reports[i]))
            for i in values
        ]
        life(ResumedASHA(config, "min", total, records), stopped, events[cut:], reports)
        assert stopped == whole, cut


def test_what_a_lineage_learned_switches_where_it_changed():
    base = {
        "warmup": {"steps": 10}, "adversarial": {"heads_alone": 10, "steps": 30},
        "critics": {"refresh_rate": {"kind": "linear", "start": 0.01, "end": 0.0}},
    }  # fmt: skip
    lineage = [
        (0, {"adversarial.adversarial_weight": 0.1, "critics.refresh_rate.start": 0.02}),
        (30, {"adversarial.adversarial_weight": 0.2, "critics.refresh_rate.start": 0.02}),
    ]
    data = learned("distill", base, lineage)
    config = resolved("distill", data)
    # 20 of the 40 steps against the panel lie behind step 30.
    assert data["adversarial"]["adversarial_weight"] == {
        "kind": "piecewise", "pieces": [{"at": 0.0, "value": 0.1}, {"at": 0.5, "value": 0.2}],
    }  # fmt: skip
    assert config.critics.refresh_rate.start == 0.02
    assert config.critics.refresh_rate.kind == "linear"
    assert learned("distill", base, lineage[:1])["adversarial"]["adversarial_weight"] == 0.1


def test_a_checkpoint_that_is_gone_cannot_be_taken_over(tmp_path):
    source, target = RunStore(str(tmp_path / "a")), RunStore(str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"no checkpoint of step 25 any more: raise base.trainer.keep"):
        take_over(source, 25, target, "")
    folder = "checkpoints/step-00000025"
    for name in (f"{folder}/unet.safetensors", f"{folder}/manifest.json", "run.json", "metrics.jsonl"):
        source.write_text(name, name)
    source.write_text("checkpoints/step-00000050/manifest.json", "later")
    take_over(source, 25, target, "seed: 1\n")
    kept = [f"{folder}/manifest.json", f"{folder}/unet.safetensors", "config.yaml", "metrics.jsonl"]
    assert list(target.list()) == kept


def test_figures_are_found_by_dotted_key():
    row = {"step": 5, "steps_1": {"fd": 2}, "stage": "panel", "ok": True}
    assert figure(row, "steps_1.fd") == 2.0
    assert [figure(row, key) for key in ("steps_1", "stage", "ok", "steps_1.fd.x", "fd")] == [None] * 5


@pytest.mark.parametrize(
    ("best", "base", "mode", "verdict"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "min", "better than the base"),
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "max", "worse than the base"),
        ([1.0, 3.0, 2.0], [2.0, 2.1, 1.9], "min", "not shown"),
    ],
)
def test_a_verdict_needs_the_whole_interval(best, base, mode, verdict):
    from scipy.stats import ttest_rel

    found = compared({"best": best, "base": base}, "fd", mode)
    interval = ttest_rel(best, base).confidence_interval(0.95)
    assert (found["difference"]["low"], found["difference"]["high"]) == pytest.approx(tuple(interval))
    assert found["verdict"] == verdict
