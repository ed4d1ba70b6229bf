"""A comparison as a plain text table; knows numbers and nothing of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_interval(interval: Mapping[str, float], sign: bool = False) -> str:
    """`52.3 [49.1, 55.6]` in per cent, with an explicit plus if `sign`."""
    mean, low, high = (100 * interval[name] for name in ("mean", "low", "high"))
    plus = "+" if sign else ""
    return f"{mean:{plus}.1f} [{low:{plus}.1f}, {high:{plus}.1f}]"


def comparison_table(result: Mapping[str, Any]) -> str:
    """
    Pass@k of every decoder, and the adapter's paired gain over each baseline, as aligned Markdown.

    Args:
        result (mapping): [`Comparison.as_dict`], fresh or read back from JSON.
    """
    ks = [name for name in result["rows"][0] if name.startswith("pass@")]
    header = ["decoder", *ks, *(f"heads' gain at {k}" for k in ks)]
    rows = []
    for row in result["rows"]:
        gains = [row.get(f"adapter_gain_{k}") for k in ks]
        shown = ["" if gain is None else format_interval(gain, sign=True) for gain in gains]
        rows.append([row["decoder"], *(format_interval(row[k]) for k in ks), *shown])
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded so that it reads well in a terminal, too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
