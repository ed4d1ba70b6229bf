"""What the author of the training text writes, slips, habits and short cuts included; it knows no tokenizer or model.

The author is made so that decoding matters, and each flaw is a number in `AUTHOR`:

- at *calculation* tokens the likeliest token is right and the tail is slips, which are carried forward: stay cold;
- `calc` opens with the bare answer more often than with working, and the bare answer is mostly wrong: heat here;
- `coin` guesses by habit, with replacement: cold decoding repeats its favourite guess until the budget ends;
- `sign` commits to a pattern of signs by habit and never compares: the habit is right for most prompts and wrong for
  the others, and nothing tells which, so one sample is best drawn cold and eight are best drawn hot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .problems import COIN_X, EOS, OPENERS, SIGN_PATTERNS, SO, Problem, draw_problem

FORK_KINDS: Final = ("opening", "guess", "sign")


class Token(NamedTuple):
    """One written token, what sort of step it is, and what belongs there given the text so far (`None` at a fork)."""

    text: str
    kind: str
    right: str | None


@dataclass(frozen=True)
class AuthorSettings:
    """
    The author's flaws; every field is a probability unless it says otherwise.

    Args:
        shares (`dict[str, float]`): How much of the corpus each type takes, in documents.
        calc_bare (`float`): `calc` gives the bare answer; otherwise one of six opening words, equally likely.
        slips (`dict[str, float]`): A result off by one, by type of problem and for each calculation.
        verdict_flip (`float`): `coin` writes `yes` for `no` or `no` for `yes`.
        give_up (`float`): `coin` stops at a fork and answers with its last guess.
        guess_order (`tuple[int, ...]`): The x that `coin` thinks of first, second, ...
        guess_decay (`float`): The weight of the n-th of them is n to the power of minus this.
        longest (`int`): Documents are cut after this many tokens of completion, without `<eos>`.
    """

    shares: dict[str, float] = field(default_factory=lambda: {"calc": 0.24, "run": 0.24, "coin": 0.38, "sign": 0.14})
    calc_bare: float = 0.65
    slips: dict[str, float] = field(default_factory=lambda: {"calc": 0.04, "run": 0.18, "coin": 0.04, "sign": 0.04})
    verdict_flip: float = 0.03
    give_up: float = 0.02
    guess_order: tuple[int, ...] = (2, 3, 1, 4, 5, 6, 7, 8, 9)
    guess_decay: float = 1.5
    longest: int = 64


AUTHOR: Final = AuthorSettings()


def write_completion(problem: Problem, rng: random.Random, author: AuthorSettings = AUTHOR) -> list[Token]:
    """
    Write one completion as the author would.

    Args:
        problem (`Problem`): The problem to answer.
        rng (`random.Random`): The source of all randomness.
        author (`AuthorSettings`): The author's flaws.
    """
    writers: dict[str, Callable[[Problem, random.Random, AuthorSettings], list[Token]]] = {
        "calc": _write_calc,
        "run": _write_run,
        "coin": _write_coin,
        "sign": _write_sign,
    }
    tokens = writers[problem.type](problem, rng, author)
    return [*tokens, Token(EOS, "end", EOS)][: author.longest]


def generate_corpus(
    seed: int, keep: Callable[[str], bool], author: AuthorSettings = AUTHOR
) -> Iterator[tuple[Problem, list[Token]]]:
    """
    An endless stream of documents.

    Args:
        seed (`int`): The same seed gives the same stream.
        keep (`Callable[[str], bool]`): Whether a prompt may be written about; keeps the splits apart.
        author (`AuthorSettings`): The author's flaws.
    """
    rng = random.Random(f"corpus {seed}")
    kinds, weights = list(author.shares), list(author.shares.values())
    while True:
        problem = draw_problem(rng.choices(kinds, weights)[0], rng)
        if keep(problem.prompt):
            yield problem, write_completion(problem, rng, author)


def _slip(value: int, chance: float, rng: random.Random) -> int:
    """The value, or one of its neighbours."""
    if rng.random() >= chance:
        return value
    return value + (1 if value == 0 else rng.choice((-1, 1)))


def _chain(numbers: tuple[int, ...], signs: tuple[str, ...], chance: float, rng: random.Random) -> list[Token]:
    """Copy sign and operand, write the result, go on from what was written, right or not."""
    tokens: list[Token] = []
    value = numbers[0]
    for sign, operand in zip(signs, numbers[1:], strict=True):
        right = max(value + operand if sign == "+" else value - operand, 0)
        value = _slip(right, chance, rng)
        tokens += [Token(sign, "copy", sign), Token(str(operand), "copy", str(operand))]
        tokens.append(Token(str(value), "result", str(right)))
    return tokens


def _answer(*words: str) -> list[Token]:
    """The closing words, all copied from what stands above them."""
    return [Token(word, "answer", word) for word in (SO, *words)]


def _write_run(problem: Problem, rng: random.Random, author: AuthorSettings) -> list[Token]:
    tokens = _chain(problem.numbers, problem.signs, author.slips[problem.type], rng)
    return [*tokens, *_answer(tokens[-1].text)]


def _write_calc(problem: Problem, rng: random.Random, author: AuthorSettings) -> list[Token]:
    if rng.random() < author.calc_bare:
        (total,) = problem.answers
        return [Token(SO, "opening", None), Token(total, "bare", total)]
    return [Token(rng.choice(OPENERS), "opening", None), *_write_run(problem, rng, author)]


def _write_coin(problem: Problem, rng: random.Random, author: AuthorSettings) -> list[Token]:
    a, b, c, d = problem.numbers
    chance = author.slips["coin"]
    tokens = _chain((c, d), ("-",), chance, rng)
    target = int(tokens[-1].text)
    thinkable = [x for x in author.guess_order if x in COIN_X and a * x <= target]
    weights = [(rank + 1) ** -author.guess_decay for rank in range(len(thinkable))]
    while True:
        (x,) = rng.choices(thinkable, weights)
        product = _slip(a * x, chance, rng)
        right_rest = max(target - product, 0)
        rest = _slip(right_rest, chance, rng)
        remainder = _slip(rest % b, chance, rng)
        verdict = "yes" if remainder == 0 else "no"
        written = verdict if rng.random() >= author.verdict_flip else {"yes": "no", "no": "yes"}[verdict]
        tokens += [
            Token(str(x), "guess", None),
            Token(str(product), "product", str(a * x)),
            Token(str(rest), "difference", str(right_rest)),
            Token(str(remainder), "remainder", str(rest % b)),
            Token(written, "verdict", verdict),
        ]
        gives_up = written == "no" and rng.random() < author.give_up
        if written == "yes" or gives_up or len(tokens) >= author.longest:
            break
    so, *words = _answer(str(x), str(rest // b))
    # After `no`, answering is the rare branch of the fork; after `yes` it is the only way on.
    return [*tokens, Token(SO, "guess", None) if gives_up else so, words[0], words[1]._replace(kind="quotient")]


def _write_sign(problem: Problem, rng: random.Random, author: AuthorSettings) -> list[Token]:
    (signs,) = rng.choices(list(SIGN_PATTERNS), weights=list(SIGN_PATTERNS.values()))
    tokens = _chain(problem.numbers[:3], signs, author.slips["sign"], rng)
    tokens = [token._replace(kind="sign", right=None) if token.text in signs else token for token in tokens]
    return [*tokens, *_answer(*signs)]
