r"""
How the soft top-p loss of a row moves with its logits, in closed form; it knows sums along the ranks, no policy.

With the symbols of `rows`, the loss moves with the probability of a token k, beside its `-log p_y`, by

    a_k = alpha 1[c_y > P] 1[k <= y] + (m_k - alpha sum_{j>=k} p_j m_j 1[c_j > P]) / (Z + eps)

so that `T dL/dl_k = p_k (1 + a_k - abar) - 1[k = y]` with `abar = sum(p a)`. In the tail the bracket is m(1) for every
token: with steps too fine to matter singly `Z = int m dc`, which no probability moves. So only the ranked tokens have
an a_k of their own, and the tail needs no order. Relative to 1 the error is below `alpha^2 / 2` times the largest p of
the tail, 5e-3 where a whole row is flat and P near 0, and below 1e-5 of the gradient on a trained model's rows.
"""

from __future__ import annotations

from typing import cast

import torch

from .ranking import RankedSums, RankedTokens, ScaledRows


def plain_logit_gradient(
    out: torch.Tensor, rows: ScaledRows, targets: torch.Tensor, inverse_temperature: torch.Tensor
) -> None:
    """
    `(p_k - 1[k = y]) / T`, the derivative of `-log softmax(l / T)_y`, into `out`.

    Args:
        out (`torch.Tensor` of shape `[R, V]`, `torch.float32`): Overwritten.
        rows ([`ScaledRows`] of `R`), targets (`torch.Tensor` of shape `[R]`, long): The rows.
        inverse_temperature (`torch.Tensor` of shape `[R]`, `torch.float64`): 1 / T.
    """
    _probs_into(out, rows).mul_(inverse_temperature.float().unsqueeze(1))
    _subtract_at(targets, inverse_temperature, out)


def cut_logit_gradient(
    out: torch.Tensor,
    rows: ScaledRows,
    targets: torch.Tensor,
    inverse_temperature: torch.Tensor,
    plain_share: torch.Tensor,
    ranked: RankedSums,
    normaliser: torch.Tensor,
    cut_tail: torch.Tensor,
    top_p: torch.Tensor,
    alpha: float,
) -> None:
    """
    The derivative of `-log p~_y - u log softmax(l / T)_y`, as [`plain_logit_gradient`].

    Args:
        plain_share (`torch.Tensor` of shape `[R]`, `torch.float64`): u.
        ranked ([`RankedSums`]): With its tokens.
        normaliser, cut_tail, top_p (`torch.Tensor` of shape `[R]`, `torch.float64`): Z + eps, the tail's
            `sum(p m 1[c > P])`, and P.
        alpha (`float`): Steepness of the mask.
    """
    tokens = cast(RankedTokens, ranked.tokens)
    row = tokens.row
    pull = alpha * (ranked.target_mass.clamp(max=1.0) > top_p).double()
    moved = (tokens.mask - alpha * (tokens.cut_after + cut_tail[row])) / normaliser[row]
    moved_in_tail = torch.exp(-alpha * (1.0 - top_p).clamp(min=0.0)) / normaliser
    mean = torch.zeros_like(top_p).index_add_(0, row, tokens.probs * moved)
    mean += moved_in_tail * (1.0 - ranked.mass) + pull * ranked.target_mass
    rest = 1.0 + plain_share - mean

    _probs_into(out, rows)
    chosen = ((pull > 0) & (ranked.target_mass > ranked.mass)).nonzero().squeeze(1)  # the target is in the tail
    pulled = out[chosen].mul_(_up_to_target(rows, targets, chosen))
    out.mul_(((rest + moved_in_tail) * inverse_temperature).float().unsqueeze(1))
    out.index_add_(0, chosen, pulled.mul_((pull * inverse_temperature)[chosen].float().unsqueeze(1)))
    own = rest[row] + moved + pull[row] * tokens.up_to_target
    out.view(-1).index_copy_(0, tokens.index, (tokens.probs * own * inverse_temperature[row]).float())
    _subtract_at(targets, (1.0 + plain_share) * inverse_temperature, out)


def _probs_into(out: torch.Tensor, rows: ScaledRows) -> torch.Tensor:
    return torch.sub(rows.scaled, rows.log_normaliser.float().unsqueeze(1), out=out).exp_()


def _subtract_at(targets: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    out.scatter_add_(1, targets.unsqueeze(1), -values.float().unsqueeze(1))


def _up_to_target(rows: ScaledRows, targets: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Which tokens of the chosen rows are ranked no lower than the target, bool `[len(chosen), V]`."""
    scaled, own = rows.scaled[chosen], rows.target_scaled[chosen].unsqueeze(1)
    ids = torch.arange(scaled.shape[1], device=scaled.device)
    return (scaled > own) | ((scaled == own) & (ids <= targets[chosen].unsqueeze(1)))
