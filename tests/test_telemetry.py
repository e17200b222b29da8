"""Metrics: one table of names, a dashboard that draws them, and what a node of Ray really exports."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from tiny_jobs import distiller, panel_recipe, remote_panel, start_hosts

from actors.telemetry import BY_NAME, METRICS, Telemetry, TrainerTelemetry, run_tag, table
from actors.worker import LoopSpec, run_loop
from cluster.waiting import get
from counterpoint.alarms import AlarmsConfig, Watcher
from counterpoint.place import Place
from jobs.dashboard import DashboardConfig, dashboard

ROOT = Path(__file__).parent.parent
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
EXPORTED = {f"ray_{m.name}{suffix}": m for m in METRICS for suffix in SUFFIXES[m.kind]}


def test_names_are_prometheus_names_with_their_units():
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"counterpoint_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    assert table() in (ROOT / "README.md").read_text(), "the README has another table"


def test_every_line_of_the_dashboard_draws_a_metric_with_its_tags():
    drawn = set()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            names = re.findall(r"ray_[a-z_]+", target["expr"])
            assert names, target
            drawn |= {EXPORTED[name].name for name in names}
            known = {"run", "rank", "role", *(tag for name in names for tag in EXPORTED[name].tags)}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known
    assert drawn == set(BY_NAME), "a metric that nobody looks at"


def test_the_dashboard_in_the_repository_is_what_the_job_writes():
    stored = json.loads((ROOT / DashboardConfig().out).read_text())
    assert stored == dashboard(), "run `python -m jobs.dashboard`"


def test_panels_of_the_dashboard_do_not_overlap():
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))


@pytest.mark.parametrize(
    ("uri", "tag"),
    [
        ("/data/runs/digits/student", "digits/student"),
        ("s3://key:secret@bucket/runs/a?token=1", "runs/a"),
        ("run", "run"),
    ],
)
def test_a_run_is_tagged_by_the_end_of_its_uri(uri, tag):
    assert run_tag(uri) == tag


def test_a_metric_of_another_role_or_with_other_tags_is_a_mistake():
    trainer = Telemetry("run", "trainer")
    with pytest.raises(AssertionError, match="gauge of trainer"):
        trainer.count("counterpoint_step")
    with pytest.raises(AssertionError, match="counter of critics"):
        trainer.count("counterpoint_judged_total", group=1)
    with pytest.raises(AssertionError, match="tags"):
        trainer.gauge("counterpoint_loss", 1.0)


class Teller:
    def tell(self):
        critics = Telemetry("runs/told", "critics", 3)
        critics.count("counterpoint_judged_total", 5, group=1)
        critics.count("counterpoint_judged_total", 0, group=1)
        critics.count("counterpoint_judged_total", 2, group=1)
        critics.observe("counterpoint_judge_seconds", 0.02, group=1)
        critics.gauge("counterpoint_snapshot_step", 50, group=1)
        critics.gauge("counterpoint_snapshot_step", float("nan"), group=1)
        critics.gauge("counterpoint_snapshot_step", None, group=1)


def scraped(deadline, run, wanted=frozenset()):
    """Return what the node exports of a run, with labels, once all metrics `wanted` are there."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'run="{run}"' in line]
        missing = wanted - {EXPORTED[line.partition("{")[0]].name for line in lines}
        if lines and not missing:
            return lines
        assert time.monotonic() < deadline, f"not exported: {sorted(missing)}"
        time.sleep(0.5)


def test_a_node_exports_what_an_actor_reports(ray_cluster):
    teller = ray.remote(num_cpus=0)(Teller).remote()
    get(teller.tell.remote(), timeout=240, what="telling")
    lines = scraped(time.monotonic() + 240, "runs/told")
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values["ray_counterpoint_judged_total"] == 7
    assert values["ray_counterpoint_snapshot_step"] == 50
    assert values["ray_counterpoint_judge_seconds_count"] == 1
    assert all('role="critics"' in line and 'rank="3"' in line and 'group="1"' in line for line in lines)
    ray.kill(teller)


def test_a_distillation_reports_every_metric_of_trainers_and_critics(ray_cluster, tiny_teacher, tmp_path):
    uri = f"{tmp_path}/runs/measured"
    recipe = panel_recipe(tiny_teacher, refresh_rate=0.5)
    hosts = start_hosts(recipe, [tuple(range(len(recipe.critics.noise_levels)))], Path(uri))
    panel = remote_panel(recipe, hosts)
    # Alarms about anything: what is measured is never within an empty range.
    alarms = AlarmsConfig(window=1, std_ratio=(0.0, 1e-6))
    spec = LoopSpec(
        uri, lambda *_: distiller(recipe, panel, steps=2), watch=lambda: Watcher(alarms), checkpoint_every=1
    )
    result = run_loop(spec, Place())
    assert result.alarms
    # No host died in these two steps: one that is said to have is counted like one that did.
    panel.recoveries += 1
    TrainerTelemetry(uri).asked(panel)
    wanted = {metric.name for metric in METRICS if metric.role in ("trainer", "critics")}
    seen = {line.partition("{")[0]: line for line in scraped(time.monotonic() + 240, "runs/measured", wanted)}
    assert float(seen["ray_counterpoint_step"].rpartition(" ")[2]) == 2
    assert float(seen["ray_counterpoint_samples_total"].rpartition(" ")[2]) == 32
    for host in hosts:
        ray.kill(host.actor)
