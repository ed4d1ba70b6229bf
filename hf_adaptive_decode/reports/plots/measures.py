"""Measured decoders side by side: accuracies and gains with their intervals; knows lines of results, no decoder."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import style

Row = Mapping[str, Any]
Interval = tuple[float, float, float]  # mean, low, high, in per cent
Line = dict[float, Interval]  # by place

_AGAINST = {"token_budget": "token budget [tokens]", "k": "k [samples]"}
_NAMED_TICKS = 12
_BESIDE = 2  # up to so many panels stand side by side
_WIDE = 4  # places up to more than so many times the first stand on a logarithmic axis
# What tells lines of several runs apart, beside the decoder.
_RUN = (("task", "{}"), ("adapter", "{}"), ("token_budget", "{} tokens"))


def plot_accuracy_by_budget(
    rows: Sequence[Row], path: style.Path, *, against: str = "token_budget", metric: str = "pass@1"
) -> None:
    """
    Draws accuracy against the token budget, or against k, for several decoders with 95 % bands, as a PNG.

    Rows of one `role` make one line even if their settings differ, as those of a best static for each budget do; a role
    with several rows at one place makes a line for each `for_k`, or else for each decoder. Decoders of one name have
    lines of their own where several adapters were measured and their values differ.

    Args:
        rows (sequence of mappings): Lines of one task of `results.jsonl`, of which those of kind `"measure"` count, or
            any mappings with `decoder`, `token_budget` and metrics as `{"mean", "low", "high"}`, fractions from 0 to 1.
            Against the token budget, rows over several budgets (`None`) are passed over.
        path (`str`): The file to write.
        against (`str`, *optional*, defaults to `"token_budget"`): What stands below, or `"k"`, for rows of one budget.
        metric (`str`, *optional*, defaults to `"pass@1"`): What is drawn. Against k, all of its kind are: `pass@1`,
            `pass@8` and so on for any `pass@k`.

    Raises:
        `ValueError`: If no row has the metric, rows are of several tasks or a decoder has several at one place.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    if against not in _AGAINST:
        raise ValueError(f"`against` is {against!r}; it has to be one of {list(_AGAINST)}.")
    lines = _lines(_measures(rows), against, metric)
    places = sorted({x for points in lines.values() for x in points})
    with style.figure(path, 7.0, 3.8) as drawn:
        axes = drawn.add_subplot()
        handles = []
        for number, points in enumerate(lines.values()):
            # Of a single place there are no lines, so marks stand side by side.
            aside = (number - (len(lines) - 1) / 2) * min(0.1, 1.2 / len(lines)) if len(places) == 1 else 0.0
            handles.append(_draw_line(axes, points, aside, number))
        _set_places(axes, places)
        axes.set_xlabel(_AGAINST[against])
        axes.set_ylabel(f"{metric if against == 'token_budget' else _kind(metric) + 'k'} [%], 95 % intervals")
        style.legend_below(drawn, handles, list(lines))


