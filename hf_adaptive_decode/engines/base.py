"""What every engine returns; knows no engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Completion:
    """
    One completion of one prompt.

    Args:
        text (`str`): Decoded without special tokens.
        token_ids (`tuple` of `int`): New tokens, the end-of-sequence token included if it came.
        ended (`bool`): Whether it ended by itself rather than by its token budget.
        temperature (`np.ndarray` of shape `[len(token_ids)]`, `float32`, *optional*):
            What each token was sampled with.
        top_p (`np.ndarray` of shape `[len(token_ids)]`, `float32`, *optional*): The same.
        action (`np.ndarray` of shape `[len(token_ids)]`, `int64`, *optional*):
            Which of its actions a policy took, -1 where it left the decision; `None` for policies without actions.
    """

    text: str
    token_ids: tuple[int, ...]
    ended: bool
    temperature: np.ndarray | None = None
    top_p: np.ndarray | None = None
    action: np.ndarray | None = None
