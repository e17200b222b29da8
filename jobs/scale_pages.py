"""What `jobs.bench scale` shows: tables and a page with curves, each labelled MEASURED or SIMULATED."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from jobs.report_axes import colours, finish
from jobs.report_page import facts, render_page, versions
from jobs.report_svg import MUTED, SERIES, Chart, drawing
from jobs.table import text_table

TEMPLATE = "scale.html.jinja"
CHECK = ("predicted_ms", "measured_ms", "error")
SIZES = (
    "gpus",
    "critic_gpus",
    "replicas",
    "images_s",
    "efficiency",
    "step_s",
    "bottleneck",
    "first_overhead",
)
SETTINGS = ("gpus", "critic_gpus", "replicas", "images_s", "step_s", "against", "gain")


def tables(told: Mapping[str, Any]) -> str:
    """Return all tables as text, each under a line that says whether it was measured or simulated."""
    return "".join(f"\n{title}\n{text_table(rows, columns)}\n" for title, rows, columns in _tables(told))


def _tables(told: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]], Sequence[str]]]:
    made: list[tuple[str, list[dict[str, Any]], Sequence[str]]] = []
    if "check" in told:
        rows = [
            {
                "name": row["arrangement"] + (" (calibrated on)" if row["calibrated_on"] else ""),
                "predicted_ms": 1e3 * row["predicted_s"],
                "measured_ms": 1e3 * row["measured_s"],
                "error": f"{row['error']:+.1%}",
            }
            for row in told["check"]["rows"]
        ]
        title = f"A step here on {told['cores']} cores: predicted is SIMULATED, measured is MEASURED"
        made.append((title, rows, CHECK))
    for cluster in told["clusters"]:
        rows = [{"name": "SIMULATED", **row, "images_s": row["images_per_second"]} for row in cluster["rows"]]
        made.append((f"SIMULATED: SDXL on {cluster['figures']['name']}, weak scaling", rows, SIZES))
    rows = [
        {"name": row["setting"], **row, "images_s": row["images_per_second"], "gain": f"{row['gain']:+.1%}"}
        for row in told["ablation"]
    ]
    made.append((f"SIMULATED: what settings buy on {told['clusters'][0]['figures']['name']}", rows, SETTINGS))
    return made


def charts(told: Mapping[str, Any]) -> list[Chart]:
    """Return the pictures: the check, throughput, efficiency, the parts of a step, what settings buy."""
    made = [_check(told)] if "check" in told else []
    return [*made, _throughput(told), _efficiency(told), _parts(told), _settings(told)]


def scale_page(told: Mapping[str, Any]) -> str:
    """Return a page, complete in itself, with the curves and tables."""
    shown = [{"title": title, "columns": columns, "rows": rows} for title, rows, columns in _tables(told)]
    figures = [
        (cluster["figures"]["name"], name, figure["value"], figure["source"])
        for cluster in told["clusters"]
        for name, figure in cluster["figures"].items()
        if isinstance(figure, dict)
    ]
    content = {
        "charts": charts(told), "tables": shown, "figures": figures,
        "fitted": told.get("check", {}).get("fitted"),
        "flops": told["flops"]["per_sample"], "facts": facts("jobs.bench scale", told["environment"]),
        "versions": versions(told["environment"]),
    }  # fmt: skip
    return render_page(TEMPLATE, content)


def _check(told: Mapping[str, Any]) -> Chart:
    rows = told["check"]["rows"]
    with drawing(size=(5.2, 0.9 + 0.45 * len(rows))) as it:
        for at, (what, colour) in enumerate((("measured_s", SERIES[0]), ("predicted_s", SERIES[1]))):
            label = "MEASURED" if what == "measured_s" else "SIMULATED"
            places = [row + 0.36 * at - 0.18 for row in range(len(rows))]
            it.ax.barh(places, [1e3 * row[what] for row in rows], 0.34, color=colour, label=label)
        names = [row["arrangement"] + ("*" if row["calibrated_on"] else "") for row in rows]
        it.ax.set_yticks(range(len(rows)), names)
        it.ax.invert_yaxis()
        it.ax.tick_params(which="both", length=0)
        it.ax.set_xlabel("milliseconds a step")
        it.ax.legend(loc="lower right")
        said = "; ".join(
            f"{row['arrangement']}: {1e3 * row['measured_s']:.0f} ms measured, "
            f"{1e3 * row['predicted_s']:.0f} predicted"
            for row in rows
        )
        caption = "MEASURED on this machine beside SIMULATED; * the simulation was calibrated on these."
        return it.chart("Prediction and measurement", caption, f"Bars: {said}.")


def _throughput(told: Mapping[str, Any]) -> Chart:
    with drawing() as it:
        for colour, cluster in zip(colours(told["clusters"]), told["clusters"], strict=True):
            x, y = _line(cluster, "images_per_second")
            it.ax.plot(x, y, "o-", color=colour, markersize=3.5, label=cluster["figures"]["name"])
            it.ax.plot(x, [y[0] * gpus / x[0] for gpus in x], ":", color=MUTED, linewidth=1)
        it.ax.set_yscale("log")
        _gpus(it.ax, told)
        finish(it.ax, "images / s", "GPUs")
        caption = "SIMULATED from stated figures, weak scaling; dotted is linear from the smallest size."
        return it.chart(
            "Images per second (SIMULATED)", caption, f"Line chart: {_ends(told, 'images_per_second')}."
        )


def _efficiency(told: Mapping[str, Any]) -> Chart:
    with drawing() as it:
        for colour, cluster in zip(colours(told["clusters"]), told["clusters"], strict=True):
            x, y = _line(cluster, "efficiency")
            it.ax.plot(x, y, "o-", color=colour, markersize=3.5, label=cluster["figures"]["name"])
        it.ax.set_ylim(0.0, 1.1)
        _gpus(it.ax, told)
        finish(it.ax, "efficiency", "GPUs")
        caption = (
            "SIMULATED: images a second and GPU over those of one GPU; above 1, passes are fewer and larger."
        )
        return it.chart("Efficiency (SIMULATED)", caption, f"Line chart: {_ends(told, 'efficiency')}.")


def _parts(told: Mapping[str, Any]) -> Chart:
    cluster = told["clusters"][0]
    rows = sorted(cluster["rows"], key=lambda row: row["gpus"])
    names = [name for name in rows[0]["parts_s"] if any(row["parts_s"][name] > 0 for row in rows)]
    palette = [*SERIES, MUTED]
    with drawing() as it:
        floor = [0.0] * len(rows)
        for colour, name in zip(palette, names, strict=False):
            heights = [row["parts_s"][name] for row in rows]
            it.ax.bar(range(len(rows)), heights, 0.7, bottom=floor, color=colour, label=name)
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
        it.ax.set_xticks(range(len(rows)), [str(row["gpus"]) for row in rows])
        finish(it.ax, "seconds", "GPUs")
        it.ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        caption = (
            f"SIMULATED on {cluster['figures']['name']}: a trainer's step by part; waiting is for critics."
        )
        said = "; ".join(f"{name} {rows[-1]['parts_s'][name]:.2f} s" for name in names)
        return it.chart("Parts of a step (SIMULATED)", caption, f"Bars; at {rows[-1]['gpus']} GPUs: {said}.")


def _settings(told: Mapping[str, Any]) -> Chart:
    rows = [row for row in told["ablation"] if row["against"]]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    sizes = list(dict.fromkeys(row["gpus"] for row in rows))
    with drawing(size=(5.2, 0.9 + 0.45 * max(1, len(names)))) as it:
        width = 0.8 / max(1, len(sizes))
        for position, (colour, gpus) in enumerate(zip(colours(sizes), sizes, strict=True)):
            gains = {row["setting"]: 100 * row["gain"] for row in rows if row["gpus"] == gpus}
            places = [at + width * (position + 0.5) - 0.4 for at in range(len(names))]
            it.ax.barh(places, [gains[name] for name in names], width, color=colour, label=f"{gpus} GPUs")
        it.ax.set_yticks(range(len(names)), names)
        it.ax.invert_yaxis()
        it.ax.tick_params(which="both", length=0)
        it.ax.set_xlabel("% more images a second")
        it.ax.legend(loc="best")
        said = "; ".join(f"{row['setting']} at {row['gpus']} GPUs {row['gain']:+.1%}" for row in rows)
        caption = "SIMULATED: against the row that the table names, GPUs split anew for each."
        return it.chart("What settings buy (SIMULATED)", caption, f"Bars: {said}.")


def _line(cluster: Mapping[str, Any], key: str) -> tuple[list[int], list[float]]:
    rows = sorted(cluster["rows"], key=lambda row: row["gpus"])
    return [row["gpus"] for row in rows], [row[key] for row in rows]


def _gpus(ax: Axes, told: Mapping[str, Any]) -> None:
    ax.set_xscale("log", base=2)
    sizes = sorted({row["gpus"] for cluster in told["clusters"] for row in cluster["rows"]})
    ax.set_xticks(sizes)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _ends(told: Mapping[str, Any], key: str) -> str:
    said = []
    for cluster in told["clusters"]:
        x, y = _line(cluster, key)
        said.append(f"{cluster['figures']['name']} from {y[0]:.3g} at {x[0]} to {y[-1]:.4g} at {x[-1]} GPUs")
    return "; ".join(said)
