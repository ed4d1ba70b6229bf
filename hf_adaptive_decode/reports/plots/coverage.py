"""What sets of actions of growing size cover; knows a curve of numbers and nothing of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import style

_CURVES = (("greedy_coverage", "greedy coverage"), ("top_by_mean", "top k by mean reward"))
_LABELLED = 20  # up to so many numbers of actions each have a tick of their own


def plot_coverage(curve: Mapping[str, Sequence[float]], path: style.Path) -> None:
    """
    Draws best-of-k reward against the number of actions, for both ways of choosing them (Figure 6), as a PNG.

    Args:
        curve (mapping): What [`coverage_curve`] gives.
        path (`str`): The file to write.

    Raises:
        `ValueError`: If the curve lacks a part, or its parts are of unequal lengths.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    missing = [name for name in ("k", *(name for name, _ in _CURVES)) if name not in curve]
    if missing:
        raise ValueError(f"`curve` lacks {missing}; give what `coverage_curve` returns.")
    ks = style.as_array("curve['k']", curve["k"], int)
    found = {name: style.as_array(f"curve[{name!r}]", curve[name]) for name, _ in _CURVES}
    lengths = {"k": len(ks), **{name: len(values) for name, values in found.items()}}
    if len(set(lengths.values())) > 1 or not len(ks):
        raise ValueError(f"`curve` has parts of the lengths {lengths}; they have to be equal, and above 0.")
    with style.figure(path, 6.0, 3.8) as drawn:
        from matplotlib.ticker import FixedLocator, MaxNLocator

        axes = drawn.add_subplot()
        handles = []
        for number, (name, _) in enumerate(_CURVES):
            # The second marks are smaller, so that where the curves meet both are seen.
            size = (8.0, 4.5)[number]
            look = style.series_style(number) | {"markevery": style.markers_at(len(ks), 0)}
            handles += axes.plot(ks, found[name], markersize=size, **look)
        axes.set_xlabel("number of actions k")
        axes.set_ylabel("best-of-k reward, mean over problems")
        axes.xaxis.set_major_locator(FixedLocator(ks.tolist()) if len(ks) <= _LABELLED else MaxNLocator(integer=True))
        style.legend_below(drawn, handles, [label for _, label in _CURVES])
