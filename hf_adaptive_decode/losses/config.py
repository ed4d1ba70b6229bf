"""The options of the supervised decoding loss, checked once; it knows no tensor shape, no model and no trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass

IGNORE_INDEX = -100

LOSS_TYPE_NAMES = ("end_to_end", "two_loss")
DFT_WEIGHTS = ("off", "base", "scaled")
EASY_TOKEN_MASK_TARGETS = ("both", "temperature")

# eps of eq. 3. Z falls to exp(-alpha (1 - P)), 1e-13 at worst, where one token holds all mass and P is near 0. An eps
# of that size would report a loss of 10 for a prediction that is certain and right; eps only has to prevent 0 / 0.
EPSILON = 1e-20


@dataclass(frozen=True)
class DecodingLossConfig:
    r"""
    What the loss of one position is, and which positions count.

    Args:
        loss_type (`str`, *optional*, defaults to `"end_to_end"`):
            `"end_to_end"`: cross entropy of the soft top-p distribution (eq. 3), whose gradient reaches both heads.
            `"two_loss"`: that plus the cross entropy of `softmax(l / T)`. A policy with only one of the two
            parameters has only one loss to take, so both names then mean the same.
        alpha (`float`, *optional*, defaults to 30.0):
            Steepness of the soft mask `exp(-alpha * relu(c - P))` (eq. 2).
        dft_weight (`str`, *optional*, defaults to `"base"`):
            Dynamic Fine-Tuning: a position's whole loss is multiplied by the target's probability, held constant,
            under the base model (`"base"`, T = 1), under the predicted temperature (`"scaled"`), or not (`"off"`).
        easy_token_mask_ratio (`float`, *optional*, defaults to 0.6):
            Fraction of the positions whose target already is the base model's argmax that is dropped.
        easy_token_mask_target (`str`, *optional*, defaults to `"both"`):
            `"both"` drops such a position altogether. `"temperature"` spares top-p: with `"two_loss"` only the
            temperature's loss is dropped, with `"end_to_end"` only the gradient to the temperature.
        detach_temperature (`bool`, *optional*, defaults to `False`):
            With `"two_loss"`, keep the soft top-p loss from moving the temperature.
    """

    loss_type: str = "end_to_end"
    alpha: float = 30.0
    dft_weight: str = "base"
    easy_token_mask_ratio: float = 0.6
    easy_token_mask_target: str = "both"  # noqa: S105
    detach_temperature: bool = False

    def __post_init__(self) -> None:
        _check_choice("loss_type", self.loss_type, LOSS_TYPE_NAMES)
        _check_choice("dft_weight", self.dft_weight, DFT_WEIGHTS)
        _check_choice("easy_token_mask_target", self.easy_token_mask_target, EASY_TOKEN_MASK_TARGETS)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a finite number above 0 (the paper uses 30.0). Got {self.alpha!r}.")
        if not 0.0 <= self.easy_token_mask_ratio <= 1.0:
            raise ValueError(
                "easy_token_mask_ratio is the fraction of easy positions to drop and must lie in [0, 1] "
                f"(0 drops none). Got {self.easy_token_mask_ratio!r}."
            )
        if self.detach_temperature and self.loss_type == "end_to_end":
            raise ValueError(
                "detach_temperature=True with loss_type='end_to_end' would leave the temperature without any gradient; "
                "use loss_type='two_loss', or detach_temperature=False."
            )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}. Got {value!r}.")
