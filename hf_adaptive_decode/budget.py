"""Checks a budget once, at the boundary, and turns it into one number a row; knows nothing of models or policies."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import BudgetError
from .types import Budget

# What fits the 32-bit counters of the hosts.
MAX_BUDGET = (1 << 31) - 1
_WANTED = "a positive whole number of tokens, or one such number for every prompt of the batch"


@dataclass(frozen=True)
class ResolvedBudget:
    """
    A checked budget.

    Args:
        tokens (`tuple` of `int`, *optional*): Token budget of each prompt, in batch order.
        samples (`int`, *optional*): Sequences per prompt.
    """

    tokens: tuple[int, ...] | None
    samples: int | None

    @property
    def longest(self) -> int | None:
        """The largest token budget of the batch."""
        return max(self.tokens) if self.tokens else None

    def per_row(self, rows: int) -> torch.Tensor | None:
        """Token budget `[rows]` (`torch.long`) after each prompt has been repeated `rows / prompts` times."""
        if self.tokens is None:
            return None
        return torch.tensor(self.tokens, dtype=torch.long).repeat_interleave(rows // len(self.tokens))


def resolve_budget(budget: Any, prompts: int) -> ResolvedBudget:
    """
    Checks what a caller passed as `budget`.

    Args:
        budget (`int`, sequence of `int`, [`Budget`] or `None`): As `generate` takes it.
        prompts (`int`): Prompts in the batch.

    Raises:
        [`BudgetError`]: If a number is not a positive whole number, or there is not one number a prompt.
    """
    if budget is None:
        return ResolvedBudget(None, None)
    if not isinstance(budget, Budget):
        budget = Budget(tokens=budget)
    if budget.tokens is None and budget.samples is None:
        raise BudgetError("`Budget()` holds neither `tokens` nor `samples`; set at least one of them.")
    samples = None if budget.samples is None else _positive_int(budget.samples, "samples", "a positive whole number")
    return ResolvedBudget(_tokens(budget.tokens, prompts), samples)


def _tokens(tokens: Any, prompts: int) -> tuple[int, ...] | None:
    if tokens is None:
        return None
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.tolist()
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        return (_positive_int(tokens, "budget", _WANTED),) * prompts
    values = tuple(_positive_int(value, f"budget[{index}]", _WANTED) for index, value in enumerate(tokens))
    if len(values) != prompts:
        raise BudgetError(
            f"`budget` holds {len(values)} numbers for a batch of {prompts} prompts; pass one number for all or "
            f"exactly {prompts}."
        )
    return values


def whole_budget(value: Any) -> int | None:
    """The number that `value` is, if it is a whole number from 1 to `MAX_BUDGET`."""
    # operator.index takes Python and numpy integers and nothing that would have to be rounded.
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if not isinstance(value, bool) and 1 <= number <= MAX_BUDGET else None


def _positive_int(value: Any, name: str, wanted: str) -> int:
    number = whole_budget(value)
    if number is None:
        raise BudgetError(f"`{name}` is {value!r}; it has to be {wanted}, at most {MAX_BUDGET}.")
    return number
