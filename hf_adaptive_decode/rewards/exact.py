r"""Compares final answers as exact texts or exact numbers; knows no algebra and evaluates nothing.

The final answer of a text is the content of its last `\boxed{...}`; else what follows its last `####` on that line;
else, where the solution is a number, the last number of the last line that is not empty; else that whole line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final

from .columns import check_column, completion_texts

# Longer answers are compared as texts only, and such exponents not at all as numbers: 1e999999999 has no place here.
MAX_NUMBER_CHARACTERS: Final = 100
MAX_EXPONENT: Final = 400
# How much of the end of a text is searched for its answer.
MAX_CHARACTERS: Final = 100_000

_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?")
_IN_LINE = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?(?:\s?/\s?\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox|operatorname|textbf|mathbf)\s*\{([^{}]*)\}")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|[,;:!])|\\?\$|\\[()\[\]]|[€£]|~")
_UNIT = re.compile(
    r"^(.*?[\d.)])\s*((?:\\?%|\\?°|\^\\?circ|\^\{\\?circ\}|[a-zA-Zµ]+(?:\s?/\s?[a-zA-Z]+)?(?:\^?\{?[23]\}?)?)(?:\s[a-zA-Z]+)*)$"
)


def exact_match_reward(
    completions: Sequence[Any],
    solution: Sequence[str | int | float | None],
    prompts: Sequence[Any] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""
    1.0 where the final answer is the solution, as a text or as a number; 0.0 elsewhere; `None` where there is none.

    Args:
        completions (`Sequence[str | list[dict]]`): Texts or message lists.
        solution (`Sequence[str | None]`): One solution a completion: a bare answer, or a text that marks it with
            `\boxed{...}` or `####`.
        prompts, completion_ids, **columns: What else TRL passes; not needed.

    Example:
        >>> exact_match_reward(completions=["so \\boxed{\\frac{1}{2}}", "It is 1,000 km."], solution=["0.5", "1000"])
        [1.0, 1.0]
    """
    check_column("solution", solution, completions)
    texts = completion_texts(completions)
    return [None if s is None else float(is_exact_match(t, str(s))) for t, s in zip(texts, solution, strict=True)]


def is_exact_match(text: str, solution: str) -> bool:
    """
    Whether the final answer of a text is the solution.

    Args:
        text (`str`): The completion.
        solution (`str`): The solution.
    """
    expected = marked_answer(solution)
    expected = solution.strip() if expected is None else expected
    number = as_number(expected)
    answer = final_answer(text, wants_number=number is not None)
    if answer is None:
        return False
    if number is not None:
        return as_number(answer, unit=_unit(expected)) == number
    return normalise(answer) == normalise(expected) != ""


def final_answer(text: str, wants_number: bool) -> str | None:
    """
    The final answer of a text, by the rules at the top of this module; `None` where there is none.

    Args:
        text (`str`): The text.
        wants_number (`bool`): Whether a number is looked for where nothing marks the answer.
    """
    answer = marked_answer(text)
    if answer is not None:
        return answer
    lines = [line.strip() for line in text[-MAX_CHARACTERS:].splitlines() if line.strip()]
    if not lines:
        return None
    last = lines[-1][-MAX_CHARACTERS // 10 :]
    if not wants_number or as_number(last) is not None:
        return last
    numbers = _IN_LINE.findall(last)
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    r"""
    What the last `\boxed{...}` holds, else what follows the last `####` on its line, else `None`.

    Args:
        text (`str`): The text; only its last 100,000 characters are read.
    """
    text = text[-MAX_CHARACTERS:]
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start >= 0:
        opening = text.index("{", start)
        depth = 0
        for position in range(opening, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[opening + 1 : position].strip()
    _, mark, rest = text.rpartition("####")
    return (rest.strip().splitlines() or [""])[0].strip() if mark else None


def normalise(answer: str) -> str:
    """
    An answer without white space, LaTeX decoration, thousands' commas and a final full stop, in lower case.

    Args:
        answer (`str`): The answer.
    """
    plain = _DECORATION.sub(" ", _WORDS.sub(r" \1 ", answer)).replace(r"\%", "%")
    plain = _FRACTION.sub(lambda m: f"{m[1]}({m[2] or m[3]})/({m[4] or m[5]})", plain)
    return "".join(_THOUSANDS.sub("", plain).split()).rstrip(".").casefold()


def as_number(answer: str, unit: str | None = None) -> Fraction | None:
    """
    The exact value of a number or a fraction of two, with or without a unit; `None` for anything else.

    Args:
        answer (`str`): The answer.
        unit (`str`, *optional*): The unit of the solution: an answer with another unit is no number. A percent sign is
            a unit, so 50% is 50.

    Example:
        >>> as_number("1,250.50 dollars"), as_number("x + 1")
        (Fraction(2501, 2), None)
    """
    if len(answer) > MAX_NUMBER_CHARACTERS:
        return None
    number, found = _split_unit(answer)
    if unit and found and unit != found:
        return None
    sign = -1 if number.startswith("-(") else 1
    top, slash, bottom = number.lstrip("-+" if "(" in number else "").replace("(", "").replace(")", "").partition("/")
    values = [_decimal(part) for part in ([top, bottom] if slash else [top])]
    if any(value is None for value in values) or (slash and not values[1]):
        return None
    exact = [Fraction(value) for value in values if value is not None]
    return sign * (exact[0] / exact[1] if slash else exact[0])


def _split_unit(answer: str) -> tuple[str, str]:
    """An answer's normalised number part and its unit, `""` without one."""
    plain = _DECORATION.sub(" ", _WORDS.sub(r" \1 ", answer)).strip().rstrip(".").strip()
    found = _UNIT.match(plain)
    # An exponent is no unit: 1e5.
    if found is None or _PLAIN.fullmatch(normalise(plain)):
        return normalise(plain), ""
    return normalise(found[1]), normalise(found[2]).removesuffix("s")


def _unit(answer: str) -> str:
    return _split_unit(answer)[1]


def _decimal(text: str) -> Decimal | None:
    if not _PLAIN.fullmatch(text):
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if abs(value.adjusted()) <= MAX_EXPONENT else None
