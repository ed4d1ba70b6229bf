"""Looks for what is not finite in a step of decoding and says where; knows tensors, no policies or hosts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from .errors import LogitsError
from .nucleus import HOST, row_maxima
from .types import SamplingParameters

Step = int | torch.Tensor


def check_scores(scores: torch.Tensor, step: Step, rows: torch.Tensor | None = None) -> torch.Tensor:
    """
    The largest score `[N]` of each row of `[N, V]`, once it is known to be finite.

    Args:
        scores (`torch.Tensor` of shape `[N, V]`): What a model gave.
        step (`int`, or `torch.Tensor` of shape `[N]`): Which step this is, of all rows or of each.
        rows (`torch.Tensor` of shape `[N]`, *optional*): What the rows are called, -1 for those that do not matter.

    Raises:
        [`LogitsError`]: If a row holds NaN or +inf, or nothing above -inf; names the step and the row.
    """
    # NaN and +inf show in the maximum, and so does a row with nothing left.
    maxima = row_maxima(scores)
    _raise_for_scores(maxima, step, rows)
    return maxima


def check_parameters(parameters: SamplingParameters, step: Step, rows: torch.Tensor | None = None) -> None:
    """Raises [`LogitsError`] with the step and the row if a policy gave a temperature or top-p that is not finite."""
    for name, values in _per_row(parameters):
        _raise_for_parameter(name, values, step, rows)


class StepChecks:
    """
    [`check_scores`] and [`check_parameters`] for each step of a call, without making a GPU's host wait.

    On a processor they are made at once. What a GPU computed is copied to the host while it goes on, and looked at when
    the next step begins, or by [`~finish`]; until then [`~make_harmless`] keeps a broken row from ending the process.

    Args:
        defers (`bool`, *optional*): Whether to put checks off; by default on CUDA alone.
    """

    def __init__(self, defers: bool | None = None) -> None:
        self._defers = defers
        self._pending: list[_Copied] = []

    def scores(self, scores: torch.Tensor, step: int) -> torch.Tensor:
        """As [`check_scores`]."""
        self.finish()
        maxima = row_maxima(scores)
        self._look(maxima, partial(_raise_for_scores, step=step, rows=None))
        return maxima

    def parameters(self, parameters: SamplingParameters, step: int) -> None:
        """As [`check_parameters`]."""
        for name, values in _per_row(parameters):
            self._look(values, partial(_raise_for_parameter, name, step=step, rows=None))

    def make_harmless(self, warped: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
        """`warped` `[N, V]` with 0 in its broken rows: to sample from NaN would end a CUDA process, and say nothing."""
        if self._put_off(maxima):
            warped = warped.masked_fill_(~torch.isfinite(maxima)[:, None], 0.0)
        return warped

    def finish(self) -> None:
        """Makes the checks that were put off."""
        pending, self._pending = self._pending, []
        for copied in pending:
            copied.check()

    def _put_off(self, values: torch.Tensor) -> bool:
        return values.is_cuda if self._defers is None else self._defers

    def _look(self, values: torch.Tensor, check: Callable[[torch.Tensor], None]) -> None:
        if self._put_off(values):
            self._pending.append(_Copied.of(values, check))
        else:
            check(values)


@dataclass(frozen=True)
class _Copied:
    values: torch.Tensor
    check_values: Callable[[torch.Tensor], None]
    is_there: Any  # torch.cuda.Event, or None

    @classmethod
    def of(cls, values: torch.Tensor, check: Callable[[torch.Tensor], None]) -> _Copied:
        if not values.is_cuda:
            return cls(values.clone(), check, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        is_there = torch.cuda.Event()
        is_there.record()
        return cls(host, check, is_there)

    def check(self) -> None:
        if self.is_there is not None:
            self.is_there.synchronize()
        self.check_values(self.values)


def _per_row(parameters: SamplingParameters) -> list[tuple[str, torch.Tensor]]:
    named = [(name, vars(parameters)[name]) for name in ("temperature", "top_p")]
    return [(name, values) for name, values in named if isinstance(values, torch.Tensor)]


def _raise_for_scores(maxima: torch.Tensor, step: Step, rows: torch.Tensor | None) -> None:
    row = _first_bad(maxima, rows)
    if row is None:
        return
    value = maxima[row].item()
    found = "NaN" if math.isnan(value) else "+inf" if value > 0 else "no token above -inf"
    raise LogitsError(
        f"{_place(row, step, rows)}: the model's scores hold {found}. Check the model's dtype and weights, "
        "and that its constraints leave at least one token."
    )


def _raise_for_parameter(name: str, values: torch.Tensor, step: Step, rows: torch.Tensor | None) -> None:
    row = _first_bad(values, rows)
    if row is not None:
        raise LogitsError(
            f"{_place(row, step, rows)}: the policy gave {values[row].item()} as {name}. Its weights, or the "
            "hidden states of this base model, are out of range; load the adapter on the base it was trained on."
        )


def _place(row: int, step: Step, rows: torch.Tensor | None) -> str:
    at = int(step[row]) if isinstance(step, torch.Tensor) else step
    return f"step {at}, row {row if rows is None else int(rows[row])}"


def _first_bad(values: torch.Tensor, rows: torch.Tensor | None) -> int | None:
    """The first place of `values` `[N]` that is not finite, of those whose number in `rows` `[N]` is not -1."""
    if values.device.type == HOST and bool(np.isfinite(values.detach().float().numpy()).all()):
        return None  # as it nearly always is; numpy says so sooner
    bad = ~torch.isfinite(values)
    if rows is not None:
        bad &= (rows >= 0).to(bad.device)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None