def plot_gains(rows: Sequence[Row], path: style.Path, metrics: Sequence[str] | None = None) -> None:
    """
    Draws the adapter's paired gain over every baseline with its 95 % interval, a row a baseline, as a PNG.

    A mark is filled where the interval leaves out zero. Rows of several tasks, adapters or token budgets are told apart
    by what differs between them.

    Args:
        rows (sequence of mappings): Lines of `results.jsonl`; those without a `gain` are passed over.
        path (`str`): The file to write.
        metrics (sequence of `str`, *optional*): Such as `["pass@1"]`, a panel each; all that there are when `None`.

    Raises:
        `ValueError`: If no row has a gain, or none in one of the `metrics`.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    compared = [row for row in _measures(rows) if row.get("gain")]
    known = list(dict.fromkeys(name for row in compared for name in row["gain"]))
    if not known:
        raise ValueError('`rows` holds no row with a `gain`; give the lines of kind "measure" of a results.jsonl.')
    shown = known if metrics is None else list(metrics)
    if not shown or not set(shown) <= set(known):
        raise ValueError(f"`metrics` is {metrics!r}; the rows have gains in {known}.")
    # Side by side if that leaves no gaps, else one below the other, each with its own rows.
    beside = len(shown) <= _BESIDE and all(row["gain"].get(name) for row in compared for name in shown)
    parts = [[row for row in compared if row["gain"].get(name)] for name in shown]
    with style.figure(path, 2.6 + 3.6 * (len(shown) if beside else 1), 1.0) as drawn:
        labels = [[style.wrapped(name, 42) for name in _names(part)] for part in parts]
        heights = [np.array([0.13 + 0.15 * (label.count("\n") + 1) for label in part]) for part in labels]
        totals = [part.sum() for part in heights]
        drawn.set_size_inches(drawn.get_figwidth(), totals[0] + 0.9 if beside else sum(totals) + 0.7 * len(parts) + 0.2)
        shape = {"ncols": len(parts), "sharey": True} if beside else {"nrows": len(parts), "height_ratios": totals}
        panels = drawn.subplots(**shape, squeeze=False).flatten()
        for number, (axes, name) in enumerate(zip(panels, shown, strict=True)):
            places = heights[number] / 2 - np.cumsum(heights[number])
            found = [_interval(row["decoder"], name, row["gain"][name]) for row in parts[number]]
            _draw_gains(axes, places, found)
            axes.set_xlabel(f"gain in {name} [points], 95 % intervals")
            if number == 0 or not beside:
                axes.set_yticks(places, labels[number])
                axes.set_ylim(-totals[number], 0)
        marks = [panels[0].plot([], [], **_mark(sure))[0] for sure in (True, False)]
        style.legend_below(drawn, marks, ["interval excludes zero", "interval includes zero"])


def _draw_line(axes: Any, points: Line, aside: float, number: int) -> Any:
    look = style.series_style(number)
    x = sorted(points)
    mean, low, high = np.array([points[place] for place in x]).T
    if len(x) == 1:
        place = x[0] + aside
        axes.plot([place, place], [*low, *high], color=look["color"], marker="_", markersize=7, linewidth=1.2)
        return axes.plot([place], mean, **{**look, "linestyle": "none"})[0]
    axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)
    return axes.plot(x, mean, **look)[0]


def _draw_gains(axes: Any, places: np.ndarray, found: Sequence[Interval]) -> None:
    axes.axvline(0.0, color="black", linewidth=1.0)
    for place, (mean, low, high) in zip(places, found, strict=True):
        sure = low > 0 or high < 0
        axes.plot([low, high], [place, place], color=_mark(sure)["color"], linewidth=1.6, solid_capstyle="butt")
        axes.plot([mean], [place], **_mark(sure))
        text = f"{mean:+z.1f} [{low:+z.1f}, {high:+z.1f}]"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)


def _mark(sure: bool) -> dict[str, Any]:
    color = style.COLORS[0] if sure else style.GREY
    return {"color": color, "marker": "o", "linestyle": "none", "markerfacecolor": color if sure else "white"}


def _set_places(axes: Any, places: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    if len(places) == 1:
        axes.set_xlim(places[0] - 0.75, places[0] + 0.75)
    elif places[-1] > _WIDE * places[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    ticks = places if len(places) <= _NAMED_TICKS else places[:: -(-len(places) // _NAMED_TICKS)]
    axes.set_xticks(ticks, [f"{place:,.0f}" for place in ticks])


def _measures(rows: Sequence[Row]) -> list[Row]:
    found = [row for row in rows if row.get("kind", "measure") == "measure"]
    for row in found:
        if not isinstance(row.get("decoder"), str):
            raise ValueError(f"`rows` holds {dict(row)!r:.200}; every row has to have a `decoder`, its name.")
    return found


def _lines(rows: Sequence[Row], against: str, metric: str) -> dict[str, Line]:
    """Points of each line, in per cent, by its name."""
    if against == "token_budget":
        rows = [row for row in rows if row.get("token_budget") is not None]
    tasks = sorted({str(row.get("task")) for row in rows})
    budgets = sorted({str(row.get("token_budget")) for row in rows})
    for name, several in (("task", tasks), ("token_budget", budgets if against == "k" else [])):
        if len(several) > 1:
            raise ValueError(f"`rows` are of several values of `{name}`, {several}; give the rows of one.")
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row.get("adapter"), row.get("role", row["decoder"]))].append(row)
    found: dict[str, dict[Any, Line]] = defaultdict(dict)
    for (adapter, _), group in groups.items():
        for name, own in _by_name(group, against, metric).items():
            line = found[name].setdefault(adapter, {})
            for row, key, place in _points(own, against, metric):
                _add_point(line, row, key, place)
    named = {name: line for shown, lines in found.items() for name, line in _of_adapters(shown, lines).items() if line}
    if not named:
        where = " at a `token_budget`" if against == "token_budget" else ""
        raise ValueError(f"`rows` holds no {metric!r}{where}; `metric` has to be one that the rows have.")
    return named


def _by_name(group: Sequence[Row], against: str, metric: str) -> dict[str, list[Row]]:
    """The rows of one role: one line if there is one decoder at each place, else one for each `for_k` or decoder."""
    if len({_name(row) for row in group}) == 1:
        return {_name(group[0]): list(group)}
    if _one_at_each_place(group, against, metric):
        return {_role(group[0]): list(group)}
    by_k: dict[Any, list[Row]] = defaultdict(list)
    for row in group:
        by_k[row.get("for_k")].append(row)
    if len(by_k) > 1 and all(_one_at_each_place(own, against, metric) for own in by_k.values()):
        return {f"{_role(own[0])} for pass@{k}": own for k, own in by_k.items()}
    by_decoder: dict[str, list[Row]] = defaultdict(list)
    for row in group:
        by_decoder[_name(row)].append(row)
    return by_decoder


def _one_at_each_place(rows: Sequence[Row], against: str, metric: str) -> bool:
    at = [(_name(row), place) for row, _, place in _points(rows, against, metric)]
    return len(set(at)) == len({place for _, place in at})


def _points(rows: Sequence[Row], against: str, metric: str) -> Iterator[tuple[Row, str, float]]:
    """Each row with each of its metrics that is drawn, and the place of that."""
    for row in rows:
        for key in [metric] if against == "token_budget" else [name for name in row if name.startswith(_kind(metric))]:
            if row.get(key) is not None:
                yield row, key, _place(row, key, against)


def _add_point(line: Line, row: Row, key: str, place: float) -> None:
    interval = _interval(row["decoder"], key, row[key])
    if line.setdefault(place, interval) != interval:
        raise ValueError(f"`rows` holds {row['decoder']!r} twice at {place:g}, with different values; give one.")


def _of_adapters(name: str, lines: Mapping[Any, Line]) -> dict[str, Line]:
    """One line where all adapters were compared with the same, as with greedy, and otherwise one for each."""
    merged: Line = {}
    for line in lines.values():
        merged |= line
    same = all(merged[place] == interval for line in lines.values() for place, interval in line.items())
    return {name: merged} if same else {f"{adapter}: {name}": line for adapter, line in lines.items()}


def _place(row: Row, name: str, against: str) -> float:
    value = row.get("token_budget") if against == "token_budget" else name.partition("@")[2]
    if not str(value).isdecimal() or int(str(value)) < 1:
        raise ValueError(f"the row of {row['decoder']!r} has {value!r} for its {against}; it has to be a whole number.")
    return float(str(value))


def _interval(decoder: str, name: str, value: Any) -> Interval:
    """Mean, low and high in per cent."""
    mean, low, high = style.as_interval(f"{name} of {decoder}", value)
    return 100 * mean, 100 * low, 100 * high


def _kind(metric: str) -> str:
    return metric.partition("@")[0] + "@"


def _role(row: Row) -> str:
    return str(row["role"]).replace("_", " ")


def _name(row: Row) -> str:
    """What tables call the decoder."""
    if "role" not in row:
        return str(row["decoder"])
    from ...evaluation.results import label

    return label({"for_k": None, **row})


def _names(rows: Sequence[Row]) -> list[str]:
    """The rows' decoders, after whatever of their runs is not the same for all."""
    varied = [(key, shape) for key, shape in _RUN if len({str(row.get(key)) for row in rows}) > 1]
    names = []
    for row in rows:
        run = ", ".join("all budgets" if row.get(key) is None else shape.format(row[key]) for key, shape in varied)
        names.append(f"{run}: {_name(row)}" if run else _name(row))
    seen = Counter(names)
    return [_told_apart(name, row) if seen[name] > 1 else name for name, row in zip(names, rows, strict=True)]


def _told_apart(name: str, row: Row) -> str:
    details = [_role(row)] if "role" in row and _role(row) not in name else []
    details += [f"for pass@{row['for_k']}"] if row.get("for_k") is not None else []
    return f"{name}, {' '.join(details)}" if details else name
