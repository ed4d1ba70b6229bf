"""Random numbers that belong to a row and a step rather than to a generator's state; it knows integers alone."""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

import torch

# Odd 64-bit multipliers of the splitmix64 generator, as the signed integers that torch stores.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def mix(values: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser: a bijection on 64-bit integers whose output bits each depend on every input bit."""
    values = (values ^ shift_right(values, 30)) * MIX_1
    values = (values ^ shift_right(values, 27)) * _MIX_2
    return values ^ shift_right(values, 31)


def shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift that fills with zeros."""
    # torch has no unsigned 64-bit shift: shift the sign in, then clear it.
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def row_key(*parts: str | SupportsIndex) -> int:
    """
    A 63-bit key for a row, the same in every process: a hash of what names the row (a seed, a prompt, a sample).

    Example:

    ```python
    >>> row_key(0, "prompt", 3) == row_key(0, "prompt", 3)
    True
    ```
    """
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in parts)  # numpy's integers, too
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def row_uniforms(keys: torch.Tensor, step: int | torch.Tensor, stream: int) -> torch.Tensor:
    """
    One number of [0, 1) for each row: a hash of its key, the step and the stream.

    Unlike numbers drawn from a generator, a row's do not depend on which other rows are in the batch, so dropping rows,
    batching otherwise, or spreading a batch over processes leaves every row's draws as they were.

    Args:
        keys (`torch.Tensor` of shape `[N]`, `torch.long`): Keys of the rows, from [`row_key`].
        step (`int`, or `torch.Tensor` of shape `[N]` or `[..., N]`, `torch.long`): Which token of the row.
        stream (`int`): Which of several numbers of the same step.

    Returns:
        `torch.Tensor` of shape `[N]`, or of `step`'s, `torch.float64`, multiples of `2**-53`.
    """
    counter = (torch.as_tensor(step, dtype=torch.long, device=keys.device) * 16 + (stream + 1)) * GOLDEN
    bits = mix(mix(keys * GOLDEN) + counter)
    return shift_right(bits, 11).to(torch.float64) * 2.0**-53
