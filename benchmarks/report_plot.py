"""RESULTS.png: how each cost grows with its work; knows the result files and measures nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_adaptive_decode.reports.plots.style import COLORS, figure, series_style

Results = Mapping[str, Mapping[str, Any]]


def log_axis(axis: Any, places: list[float] | None = None) -> None:
    """A logarithmic axis with plain numbers, at these places if they are given."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(FixedLocator(places) if places else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: short(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def short(value: float) -> str:
    """A number as an axis shows it: 16384 is 16k."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def line(axes: Any, number: int, xs: list[float], summaries: list[Mapping[str, float]], label: str) -> None:
    """Medians with the range as whiskers."""
    middle = [s["median"] for s in summaries]
    below = [m - s["min"] for m, s in zip(middle, summaries, strict=True)]
    above = [s["max"] - m for m, s in zip(middle, summaries, strict=True)]
    axes.errorbar(xs, middle, yerr=[below, above], label=label, capsize=2, elinewidth=0.8, **series_style(number))


def plot_warping(axes: Any, found: Mapping[str, Any]) -> None:
    """Milliseconds over the vocabulary."""
    number = 0
    for logits in ("peaked", "flat"):
        cells = [cell for cell in found["growth"] if cell["logits"] == logits]
        for side in ("ours", "transformers"):
            label = f"{side}, {logits}"
            line(axes, number, [c["vocab"] for c in cells], [c["ms a call"][side] for c in cells], label)
            number += 1
    log_axis(axes.xaxis, sorted({cell["vocab"] for cell in found["growth"]}))
    log_axis(axes.yaxis)
    axes.set(xlabel="words", ylabel="ms", title=f"Top-p of {found['growth'][0]['rows']} rows")


def plot_decoding(axes: Any, found: Mapping[str, Any]) -> None:
    """Milliseconds a token over the prompt's length, of the shape with most prompts."""
    cells = [cell for cell in found["cells"] if cell["batch"] == 1]
    shapes = [cell["shape"] for cell in cells]
    shape = max(shapes, key=shapes.count)
    cells = [cell for cell in cells if cell["shape"] == shape]
    for number, name in enumerate(("plain sampling", "static T + top-p", "adaptive heads")):
        of_name = [cell for cell in cells if name in cell["ms a token"]]
        line(axes, number, [c["prompt"] for c in of_name], [c["ms a token"][name] for c in of_name], name)
    log_axis(axes.xaxis, sorted({cell["prompt"] for cell in cells}))
    axes.set(xlabel="prompt, tokens", ylabel="ms a token", title=f"Decoding, {shape}, batch 1")
    axes.set_ylim(bottom=0)


def plot_training(axes: Any, found: Mapping[str, Any], over: str, field: str) -> None:
    """Seconds or bytes of the loss over tokens or vocabulary."""
    (cell,) = (cell for cell in found["cells"] if cell["part"] == "d")
    xs = [point[over] for point in cell[over]]
    if field == "seconds":
        line(axes, 0, xs, [point["seconds"] for point in cell[over]], "loss and gradients")
        log_axis(axes.yaxis)
        axes.set(ylabel="s")
    else:
        axes.plot(xs, [point["bytes"] / 2**20 for point in cell[over]], label="loss and gradients", **series_style(0))
        axes.set(ylabel="added MiB")
        axes.set_ylim(bottom=0)
    slope = cell["ratios"][f"{field} over {over}"]["median"]
    what = "time" if field == "seconds" else "memory"
    log_axis(axes.xaxis, xs)
    axes.set(xlabel=over, title=f"Training: {what} over {over} (slope {slope:.2f})")


def plot_startup(axes: Any, found: Mapping[str, Any]) -> None:
    """Seconds of processes as bars."""
    bars = [(f"{c['start']}, {side}", value) for c in found["cells"] for side, value in c["s a process"].items()]
    labels, values = [label for label, _ in bars], [value["median"] for _, value in bars]
    spread = [[v["median"] - v["min"] for _, v in bars], [v["max"] - v["median"] for _, v in bars]]
    colors = [COLORS[1 if "with" in label.split() or label == "help, help" else 0] for label in labels]
    axes.barh(labels, values, xerr=spread, color=colors, error_kw={"elinewidth": 0.8, "capsize": 2})
    axes.invert_yaxis()
    axes.set(xlabel="s a process", title="Start-up")


def panels(found: Results) -> list[Callable[[Any], None]]:
    """The panels for which there are results."""
    drawn: list[Callable[[Any], None]] = []
    if found.get("warping", {}).get("growth"):
        drawn.append(lambda axes: plot_warping(axes, found["warping"]))
    if found.get("decoding", {}).get("cells"):
        drawn.append(lambda axes: plot_decoding(axes, found["decoding"]))
    if any(cell["part"] == "d" for cell in found.get("training_step", {}).get("cells", ())):
        for over, field in (("tokens", "seconds"), ("tokens", "bytes"), ("vocabulary", "seconds")):
            drawn.append(lambda axes, o=over, f=field: plot_training(axes, found["training_step"], o, f))
    if found.get("startup", {}).get("cells"):
        drawn.append(lambda axes: plot_startup(axes, found["startup"]))
    return drawn


def draw(found: Results, path: str | os.PathLike[str] | Path) -> bool:
    """Draws what there is; whether there was anything."""
    drawn = panels(found)
    if not drawn:
        return False
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    with figure(path, 4.2 * columns, 3.3 * lines) as picture:
        places = picture.subplots(lines, columns, squeeze=False).flatten()
        for axes, panel in zip(places, drawn, strict=False):
            panel(axes)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        for axes in places[len(drawn) :]:
            axes.set_visible(False)
    return True
