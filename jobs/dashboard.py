"""Write the Grafana dashboard of the cast's metrics: `python -m jobs.dashboard`.

The file in the repository is what this writes: import it into a Grafana whose Prometheus scrapes Ray's nodes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterpoint.section import Section
from jobs.config import run_job

PANELS_A_ROW, HEIGHT = 3, 8
WIDTH = 24 // PANELS_A_ROW


class DashboardConfig(Section):
    """Write the Grafana dashboard of the cast's metrics."""

    out: str = "cluster/files/grafana/counterpoint.json"
    """The file to write."""


@dataclass(frozen=True)
class Panel:
    """One graph: lines of Prometheus expressions, as (expression, legend)."""

    title: str
    unit: str
    """Grafana's name of the unit."""
    lines: tuple[tuple[str, str], ...]


RUN = '{run=~"$run"}'
RATE = "[$__rate_interval]"
PANELS: dict[str, tuple[Panel, ...]] = {
    "Training": (
        Panel("Steps done", "short", ((f"max by (run) (ray_counterpoint_step{RUN})", "{{run}}"),)),
        Panel(
            "Time to go", "s",
            ((
                f"(max by (run) (ray_counterpoint_steps_wanted{RUN}) - max by (run) "
                f"(ray_counterpoint_step{RUN})) * avg by (run) "
                f"(rate(ray_counterpoint_step_seconds_total{RUN}{RATE}) / "
                f"rate(ray_counterpoint_step_seconds_count{RUN}{RATE}))", "{{run}}",
            ),),
        ),
        Panel(
            "Samples per second", "short",
            ((f"sum by (run) (rate(ray_counterpoint_samples_total{RUN}{RATE}))", "{{run}}"),),
        ),
        Panel("Losses", "short", ((f"ray_counterpoint_loss{RUN}", "{{run}} {{part}}"),)),
        Panel("Gradient norm", "short", ((f"ray_counterpoint_gradient_norm{RUN}", "{{run}}"),)),
        Panel("Learning rate", "short", ((f"ray_counterpoint_learning_rate{RUN}", "{{run}}"),)),
        Panel(
            "Step time, median and 95 %", "s",
            tuple(
                (
                    f"histogram_quantile({q}, sum by (run, le) "
                    f"(rate(ray_counterpoint_step_seconds_bucket{RUN}{RATE})))", f"{{{{run}}}} {q}",
                )
                for q in (0.5, 0.95)
            ),
        ),
        Panel(
            "Steps since the last checkpoint", "short",
            ((f"ray_counterpoint_step{RUN} - ray_counterpoint_checkpoint_step{RUN}", "{{run}}"),),
        ),
        Panel(
            "Time spent on checkpoints", "percentunit",
            ((f"rate(ray_counterpoint_checkpoint_seconds_total{RUN}{RATE})", "{{run}}"),),
        ),
    ),
    "Panel of critics": (
        Panel(
            "Trainers' time with the panel", "percentunit",
            ((f"rate(ray_counterpoint_panel_seconds_total{RUN}{RATE})", "rank {{rank}} {{part}}"),),
        ),
        Panel(
            "Judging, share of time", "percentunit",
            ((f"rate(ray_counterpoint_judge_seconds_total{RUN}{RATE})", "host {{rank}} group {{group}}"),),
        ),
        Panel(
            "Judgement, 95 %", "s",
            ((
                "histogram_quantile(0.95, sum by (group, le) "
                f"(rate(ray_counterpoint_judge_seconds_bucket{RUN}{RATE})))", "group {{group}}",
            ),),
        ),
        Panel(
            "Samples judged per second", "short",
            ((f"sum by (group) (rate(ray_counterpoint_judged_total{RUN}{RATE}))", "group {{group}}"),),
        ),
        Panel(
            "Heads refreshed per second", "short",
            ((
                f"sum by (group) (rate(ray_counterpoint_heads_refreshed_total{RUN}{RATE}))",
                "group {{group}}",
            ),),
        ),
        Panel(
            "Recoveries and alarms", "short",
            (
                (f"sum by (run) (ray_counterpoint_panel_recoveries_total{RUN})", "{{run}} recoveries"),
                (f"sum by (run) (ray_counterpoint_alarms_total{RUN})", "{{run}} alarms"),
            ),
        ),
        Panel("Snapshots", "short", ((f"ray_counterpoint_snapshot_step{RUN}", "group {{group}}"),)),
    ),
    "Samplers and evaluators": (
        Panel(
            "Decisions per second", "short",
            ((f"rate(ray_counterpoint_decisions_total{RUN}{RATE})", "sampler {{rank}}"),),
        ),
        Panel(
            "Observations per batch", "short",
            ((
                f"rate(ray_counterpoint_decisions_total{RUN}{RATE}) / "
                f"rate(ray_counterpoint_decision_batches_total{RUN}{RATE})", "sampler {{rank}}",
            ),),
        ),
        Panel(
            "Deciding, share of time", "percentunit",
            ((f"rate(ray_counterpoint_decision_seconds_total{RUN}{RATE})", "sampler {{rank}}"),),
        ),
        Panel(
            "Shards scored", "short",
            ((f"sum by (run) (ray_counterpoint_shards_scored_total{RUN})", "{{run}}"),),
        ),
        Panel(
            "Scoring, share of time", "percentunit",
            ((f"rate(ray_counterpoint_score_seconds_total{RUN}{RATE})", "evaluator {{rank}}"),),
        ),
    ),
}  # fmt: skip
"""The graphs by row."""


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in PANELS.items():
        panels.append(_row(len(panels) + 1, title, top))
        top += 1
        for index, panel in enumerate(row):
            place = (index % PANELS_A_ROW * WIDTH, top + index // PANELS_A_ROW * HEIGHT)
            panels.append(_graph(len(panels) + 1, panel, *place))
        top += -(-len(row) // PANELS_A_ROW) * HEIGHT
    return {
        "title": "Counterpoint",
        "uid": "counterpoint",
        "tags": ["counterpoint", "ray"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _run()]},
        "panels": panels,
    }


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    place = {"h": 1, "w": 24, "x": 0, "y": top}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _graph(number: int, panel: Panel, left: int, top: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(panel.lines)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": left, "y": top},
        "targets": targets,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _run() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": 'label_values({__name__=~"ray_counterpoint_.+"}, run)', "refId": "run"},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "refresh": 2,
    }


def main(config: DashboardConfig) -> dict[str, Any]:
    """Write the file and return where it is."""
    path = Path(config.out)
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    return {"dashboard": str(path), "panels": sum(len(row) for row in PANELS.values())}


if __name__ == "__main__":
    run_job(main, DashboardConfig)
