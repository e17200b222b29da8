"""The report of a comparison: one page, complete in itself, with figures, decisions and moving pictures."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.storage import RunStore
from counterpoint.actions.space import ActionSpace
from jobs.report_page import data_uri, facts, render_page, versions
from jobs.report_record import CONFIG, ENVIRONMENT, read_json
from jobs.report_words import duration
from jobs.rollout_charts import difference_charts, success_chart
from jobs.rollout_trace import confidence_bars, draw_candidates, read_traces
from jobs.rollout_words import p_value, percent, signed, summary, verdict
from jobs.runs import read_results

REPORT = "report.html"
TEMPLATE = "rollout.html.jinja"
MOST_ASIDE, MOST_CLIPS = 60, 24
_CLIP = re.compile(r"videos/(.+)-(success|failure)-(\d+)\.gif")


def write_rollout_report(store: RunStore) -> str:
    """Write `report.html` into the run's store from what it holds and return where a person finds it."""
    store.write_text(REPORT, render(store, read_results(store)))
    return store.location(REPORT)


def render(store: RunStore, results: Mapping[str, Any]) -> str:
    """Return the page for `results` with the videos and traces in `store`."""
    environment = read_json(store, ENVIRONMENT)
    chart = success_chart(results["figures"], results["references"])
    rows = [*results["figures"], *results["references"]]
    return render_page(
        TEMPLATE,
        {
            "percent": percent,
            "signed": signed,
            "p_value": p_value,
            "verdict": verdict,
            "summary": summary(results),
            "results": results,
            "tiles": _tiles(results),
            "charts": [*([chart] if chart else []), *difference_charts(results["comparisons"])],
            "rows": rows,
            "several": any(len(row["seeds"]) > 1 for row in rows),
            "instructions": _by_instruction(results["instructions"]),
            "outcomes": list(dict.fromkeys(name for row in rows for name in row["outcomes"])),
            "trace": _episode(read_traces(store), results),
            "clips": _clips(store, results),
            "aside": results["set_aside"][:MOST_ASIDE],
            "more_aside": max(0, len(results["set_aside"]) - MOST_ASIDE),
            "facts": facts(store.uri, environment) | {"Time": duration(results["seconds"])},
            "versions": versions(environment),
            "config": store.read_text(CONFIG) if store.exists(CONFIG) else "",
        },
    )


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, figure, remark) of the figures that are shown large."""
    figures = results["figures"]
    if not figures:
        return []
    of_first = [r for r in figures if r["policy"] == figures[0]["policy"] and r["rate"] is not None]
    tiles = []
    for row in of_first:
        if row["rule"] == results["baseline"]:
            tiles.append((row["rule"], f"{percent(row['rate'])} %", row["policy"]))
    tiles += [
        (row["policy"], f"{percent(row['rate'])} %", "scripted")
        for row in results["references"]
        if row["rate"] is not None
    ]
    played = sum(row["episodes"] for row in figures)
    tiles.append(("episodes", f"{played:,}", f"{len(figures)} pairs of policy and rule"))
    if results.get("mean_batch_size"):
        tiles.append(("mean batch", f"{results['mean_batch_size']:.1f}", "observations a sampler's batch"))
    return tiles


def _by_instruction(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the names of the instructions, and per policy and rule its figures in that order."""
    names = sorted({row["instruction"] for row in rows})
    found = {(row["policy"], row["rule"], row["instruction"]): row for row in rows}
    pairs = list(dict.fromkeys((row["policy"], row["rule"]) for row in rows))
    return {
        "names": names,
        "rows": [(*pair, [found.get((*pair, name)) for name in names]) for pair in pairs],
    }


def _episode(traces: Sequence[dict[str, Any]], results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the episode whose decisions are shown: of a masked-condition rule if there is one."""

    rules, policies = list(results["rules"]), [row["policy"] for row in results["figures"]]

    def rank(trace: Mapping[str, Any]) -> tuple[bool, bool, int, int]:
        masked = results["rules"][trace["rule"]]["rule"] == "masked_condition"
        several = any(len(decision["candidates"]) > 1 for decision in trace["decisions"])
        return masked, several, -policies.index(trace["policy"]), -rules.index(trace["rule"])

    whole = [t for t in traces if t["decisions"] and t["rule"] in rules and t["policy"] in policies]
    if not whole:
        return None
    trace = max(whole, key=rank)
    space = ActionSpace.model_validate(trace["action_space"])
    images = trace["images"] or [None] * len(trace["decisions"])
    return trace | {
        "rows": [
            {
                "step": k * space.execute,
                "image": image,
                "chunks": draw_candidates(decision, space),
                "bars": confidence_bars(decision),
                "fallback": decision["chosen"] < 0,
                "clipped": decision["clipped"],
            }
            for k, (decision, image) in enumerate(zip(trace["decisions"], images, strict=True))
        ]
    }


def _clips(store: RunStore, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the videos in the order of the policies, then of the rules; successes before failures."""
    matches = [(name, _CLIP.fullmatch(name)) for name in store.list("videos")]
    found = {(m[1], m[2], int(m[3])): name for name, m in matches if m}
    order = list(results["cells"])
    shown = sorted(
        (key for key in found if key[0] in results["cells"]),
        key=lambda key: (order.index(key[0]), key[1] != "success", key[2]),
    )
    return [
        results["cells"][path]
        | {"kind": kind, "seed": seed, "image": data_uri(store.read_bytes(found[path, kind, seed]), "gif")}
        for path, kind, seed in shown[:MOST_CLIPS]
    ]
