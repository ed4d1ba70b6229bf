"""Which tokens an action is taken at, as small bar charts; knows texts and counts, no tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import style

_COLUMNS = 3


def plot_tokens_by_action(
    tokens: Sequence[str],
    action: Sequence[int] | np.ndarray,
    labels: Sequence[str],
    path: style.Path,
    *,
    top: int = 10,
) -> None:
    """
    Draws the most frequent tokens of each action (in place of Adaptive Decoding's word clouds, Figure 5), as a PNG.

    A bar is a token's share of the action's tokens. The number beside it is its lift: how many times that is its share
    of all tokens, which tells what the action is about from what is frequent anyway.

    Args:
        tokens (sequence of `M` `str`): Text of each token.
        action (array of shape `[M]`, whole numbers): The action taken at each token; -1 where none was.
        labels (sequence of `str`): A name for each action.
        path (`str`): The file to write.
        top (`int`, *optional*, defaults to 10): Bars of an action.

    Raises:
        `ValueError`: If there is no token, an argument is of another length, or `top` is not from 1 to 40.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    if isinstance(tokens, str) or not len(tokens):
        raise ValueError(f"`tokens` is {tokens!r}; it has to hold the text of at least one token.")
    if not 1 <= top <= 40:
        raise ValueError(f"`top` is {top}; it has to be from 1 to 40.")
    actions = style.as_actions(action, labels, len(tokens))
    overall = Counter(tokens)
    names = [*labels, *(["no decision"] if (actions == -1).any() else [])]
    counts: list[Counter[str]] = [Counter() for _ in range(len(labels) + 1)]
    for token, taken in zip(tokens, actions, strict=True):
        counts[taken][token] += 1  # the last one where there was no decision, -1
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    # As many bars as the fullest action has, so that a short list is not stretched.
    bars = max(1, min(top, max(len(found) for found in counts)))
    with style.figure(path, 3.6 * columns, rows * (0.2 * max(bars, 3) + 0.85) + 0.2) as drawn:
        panels = drawn.subplots(rows, columns, squeeze=False).flatten()
        for number, (axes, name) in enumerate(zip(panels, names, strict=False)):
            color = style.GREY if number == len(labels) else style.FILLS[number % len(style.FILLS)]
            _draw_action(axes, name, counts[number], overall, bars, color)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        label = ["share of the action's tokens [%];", "beside a bar: how many times its share of all tokens"]
        drawn.supxlabel(("\n" if columns == 1 else " ").join(label), fontsize=9)


def _draw_action(axes: Any, name: str, counts: Counter[str], overall: Counter[str], bars: int, color: str) -> None:
    total = counts.total()
    title = style.wrapped(name, 40, 2)
    if not total:
        axes.set_title(f"{title}\nno token")
        axes.set_axis_off()
        return
    # Ties in the order of the texts, not of the rows.
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:bars]
    shares = [100 * count / total for _, count in shown]
    axes.barh(range(len(shown)), shares, height=0.72, color=color, alpha=0.75)
    for place, (token, count) in enumerate(shown):
        lift = (count / total) / (overall[token] / overall.total())
        axes.annotate(
            f"×{lift:.1f}" if lift < 99.95 else f"×{lift:.0f}",
            (shares[place], place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_yticks(range(len(shown)), [style.token_text(token) for token, _ in shown])
    axes.set_ylim(bars - 0.4, -0.6)
    # Room for the numbers beside the bars.
    axes.set_xlim(0, 1.25 * max(shares))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{title}\n{total:,} token{'' if total == 1 else 's'}")
