"""Distributions one above the other, of entropies and of lengths; knows arrays and nothing of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import style

_ENTROPY_FLOOR = 1e-4  # nats; what is below is shown as one bar, for a logarithm has no zero
_FLOOR_PLACE = -4.75  # where that bar stands, in decades, a little apart from the others
_BINS_PER_DECADE = 5
_FEW = 30  # a row of fewer values is too ragged to set the height of the others
_FILLED = 0.85  # part of a row's height that the tallest bin takes


@dataclass(frozen=True)
class _Row:
    name: str
    color: str
    shares: np.ndarray  # [bins], of this row's values; sums to 1
    count: int
    median: float | None  # where its mark stands
    note: str


def plot_entropy_by_action(
    entropy: Sequence[float] | np.ndarray,
    action: Sequence[int] | np.ndarray,
    labels: Sequence[str],
    path: style.Path,
    static_entropy: Sequence[float] | np.ndarray | None = None,
) -> None:
    """
    Draws how the entropies of the tokens are distributed, action by action (Adaptive Decoding, Figure 3), as a PNG.

    Entropies up to 0.0001 nats are counted in a bar of their own, left of a logarithmic axis.

    Args:
        entropy (array of shape `[M]`): Nats, of the base's distribution at each token; those that are NaN are left out.
        action (array of shape `[M]`, whole numbers): The action taken at each token; -1 where none was.
        labels (sequence of `str`): A name for each action.
        path (`str`): The file to write.
        static_entropy (array, *optional*): Entropies under a static strategy, drawn behind every row; without it, those
            of all actions together are.

    Raises:
        `ValueError`: If an argument is of another shape, an entropy is negative, or none is known.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    values = style.as_array("entropy", entropy)
    actions = style.as_actions(action, labels, len(values))
    known = _entropies("entropy", values)
    reference = known if static_entropy is None else _entropies("static_entropy", static_entropy)
    edges = _entropy_edges(max(known.max(), reference.max()))
    groups = [(name, values[actions == number]) for number, name in enumerate(labels)]
    if (actions == -1).any():
        groups.append(("no decision", values[actions == -1]))
    rows = []
    for number, (name, group) in enumerate(groups):
        group = group[np.isfinite(group)]
        median = float(np.median(group)) if len(group) else None
        note = _count(len(group), "token") + ("" if median is None else f", median {median:.2g}")
        place = None if median is None else float(_decades(median))
        color = style.GREY if number == len(labels) else _color(number)
        rows.append(_Row(name, color, _shares(_decades(group), edges), len(group), place, note))
    behind = ("all tokens" if static_entropy is None else "static decoding", _shares(_decades(reference), edges))
    with style.figure(path, 7.0, 1.0 + 0.62 * len(rows)) as drawn:
        axes = _draw_rows(drawn, rows, edges, behind)
        ticks = [tick for tick in (-3, -2, -1, 0, 1) if tick <= edges[-1]]
        axes.set_xticks(
            [(edges[0] + edges[1]) / 2, *ticks], [f"≤ {_ENTROPY_FLOOR:g}", *(f"{10.0**t:g}" for t in ticks)]
        )
        axes.set_xlabel("entropy of the token's distribution [nats]")


