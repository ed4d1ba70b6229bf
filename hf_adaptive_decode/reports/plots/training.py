"""What training logged, as curves; knows the keys of the trainers' logs, and no trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import style

LogHistory = Sequence[Mapping[str, Any]]
ByStep = Mapping[int, Sequence[float]]

_ACTION = re.compile(r"action/(\d+)(?:/(.+))?")
_CURVES = (
    ("loss", "loss"),
    ("temperature_mean", "mean temperature T"),
    ("top_p_mean", "mean top-p P"),
)
_IN_ONE_COLUMN = 3  # more panels stand in two
_HOLLOW = {"linestyle": "none", "fillstyle": "none", "markersize": 7}


def plot_action_training(
    log_history: LogHistory,
    path: style.Path,
    by_type: Mapping[str, ByStep] | None = None,
    *,
    labels: Sequence[str] | None = None,
    metric: str = "reward",
) -> None:
    """
    Draws how often each action is taken during training, and the reward (Adaptive Decoding, Figures 2, 7, 8), as a PNG.

    Args:
        log_history (list of mappings): `trainer.state.log_history` of [`REINFORCEDecodingTrainer`], as it is: the share
            of decisions `action/0`, `action/1`, ... and, on the right axis, the reward of its evaluations (of each set,
            if there are several), or that of training if there was none.
        path (`str`): The file to write.
        by_type (mapping, *optional*): From a type of prompt, such as `"with chain of thought"`, to the shares of the
            actions by step, `{step: [share of action 0, share of action 1, ...]}`; each gets a panel of its own beside
            that of all prompts. A step whose batch had no decision on such a prompt is left out, or NaN, never 0. When
            `None`, the types that the log itself holds, such as `action/0/cot`; with `{}` all prompts alone are drawn.
        labels (sequence of `str`, *optional*): A name for each action; `action 0`, `action 1`, ... when `None`.
        metric (`str`, *optional*, defaults to `"reward"`): Drawn on the right axis; `"objective"` is what B samples are
            worth.

    Raises:
        `ValueError`: If the log holds no `action/...`, or `labels` or `by_type` are for another number of actions.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    shares = _logged_shares(log_history)
    count = len(next(iter(shares.values())))
    if labels is None:
        labels = [f"action {number}" for number in range(count)]
    if len(labels) != count:
        raise ValueError(f"`labels` holds {len(labels)} names; the log has {count} actions.")
    by_type = _logged_types(log_history, count) if by_type is None else by_type
    panels = {"all prompts": shares, **{name: _by_step(name, found, count) for name, found in by_type.items()}}
    if len(panels) != 1 + len(by_type):
        raise ValueError("`by_type` holds the type 'all prompts', which is what the log itself is; name it otherwise.")
    rewards = _logged_rewards(log_history, metric)
    columns = 1 if len(panels) <= _IN_ONE_COLUMN else 2
    rows = -(-len(panels) // columns)
    with style.figure(path, (7.0, 11.0)[columns - 1], 2.8 * rows + 0.2) as drawn:
        grid = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, (name, found) in zip(grid, panels.items(), strict=False):
            handles = [*_draw_shares(axes, found, count), *_draw_rewards(axes, rewards, metric)]
            if by_type:
                axes.set_title(style.wrapped(name, 60, 2), loc="left")
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[len(panels) - columns : len(panels)]:
            axes.set_xlabel("training step [updates]")
            axes.tick_params(labelbottom=True)
        grid[0].xaxis.get_major_locator().set_params(integer=True)
        grid[0].set_ylim(-0.02, 1.06 * max(0.3, *(max(_known(found)) for found in panels.values())))
        style.legend_below(drawn, handles, [*labels, *rewards])


def plot_training_curves(histories: Mapping[str, LogHistory], path: style.Path) -> None:
    """
    Draws the loss of one or several trainings (AutoDeco, Figure 6), as a PNG.

    Beside it, where they were logged, the means of temperature and top-p. Losses of evaluations are marks alone.

    Args:
        histories (mapping): From a training's name to its `trainer.state.log_history`.
        path (`str`): The file to write.

    Raises:
        `ValueError`: If there is no training, or one has logged no loss.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    style.check_named("histories", histories)
    curves = {name: {key: _series(found, key) for key, _ in _CURVES} for name, found in histories.items()}
    for name, found in curves.items():
        if not found["loss"]:
            raise ValueError(
                f"`histories[{name!r}]` holds no entry with `loss` and `step`; give a trainer's log_history."
            )
    shown = [(key, label) for key, label in _CURVES if any(found[key] for found in curves.values())]
    held_out = {name: _evaluations(found, "loss").values() for name, found in histories.items()}
    with style.figure(path, 1.2 + 3.4 * len(shown), 3.3) as drawn:
        row = drawn.subplots(1, len(shown), squeeze=False)[0]
        for axes, (key, label) in zip(row, shown, strict=True):
            lines = [_draw_line(axes, found[key], number) for number, found in enumerate(curves.values())]
            axes.set_xlabel("training step [updates]")
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for number, name in enumerate(held_out):
            for series in held_out[name]:
                _draw_line(row[0], series, number, **_HOLLOW, markevery=1)
        names = list(histories)
        if any(held_out.values()):
            lines += row[0].plot([], [], color=style.GREY, marker="o", **_HOLLOW)
            names.append("hollow: on held-out data")
        style.legend_below(drawn, lines, names)


def _draw_shares(axes: Any, shares: ByStep, count: int) -> list[Any]:
    axes.set_ylabel("share of the decisions")
    actions = ({step: values[number] for step, values in shares.items()} for number in range(count))
    return [_draw_line(axes, series, number) for number, series in enumerate(actions)]


def _draw_rewards(axes: Any, rewards: Mapping[str, Mapping[int, float]], metric: str) -> list[Any]:
    """On an axis of their own, in black."""
    if not rewards:
        return []
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    right.set_ylabel(metric)
    look = {"color": "black", "linewidth": 2.2, "markersize": 6.5, "fillstyle": "none"}
    return [_draw_line(right, series, number, **look) for number, series in enumerate(rewards.values())]


def _draw_line(axes: Any, series: Mapping[int, float], number: int, **look: Any) -> Any:
    steps = sorted(series)
    look = {"markevery": style.markers_at(len(steps), number), **style.series_style(number), **look}
    return axes.plot(steps, [series[step] for step in steps], **look)[0]


def _known(shares: ByStep) -> list[float]:
    return [value for values in shares.values() for value in values if np.isfinite(value)] or [0.0]


def _series(log_history: LogHistory, key: str) -> dict[int, float]:
    """Values by step, without those that are not finite."""
    found = {entry["step"]: float(entry[key]) for entry in log_history if key in entry and "step" in entry}
    return {step: value for step, value in found.items() if np.isfinite(value)}


def _logged_shares(log_history: LogHistory) -> dict[int, list[float]]:
    """Shares of all actions by step, of training alone."""
    entries = [entry for entry in log_history if "step" in entry and "action/0" in entry]
    if not entries:
        raise ValueError(
            "`log_history` holds no entry with `action/0` and `step`; give that of a REINFORCEDecodingTrainer, "
            "`trainer.state.log_history`."
        )
    count = 1 + max(int(match[1]) for entry in entries for key in entry if (match := _ACTION.fullmatch(key)))
    return {entry["step"]: _shares_of(entry, count) for entry in entries}


def _logged_types(log_history: LogHistory, count: int) -> dict[str, dict[int, list[float]]]:
    """Shares of all actions by type of prompt and step; steps without a decision on a type are not among its own."""
    found: dict[str, dict[int, list[float]]] = {}
    for entry in log_history:
        matches = filter(None, map(_ACTION.fullmatch, entry))
        for kind in dict.fromkeys(match[2] for match in matches if match[2] is not None):
            found.setdefault(kind, {})[entry["step"]] = _shares_of(entry, count, f"/{kind}")
    return found


def _shares_of(entry: Mapping[str, Any], count: int, ending: str = "") -> list[float]:
    return [float(entry.get(f"action/{number}{ending}", np.nan)) for number in range(count)]


def _by_step(name: str, found: ByStep, count: int) -> dict[int, list[float]]:
    """A checked copy of one type's shares."""
    checked = {}
    for step, values in found.items():
        shares = style.as_array(f"by_type[{name!r}][{step}]", values)
        if len(shares) != count:
            raise ValueError(f"`by_type[{name!r}][{step}]` holds {len(shares)} shares; the log has {count} actions.")
        checked[int(step)] = shares.tolist()
    return checked


def _logged_rewards(log_history: LogHistory, metric: str) -> dict[str, dict[int, float]]:
    """Of the evaluations, by name; of training where there was none."""
    evaluated = _evaluations(log_history, metric)
    if evaluated:
        return {f"validation {metric}" + (f" on {name}" if name else ""): found for name, found in evaluated.items()}
    training = _series(log_history, metric)
    return {f"training {metric}": training} if training else {}


def _evaluations(log_history: LogHistory, key: str) -> dict[str, dict[int, float]]:
    """By evaluation set, which is known by the `eval_NAME_runtime` that the Trainer logs beside its metrics."""
    keys = [key for entry in log_history for key in entry if key.startswith("eval") and key.endswith("_runtime")]
    prefixes = dict.fromkeys(name.removesuffix("_runtime") for name in keys)
    found = {p.removeprefix("eval").removeprefix("_"): _series(log_history, f"{p}_{key}") for p in prefixes}
    return {name: series for name, series in found.items() if series}
