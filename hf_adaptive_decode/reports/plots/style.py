"""What the figures share: colours, marks, type, text and the file; knows matplotlib and nothing of what is drawn."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from ...errors import MissingExtraError

Path = str | os.PathLike[str]

# The Okabe-Ito palette, which colour-blind readers tell apart, but for its yellow, which is lost on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FILLS = COLORS[:-1]  # areas, before which black outlines stand
GREY = "#707070"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.2, 1.5)), (0, (1.2, 1.2)), (0, (3, 1, 1, 1, 1, 1)))

_DPI = 150
_STYLE: dict[str, Any] = {
    # What the first lacks is taken from the reader's own choice of fonts.
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    # Tokens and names hold dollar signs that mean dollars.
    "text.parse_math": False,
}
# Width of a character of the legend and height of a line of it, in inches.
_CHARACTER, _LINE = 0.072, 0.185


def series_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series, no two of the first 84 alike; the first twelve differ by marker alone."""
    dashes = _DASHES[(number + number // len(COLORS)) % len(_DASHES)]
    color, marker = COLORS[number % len(COLORS)], _MARKERS[number % len(_MARKERS)]
    return {"color": color, "marker": marker, "linestyle": dashes}


def markers_at(points: int, number: int) -> Any:
    """Places of the markers of a line of so many points: on all of a few, else on about a dozen, apart by series."""
    every = max(1, points // 12)
    return (number % every, every)


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """
    A figure that is written to `path` as a PNG at the end, the same bytes for the same data.

    The settings of matplotlib that are in force are put aside, but for the fonts that the reader prefers.

    Args:
        path (`str`): The file to write.
        width (`float`), height (`float`): Inches; a legend below the axes adds its own height.

    Raises:
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    preferred = {"font.sans-serif": matplotlib.rcParams["font.sans-serif"]}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | preferred)
        drawn = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(drawn)
        yield drawn
        canvas.print_png(os.fspath(path), metadata={"Software": None})


def legend_below(drawn: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Puts a legend under the axes, where it covers nothing, and makes the figure as much higher."""
    width, height = drawn.get_size_inches()
    room = int(width / _CHARACTER)
    labels = [legend_text(name, min(room - 8, 80)) for name in names]
    columns = next(n for n in range(len(labels), 0, -1) if n == 1 or _row_width(labels, n) <= room)
    rows = [labels[start : start + columns] for start in range(0, len(labels), columns)]
    lines = sum(max(label.count("\n") + 1 for label in row) for row in rows)
    drawn.set_size_inches(width, height + _LINE * lines + 0.1)
    # Columns are filled from the top; given row by row, the names keep their order from left to right.
    order = [place for column in range(columns) for place in range(column, len(labels), columns)]
    drawn.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=columns,
        handlelength=3.2,
        columnspacing=1.6,
    )


def _row_width(labels: Sequence[str], columns: int) -> int:
    """Characters that a legend of so many columns takes, its marks included."""
    widths = [max(len(line) for line in label.splitlines()) + 8 for label in labels]
    return sum(max(widths[column::columns]) for column in range(columns))


def legend_text(name: str, width: int) -> str:
    """A series' name, wrapped, as a legend takes it."""
    shown = wrapped(name, width)
    # Before matplotlib 3.10 a legend leaves out what begins with an underscore.
    return f" {shown}" if shown.startswith("_") else shown


def wrapped(name: str, width: int, lines: int = 3) -> str:
    """A name in at most so many lines of `width` characters, with an ellipsis where it was longer."""
    parts = textwrap.wrap(drawable(name), width, break_on_hyphens=False) or ["''"]
    if len(parts) > lines:
        parts = [*parts[: lines - 1], parts[lines - 1][: width - 1] + "…"]
    return "\n".join(parts)


def token_text(token: str, longest: int = 18) -> str:
    """A token as a figure shows it: spaces visible, `repr` where it cannot be printed, cut where it is long."""
    shown = drawable(token if token and token.isprintable() else repr(token)).replace(" ", "␣")
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def drawable(text: str) -> str:
    """The text with an escape, as Python writes it, for each character that no font has."""
    known = _characters()
    escaped = (c if ord(c) in known else c.encode("ascii", "backslashreplace").decode() for c in text.expandtabs(1))
    return "".join(escaped)


def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont

    return _glyphs(*(str(findfont(FontProperties(family=[family]))) for family in _STYLE["font.family"]))


@lru_cache(maxsize=8)
def _glyphs(*fonts: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    # A line break is no glyph, and none is needed for it.
    return frozenset({ord("\n")}.union(*(FT2Font(font).get_charmap() for font in fonts)))


def as_array(name: str, values: Any, dtype: type = float) -> np.ndarray:
    """
    One-dimensional numbers; NaN stands for what is not known.

    Raises:
        `ValueError`: If they are not one-dimensional numbers, or one is infinite, by `name`.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` has to hold numbers: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"`{name}` has the shape {list(array.shape)}; it has to be one-dimensional.")
    if np.isinf(array).any():
        raise ValueError(f"`{name}[{int(np.isinf(array).argmax())}]` is infinite; it has to be a finite number.")
    if dtype is int:
        if not (array == np.round(array)).all():
            wrong = int((array != np.round(array)).argmax())
            raise ValueError(f"`{name}[{wrong}]` is {array[wrong]:g}; it has to be a whole number.")
        return array.astype(np.int64)
    return array


def as_actions(action: Any, labels: Sequence[str], length: int) -> np.ndarray:
    """
    Checked indices of actions, -1 where no decision was taken.

    Raises:
        `ValueError`: If they are of another length than the tokens, or not indices into `labels`.
    """
    if isinstance(labels, str) or not len(labels):
        raise ValueError(f"`labels` is {labels!r}; it has to hold a name for each action.")
    found = as_array("action", action, int)
    if len(found) != length:
        raise ValueError(f"`action` has {len(found)} entries for {length} tokens; there has to be one for each.")
    outside = (found < -1) | (found >= len(labels))
    if outside.any():
        wrong = int(outside.argmax())
        raise ValueError(
            f"`action[{wrong}]` is {found[wrong]}; with {len(labels)} `labels` it has to be from 0 to "
            f"{len(labels) - 1}, or -1 for none."
        )
    return found


def as_interval(name: str, value: Any) -> tuple[float, float, float]:
    """
    Mean, low and high of an interval.

    Raises:
        `ValueError`: If a part is missing or is not a finite number, or low is above high, by `name`.
    """
    try:
        mean, low, high = (float(value[part]) for part in ("mean", "low", "high"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{name}` is {value!r}; it has to be a mapping with `mean`, `low` and `high`.") from error
    if not np.isfinite([mean, low, high]).all() or low > high:
        raise ValueError(f"`{name}` is {dict(value)!r}; it has to be finite, and `low` not above `high`.")
    return mean, low, high


def check_named(name: str, given: Any) -> None:
    """Refuses what is not a mapping with at least one entry, by `name`."""
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"`{name}` is {given!r}; it has to be a mapping with at least one entry.")
