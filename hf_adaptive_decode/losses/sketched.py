r"""
The soft top-p loss of rows of which only a sketch is kept, with its derivatives; it knows sketches, no logits.

The kept tokens are summed as `rows` does. Of the tail, the cumulative mass is known at the borders of its segments, and
what it adds to `Z = sum(p m)` hardly depends on more: with `G(c) = (1 - exp(-alpha relu(c - P))) / alpha`, a run of
tokens of equal probability q from c to c' beyond P has, as a geometric series,

    sum(p m) = (G(c') - G(c)) a / (e^a - 1),  a = alpha q

whose factor is about `1 - a / 2`, and at least 0.88 at alpha = 30, as no token of the tail holds more than 1 / 129. For
q a segment's mean of p over its mass is taken. A segment that P falls into is split there; up to P its mass counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .chunked import (
    DecodingLossOutput,
    LossSums,
    Predict,
    check_inputs,
    check_predictions,
    weighed,
    with_derivatives,
)
from .config import EPSILON, DecodingLossConfig
from .rows import SMALLEST_TEMPERATURE, RowDerivatives
from .sketch import KEPT, LARGEST_TEMPERATURE, SEGMENTS, Sketch, border_depths, node_depths, part_depths

# Positions computed at once: a dozen float64 tensors of [positions, 128].
CHUNK_POSITIONS = 2048

# From here on down a / (e^a - 1) and its derivative are those of 0 to 1e-9.
_SMALLEST_STEP = 1e-9


def sketched_decoding_loss(
    hidden: torch.Tensor,
    sketch: Sketch,
    predict: Predict,
    config: DecodingLossConfig | None = None,
    *,
    mask_uniform: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> DecodingLossOutput:
    r"""
    [`chunked_decoding_loss`] of positions whose logits were seen before and are kept as sketches.

    Within 1e-4 of it a position, and 1e-5 on average, on logits as peaked as a trained model's; the positions dropped
    are the same.

    Args:
        hidden (`torch.Tensor` of shape `[N, H]`): The frozen model's last hidden states of the positions with a target.
        sketch ([`Sketch`] of `N` rows): What [`sketch_rows`] made of their logits and targets.
        predict, config, num_items: As [`chunked_decoding_loss`] takes them. There are no logits, so `predict` is called
            with logits of shape `[C, 0]`.
        mask_uniform (`torch.Tensor` of shape `[N]`, *optional*): As there, of these positions.
        chunk_size (`int`, *optional*): Positions per chunk.

    Returns:
        [`DecodingLossOutput`].

    Raises:
        `ValueError`: If a predicted T is above `LARGEST_TEMPERATURE`.
    """
    config = config or DecodingLossConfig()
    check_inputs(hidden, sketch.target, mask_uniform, num_items, chunk_size, config)
    sums, count = LossSums(hidden.device), hidden.shape[0]
    size = chunk_size or CHUNK_POSITIONS
    # Even without a position one empty chunk comes: it is what connects the 0 to the policy's parameters.
    for start in range(0, max(count, 1), size):
        part, rows = hidden[start : start + size].detach(), sketch[start : start + size]
        drawn = torch.zeros_like(rows.easy, dtype=torch.bool)
        if config.easy_token_mask_ratio > 0 and mask_uniform is not None:
            drawn = rows.easy.bool() & (mask_uniform[start : start + size] < config.easy_token_mask_ratio)
        n_easy_dropped = int(drawn.sum())
        if config.easy_token_mask_target == "both":  # noqa: S105
            kept = (~drawn).nonzero().squeeze(1)
            part, rows, drawn = part[kept], rows[kept], drawn[kept]
        temperature, top_p = predict(part, part.new_empty(part.shape[0], 0))
        check_predictions(temperature, top_p, rows.target)
        found = sketched_nll(
            rows,
            None if temperature is None else temperature.detach(),
            None if top_p is None else top_p.detach(),
            config.alpha,
        )
        chunk = weighed(found, drawn, temperature, top_p, n_easy_dropped, config)
        sums.add(with_derivatives(chunk), chunk)
    divisor = max(count, 1) if num_items is None else num_items
    return sums.output(sums.loss / divisor, count)


@torch.no_grad()
def sketched_nll(
    sketch: Sketch, temperature: torch.Tensor | None, top_p: torch.Tensor | None, alpha: float = 30.0
) -> RowDerivatives:
    r"""
    [`soft_top_p_nll`] of sketched rows.

    Args:
        sketch ([`Sketch`] of `C` rows): The rows.
        temperature (`torch.Tensor` of shape `[C]`, *optional*): T, above 0 and at most `LARGEST_TEMPERATURE`.
        top_p (`torch.Tensor` of shape `[C]`, *optional*): P; `None` means no mask.
        alpha (`float`, *optional*, defaults to 30.0): Steepness of the mask.

    Returns:
        [`RowDerivatives`].
    """
    scale = torch.ones_like(sketch.target) if temperature is None else temperature.float()
    bad = ~((scale > 0) & (scale <= LARGEST_TEMPERATURE))
    if bool(bad.any()):
        raise ValueError(
            f"The temperature at position {bad.nonzero()[0].item()} is {scale[bad][0].item()}; of logits kept as a "
            f"sketch the loss is known above 0 and up to {LARGEST_TEMPERATURE:g}."
        )
    if top_p is not None and bool(torch.isnan(top_p).any()):
        raise ValueError(f"The top-p at position {torch.isnan(top_p).nonzero()[0].item()} is NaN.")
    inverse = 1.0 / scale.double().clamp_min(SMALLEST_TEMPERATURE)
    masses = _masses(sketch, inverse)
    own = sketch.target.double() * inverse
    log_prob, pull = own - masses.log_normaliser, own - masses.mean
    loss, d_temperature, d_top_p = -log_prob, pull, torch.zeros_like(pull)
    if top_p is not None:
        cut = top_p.double()
        kept, tail = _kept_sums(masses, cut, alpha), _tail_sums(masses, cut, alpha)
        normaliser = kept.masked + tail.masked + EPSILON
        mass, drift = _at_target(masses, sketch, inverse)
        excess = mass.clamp(max=1.0) - cut
        active = (excess > 0).double()
        loss = loss + alpha * excess.clamp(min=0.0) + normaliser.log()
        d_temperature = d_temperature - alpha * active * drift - (kept.drift + tail.drift) / normaliser
        d_top_p = (kept.d_top_p + tail.d_top_p) / normaliser - alpha * active
    fields = (loss, d_temperature * inverse, d_top_p, log_prob, pull * inverse, sketch.base_log_prob.double())
    return RowDerivatives(*torch.stack(fields).float().unbind(0))


@dataclass(frozen=True)
class _Masses:
    """Rows at their T, float64; `v = x / T`, and the drift of what is a sum of p is the same sum of `p (v - vbar)`."""

    log_normaliser: torch.Tensor  # logsumexp(v) [C]
    mean: torch.Tensor  # vbar [C]
    kept: torch.Tensor  # p of the kept tokens [C, KEPT]
    kept_drift: torch.Tensor  # [C, KEPT]
    after: torch.Tensor  # c after each kept token [C, KEPT]
    drift_after: torch.Tensor  # [C, KEPT]
    segments: torch.Tensor  # mass [C, SEGMENTS]
    segments_drift: torch.Tensor  # [C, SEGMENTS]
    step: torch.Tensor  # q, a segment's mean of p over its mass [C, SEGMENTS]
    borders: torch.Tensor  # p that a token at the segments' borders would have [C, SEGMENTS + 1]


def _masses(sketch: Sketch, inverse: torch.Tensor) -> _Masses:
    top, weights = sketch.top.double(), sketch.tail.double()
    v = top * inverse[:, None]
    at = (top[:, -1, None, None] - node_depths(top.device)) * inverse[:, None, None]
    kept, nodes = v.exp(), at.exp()
    tail = weights * nodes
    total = kept.sum(dim=1) + tail.sum(dim=(1, 2))
    mean = ((kept * v).sum(dim=1) + (tail * at).sum(dim=(1, 2))) / total
    kept, nodes = kept / total[:, None], nodes / total[:, None, None]
    borders = torch.exp((top[:, -1:] - border_depths(top.device)) * inverse[:, None]) / total[:, None]
    kept_drift, nodes_drift = kept * (v - mean[:, None]), nodes * (at - mean[:, None, None])
    # Where exp(-d / T) is too steep for the nodes, nothing is left of the segment, not even a sign.
    segments = (weights * nodes).sum(dim=2).clamp_(min=0.0)
    segments_drift = (weights * nodes_drift).sum(dim=2)
    share = segments.clamp(min=1e-30)
    step = ((weights * nodes.square()).sum(dim=2) / share).clamp_(min=0.0).minimum(kept[:, -1:])
    return _Masses(
        log_normaliser=total.log(),
        mean=mean,
        kept=kept,
        kept_drift=kept_drift,
        after=kept.cumsum(dim=1).clamp_(max=1.0),
        drift_after=kept_drift.cumsum(dim=1),
        segments=segments,
        segments_drift=segments_drift,
        step=step,
        borders=borders,
    )


@dataclass(frozen=True)
class _Masked:
    """`sum(p m)` over some tokens, -T times its derivative by T, and that by P; float64 `[C]` each."""

    masked: torch.Tensor
    drift: torch.Tensor
    d_top_p: torch.Tensor


def _kept_sums(masses: _Masses, cut: torch.Tensor, alpha: float) -> _Masked:
    excess = (masses.after - cut[:, None]).clamp_(min=0.0)
    mask = torch.exp(-alpha * excess)
    masked = masses.kept * mask
    beyond = masked * (excess > 0)
    drift = (masses.kept_drift * mask).sum(dim=1) - alpha * (beyond * masses.drift_after).sum(dim=1)
    return _Masked(masked.sum(dim=1), drift, alpha * beyond.sum(dim=1))


def _tail_sums(masses: _Masses, cut: torch.Tensor, alpha: float) -> _Masked:
    """The module's docstring, by segments; T moves where the tail begins, and the steps' factor too little to count."""
    cut = cut[:, None]
    end = masses.after[:, -1:]
    after = (end + masses.segments.cumsum(dim=1)).clamp_(max=1.0)
    before = torch.cat([end, after[:, :-1]], dim=1)
    mask_before = torch.exp(-alpha * (before - cut).clamp(min=0.0))

    whole = before >= cut
    width = masses.segments.where(whole, (after - cut).clamp(min=0.0).minimum(masses.segments))
    gained = mask_before * -torch.expm1(-alpha * width) / alpha  # of G
    # Within a segment p falls about evenly with the mass, so where m weighs its beginning, its steps are higher.
    centre = (before.maximum(cut) - before + _centre(width, alpha)) / masses.segments.clamp(min=1e-30) - 0.5
    fall = (masses.borders[:, 1:] - masses.borders[:, :-1]) * centre.clamp_(-0.5, 0.5)
    step = (alpha * (masses.step + fall)).clamp_(min=_SMALLEST_STEP)
    factor = step / torch.expm1(step)
    masked = masses.segments - width + factor * gained

    at_end = mask_before[:, 0] * masses.drift_after[:, -1]
    d_top_p = factor * alpha * gained + (1.0 - factor) * ((after > cut) & ~whole)
    return _Masked(masked.sum(dim=1), -at_end, d_top_p.sum(dim=1))


def _centre(width: torch.Tensor, alpha: float) -> torch.Tensor:
    """The mean of c over `[0, width]` under `exp(-alpha c)`."""
    steep = (alpha * width).clamp(min=1e-4)
    return (1.0 - steep / torch.expm1(steep)) / alpha


def _at_target(masses: _Masses, sketch: Sketch, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c_y and its drift, float64 `[C]` each."""
    place = sketch.place.long()
    index = place.clamp(max=KEPT - 1).unsqueeze(1)
    is_kept, segment = place < KEPT, (place - KEPT).clamp_(min=0)
    behind = torch.arange(SEGMENTS, device=place.device) < segment.unsqueeze(1)
    last = sketch.top[:, -1].double()
    depths = part_depths(segment, last - sketch.target.double())
    at = (last.unsqueeze(1) - depths) * inverse.unsqueeze(1)
    part = sketch.part.double() * torch.exp(at - masses.log_normaliser.unsqueeze(1))
    part_drift = part * (at - masses.mean.unsqueeze(1))

    def up_to_target(after: torch.Tensor, segments: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        in_tail = after[:, -1] + (segments * behind).sum(dim=1) + own.sum(dim=1)
        return after.gather(1, index).squeeze(1).where(is_kept, in_tail)

    mass = up_to_target(masses.after, masses.segments, part)
    return mass, up_to_target(masses.drift_after, masses.segments_drift, part_drift)
