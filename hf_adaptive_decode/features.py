"""What a policy may see of a decode state, as one vector a row; knows tensors, nothing of models or policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from .blocks import rows_at_once
from .nucleus import largest
from .types import DecodeState

FEATURES = ("hidden", "entropy", "statistics")
STATISTICS = ("max_probability", "entropy", "variance", "top5_mass")
# AutoDeco's released heads were trained with it in both places, so it is part of their formula.
_SCALED_EPSILON = 1e-8
# exp(-200) is 0 in fp32; a scaled logit further down, or -inf, would turn 0 * inf into NaN.
_LOWEST_SCALED = -200.0


def logit_statistics(logits: torch.Tensor, maxima: torch.Tensor | None = None) -> torch.Tensor:
    """
    Max p, entropy −Σ p log p (nats), variance of p scaled by the vocabulary, and mass of the five most likely tokens.

    The variance of the probabilities shrinks like 1/V, so it is multiplied by the number of words: then a one-hot row
    gives (about) 1 and a flat one 0 at any vocabulary.

    Args:
        logits (`torch.Tensor` of shape `[..., V]`): Any float dtype; computed in fp32. -inf entries have p = 0.
        maxima (`torch.Tensor` of shape `[...]`, *optional*): The largest of each row, where it is known already.

    Returns:
        `torch.Tensor` of shape `[..., 4]`, `torch.float32`, in the order of `STATISTICS`.
    """
    logits = logits.float()
    rows = logits.reshape(-1, logits.shape[-1])
    peak = rows.amax(-1, keepdim=True) if maxima is None else maxima.float().reshape(-1, 1)
    parts = rows_at_once(rows)
    found = [_statistics(part, of_part) for part, of_part in zip(rows.split(parts), peak.split(parts), strict=True)]
    return torch.cat(found).reshape(*logits.shape[:-1], len(STATISTICS))


def _statistics(logits: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    vocabulary = logits.shape[-1]
    # Relative to the maximum, so that logits far from zero lose no digits; what is as far below it as this has p = 0.
    shifted = (logits - peak).clamp_(min=_LOWEST_SCALED)
    weights = shifted.exp()
    total = weights.sum(-1)
    # −Σ p log p = log Z − Σ p·l. No dot products: their last bit depends on how many rows there are.
    entropy = total.log() - (weights * shifted).sum(-1) / total
    variance = weights.square_().sum(-1) / total.square() - 1.0 / vocabulary
    top = largest(shifted, min(5, vocabulary)).exp().sum(-1) / total
    return torch.stack([1.0 / total, entropy.clamp(min=0.0), variance.clamp(min=0.0), top], dim=-1)


def scaled_statistics(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """
    `STATISTICS` of p = softmax(l / (T + 1e-8)): max p, −Σ p log(p + 1e-8), the unbiased variance of p, top-5 mass.

    They differ from [`logit_statistics`] in that they see the temperature, and in the variance, which is not scaled.

    Args:
        logits (`torch.Tensor` of shape `[..., V]`): Any float dtype; computed in fp32. No gradient reaches them.
        temperature (`torch.Tensor` of shape `[...]`): T; the statistics carry its gradient if it requires one.

    Returns:
        `torch.Tensor` of shape `[..., 4]`, `torch.float32`, on the device of `temperature`.
    """
    with torch.no_grad():
        scale = temperature.to(logits.device, torch.float32).unsqueeze(-1) + _SCALED_EPSILON
        scaled = (logits.float() - logits.amax(dim=-1, keepdim=True).float()).div_(scale).clamp_(min=_LOWEST_SCALED)
        p = scaled.softmax(dim=-1)
        log_p = (p + _SCALED_EPSILON).log_()
        top = p.topk(min(5, p.shape[-1]), dim=-1)
        entropy = -(p * log_p).sum(-1)
        values = torch.stack([top.values[..., 0], entropy, p.var(dim=-1), top.values.sum(-1)], dim=-1)
        values = values.to(temperature.device)
    if not (temperature.requires_grad and torch.is_grad_enabled()):
        return values
    with torch.no_grad():
        # dp/dT = −p (v − Σ p v) / T, by which each of the four follows; so no [..., V] tensor stays in the graph.
        d_p = p * (scaled - (p * scaled).sum(-1, keepdim=True)) / -scale
        d_entropy = -(d_p * (log_p + p / (p + _SCALED_EPSILON))).sum(-1)
        d_variance = 2 * (p * d_p).sum(-1) / (p.shape[-1] - 1)
        d_top = d_p.gather(-1, top.indices)
        slopes = torch.stack([d_top[..., 0], d_entropy, d_variance, d_top.sum(-1)], dim=-1).to(temperature.device)
    return values + slopes * (temperature - temperature.detach()).unsqueeze(-1)


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
            parts["statistics"] = logit_statistics(cast(torch.Tensor, state.logits), state.maxima).to(
                state.hidden.device
            )
            parts["entropy"] = parts["statistics"][..., 1:2]
    return torch.cat([parts[name] for name in features], dim=-1)
