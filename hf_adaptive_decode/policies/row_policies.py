"""Several policies in one batch, each for its own rows; knows what a policy knows, not adapters' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from ..types import DecodeState, SamplingParameters, is_per_row
from .base import DecodingPolicy

# What a parameter is in the rows of a policy that leaves it off.
_OFF: dict[str, float | int] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "action": -1}


class RowPolicies:
    """
    Asks for each row the policy that it was given. Made for one batch, whose decisions it remembers.

    Args:
        policies (sequence of [`DecodingPolicy`]): One a row, `N` of them, many of them the same object.
    """

    # Each policy that decides once is asked once, here.
    decides_once = False

    def __init__(self, policies: Sequence[DecodingPolicy]) -> None:
        members = {id(policy): policy for policy in policies}
        self._groups = [
            (policy, torch.tensor([row for row, own in enumerate(policies) if own is policy]))
            for policy in members.values()
        ]
        self._held: dict[int, SamplingParameters] = {}

    @property
    def has_actions(self) -> bool:
        """Whether any of them chooses among actions; the rows of the others have action -1."""
        return any(policy.has_actions for policy, _ in self._groups)

    @property
    def pools_prompt(self) -> bool:
        """Whether any of them reads the mean over the prompt."""
        return any(policy.pools_prompt for policy, _ in self._groups)

    def warn_beyond(self, tokens: int | None, samples: int | None) -> None:
        """Warns once if a budget is beyond what one of them was made for."""
        for policy, _ in self._groups:
            policy.warn_beyond(tokens, samples)

    def __call__(self, state: DecodeState) -> SamplingParameters:
        """Sampling parameters with fields of shape `[N]` for the `N` rows of `state`."""
        decided = []
        for number, (policy, rows) in enumerate(self._groups):
            rows = rows.to(state.hidden.device)
            if number in self._held:
                decided.append((rows, self._held[number]))
                continue
            parameters = policy(state.select(rows))
            if policy.decides_once:
                self._held[number] = parameters
            decided.append((rows, parameters))
        return _joined(decided, state.hidden.shape[0], state.hidden.device)


def _joined(
    decided: Sequence[tuple[torch.Tensor, SamplingParameters]], count: int, device: torch.device
) -> SamplingParameters:
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(SamplingParameters)):
        values = [(rows, value) for rows, some in decided if (value := vars(some)[name]) is not None]
        if not values:
            continue
        dtype = torch.long if name in ("top_k", "action") else torch.float32
        joined[name] = torch.full((count,), _OFF[name], dtype=dtype, device=device)
        for rows, value in values:
            joined[name][rows] = value.to(device, dtype) if is_per_row(value) else value
    return SamplingParameters(**joined)