def plot_lengths(
    lengths_by_decoder: Mapping[str, Sequence[int] | np.ndarray], path: style.Path, token_budget: int | None = None
) -> None:
    """
    Draws how long the completions of each decoder are (Adaptive Decoding, Figure 4), as a PNG.

    Args:
        lengths_by_decoder (mapping): From a decoder's name to the lengths of its completions, in tokens.
        path (`str`): The file to write.
        token_budget (`int`, *optional*): Where completions were cut; the part that is as long is written beside a row.

    Raises:
        `ValueError`: If there is no decoder, or a length is not a whole number from 0.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    style.check_named("lengths_by_decoder", lengths_by_decoder)
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"`token_budget` is {token_budget}; it has to be at least 1.")
    groups = {}
    for name, given in lengths_by_decoder.items():
        groups[name] = style.as_array(f"lengths_by_decoder[{name!r}]", given, int)
        if (groups[name] < 0).any():
            raise ValueError(f"`lengths_by_decoder[{name!r}]` holds {groups[name].min()}; a length is at least 0.")
    everything = np.concatenate([*groups.values(), [token_budget or 0, 1]])
    edges = _length_edges(int(everything.max()))
    rows = []
    for number, (name, group) in enumerate(groups.items()):
        note = _count(len(group), "completion")
        if len(group):
            note += f", mean {group.mean():.1f}"
        if len(group) and token_budget is not None:
            note += f"\n{100 * (group >= token_budget).mean():.1f} % at the budget"
        median = float(np.median(group)) if len(group) else None
        rows.append(_Row(name, _color(number), _shares(group, edges), len(group), median, note))
    with style.figure(path, 7.0, 1.0 + 0.62 * len(rows)) as drawn:
        axes = _draw_rows(drawn, rows, edges, None)
        if token_budget is not None:
            axes.axvline(token_budget, color="black", linestyle=":", linewidth=1.2)
        axes.set_xlabel("length of the completion [tokens]" + ("" if token_budget is None else "; dotted: the budget"))


def _draw_rows(drawn: Any, rows: Sequence[_Row], edges: np.ndarray, behind: tuple[str, np.ndarray] | None) -> Any:
    """One filled outline above the other; returns the axes."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    tallest = _tallest(rows, behind)
    axes = drawn.add_subplot()
    for place, row in enumerate(reversed(rows)):
        height = np.minimum(_FILLED * row.shares / tallest, 0.95)
        axes.stairs(place + height, edges, baseline=place, fill=True, color=row.color, alpha=0.45)
        axes.stairs(place + height, edges, baseline=place, color=row.color, linewidth=1.2)
        if behind is not None:
            axes.stairs(place + _FILLED * behind[1] / tallest, edges, baseline=None, color="black", linewidth=0.9)
        if row.median is not None:
            axes.plot([row.median], [place], marker="^", color="black", markersize=5, clip_on=False, zorder=5)
        axes.text(1.01, place + 0.3, row.note, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.axhline(place, color=style.GREY, linewidth=0.6)
    axes.set_ylim(-0.12, len(rows))
    axes.set_yticks([place + 0.3 for place in range(len(rows))], [style.wrapped(r.name, 24, 2) for r in reversed(rows)])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    handles: list[Any] = [Patch(facecolor=style.GREY, alpha=0.45, edgecolor=style.GREY)]
    handles.append(Line2D([], [], color="black", marker="^", linestyle="none", markersize=5))
    cut = any(row.shares.max() > tallest for row in rows)
    note = f"; rows of under {_FEW} cut off" if cut else ""
    names = [f"share of the row's values in a bin, up to {100 * tallest:.0f} %{note}", "median"]
    if behind is not None:
        handles.append(Line2D([], [], color="black", linewidth=0.9))
        names.append(behind[0])
    style.legend_below(drawn, handles, names)
    return axes


def _tallest(rows: Sequence[_Row], behind: tuple[str, np.ndarray] | None) -> float:
    """The highest share of all rows, but for those of few values if there are others."""
    full = [row for row in rows if row.count >= _FEW] or rows
    shares = [row.shares for row in full] + ([] if behind is None else [behind[1]])
    return float(np.max(shares)) or 1.0


def _entropies(name: str, values: Any) -> np.ndarray:
    array = style.as_array(name, values)
    found: np.ndarray = array[np.isfinite(array)]
    if not len(found):
        raise ValueError(f"`{name}` holds no known entropy; there has to be at least one that is not NaN.")
    # Rounding takes the entropy of a certain token a little below 0.
    if found.min() < -_ENTROPY_FLOOR:
        raise ValueError(f"`{name}` holds {found.min():g}; an entropy is at least 0 nats.")
    return found


def _decades(entropies: Any) -> np.ndarray:
    """Logarithms to base 10, with everything up to the floor at one place."""
    logarithms = np.log10(np.maximum(entropies, _ENTROPY_FLOOR))
    places: np.ndarray = np.where(np.asarray(entropies) <= _ENTROPY_FLOOR, _FLOOR_PLACE, logarithms)
    return places


def _entropy_edges(highest: float) -> np.ndarray:
    """Edges in decades: the bar of the smallest, an empty gap, and equal bins up to the highest."""
    lowest = np.log10(_ENTROPY_FLOOR)
    bins = max(_BINS_PER_DECADE, int(np.ceil((np.log10(max(highest, 1.0)) - lowest) * _BINS_PER_DECADE + 1e-9)))
    return np.array([_FLOOR_PLACE - 0.25, _FLOOR_PLACE + 0.25, *(lowest + np.arange(bins + 1) / _BINS_PER_DECADE)])


def _length_edges(longest: int) -> np.ndarray:
    """Edges between whole numbers, of at most about fifty bins of equal width."""
    width = max(1, -(-(longest + 1) // 50))
    return np.arange(0, longest + width + 1, width) - 0.5


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.histogram(values, edges)[0] / max(len(values), 1)
    return shares


def _color(number: int) -> str:
    return style.FILLS[number % len(style.FILLS)]


def _count(number: int, noun: str) -> str:
    return f"no {noun}" if number == 0 else f"{number:,} {noun}{'' if number == 1 else 's'}"
