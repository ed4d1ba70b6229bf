"""The places of a batch: which row has each, how far it is, and what it has written; knows no model and no policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..randomness import row_uniforms
from ..types import SamplingParameters, is_per_row

# Streams of a row's random numbers: for what the policy draws, and for the token.
FOR_ACTION, FOR_TOKEN = 0, 1
# Steps whose random numbers are made at once.
_AHEAD = 16
_COLUMNS = ("row", "keys", "token_budget", "parallel_samples", "step", "going", "ended", "newest")


@dataclass
class Places:
    """
    Rows of a batch, `N` of them, that each take their own steps.

    Args:
        row (`torch.Tensor` of shape `[N]`, `torch.long`): Which of the call's.
        keys, token_budget, parallel_samples (`torch.Tensor` of shape `[N]`, `torch.long`): As [`~rollout.Rows`] has.
        step (`torch.Tensor` of shape `[N]`, `torch.long`): Tokens written.
        going, ended (`torch.Tensor` of shape `[N]`, `torch.bool`): Whether it goes on, and whether it ended by itself.
        newest (`torch.Tensor` of shape `[N]`, `torch.long`): The latest token.
        written (`dict`): By name, what is kept of every token, `[N, longest + 1]`, with -1 (NaN) after a row's end.
        held ([`SamplingParameters`], *optional*): Of policies that decide once.
    """

    row: torch.Tensor
    keys: torch.Tensor
    token_budget: torch.Tensor
    parallel_samples: torch.Tensor
    step: torch.Tensor
    going: torch.Tensor
    ended: torch.Tensor
    newest: torch.Tensor
    written: dict[str, torch.Tensor]
    held: SamplingParameters | None = None
    count: int = 0
    _uniforms: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def begin(cls, row: torch.Tensor, columns: dict[str, torch.Tensor], longest: int, kept: dict[str, float]) -> Places:
        """
        Rows at their first step.

        Args:
            row (`torch.Tensor` of shape `[N]`, `torch.long`): Which.
            columns (`dict`): `keys`, `token_budget` and `parallel_samples` of all rows of the call.
            longest (`int`): Their largest budget.
            kept (`dict`): What is kept of every token, and what stands after a row's end.
        """
        count, on = len(row), row.device
        # One more than any row writes, for what rows that stand still write.
        written = {name: torch.full((count, longest + 1), after, device=on) for name, after in kept.items()}
        going = torch.ones(count, dtype=torch.bool, device=on)
        own: dict[str, Any] = {name: column[row] for name, column in columns.items()}
        step = torch.zeros_like(row)
        return cls(row, **own, step=step, going=going, ended=~going, newest=step, written=written, count=count)

    @property
    def all_going(self) -> bool:
        """Whether nobody stands still."""
        return self.count == len(self.row)

    @property
    def names(self) -> torch.Tensor:
        """The call's numbers of the rows that go on, -1 for the others, `[N]`."""
        return self.row if self.all_going else torch.where(self.going, self.row, -1)

    def uniforms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random numbers of the step, `[N]`, `torch.float64`: for what the policy draws, and for the token."""
        if not self._uniforms:
            steps = self.step + torch.arange(_AHEAD, device=self.step.device)[:, None]
            both = [row_uniforms(self.keys, steps, stream).unbind() for stream in (FOR_ACTION, FOR_TOKEN)]
            self._uniforms = list(zip(*both, strict=True))[::-1]
        return self._uniforms.pop()

    def write(self, name: str, values: torch.Tensor, after: float) -> None:
        """Keeps `values` `[N]` of the step, of rows that go on."""
        column = self.written[name]
        values = values.to(column.device, column.dtype)
        if not self.all_going:
            values = values.masked_fill(~self.going, after)
        column.scatter_(1, self.step[:, None], values[:, None])

    def advance(self, tokens: torch.Tensor, ends: torch.Tensor) -> None:
        """The step is over: `tokens` `[N]` were its, and `ends` end a row."""
        self.write("tokens", tokens, -1)
        self.newest = tokens
        self.step = self.step + self.going
        finished = torch.isin(tokens, ends) & self.going
        self.ended = self.ended | finished
        self.going = self.going & ~finished & (self.step < self.token_budget)
        self.count = int(self.going.sum())

    def select(self, kept: torch.Tensor) -> Places:
        """Those of `kept` (indices)."""
        columns = {name: vars(self)[name][kept] for name in _COLUMNS}
        written = {name: column[kept] for name, column in self.written.items()}
        held = None if self.held is None else self.held.select(kept)
        return Places(**columns, written=written, held=held, count=int(columns["going"].sum()))

    def take(self, places: torch.Tensor, others: Places) -> None:
        """`others` take `places`."""
        for name in _COLUMNS:
            vars(self)[name][places] = vars(others)[name]
        for name, column in self.written.items():
            column[places] = others.written[name]
        if self.held is not None and others.held is not None:
            for mine, theirs in zip(vars(self.held).values(), vars(others.held).values(), strict=True):
                if is_per_row(mine):
                    mine[places.to(mine.device)] = theirs
        self.count = int(self.going.sum())
        self._uniforms = []
