"""Temperature and top-p along a generation; knows numbers and texts, and nothing of what generated them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import style

_NAMED = 80  # up to so many tokens each stand under their own value
_DENSE = 300  # more than so many tokens make a line that nobody can follow
_LINES = (
    ("temperature", "temperature T", {"color": style.COLORS[1], "marker": "o", "linestyle": "-"}),
    ("top_p", "top-p P", {"color": style.COLORS[0], "marker": "s", "linestyle": (0, (4, 1.5))}),
)


@dataclass(frozen=True)
class _Panel:
    name: str
    tokens: list[str] | None
    values: dict[str, np.ndarray]  # those of temperature and top_p that are there, [N] each
    length: int


def plot_generation(panels: Mapping[str, Mapping[str, Any]], path: style.Path) -> None:
    """
    Draws temperature and top-p at each token of one or several generations (AutoDeco, Figure 5), as a PNG.

    The means of a generation stand beside its name; those of the first one are drawn through the others as thin lines,
    so that one sees whether a command raised or lowered them. Up to 80 tokens are written under their values.

    Args:
        panels (mapping): From a name, such as `"baseline"` and `"high diversity"`, to a mapping with `temperature` and
            `top_p` (arrays of shape `[N]`, NaN where not recorded; one of both may be left out or `None`) and, if their
            texts are to be shown, `tokens` (sequence of `N` `str`).
        path (`str`): The file to write.

    Raises:
        `ValueError`: If a panel holds no value, something unknown, values below 0 or lengths that differ.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    style.check_named("panels", panels)
    checked = [_checked(name, panel) for name, panel in panels.items()]
    longest = max(panel.length for panel in checked)
    named = any(panel.tokens and panel.length <= _NAMED for panel in checked)
    width = min(max(6.0, 1.2 + 0.16 * longest), 13.0) if longest <= _NAMED else 9.0
    highest = max(np.nanmax(values) for panel in checked for values in panel.values.values())
    with style.figure(path, width, 0.3 + (2.5 if named else 2.0) * len(checked)) as drawn:
        rows = drawn.subplots(len(checked), 1, squeeze=False, sharey=True)[:, 0]
        handles: dict[str, Any] = {}
        for axes, panel in zip(rows, checked, strict=True):
            handles |= _draw_panel(axes, panel, None if panel is checked[0] else checked[0])
        rows[0].set_ylim(-0.04 * max(highest, 1.0), 1.06 * max(highest, 1.0))
        style.legend_below(drawn, list(handles.values()), list(handles))


def _draw_panel(axes: Any, panel: _Panel, first: _Panel | None) -> dict[str, Any]:
    """Returns what the legend needs: from names to lines."""
    positions = np.arange(panel.length)
    handles, means = {}, []
    few = panel.length <= _NAMED
    for name, label, look in _LINES:
        if first is not None and name in first.values:
            before = f"mean of {label} in the first"
            mean = np.nanmean(first.values[name])
            handles[before] = axes.axhline(mean, color=look["color"], linestyle=":", linewidth=1.1)
        if name not in panel.values:
            continue
        values = panel.values[name]
        handles |= _draw_line(axes, positions, values, label, look)
        means.append(f"mean {label[-1]} {np.nanmean(values):.2f}")
    axes.set_title(f"{style.wrapped(panel.name, 90, 2)}   ({', '.join(means)})", loc="left")
    axes.set_ylabel("T and P (no unit)")
    axes.set_xlim(-0.7, panel.length - 0.3)
    if few and panel.tokens:
        axes.set_xticks(positions, [style.token_text(t, 14) for t in panel.tokens], rotation=90, fontsize=7)
        axes.grid(visible=False, axis="x")
    else:
        axes.set_xlabel("position in the completion [tokens]")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return handles


def _draw_line(
    axes: Any, positions: np.ndarray, values: np.ndarray, label: str, look: dict[str, Any]
) -> dict[str, Any]:
    """A line with marks; many values are drawn faintly, behind their running mean."""
    if len(values) <= _DENSE:
        # A value between two that are missing makes no line, so at least there a mark has to be.
        alone = np.isfinite(values) & ~np.isfinite(_shifted(values, 1)) & ~np.isfinite(_shifted(values, -1))
        every = None if len(values) <= _NAMED else np.flatnonzero(alone).tolist()
        return {label: axes.plot(positions, values, markersize=3.5, linewidth=1.2, markevery=every, **look)[0]}
    window = 2 * (len(values) // 100) + 1
    axes.plot(positions, values, color=look["color"], linewidth=0.4, alpha=0.4)
    smooth = {**look, "marker": "", "linewidth": 1.8}
    return {f"{label}, mean of {window} tokens": axes.plot(positions, _running_mean(values, window), **smooth)[0]}


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means of the values that are known among `window` neighbours, NaN where there is none."""
    known = np.isfinite(values)
    sums, counts = (np.convolve(part, np.ones(window), "same") for part in (np.where(known, values, 0.0), known))
    means: np.ndarray = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)
    return means


def _shifted(values: np.ndarray, by: int) -> np.ndarray:
    """The neighbour of each value on one side, NaN where there is none."""
    padded = np.concatenate([[np.nan], values, [np.nan]])
    return padded[1 + by : 1 + by + len(values)]


def _checked(name: str, panel: Mapping[str, Any]) -> _Panel:
    style.check_named(f"panels[{name!r}]", panel)
    unknown = sorted(set(panel) - {"tokens", "temperature", "top_p"})
    if unknown:
        raise ValueError(f"`panels[{name!r}]` holds {unknown}; it may hold `tokens`, `temperature` and `top_p`.")
    values = {}
    for key, _, _ in _LINES:
        if panel.get(key) is None:
            continue
        found = style.as_array(f"panels[{name!r}][{key!r}]", panel[key])
        if (found < 0).any():
            raise ValueError(f"`panels[{name!r}][{key!r}]` holds {np.nanmin(found):g}; it has to be at least 0.")
        if np.isfinite(found).any():
            values[key] = found
    lengths = {key: len(found) for key, found in values.items()}
    tokens: Sequence[str] | None = panel.get("tokens")
    if not values:
        raise ValueError(f"`panels[{name!r}]` holds no known value of `temperature` or `top_p`, so nothing to draw.")
    if tokens is not None:
        lengths["tokens"] = len(tokens)
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"`panels[{name!r}]` holds columns of unequal lengths, {lengths}; there has to be one a token."
        )
    return _Panel(name, None if tokens is None else list(tokens), values, next(iter(lengths.values())))
