"""Tables of figures as text."""

from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = ("fd", "kid", "precision", "recall", "accuracy", "train_fd", "samples")


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = FIGURES) -> str:
    """Return rows of {"name": ..., figure: number} as aligned text; a figure that is missing is a dash."""
    lines = [["", *columns]]
    lines += [[str(row["name"]), *(shown(row.get(column)) for column in columns)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def shown(value: Any) -> str:
    """Return a figure in a few characters."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
