"""All figures of a comparison: as they are stored, as a table, and as the headline."""

import itertools
from collections.abc import Sequence
from typing import Any

from jobs.rollout_cells import Cell, CellResult, Session, slug
from jobs.rollout_figures import cell_figures, comparisons, instruction_figures, speed_figures
from jobs.rollout_settings import RolloutConfig
from jobs.rollout_words import percent, signed, verdict
from jobs.table import text_table

COLUMNS = (
    "success", "of", "percent", "interval", "trainings", "steps", "against_baseline", "p_holm",
    "verdict", "ms",
)  # fmt: skip
Row = dict[str, Any]


def compare(config: RolloutConfig, results: Sequence[CellResult]) -> Row:
    """Return all figures of the comparison, as they are stored."""
    rules = {rule.name: rule.selection for rule in config.rules}
    grouped: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        grouped.setdefault((result.cell.policy, result.cell.rule), []).append(result)
    scripted = {key: group for key, group in grouped.items() if group[0].cell.selection is None}
    of_policies = {key: group for key, group in grouped.items() if key not in scripted}
    figures = [cell_figures(group) for group in of_policies.values()]
    references = [cell_figures(group) for group in scripted.values()]
    session = sum((r.session for group in of_policies.values() for r in group), Session())
    speed = speed_figures(session)
    return {
        "first_seed": config.first_seed,
        "episodes": config.episodes,
        "split": config.split,
        "baseline": config.baseline,
        "rules": {name: selection.model_dump(mode="json") for name, selection in rules.items()},
        "figures": figures,
        "references": references,
        "comparisons": comparisons(of_policies, config.baseline, rules),
        "instructions": list(
            itertools.chain.from_iterable(instruction_figures(group) for group in grouped.values())
        ),
        "cells": {r.cell.path: _named(r.cell) for r in results},
        "set_aside": [
            _named(r.cell) | {"seed": seed, "reason": reason}
            for r in results
            for seed, reason in r.set_aside.items()
        ],
        "mean_batch_size": speed["mean_batch_size"],
        "seconds": round(sum(r.session.seconds for r in results), 1),
        "headline": headline(config, figures, references, speed),
    }


def headline(config: RolloutConfig, figures: Sequence[Row], references: Sequence[Row], speed: Row) -> Row:
    """Return the figures of the job's last line; success rates are those of the first policy."""
    first = config.policies[0].name
    rates = {
        f"{slug(row['rule']).replace('-', '_')}_success_rate": row["rate"]
        for row in figures
        if row["policy"] == first
    }
    rates |= {f"{row['policy']}_success_rate": row["rate"] for row in references}
    return {
        "episodes": sum(row["episodes"] for row in [*figures, *references]),
        **{name: None if rate is None else round(rate, 4) for name, rate in rates.items()},
        "set_aside": sum(row["set_aside"] for row in [*figures, *references]),
        "mean_batch_size": _rounded(speed["mean_batch_size"]),
        "episodes_per_second": _rounded(speed["episodes_per_second"]),
    }


def table(results: Row) -> str:
    """Return the comparison as text: a line for each policy and rule."""
    against = {(r["policy"], r["rule"]): r for r in results["comparisons"] if r["kind"] == "baseline"}
    rows = [
        _line(row, against.get((row["policy"], row["rule"])))
        for row in [*results["figures"], *results["references"]]
    ]
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    return text_table(rows, columns)


def _line(row: Row, against: Row | None) -> Row:
    name = row["policy"] if row["policy"] == row["rule"] else f"{row['policy']}, {row['rule']}"
    line: Row = {
        "name": name,
        "success": row["successes"],
        "of": row["episodes"],
        "percent": percent(row["rate"]),
        "interval": f"[{percent(row['low'])}, {percent(row['high'])}]",
        "steps": _rounded(row["mean_steps"]),
        "ms": _rounded(row["ms_per_decision"]),
    }
    if row["mean_low"] is not None:
        line["trainings"] = (
            f"{percent(row['mean'])} [{percent(row['mean_low'])}, {percent(row['mean_high'])}]"
        )
    if against is not None:
        line |= {
            "against_baseline": signed(against["difference"])
            + f" [{signed(against['low'])}, {signed(against['high'])}]",
            "p_holm": against["p_holm"],
            "verdict": verdict(against),
        }
    return line


def _named(cell: Cell) -> Row:
    return {"policy": cell.policy, "training_seed": cell.training_seed, "rule": cell.rule}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
