"""Temperature and top-p heads (AutoDeco, section 2.2); knows hidden states and nothing of hosts or losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from ..configuration import AutoDecoConfig
from ..features import STATISTICS, context, context_width, reads_logits, scaled_statistics
from ..types import DecodeState, SamplingParameters
from .base import DecodingPolicy

# σ(4) ≈ 0.98: a fresh top-p head cuts off almost nothing, and its sigmoid is not yet too flat to learn.
_INITIAL_TOP_P_LOGIT = 4.0
_INITIAL_OUTPUT_STD = 1e-3


class Head(nn.Module):
    """
    A 2-layer MLP with one output: Linear, ReLU, Linear.

    Args:
        inputs (`int`): Width of the input.
        hidden (`int`): Width of the hidden layer.
        bias (`float`): Output of the untrained head.
    """

    def __init__(self, inputs: int, hidden: int, bias: float) -> None:
        super().__init__()
        self.up = nn.Linear(inputs, hidden, dtype=torch.float32)
        self.out = nn.Linear(hidden, 1, dtype=torch.float32)
        nn.init.normal_(self.out.weight, std=_INITIAL_OUTPUT_STD)
        nn.init.constant_(self.out.bias, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[N, inputs]` → `[N]`, in fp32 even when a host has cast the weights."""
        up = F.relu(F.linear(x, self.up.weight.float(), self.up.bias.float()))
        return F.linear(up, self.out.weight.float(), self.out.bias.float()).squeeze(-1)


class HeadsPolicy(DecodingPolicy):
    """
    T = low + (high − low)·σ(temperature head of h), P = the same of the top-p head of [h, T] (equation 4).

    With the default ranges T is in (0, 2) and P in (0, 1). A fresh policy is close to plain sampling: T = 1 and
    P = 0.98 up to its small random output weights. With `top_p_statistics` the top-p head reads [h, T, s], where s are
    the [`scaled_statistics`] at that T.
    """

    def __init__(self, config: AutoDecoConfig) -> None:
        super().__init__(config)
        width = context_width(config.features, int(config.hidden_size or 0))
        has_temperature = "temperature" in config.heads
        self.temperature_head = Head(width, config.head_hidden_size, 0.0) if has_temperature else None
        # The top-p head has a place for the temperature even where no temperature head fills it: it then reads 1.
        width += 1 + (len(STATISTICS) if config.top_p_statistics else 0)
        hidden = config.top_p_head_hidden_size or config.head_hidden_size
        self.top_p_head = Head(width, hidden, _INITIAL_TOP_P_LOGIT) if "top_p" in config.heads else None

    @property
    def needs_logits(self) -> bool:
        """The heads read the logits only for their statistics."""
        return reads_logits(self.config.features) or bool(self.config.top_p_statistics)

    def forward(self, state: DecodeState) -> SamplingParameters:
        """`temperature` and `top_p` of shape `[N]`, `torch.float32`; `None` for a head that is not there."""
        device = state.hidden.device.type
        # Where it is off already, to switch it off takes a tenth of all that the heads take.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            x = context(state, self.config.features)
            temperature = None
            if self.temperature_head is not None:
                temperature = _stretch(self.temperature_head(x), self.config.temperature_range)
            top_p = None
            if self.top_p_head is not None:
                seen = torch.ones_like(x[:, 0]) if temperature is None else temperature
                seen = seen.detach() if self.config.detach_temperature else seen
                parts = [x, seen[:, None]]
                if self.config.top_p_statistics:
                    parts.append(scaled_statistics(cast(torch.Tensor, state.logits), seen))
                top_p = _stretch(self.top_p_head(torch.cat(parts, dim=-1)), self.config.top_p_range)
        return SamplingParameters(temperature=temperature, top_p=top_p)


def _stretch(logit: torch.Tensor, interval: Sequence[float]) -> torch.Tensor:
    low, high = interval
    # The last bit of a float may lie beyond the range.
    return (low + (high - low) * torch.sigmoid(logit)).clamp(low, high)
