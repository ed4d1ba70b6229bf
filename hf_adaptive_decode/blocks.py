"""How many rows are worked on at once; knows sizes and devices, not what is done with the rows."""

from __future__ import annotations

import torch

# Elements: several buffers of so many stay in a processor's last-level cache, which makes the passes over a block
# several times cheaper than passes over memory.
HOST_BLOCK = 1 << 20
# Where a few buffers of a block are to fit into an accelerator's memory beside everything else.
LARGE_BLOCK = 1 << 26


def rows_at_once(rows: torch.Tensor, elsewhere: int | None = None, width: int = 1) -> int:
    """
    How many of `rows` `[N, V]` make a block, at least one.

    Args:
        rows (`torch.Tensor` of shape `[N, V]`): Only its shape and device matter.
        elsewhere (`int`, *optional*): Elements of a block on an accelerator, which prefers few long kernels; all by
            default.
        width (`int`, defaults to 1): Elements that a row takes, if they are more than V.
    """
    limit = HOST_BLOCK if rows.device.type == "cpu" else elsewhere
    return max(1, rows.shape[0] if limit is None else limit // max(rows.shape[1], width))
