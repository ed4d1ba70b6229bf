"""One HTML page that shows completions token by token, coloured by what each was decoded with; knows traces as plain
values, no models, tokenizers or files.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .colours import ACTION_COLOURS, STEPS, Scale
from .escaping import marked, script_json, visible
from .trace_assets import SCRIPT, style_sheet

if TYPE_CHECKING:
    from ..evaluation.traces import TokenTrace, Trace

_WORDS = {"temperature": "T", "top_p": "P", "action": "action", "entropy": "entropy"}
# The ends of a scale are multiples of these, so that differences too small to matter get one colour.
_GRAINS = {"temperature": 0.1, "top_p": 0.1, "entropy": 0.5}
_PLAIN = "plain"
_PART = "(part of a character)"
_PATTERNS = 4  # actions beyond the palette come again with underlines of three kinds


def trace_page(traces: Sequence[Trace], *, title: str, note: str = "", colour: str | None = None) -> str:
    """
    A self-contained page: one file that loads nothing, and works from a disk.

    Tokens are coloured by their temperature, their top-p, their action or the base model's entropy, or by those of
    the next token, as in the two example generations of Adaptive Decoding, Appendix B.3. All texts are escaped, and
    the page's own policy lets no other script than its own run.

    Args:
        traces (sequence of one or two [`Trace`]): Of one prompt, side by side.
        title (`str`): The page's.
        note (`str`): A line below it.
        colour (`str`, *optional*): What to colour by at first: `"temperature"`, `"top_p"`, `"action"` or `"entropy"`;
            by default the action if there is a choice of them, else the temperature.

    Returns:
        `str`: The page, to be written as UTF-8; equal traces give equal pages.

    Raises:
        `ValueError`: If there are not one or two traces of one prompt, or nothing to colour by as asked.
    """
    if len(traces) not in (1, 2) or len({trace.prompt for trace in traces}) != 1:
        raise ValueError(f"got {len(traces)} traces; a page shows one or two, and of the same prompt.")
    colouring = _Colouring.of(traces)
    colour = colouring.quantities[0] if colour is None else colour
    if colour not in colouring.quantities:
        raise ValueError(f"the page cannot be coloured by {colour!r}; choose from {', '.join(colouring.quantities)}.")
    # By its digest: a script that slipped in with a text would have another one.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    panes = "\n".join(_pane(trace, colouring, colour) for trace in traces)
    data = script_json([_data(trace, colouring) for trace in traces])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(visible(title, marks_spaces=False))}</title>
<style>
{style_sheet(colouring.quantities)}</style>
</head>
<body data-colour="{colour}">
<h1>{marked(title)}</h1>
<p class="note">{marked(note)}</p>
<div class="prompt" dir="auto">{marked(traces[0].prompt)}</div>
{_controls(colouring.quantities, colour)}
<div class="panes">
{panes}
</div>
<div id="details" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class _Colouring:
    """Which colours stand for what, the same in both panes."""

    quantities: list[str]
    scales: dict[str, Scale]
    configurations: list[str]

    @staticmethod
    def of(traces: Sequence[Trace]) -> _Colouring:
        scales = {}
        for name, grain in _GRAINS.items():
            values = [vars(token)[name] for trace in traces for token in trace.tokens]
            scale = Scale.around([value for value in values if value is not None], grain)
            if scale is not None:
                scales[name] = scale
        has_choice = any(len(trace.actions) > 1 for trace in traces)
        quantities = [name for name in _WORDS if name in scales or (name == "action" and has_choice)]
        if has_choice:  # first, since what a page is coloured by is else what comes first
            quantities.sort(key=lambda name: name != "action")
        configurations = list(dict.fromkeys(action for trace in traces for action in trace.actions))
        return _Colouring(quantities or ["entropy"], scales, configurations)

    def name(self, quantity: str, trace: Trace, token: TokenTrace) -> str:
        """The class of a token coloured by a quantity."""
        value = vars(token)[quantity]
        if value is None:
            return _PLAIN
        if quantity == "action":
            return self.action(trace.actions[value])
        return f"s{self.scales[quantity].step(value)}"

    def action(self, configuration: str) -> str:
        """The classes of an action: equal configurations of two decoders look alike, whatever their numbers."""
        turn, place = divmod(self.configurations.index(configuration), len(ACTION_COLOURS))
        return f"a{place} again{turn % _PATTERNS}" if turn else f"a{place}"


def _controls(quantities: list[str], colour: str) -> str:
    by = "".join(_radio("colour", name, _WORDS[name], name == colour) for name in quantities)
    which = _radio("which", "current", "current token", True) + _radio("which", "next", "next token", False)
    return (
        f'<div class="controls"><fieldset><legend>Colour by</legend>{by}</fieldset>'
        f"<fieldset><legend>of the</legend>{which}</fieldset></div>"
    )


def _radio(group: str, value: str, words: str, is_checked: bool) -> str:
    checked = " checked" if is_checked else ""
    return f'<label><input type="radio" name="{group}" value="{value}"{checked}> {words}</label>'


def _pane(trace: Trace, colouring: _Colouring, colour: str) -> str:
    legends = "\n".join(_legend(name, trace, colouring) for name in colouring.quantities)
    # One tab stop a pane; the arrow keys go on from it.
    tokens = "".join(
        f'<span class="token {colouring.name(colour, trace, token)}" tabindex="{-1 if number else 0}">'
        f"{marked(token.text)}</span>"
        for number, token in enumerate(trace.tokens)
    )
    label = html.escape(visible(trace.name, marks_spaces=False))
    return f"""<section class="pane">
