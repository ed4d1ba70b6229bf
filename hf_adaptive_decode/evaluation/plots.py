"""Figures as image files; knows numbers and matplotlib, and needs no display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MissingExtraError

# Of the Okabe-Ito palette, which colour-blind readers tell apart; markers and dashes do without colour altogether.
_CURVES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("greedy_coverage", "greedy coverage", {"color": "#0072B2", "marker": "o", "linestyle": "-"}),
    ("top_by_mean", "top k by mean reward", {"color": "#D55E00", "marker": "s", "linestyle": "--"}),
)
_LABELLED = 20  # up to so many numbers of actions each have a tick of their own


def plot_coverage(curve: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> None:
    """
    Draws best-of-k reward against the number of actions, for both ways of choosing them (Figure 6), as a PNG.

    Args:
        curve (mapping): What [`coverage_curve`] gives.
        path (`str`): The file to write.

    Raises:
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, MaxNLocator
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    figure = Figure(figsize=(6.0, 4.0), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ks = curve["k"]
    for name, label, style in _CURVES:
        # The squares are smaller, so that where the curves meet both are seen.
        size = 8 if style["marker"] == "o" else 4.5
        axes.plot(ks, curve[name], label=label, linewidth=1.8, markersize=size, **style)
    axes.set_xlabel("number of actions k")
    axes.set_ylabel("best-of-k reward, mean over problems")
    axes.xaxis.set_major_locator(FixedLocator(ks) if len(ks) <= _LABELLED else MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    canvas.print_png(os.fspath(path))
