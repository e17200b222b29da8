"""Matplotlib charts as inline SVG that takes its colours and its font from the page around it.

Charts are drawn in stand-in colours, each of which becomes a CSS variable of the page, so that one picture
serves a light and a dark page.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, LINE, BAND, PAPER, BAD = "#0b0001", "#0b0002", "#0b0003", "#0b0004", "#0b0005", "#0b0006"
SERIES = ("#0c0001", "#0c0002", "#0c0003", "#0c0004", "#0c0005", "#0c0006")
RANKS = ("#0d0001", "#0d0002", "#0d0003", "#0d0004", "#0d0005", "#0d0006", "#0d0007")
"""From the best to the worst."""
COLOURS = {INK: "ink", MUTED: "muted", LINE: "line", BAND: "band", PAPER: "paper", BAD: "bad"}
COLOURS |= {colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)}
COLOURS |= {colour: f"rank-{number}" for number, colour in enumerate(RANKS, start=1)}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.labelsize": 8.5,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.color": "none",
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True)
class Chart:
    """A drawn chart with what a page says about it."""

    title: str
    svg: Markup
    caption: str
    """One sentence on what is drawn."""
    wide: bool = False
    """Whether it wants a row to itself."""


class Drawing:
    """A chart being drawn: `axes` to draw on, then `chart` to have it."""

    def __init__(self, figure: Figure, axes: list[Axes]) -> None:
        self.figure, self.axes = figure, axes

    @property
    def ax(self) -> Axes:
        """The only axes of a simple chart."""
        return self.axes[0]

    def chart(self, title: str, caption: str, alt: str, *, wide: bool = False) -> Chart:
        """Return the finished chart; `alt` tells what it shows to those who cannot see it."""
        return Chart(title, _inline(self.figure, f"{title}. {alt}"), caption, wide)


@contextmanager
def drawing(
    panels: int = 1, size: tuple[float, float] = (5.2, 2.9), share: bool = False
) -> Iterator[Drawing]:
    """Yield a drawing of `panels` axes side by side, `size` in inches (72 units of the picture each)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, sharey=share)
        yield Drawing(figure, list(axes[0]))


def _inline(figure: Figure, alt: str) -> Markup:
    """Return the figure as an <svg> element without addresses, fixed sizes, colours or fonts of its own."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": alt}):
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    opening, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", rest, flags=re.DOTALL)
    used = set(re.findall(r"#(\w+)", rest))
    rest = re.sub(r' id="([\w.]+)"', lambda match: match.group() if match.group(1) in used else "", rest)
    rest = re.sub(r' d="[^"]*"', lambda match: _shortened(match.group()), rest)
    rest = re.sub(r"'DejaVu Sans'(?:, [^;\"]*)?", "var(--sans)", rest)
    rest = re.sub(r"#0[bcd]000\d", lambda match: f"var(--{COLOURS[match.group()]})", rest)
    return Markup('<svg role="img" aria-label="{}" {}>').format(alt, Markup(view.group())) + Markup(rest)


def _shortened(path: str) -> str:
    """Return a path's data with two decimals, a hundredth of a point, on one line."""
    return " ".join(re.sub(r"\d+\.\d+", lambda match: f"{float(match.group()):.2f}", path).split()).join(
        (" ", "")
    )