<h2>{marked(trace.name)}</h2>
<p class="facts">{_facts(trace)}</p>
{legends}
<div class="tokens" dir="auto" role="group" aria-label="{label}: tokens">{tokens}</div>
</section>"""


def _facts(trace: Trace) -> str:
    end = "ended by itself" if trace.ended else "cut off by its budget"
    facts = [f"{len(trace.tokens)} tokens of {trace.token_budget}, {end}"]
    for name, words in (("temperature", "mean T"), ("top_p", "mean P"), ("entropy", "mean entropy")):
        known = [vars(token)[name] for token in trace.tokens if vars(token)[name] is not None]
        facts += [f"{words} {math.fsum(known) / len(known):.3f}"] if known else []
    facts += [] if trace.reward is None else [f"reward {trace.reward:g}"]
    return "; ".join(facts)


def _legend(quantity: str, trace: Trace, colouring: _Colouring) -> str:
    keys = _actions(trace, colouring) if quantity == "action" else _bar(quantity, colouring.scales.get(quantity))
    return f'<div class="legend {quantity}">{keys}</div>'


def _bar(quantity: str, scale: Scale | None) -> str:
    if scale is None:
        return "no token, no scale"
    cells = "".join(f'<span class="cell s{step}"></span>' for step in range(STEPS))
    unit = " nats" if quantity == "entropy" else ""
    return (
        f'<span class="key">{_WORDS[quantity]} {scale.low:.1f} <span class="bar">{cells}</span> '
        f"{scale.high:.1f}{unit}</span>"
    )


def _actions(trace: Trace, colouring: _Colouring) -> str:
    if not trace.actions:
        return "this decoder has no actions"
    taken = [token.action for token in trace.tokens]
    share: Callable[[int], str] = lambda count: f"{count / max(1, len(taken)):.0%}"  # noqa: E731
    keys = [
        f'<span class="key"><span class="cell {colouring.action(words)}"></span>{number}: {html.escape(words)} '
        f"<small>{share(taken.count(number))}</small></span>"
        for number, words in enumerate(trace.actions)
    ]
    if None in taken:
        none = f"none taken <small>{share(taken.count(None))}</small>"
        keys.append(f'<span class="key"><span class="cell {_PLAIN}"></span>{none}</span>')
    return "".join(keys)


def _data(trace: Trace, colouring: _Colouring) -> dict[str, Any]:
    """What the script needs of a trace, column by column."""
    tokens = trace.tokens
    columns = {name: [vars(token)[name] for token in tokens] for name in ("token_id", "action", "remaining")}
    for name in ("temperature", "top_p", "entropy", "probability"):
        columns[name] = [_short(vars(token)[name]) for token in tokens]
    return {
        **columns,
        "text": [visible(token.text) or _PART for token in tokens],
        "top_ids": [[one.token_id for one in token.alternatives] for token in tokens],
        "top_texts": [[visible(one.text) or _PART for one in token.alternatives] for token in tokens],
        "top_probabilities": [[_short(one.probability) for one in token.alternatives] for token in tokens],
        "classes": {name: [colouring.name(name, trace, token) for token in tokens] for name in colouring.quantities},
        "actions": list(trace.actions),
        "token_budget": trace.token_budget,
    }


def _short(value: float | None) -> float | None:
    """A number with little more digits than the page shows."""
    return None if value is None else float(f"{value:.4g}")
