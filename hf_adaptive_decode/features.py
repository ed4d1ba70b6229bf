"""What a policy may see of a decode state, as one vector a row; knows tensors, nothing of models or policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from .types import DecodeState

FEATURES = ("hidden", "entropy", "statistics")
STATISTICS = ("max_probability", "entropy", "variance", "top5_mass")


def logit_statistics(logits: torch.Tensor) -> torch.Tensor:
    """
    Max p, entropy −Σ p log p (nats), variance of p scaled by the vocabulary, and mass of the five most likely tokens.

    The variance of the probabilities shrinks like 1/V, so it is multiplied by the number of words: then a one-hot row
    gives (about) 1 and a flat one 0 at any vocabulary.

    Args:
        logits (`torch.Tensor` of shape `[..., V]`): Any float dtype; computed in fp32. -inf entries have p = 0.

    Returns:
        `torch.Tensor` of shape `[..., 4]`, `torch.float32`, in the order of `STATISTICS`.
    """
    logits = logits.float()
    vocabulary = logits.shape[-1]
    # Relative to the maximum, so that logits far from zero lose no digits.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    log_z = torch.logsumexp(shifted, dim=-1, keepdim=True)
    p = torch.exp(shifted - log_z)
    # −Σ p log p = log Z − Σ p·l; where p is 0 the product must be, too, even for l = -inf.
    entropy = log_z.squeeze(-1) - (p * shifted.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    variance = (p * p).sum(-1) - 1.0 / vocabulary
    top = p.topk(min(5, vocabulary), dim=-1).values
    return torch.stack([top[..., 0], entropy.clamp(min=0.0), variance.clamp(min=0.0), top.sum(-1)], dim=-1)


def context_width(features: Sequence[str], hidden_size: int) -> int:
    """Width of what [`context`] gives."""
    widths = {"hidden": hidden_size, "entropy": 1, "statistics": len(STATISTICS)}
    return sum(widths[name] for name in features)


def reads_logits(features: Sequence[str]) -> bool:
    """Whether any of the features is computed from logits."""
    return any(name != "hidden" for name in features)


def context(state: DecodeState, features: Sequence[str]) -> torch.Tensor:
    """
    The features of each row, side by side.

    Args:
        state ([`DecodeState`]): With `logits` if a feature needs them; no gradient reaches them.
        features (sequence of `str`): Names among `FEATURES`; `"entropy"` is the second of the statistics alone.

    Returns:
        `torch.Tensor` of shape `[N, context_width]`, `torch.float32`.
    """
    parts: dict[str, torch.Tensor] = {"hidden": state.hidden.float()}
    if reads_logits(features):
        with torch.no_grad():
            parts["statistics"] = logit_statistics(cast(torch.Tensor, state.logits))
            parts["entropy"] = parts["statistics"][..., 1:2]
    return torch.cat([parts[name] for name in features], dim=-1)
