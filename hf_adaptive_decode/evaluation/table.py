"""Intervals and plain text tables; knows numbers and nothing of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def format_interval(interval: Mapping[str, float], sign: bool = False) -> str:
    """`52.3 [49.1, 55.6]` in per cent, with an explicit plus if `sign`."""
    mean, low, high = (100 * interval[name] for name in ("mean", "low", "high"))
    plus = "+" if sign else ""
    return f"{mean:{plus}.1f} [{low:{plus}.1f}, {high:{plus}.1f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded so that it reads well in a terminal, too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
