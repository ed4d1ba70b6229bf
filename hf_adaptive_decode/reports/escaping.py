"""Text that others wrote, made harmless and visible within HTML, attributes and scripts; knows no pages."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import Any

_DRAWN = {" ": "␣", "\t": "⇥", "\n": "↵"}
# Kinds that draw nothing, or draw elsewhere what follows: controls, separators, half surrogate pairs, unassigned ones.
_HIDDEN = ("Cc", "Cs", "Cn", "Co", "Zl", "Zp")
# As do marks of direction, zero-width spaces, a byte order mark. Joiners are not here: scripts and emoji need them.
_FORMATS = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]")


def marked(text: str) -> str:
    """
    HTML of a text in which what cannot be seen has a mark, drawn by the style sheet from `data-mark`.

    The page's own text stays the given one, so that it can be copied, but for two things that HTML cannot hold: a NUL
    and half a surrogate pair become U+FFFD.
    """
    only_space = text.isspace()
    return "".join(_element(character, _mark(character, only_space)) for character in text)


def visible(text: str, marks_spaces: bool = True) -> str:
    """A text on one line in which every character is drawn, spaces too if wanted, for a list of tokens; not escaped."""
    marks = [(character, _mark(character, marks_spaces)) for character in text]
    return "".join(character if mark is None else mark if len(mark) == 1 else f"⟨{mark}⟩" for character, mark in marks)


def script_json(value: Any) -> str:
    """
    JSON that can stand within a `<script>`: nothing in it can end the element, open a comment, or end a line.

    Raises:
        `ValueError`: If a number is NaN or infinite, which JSON has no word for.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _element(character: str, mark: str | None) -> str:
    if character == "\r":
        escaped = "&#13;"  # a parser makes a bare one a line feed
    else:
        escaped = "\ufffd" if character == "\0" or "\ud800" <= character <= "\udfff" else html.escape(character)
    return escaped if mark is None else f'<i class="mark" data-mark="{mark}">{escaped}</i>'


def _mark(character: str, marks_spaces: bool) -> str | None:
    """What to draw for a character that is not drawn itself; of spaces, which words have around them, if wanted."""
    kind = unicodedata.category(character)
    if kind == "Zs" and not marks_spaces:
        return None
    if character in _DRAWN:
        return _DRAWN[character]
    return f"U+{ord(character):04X}" if kind in (*_HIDDEN, "Zs") or _FORMATS.match(character) else None
