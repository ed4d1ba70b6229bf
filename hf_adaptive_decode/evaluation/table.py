"""A comparison as a plain text table; knows numbers and nothing of how they came about."""

from __future__ import annotations

from collections.abc import Sequence

from .comparison import Comparison
from .metrics import Interval


def format_interval(interval: Interval, sign: bool = False) -> str:
    """`52.3 [49.1, 55.6]` in per cent, with an explicit plus if `sign`."""
    mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
    plus = "+" if sign else ""
    return f"{mean:{plus}.1f} [{low:{plus}.1f}, {high:{plus}.1f}]"


def comparison_table(comparison: Comparison) -> str:
    """Pass@k of every decoder, and the adapter's paired gain over each baseline, as aligned Markdown."""
    ks = comparison.ks
    header = ["decoder", *(f"pass@{k}" for k in ks), *(f"heads' gain at pass@{k}" for k in ks)]
    rows = [[comparison.adapter.decoder.name, *(format_interval(comparison.adapter.interval(k)) for k in ks)]]
    rows[0] += ["" for _ in ks]
    for outcome in comparison.baselines:
        scores = [format_interval(outcome.interval(k)) for k in ks]
        gains = [format_interval(comparison.adapter.difference(outcome, k), sign=True) for k in ks]
        rows.append([outcome.decoder.name, *scores, *gains])
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded so that it reads well in a terminal, too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
