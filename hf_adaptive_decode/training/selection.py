"""Which sampled solutions are learned from, and how many were left out for what; knows no texts and no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .rejection import Drawn, choose


@dataclass(frozen=True)
class Selection:
    """
    What was kept of the draws of many problems.

    Args:
        kept (list of [`Drawn`]): By problem, setting and sample.
        solve_rate (list of `float`): Of each problem, the part of its draws that were verified.
        counts (`dict` of `str` to `int`): Of problems: `problems`, `solved` (with a verified completion),
            `solved_always` (all draws verified), `solved_never`, and `outside_solve_rate` (solved and left out by
            difficulty). Of completions: `sampled`, `truncated` (cut off by the budget), `right_but_truncated`,
            `verified`, `duplicates` (verified, with the tokens of an earlier one of the problem), `kept`. Of tokens:
            `tokens_sampled`, `tokens_kept`.
        by_rung (list of `dict`): `sampled`, `verified` and `kept` at each setting of the ladder.
    """

    kept: list[Drawn]
    solve_rate: list[float]
    counts: dict[str, int]
    by_rung: list[dict[str, int]]


def select(
    drawn: Sequence[Sequence[Drawn]], rungs: int, keep: int, solve_rate: tuple[float, float] | None = None
) -> Selection:
    """
    The distinct verified completions of each problem, at most `keep`, of problems within a range of difficulty.

    Args:
        drawn (sequence of sequences of [`Drawn`]): As [`~training.rejection.draw_solutions`] returns them.
        rungs (`int`): How many settings the ladder has.
        keep (`int`): Most completions of a problem.
        solve_rate (`tuple[float, float]`, *optional*): The lowest and the highest part of a problem's draws that may
            be verified, ends included.
    """
    low, high = (0.0, 1.0) if solve_rate is None else solve_rate
    rates = [sum(one.verified for one in of) / len(of) for of in drawn]
    inside = [low <= rate <= high for rate in rates]
    kept = [one for of, is_in in zip(drawn, inside, strict=True) if is_in for one in choose(of, keep)]
    flat = [one for of in drawn for one in of]
    verified = [one for one in flat if one.verified]
    counts = {
        "problems": len(drawn),
        "solved": sum(rate > 0 for rate in rates),
        "solved_always": sum(rate == 1 for rate in rates),
        "solved_never": sum(rate == 0 for rate in rates),
        "outside_solve_rate": sum(rate > 0 and not is_in for rate, is_in in zip(rates, inside, strict=True)),
        "sampled": len(flat),
        "truncated": sum(not one.ended for one in flat),
        "right_but_truncated": sum(one.reward >= 1 and not one.ended for one in flat),
        "verified": len(verified),
        "duplicates": len(verified) - len({(one.problem, one.digest) for one in verified}),
        "kept": len(kept),
        "tokens_sampled": sum(one.tokens for one in flat),
        "tokens_kept": sum(one.tokens for one in kept),
    }
    parts: dict[str, list[Any]] = {"sampled": flat, "verified": verified, "kept": kept}
    by_rung = [{name: sum(one.rung == rung for one in part) for name, part in parts.items()} for rung in range(rungs)]
    return Selection(kept, rates, counts, by_rung)
