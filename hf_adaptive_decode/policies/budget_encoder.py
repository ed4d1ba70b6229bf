"""Budgets as a learned vector (Adaptive Decoding, section 3.1); knows budgets, nothing of hidden states or actions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import BudgetError
from ..types import Observation

WIDTH = 32
# The encoding stands beside hundreds of components of the hidden state and has to be heard among them.
_SCALE = 3.0
_TOKEN_STEPS = 24


class BudgetEncoder(nn.Module):
    """
    3 · LayerNorm(MLP(thermometer code)) for each budget, side by side; the MLP has two layers.

    A thermometer code has one component a threshold, which rises from -1 to 1 as the budget passes from the threshold
    below to this one: budgets between those trained on interpolate. Thresholds stand closer together at small budgets,
    where a token more or less matters; beyond the largest the code is constant.

    Args:
        names (sequence of `str`): Which budgets to encode: `"tokens"` (the remaining b_t), `"samples"` (B), or both.
        max_tokens (`int`): Largest remaining token budget that is told apart.
        max_samples (`int`): Largest parallel budget that is told apart.
    """

    def __init__(self, names: Sequence[str], max_tokens: int, max_samples: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.largest = {"tokens": max_tokens, "samples": max_samples}
        scales = {
            "tokens": sorted({round(max_tokens ** (i / (_TOKEN_STEPS - 1))) for i in range(_TOKEN_STEPS)}),
            "samples": sorted({min(2**i, max_samples) for i in range(max_samples.bit_length() + 1)}),
        }
        self.up, self.out = nn.ModuleDict(), nn.ModuleDict()
        for name in self.names:
            thresholds = torch.tensor(scales[name], dtype=torch.float32)
            self.register_buffer(f"{name}_thresholds", thresholds, persistent=False)
            up, out = (nn.Linear(width, WIDTH, dtype=torch.float32) for width in (len(thresholds), WIDTH))
            # What all budgets have in common would drown what tells them apart once the norm is fixed.
            nn.init.zeros_(up.bias)
            nn.init.zeros_(out.bias)
            self.up[name], self.out[name] = up, out
        self._warned = False

    @property
    def width(self) -> int:
        """Width of the encoding."""
        return WIDTH * len(self.names)

    def forward(self, state: Observation) -> torch.Tensor:
        """
        Encoding `[N, width]`, `torch.float32`, of the observed budgets.

        Raises:
            [`BudgetError`]: If a budget is missing that the policy was made to know.
        """
        budgets = {"tokens": state.remaining_tokens, "samples": state.parallel_samples}
        parts = []
        for name in self.names:
            budget = budgets[name]
            if budget is None:
                raise BudgetError(
                    f"this policy was trained to know the budget of {name}, and none was given: pass `budget=`."
                )
            code = 2 * thermometer(budget, self.get_buffer(f"{name}_thresholds")) - 1
            up, out = cast(nn.Linear, self.up[name]), cast(nn.Linear, self.out[name])
            x = F.silu(F.linear(code, up.weight.float(), up.bias.float()))
            parts.append(_SCALE * F.layer_norm(F.linear(x, out.weight.float(), out.bias.float()), (WIDTH,)))
        return torch.cat(parts, dim=-1)

    def warn_beyond(self, tokens: int | None, samples: int | None) -> None:
        """Warns once if a budget is beyond what the policy tells apart."""
        for name, value in (("tokens", tokens), ("samples", samples)):
            if name in self.names and value is not None and value > self.largest[name] and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the budget of {value} {name} is beyond the policy's largest, {self.largest[name]}; it is treated "
                    "as that.",
                    stacklevel=4,
                )


def thermometer(budget: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """
    Piecewise linear code: component i is clip((b − θ_{i−1}) / (θ_i − θ_{i−1}), 0, 1), with θ_{−1} = 0.

    Args:
        budget (`torch.Tensor` of shape `[N]`): Budgets.
        thresholds (`torch.Tensor` of shape `[K]`): Ascending, above 0.

    Returns:
        `torch.Tensor` of shape `[N, K]`, `torch.float32`.
    """
    below = F.pad(thresholds, (1, 0))[:-1]
    return ((budget[:, None].float() - below) / (thresholds - below)).clamp(0.0, 1.0)
