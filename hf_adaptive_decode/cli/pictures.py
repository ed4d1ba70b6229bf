"""Puts what a command found into pictures and pages; knows files, and nothing of how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_gains(measures: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """A picture of an adapter's gains for each task, token budget and adapter; returns the files."""
    from ..reports.plots import plot_gains

    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in measures:
        if "gain" in line:
            cells.setdefault((line["task"], line["token_budget"], line["adapter"]), []).append(line)
    written = []
    for number, lines in enumerate(cells.values()):
        path = folder / ("gains.png" if len(cells) == 1 else f"gains_{number}.png")
        plot_gains(lines, path)
        written.append(str(path))
    return written


def write_trace(traces: Sequence[Any], folder: Path, note: str) -> list[str]:
    """A page with the completions of one prompt side by side, and a picture of the first one's settings."""
    from ..reports.plots import plot_generation
    from ..reports.trace_page import trace_page

    page, picture = folder / "trace.html", folder / "generation.png"
    page.write_text(trace_page(traces, title="Decoding trace", note=note), encoding="utf-8")
    own = traces[0]
    values = {name: [getattr(token, name) for token in own.tokens] for name in ("temperature", "top_p")}
    plot_generation({own.name: {**values, "tokens": [token.text for token in own.tokens]}}, picture)
    return [str(page), str(picture)]


def has_pictures() -> bool:
    """Whether what draws them is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None
