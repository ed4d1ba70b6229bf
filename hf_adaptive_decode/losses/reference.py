"""The decoding loss as the equations read, by autograd over whole rows; it knows no chunks and saves no memory."""

from __future__ import annotations

import torch

from .config import EPSILON, IGNORE_INDEX, DecodingLossConfig


def _as_rows(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A scalar or `[...]` parameter as `[..., 1]` in the dtype of `like`, so that it broadcasts over the vocabulary."""
    return torch.as_tensor(value, device=like.device).to(like.dtype).unsqueeze(-1)


def _scaled_log_probs(logits: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """`log softmax(l / T)` (eq. 1) in float32 (float64 for float64 logits), `[..., V]`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    temperature = _as_rows(temperature, logits)
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be above 0. Got a minimum of {float(temperature.min())}.")
    maximum = logits.detach().amax(dim=-1, keepdim=True)
    if not bool(torch.isfinite(maximum).all()):
        row = (~torch.isfinite(maximum.reshape(-1))).nonzero()[0].item()
        raise ValueError(f"logits of row {row} are NaN, +inf or all -inf: there is no distribution to take.")
    masked = torch.isneginf(logits)
    # -inf / T would send 0 * inf = NaN back to T. A masked token has to leave the graph before the division.
    scaled = (logits - maximum).masked_fill(masked, 0.0) / temperature
    return torch.log_softmax(scaled.masked_fill(masked, -torch.inf), dim=-1)


def _log_soft_mask(probs: torch.Tensor, top_p: torch.Tensor | float, alpha: float) -> torch.Tensor:
    """`log m = -alpha * relu(c - P)` (eq. 2) in vocabulary order, `[..., V]`."""
    ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    # A cumulative sum may end a rounding error above 1; P = 1 must still mean "no mask".
    cumulative = ranked.cumsum(dim=-1).clamp(max=1.0)
    ranked_log_mask = -alpha * torch.relu(cumulative - _as_rows(top_p, probs))
    return torch.zeros_like(ranked_log_mask).scatter(-1, order, ranked_log_mask)


def soft_top_p_probs(
    logits: torch.Tensor,
    temperature: torch.Tensor | float,
    top_p: torch.Tensor | float,
    alpha: float = 30.0,
) -> torch.Tensor:
    r"""
    `p~ = p * m / (sum(p * m) + eps)` with `p = softmax(l / T)` and `m = exp(-alpha * relu(c - P))` (eqs. 1 to 3).

    `c` is the inclusive cumulative sum of `p` in descending order; ties are ranked by lower token id.

    Args:
        logits (`torch.Tensor` of shape `[..., V]`, any floating dtype): Computed in float32, or float64 if given so.
        temperature (`torch.Tensor` of shape `[...]` or `float`): T, above 0.
        top_p (`torch.Tensor` of shape `[...]` or `float`): P. At 1 and above the mask is exactly 1.
        alpha (`float`, *optional*, defaults to 30.0): Steepness of the mask.

    Returns:
        `torch.Tensor` of shape `[..., V]`, float32 or float64, differentiable in `logits`, `temperature` and `top_p`.
        A logit of -inf has probability 0 and no gradient.

    Example:

    ```python
    >>> import torch
    >>> probs = soft_top_p_probs(torch.tensor([2.0, 1.0, 0.0]), temperature=1.0, top_p=0.7)
    >>> [round(value, 4) for value in probs.tolist()]
    [0.9993, 0.0007, 0.0]

    ```
    """
    probs = _scaled_log_probs(logits, temperature).exp()
    weighted = probs * _log_soft_mask(probs, top_p, alpha).exp()
    return weighted / (weighted.sum(dim=-1, keepdim=True) + EPSILON)


def _soft_top_p_nll(
    logits: torch.Tensor, temperature: torch.Tensor | float, top_p: torch.Tensor, targets: torch.Tensor, alpha: float
) -> torch.Tensor:
    """`-log p~_y` `[N]`, through logarithms: a probability that underflows still has a finite loss."""
    log_probs = _scaled_log_probs(logits, temperature)
    probs = log_probs.exp()
    log_mask = _log_soft_mask(probs, top_p, alpha)
    normaliser = (probs * log_mask.exp()).sum(dim=-1) + EPSILON
    index = targets.unsqueeze(-1)
    return -(log_probs.gather(-1, index) + log_mask.gather(-1, index)).squeeze(-1) + normaliser.log()


def decoding_loss_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    config: DecodingLossConfig | None = None,
    *,
    mask_uniform: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    `sum_i w_i L_i / num_items`, the loss of [`chunked_decoding_loss`] from full logits.

    Args:
        logits (`torch.Tensor` of shape `[N, V]`): The frozen model's logits.
        targets (`torch.Tensor` of shape `[N]`, long): Next tokens; -100 is ignored.
        temperature (`torch.Tensor` of shape `[N]`, *optional*): Predicted T; `None` means T = 1 and no gradient.
        top_p (`torch.Tensor` of shape `[N]`, *optional*): Predicted P; `None` means no top-p.
        config (`DecodingLossConfig`, *optional*): Options; the defaults are the paper's.
        mask_uniform (`torch.Tensor` of shape `[N]`, *optional*): Numbers in [0, 1); the low ones drop easy positions.
        num_items (`int` or `torch.Tensor`, *optional*): Normaliser; defaults to the number of valid targets.

    Returns:
        `torch.Tensor` of shape `[]`.
    """
    config = config or DecodingLossConfig()
    valid = targets != IGNORE_INDEX
    logits, targets = logits[valid], targets[valid]
    kept_t = None if temperature is None else temperature[valid]
    kept_p = None if top_p is None else top_p[valid]
    dropped = torch.zeros_like(targets, dtype=torch.bool)
    if config.easy_token_mask_ratio > 0:
        if mask_uniform is None:
            raise ValueError("easy_token_mask_ratio is above 0, so mask_uniform [N] must say which positions to drop.")
        easy = logits.argmax(dim=-1) == targets
        dropped = easy & (mask_uniform[valid] < config.easy_token_mask_ratio)
    losses = _position_losses(logits, targets, kept_t, kept_p, dropped, config)
    divisor = max(int(valid.sum()), 1) if num_items is None else num_items
    return losses.sum() / divisor


def _position_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    dropped: torch.Tensor,
    config: DecodingLossConfig,
) -> torch.Tensor:
    """`w_i L_i` `[n]`; `dropped` `[n]` marks the easy positions that the draw removed."""
    scale: torch.Tensor | float = 1.0 if temperature is None else temperature
    spare_top_p = config.easy_token_mask_target == "temperature"  # noqa: S105
    index = targets.unsqueeze(-1)
    scaled_log_prob = _scaled_log_probs(logits, scale).gather(-1, index).squeeze(-1)
    two_losses = config.loss_type == "two_loss" and temperature is not None and top_p is not None

    if temperature is not None and spare_top_p and not two_losses:
        scale = torch.where(dropped, temperature.detach(), temperature)
    elif temperature is not None and two_losses and config.detach_temperature:
        scale = temperature.detach()
    if top_p is None:
        losses = -_scaled_log_probs(logits, scale).gather(-1, index).squeeze(-1)
    else:
        losses = _soft_top_p_nll(logits, scale, top_p, targets, config.alpha)
    if two_losses:
        losses = losses - (scaled_log_prob.masked_fill(dropped, 0.0) if spare_top_p else scaled_log_prob)

    if config.dft_weight == "base":
        losses = losses * torch.log_softmax(logits.float(), dim=-1).gather(-1, index).squeeze(-1).exp().detach()
    elif config.dft_weight == "scaled":
        losses = losses * scaled_log_prob.exp().detach()
    return losses if spare_top_p else losses.masked_fill(dropped, 0.0)
