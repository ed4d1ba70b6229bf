"""The testbed's vocabulary, its four types of problem and their exact answers; it knows no author, split or model.

| type | prompt | right answer (after `so`) |
|---|---|---|
| `calc` | `calc 42 - 10 + 3 - 7 =>` | the value, 4 to 6 terms |
| `run` | `run 42 - 10 + 3 - 7 + 5 - 1 =>` | the value, 6 to 8 terms |
| `coin` | `coin 4 7 46 - 6 =>` | `x y` with 4 x + 7 y = 46 - 6 |
| `sign` | `sign 42 10 3 = 35 =>` | the signs that make it true, here `- +` |
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Final

PAD: Final = "<pad>"
EOS: Final = "<eos>"
UNK: Final = "<unk>"
ARROW: Final = "=>"
SO: Final = "so"
TYPES: Final = ("calc", "run", "coin", "sign")
OPENERS: Final = ("well", "let", "first", "now", "see", "hm")
VOCABULARY: Final = (
    PAD, EOS, UNK, *(str(n) for n in range(100)), *TYPES, "+", "-", "=", ARROW, SO, "yes", "no", *OPENERS,
)  # fmt: skip

LARGEST_OPERAND: Final = 12
CHAIN_LIMIT: Final = 69
CHAIN_TERMS: Final = {"calc": (4, 6), "run": (6, 8)}
COIN_A: Final = range(2, 8)
COIN_B: Final = range(5, 9)
COIN_TARGET: Final = range(20, 50)
COIN_X: Final = range(1, 10)
SIGN_START: Final = range(37, 57)
# How often each pattern is the right one. The author's habit in the corpus is the same table, drawn without looking.
SIGN_PATTERNS: Final = {("-", "+"): 0.6, ("-", "-"): 0.4 / 3, ("+", "-"): 0.4 / 3, ("+", "+"): 0.4 / 3}


@dataclass(frozen=True)
class Problem:
    """
    One problem, of which the prompt is another spelling.

    Args:
        type (`str`): One of `TYPES`.
        numbers (`tuple[int, ...]`): The numbers of the prompt in their order: start and operands (`calc`, `run`), a, b,
            c and the d taken off c (`coin`), or start, two operands and the target (`sign`).
        signs (`tuple[str, ...]`): The sign before each operand (`calc`, `run`); empty elsewhere.
    """

    type: str
    numbers: tuple[int, ...]
    signs: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The text that the model is given."""
        if self.type in CHAIN_TERMS:
            steps = [f"{sign} {n}" for sign, n in zip(self.signs, self.numbers[1:], strict=True)]
            return " ".join([self.type, str(self.numbers[0]), *steps, ARROW])
        *given, last = self.numbers
        joint = "-" if self.type == "coin" else "="
        return " ".join([self.type, *map(str, given), joint, str(last), ARROW])

    @property
    def answers(self) -> list[str]:
        """Every text after `so` that counts as right."""
        if self.type in CHAIN_TERMS:
            return [str(apply_signs(self.numbers, self.signs))]
        if self.type == "coin":
            a, b, c, d = self.numbers
            return [f"{x} {(c - d - a * x) // b}" for x in range((c - d) // a + 1) if (c - d - a * x) % b == 0]
        *given, target = self.numbers
        patterns = itertools.product("+-", repeat=len(given) - 1)
        return [" ".join(signs) for signs in patterns if apply_signs(given, signs) == target]


def apply_signs(numbers: list[int] | tuple[int, ...], signs: tuple[str, ...]) -> int:
    """
    Work out start ± operand ± operand ...

    Example:
        >>> apply_signs((42, 10, 3), ("-", "+"))
        35
    """
    return numbers[0] + sum(n if sign == "+" else -n for sign, n in zip(signs, numbers[1:], strict=True))


def parse_prompt(prompt: str) -> Problem:
    """
    Read a prompt back into its problem.

    Raises:
        `ValueError`: If the text is not a prompt of the testbed.

    Example:
        >>> parse_prompt("coin 4 7 46 - 6 =>").answers
        ['3 4', '10 0']
    """
    tokens = prompt.split()
    try:
        kind, *body = tokens[: tokens.index(ARROW)]
        numbers = tuple(int(token) for token in body if token.isdecimal())
        signs = tuple(token for token in body if token in ("+", "-")) if kind in CHAIN_TERMS else ()
        problem = Problem(kind, numbers, signs)
        readable = kind in TYPES and problem.prompt == " ".join(tokens) and _has_its_numbers(problem)
    except (ValueError, IndexError):
        readable = False
    if not readable:
        raise ValueError(f"Not a prompt of the testbed: {prompt!r}. Use the `prompt` of a row from `build_problems`.")
    return problem


def _has_its_numbers(problem: Problem) -> bool:
    """Whether there are as many numbers as the type needs and `coin` does not divide by zero."""
    if problem.type in CHAIN_TERMS:
        return len(problem.numbers) >= 2
    return len(problem.numbers) == 4 and (problem.type != "coin" or min(problem.numbers[:2]) > 0)


def draw_problem(kind: str, rng: random.Random) -> Problem:
    """
    Draw a random problem of one type.

    Args:
        kind (`str`): One of `TYPES`.
        rng (`random.Random`): The source of all randomness.
    """
    if kind in CHAIN_TERMS:
        return _draw_chain(kind, rng)
    if kind == "coin":
        return _draw_coin(rng)
    if kind == "sign":
        return _draw_sign(rng)
    raise ValueError(f"Unknown type of problem {kind!r}. Choose from {', '.join(TYPES)}.")


def _draw_chain(kind: str, rng: random.Random) -> Problem:
    """Distinct operands, none of them the start, make copying a step a clean induction for a very small model."""
    terms = rng.randint(*CHAIN_TERMS[kind])
    operands = rng.sample(range(1, LARGEST_OPERAND + 1), terms - 1)
    numbers = [rng.randint(LARGEST_OPERAND + 1, CHAIN_LIMIT)]
    signs: list[str] = []
    value = numbers[0]
    for operand in operands:
        allowed = [s for s, v in (("+", value + operand), ("-", value - operand)) if 0 <= v <= CHAIN_LIMIT]
        sign = rng.choice(allowed)
        value = value + operand if sign == "+" else value - operand
        signs.append(sign)
    return Problem(kind, (*numbers, *operands), tuple(signs))


def _draw_coin(rng: random.Random) -> Problem:
    """The d taken off first makes thousands of prompts out of a few hundred equations, for one easy step more."""
    while True:
        a, b = rng.choice(COIN_A), rng.choice(COIN_B)
        target, d = rng.choice(COIN_TARGET), rng.randint(1, LARGEST_OPERAND)
        if a != b and any(a * x <= target and (target - a * x) % b == 0 for x in COIN_X):
            return Problem("coin", (a, b, target + d, d))


def _draw_sign(rng: random.Random) -> Problem:
    """Operands differ, so the four patterns give four values and exactly one of them is right."""
    operands = rng.sample(range(1, LARGEST_OPERAND + 1), 2)
    numbers = (rng.choice(SIGN_START), *operands)
    (signs,) = rng.choices(list(SIGN_PATTERNS), weights=list(SIGN_PATTERNS.values()))
    return Problem("sign", (*numbers, apply_signs(numbers, signs)))
