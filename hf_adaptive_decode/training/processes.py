"""What the processes of a training tell each other: sums over all of them, and which rows are whose; knows accelerate,
no model, no loss and no reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def total(accelerator: Accelerator, *numbers: float) -> list[float]:
    """Each number, summed over all processes."""
    if accelerator.num_processes == 1:
        return list(numbers)
    own = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    found: list[float] = accelerator.reduce(own, "sum").tolist()
    return found


def summed(accelerator: Accelerator, own: Mapping[str, Any]) -> dict[str, Any]:
    """
    Numbers by name, or arrays of them, summed over all processes.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Its processes have to call this together.
        own (mapping of `str` to `float` or sequence of `float`): This process's; what a process lacks counts as 0.
    """
    parts = gather_object([dict(own)]) if accelerator.num_processes > 1 else [dict(own)]
    names = sorted({name for part in parts for name in part})
    return {name: np.sum([part[name] for part in parts if name in part], axis=0) for name in names}


def count_own(accelerator: Accelerator, rows: int) -> int:
    """
    How many of the `rows` of the batch that was drawn last are there for the first time.

    The last batches of several processes are filled up with rows that were there before, so that each process has as
    many batches as the others. What is learned, and what is measured, leaves those out.
    """
    drawn = accelerator.gradient_state
    if accelerator.num_processes == 1 or not drawn.end_of_dataloader or drawn.remainder <= 0:
        return rows
    before: int = accelerator.process_index * rows
    return min(rows, max(0, int(drawn.remainder) - before))
