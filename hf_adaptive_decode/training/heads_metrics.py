"""What is logged of the training of heads: sums over batches and over processes; knows losses' outputs, no model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..losses import DecodingLossOutput
from .control import ControlOutput
from .processes import summed

_SUMS = ("temperature", "temperature_square", "top_p", "top_p_square", "temperature_loss", "top_p_loss")


class HeadsMetrics:
    """
    Sums since the last log, of training and of evaluation apart.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Its processes' sums are added up.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, dict[str, Any]] = {mode: defaultdict(float) for mode in ("train", "eval")}

    def add(self, output: DecodingLossOutput, mode: str) -> None:
        """Counts a batch."""
        sums = self._sums[mode]
        sums["kept"] += output.n_kept
        sums["valid"] += output.n_valid
        for name in _SUMS:
            sums[name] = sums[name] + vars(output)[f"{name}_sum"]

    def add_control(self, output: ControlOutput, mode: str) -> None:
        """Counts the pairs of a batch with commands."""
        sums = self._sums[mode]
        sums["pairs"] += output.ranking.n_pairs
        sums["control_loss"] = sums["control_loss"] + output.ranking.loss_sum.double()
        for version, means in output.means.items():
            sums[f"rows_{version}"] += int(means.present.sum())
            for name in ("temperature", "top_p"):
                mean = vars(means)[name]
                if mean is not None:
                    sums[f"control_{name}_{version}"] = sums[f"control_{name}_{version}"] + mean.detach().double().sum()

    def drain(self, mode: str, heads: Sequence[str], prefix: str = "") -> dict[str, float]:
        """Means since the last time, over all processes, which have to ask together; of T and P where `heads` say."""
        own, self._sums[mode] = self._sums[mode], defaultdict(float)
        sums = defaultdict(float, summed(self._accelerator, {name: _number(value) for name, value in own.items()}))
        found: dict[str, float] = {}
        kept = float(sums["kept"])
        if kept:
            for name in heads:
                mean = sums[name] / kept
                found[f"{name}_mean"] = mean
                found[f"{name}_std"] = max(sums[f"{name}_square"] / kept - mean**2, 0.0) ** 0.5
            for name in ("temperature_loss", "top_p_loss"):
                found[name] = sums[name] / kept
            found["kept_fraction"] = kept / sums["valid"]
        if sums["pairs"]:
            found["control_loss"] = sums["control_loss"] / sums["pairs"]
            for name in [name for name in sums if name.startswith(("control_temperature_", "control_top_p_"))]:
                found[name] = sums[name] / max(sums[f"rows_{name.rpartition('_')[2]}"], 1)
        return {prefix + name: float(value) for name, value in found.items()}


def _number(value: torch.Tensor | float) -> float:
    return value.item() if isinstance(value, torch.Tensor) else value
