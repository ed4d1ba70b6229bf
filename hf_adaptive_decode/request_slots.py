"""Places for requests that are under way, and what was decided for each of them; knows no host and no policy."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from .errors import UnsupportedGenerationError
from .types import SamplingParameters, is_per_row

# Requests that may be under way at once; what a policy decided for each of them is kept in tables of this size.
MAX_REQUESTS = 1 << 16


class Slots:
    """Places in tables by request; a request's is free again when nothing holds its [`Slot`] any more."""

    def __init__(self) -> None:
        # The first is for rows that belong to no request.
        self._free = list(range(MAX_REQUESTS - 1, 0, -1))

    def take(self, owner: Any) -> Slot:
        """
        A free place.

        Raises:
            [`UnsupportedGenerationError`]: If more requests are under way than there are places.
        """
        if not self._free:
            raise UnsupportedGenerationError(f"more than {MAX_REQUESTS} requests are under way; wait for some to end.")
        return Slot(self._free, owner)


class Slot:
    """The place of one request: `index` is its row in the tables, `owner` tells whose it is."""

    def __init__(self, free: list[int], owner: Any) -> None:
        self.owner, self.index, self.is_fresh = owner, free.pop(), True
        self._free = free

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return self

    def __del__(self) -> None:
        self._free.append(self.index)


class HeldDecisions:
    """
    What was decided at the first step of each request, for policies that decide once.

    Args:
        places (`int`): How many requests there may be.
    """

    def __init__(self, places: int = MAX_REQUESTS) -> None:
        self._places = places
        self._tables: dict[str, torch.Tensor] = {}

    def keep(self, parameters: SamplingParameters, slots: torch.Tensor, fresh: torch.Tensor) -> SamplingParameters:
        """
        The parameters of each request's first step, which this may be. Nothing waits for an accelerator.

        Args:
            parameters ([`SamplingParameters`]): What the policy says now, fields of shape `[N]` or scalars.
            slots (`torch.Tensor` of shape `[N]`, `torch.long`): Places of the rows.
            fresh (`torch.Tensor` of shape `[N]`, `torch.bool`): Rows for which this is what counts from now on.
        """
        kept = {}
        for name in (field.name for field in fields(SamplingParameters)):
            value = vars(parameters)[name]
            if not is_per_row(value):
                continue
            table = self._tables.get(name)
            if table is None:
                table = self._tables[name] = value.new_zeros(self._places)
            kept[name] = torch.where(fresh, value, table[slots])
            table[slots] = kept[name]
        return replace(parameters, **kept)
