"""Text that came from elsewhere made safe for Markdown, and tables of it; knows nothing of adapters or cards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"[\\`*~|$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])|\[(?=\^)")


def plain(value: object) -> str:
    """`value` on one line, without control characters, lone surrogates or marks that turn the direction of text."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def escape(value: object) -> str:
    """`value` as Markdown that shows it as it is: no emphasis, code, link, table cell or HTML begins or ends in it."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(lambda found: "\\" + found.group(), text)


def code(value: object) -> str:
    """`value` as a code span, fenced by more backticks than it holds; not for tables, where a `|` would split it."""
    text = plain(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def literal(value: str) -> str:
    """`value` as a Python string on one line of plain characters."""
    return json.dumps(value, ensure_ascii=False) if value.isprintable() else repr(value)


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table of escaped cells, padded so that it reads well unrendered, too."""
    lines = [[escape(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
