"""The charts of a comparison: success by rule and policy, and paired differences with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jobs.report_axes import colours
from jobs.report_svg import INK, LINE, MUTED, Chart, drawing

Row = Mapping[str, Any]
WIDTH, ROW_INCHES, EDGE_INCHES = 8.4, 0.21, 0.75
KINDS = {
    "baseline": "Against {rival}, same policy",
    "random": "Against random choice among as many candidates, same policy",
    "likelihood": "Against the likeliest of as many candidates, same policy",
    "policy": "Against the policy {rival}, same rule",
}


def success_chart(figures: Sequence[Row], references: Sequence[Row]) -> Chart | None:
    """Draw each rule's success with a bar per policy, and a line for each scripted policy."""
    shown = [row for row in figures if row["rate"] is not None]
    if not shown:
        return None
    rules = list(dict.fromkeys(row["rule"] for row in shown))
    policies = list(dict.fromkeys(row["policy"] for row in shown))
    colour = dict(zip(policies, colours(policies), strict=True))
    height, thick = EDGE_INCHES + ROW_INCHES * len(rules) * (len(policies) + 0.6), 0.8 / len(policies)
    with drawing(size=(WIDTH, height)) as picture:
        ax = picture.ax
        for row in shown:
            at = rules.index(row["rule"]) + (policies.index(row["policy"]) + 0.5) * thick - 0.4
            first = row["rule"] == next(r["rule"] for r in shown if r["policy"] == row["policy"])
            label = row["policy"] if first else ""
            rate = 100 * row["rate"]
            ax.barh(at, rate, 0.86 * thick, color=colour[row["policy"]], alpha=0.55, label=label, linewidth=0)
            ax.plot([100 * row["low"], 100 * row["high"]], [at, at], color=INK, linewidth=1.0)
            if len(row["seeds"]) > 1:
                each = [100 * seed["rate"] for seed in row["seeds"] if seed["rate"] is not None]
                ax.plot(each, [at] * len(each), ".", color=INK, markersize=3.5)
        for row in references:
            if row["rate"] is not None:
                _mark(ax, 100 * row["rate"], row["policy"])
        _sideways(ax, "success, %", rules)
        ax.set_xlim(0, 102)
        if len(policies) > 1:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.0)
        told = "; ".join(f"{r['policy']} with {r['rule']} {100 * r['rate']:.1f} %" for r in shown)
        return picture.chart(
            "Success by rule and policy",
            "Lines: Wilson 95 % interval over all episodes. Dots: training seeds. Dashed: scripted policies.",
            told, wide=True,
        )  # fmt: skip


def difference_charts(comparisons: Sequence[Row]) -> list[Chart]:
    """Draw one forest of paired differences per kind of comparison."""
    charts = []
    for kind, title in KINDS.items():
        rows = [row for row in comparisons if row["kind"] == kind]
        if rows:
            rival = rows[0]["against_policy" if kind == "policy" else "against_rule"]
            charts.append(_forest(title.format(rival=rival), rows))
    return charts


def _forest(title: str, rows: Sequence[Row]) -> Chart:
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    colour = dict(zip(policies, colours(policies), strict=True))
    labels = [f"{row['policy']}, {row['rule']}" for row in rows]
    with drawing(size=(WIDTH, EDGE_INCHES + 1.35 * ROW_INCHES * len(rows))) as picture:
        ax = picture.ax
        ax.axvline(0, color=MUTED, linewidth=0.9)
        for at, row in enumerate(rows):
            shade = colour[row["policy"]]
            ax.plot([100 * row["low"], 100 * row["high"]], [at, at], color=shade, linewidth=2.0)
            ax.plot(100 * row["difference"], at, "s", color=shade, markersize=5)
            if len(row["by_seed"]) > 1:
                each = [100 * value for value in row["by_seed"]]
                ax.plot(each, [at + 0.27] * len(each), ".", color=INK, markersize=3.5)
        _sideways(ax, "difference in success, percentage points", labels)
        reach = 1.08 * max(abs(value) for value in ax.get_xlim())
        ax.set_xlim(-reach, reach)
        told = "; ".join(
            f"{label} {100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
            for label, row in zip(labels, rows, strict=True)
        )
        return picture.chart(
            title, "Squares: all pairs, with 95 % interval. Dots: training seeds.", told, wide=True
        )


def _mark(ax: Axes, rate: float, name: str) -> None:
    """Draw a scripted policy's rate as a dashed line with its name above."""
    ax.axvline(rate, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    ax.text(
        rate, 1.01, f"{name} {rate:.0f}", transform=ax.get_xaxis_transform(),
        ha="right" if rate > 50 else "left", va="bottom", color=MUTED, fontsize=7.5,
    )  # fmt: skip


def _sideways(ax: Axes, x: str, labels: Sequence[str]) -> None:
    """Name the rows from the top down and leave quiet axes."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlabel(x)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.tick_params(which="both", length=0)
    ax.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
    ax.spines["bottom"].set_color(LINE)
