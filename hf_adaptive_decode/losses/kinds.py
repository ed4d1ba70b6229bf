"""The loss of one position by name, from what is known of its row; it knows no chunk, no policy and no weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .config import DecodingLossConfig
from .rows import RowDerivatives


@dataclass(frozen=True)
class PositionLoss:
    """A chunk's losses and their derivatives, each float32 `[C]`."""

    value: torch.Tensor
    d_temperature: torch.Tensor
    d_top_p: torch.Tensor


def _end_to_end(rows: RowDerivatives, moves_temperature: torch.Tensor, _config: DecodingLossConfig) -> PositionLoss:
    """`-log p~_y`, whose gradient to T is dropped where `moves_temperature` is False."""
    return PositionLoss(rows.loss, rows.d_temperature.where(moves_temperature, 0.0), rows.d_top_p)


def _two_loss(rows: RowDerivatives, moves_temperature: torch.Tensor, config: DecodingLossConfig) -> PositionLoss:
    """`-log softmax(l / T)_y - log p~_y`; the first term is dropped where `moves_temperature` is False."""
    value = (-rows.scaled_log_prob).where(moves_temperature, 0.0) + rows.loss
    d_temperature = rows.scaled_d_temperature.where(moves_temperature, 0.0)
    if not config.detach_temperature:
        d_temperature = d_temperature + rows.d_temperature
    return PositionLoss(value, d_temperature, rows.d_top_p)


LOSS_TYPES: dict[str, Callable[[RowDerivatives, torch.Tensor, DecodingLossConfig], PositionLoss]] = {
    "end_to_end": _end_to_end,
    "two_loss": _two_loss,
}


def loss_type_of(temperature: torch.Tensor | None, top_p: torch.Tensor | None, config: DecodingLossConfig) -> str:
    """A policy with only one of the two parameters has only one loss to take."""
    return "end_to_end" if temperature is None or top_p is None else config.loss_type
