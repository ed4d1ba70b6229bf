r"""
Value and derivatives of the soft top-p loss for rows of logits, without autograd and nearly without sorting; it knows
no hidden state, no policy, and no weight or mask of a row.

With `v = (l - max l) / T`, `p = softmax(v)`, `vbar = sum(p v)` and tokens ranked by descending p,

| quantity | value | T-derivative, times -T |
|---|---|---|
| log p_j | `v_j - logsumexp(v)` | `v_j - vbar` |
| c_j | `sum_{k<=j} p_k` | `w_j = sum_{k<=j} p_k (v_k - vbar)` |
| log m_j (eq. 2) | `-alpha relu(c_j - P)` | `-alpha 1[c_j > P] w_j` |
| L = -log p~_y (eq. 3) | `-log p_y + alpha relu(c_y - P) + log(Z + eps)`, `Z = sum(p m)` | by the rows above |

The sums along the ranks come from `ranking`, which sorts only the tokens above a probability of 1e-5 and integrates
over the rest. Everything else is a dozen elementwise passes over a block of rows that stays in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blocks import LARGE_BLOCK, rows_at_once
from .config import EPSILON
from .logit_gradient import cut_logit_gradient, plain_logit_gradient
from .ranking import FoundTokens, ScaledRows, find_tokens, rank, tail_sums

# 2 * sigmoid(-27) is 4e-12. Below this 1 / T**2 leaves float32's range and no derivative means anything.
SMALLEST_TEMPERATURE = 1e-12

# Stands for -inf where 0 * -inf would turn a sum into NaN; its probability underflows to 0 just the same.
_MASKED_LOGIT = -1e30

# Tokens ranked at once, of as many blocks as they come from: each of the many small steps then has enough to do.
_RANKED_TOKENS = 1 << 18


@dataclass(frozen=True)
class RowDerivatives:
    """The loss of each of C rows and how it moves with that row's T and P. Every field: float32 `[C]`, no graph."""

    # -log p~_y of eq. 3; -log softmax(l / T)_y without top-p
    loss: torch.Tensor
    # d loss / d T
    d_temperature: torch.Tensor
    # d loss / d P; 0 without top-p
    d_top_p: torch.Tensor
    # log softmax(l / T)_y
    scaled_log_prob: torch.Tensor
    # d(-log softmax(l / T)_y) / d T
    scaled_d_temperature: torch.Tensor
    # log softmax(l)_y; NaN where it was not asked for
    base_log_prob: torch.Tensor
    # d loss / d l, float32 [C, V]; `None` where it was not asked for
    d_logits: torch.Tensor | None = None


@torch.no_grad()
def soft_top_p_nll(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    targets: torch.Tensor,
    alpha: float = 30.0,
    *,
    base_log_prob: bool = True,
    positions: torch.Tensor | None = None,
    plain_share: torch.Tensor | None = None,
) -> RowDerivatives:
    r"""
    `L = -log p~_y` of eqs. 1 to 3 with `dL/dT` and `dL/dP`, row by row and in closed form.

    Args:
        logits (`torch.Tensor` of shape `[C, V]`, any floating dtype): Computed in float32; -inf is probability 0.
        temperature (`torch.Tensor` of shape `[C]`, *optional*): T, above 0; `None` means 1.
        top_p (`torch.Tensor` of shape `[C]`, *optional*): P; `None` means no mask.
        targets (`torch.Tensor` of shape `[C]`, long): Token ids y.
        alpha (`float`, *optional*, defaults to 30.0): Steepness of the mask.
        base_log_prob (`bool`, *optional*, defaults to `True`):
            Whether to also take the target's log-probability at T = 1, a fifth of the cost.
        positions (`torch.Tensor` of shape `[C]`, *optional*): What errors call the rows; their index by default.
        plain_share (`torch.Tensor` of shape `[C]`, *optional*):
            Asks for `d_logits`, the derivative of `L - u log softmax(l / T)_y` with this as u; 0 gives that of L alone.

    Returns:
        [`RowDerivatives`].
    """
    rows, vocab = logits.shape
    device = logits.device
    names = torch.arange(rows, device=device) if positions is None else positions
    scale = torch.ones(rows, device=device) if temperature is None else temperature.float()
    cut = None if top_p is None else top_p.float()
    _check_parameters(scale, cut, names)

    size = min(rows, rows_at_once(logits, LARGE_BLOCK))
    buffers = torch.empty(3, size, vocab, device=device)
    gradient = None if plain_share is None else torch.empty(rows, vocab, device=device)
    parts: list[torch.Tensor] = []
    pending: list[_RowSums] = []
    for start in range(0, rows, max(size, 1)):
        part = slice(start, min(start + size, rows))
        block, base = _vocabulary_passes(
            logits[part], scale[part], targets[part], buffers[:, : part.stop - start], base_log_prob, names[part]
        )
        pending.append(_RowSums.of(block, base, scale[part], None if cut is None else cut[part], targets[part]))
        if gradient is not None and plain_share is not None:
            # It needs the block, which is overwritten by the next.
            wanted = _Wanted(gradient[part], plain_share[part].double(), block, targets[part])
            parts.append(_combine(pending.pop(), alpha, wanted))
        elif part.stop == rows or sum(sums.n_tokens for sums in pending) > _RANKED_TOKENS:
            parts.append(_combine(_RowSums.join(pending), alpha))
            pending = []
    table = torch.cat(parts, dim=1) if parts else torch.empty(6, 0, device=device)
    loss, d_temperature, d_top_p, scaled, scaled_d_temperature, base_log_probs = table.unbind(0)
    return RowDerivatives(loss, d_temperature, d_top_p, scaled, scaled_d_temperature, base_log_probs, gradient)


def _check_parameters(temperature: torch.Tensor, top_p: torch.Tensor | None, names: torch.Tensor) -> None:
    bad = ~(torch.isfinite(temperature) & (temperature > 0))
    if bool(bad.any()):
        value, name = temperature[bad][0].item(), names[bad][0].item()
        raise ValueError(f"The temperature at position {name} is {value}; it must be finite and above 0.")
    if top_p is not None and bool(torch.isnan(top_p).any()):
        raise ValueError(f"The top-p at position {names[torch.isnan(top_p)][0].item()} is NaN.")


def _vocabulary_passes(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    targets: torch.Tensor,
    buffers: torch.Tensor,
    base_log_prob: bool,
    names: torch.Tensor,
) -> tuple[ScaledRows, torch.Tensor]:
    """Everything that reads the whole vocabulary, in place in `buffers` `[3, R, V]`; and `log softmax(l)_y` `[R]`."""
    scaled, probs = buffers[0].copy_(logits), buffers[1]
    maximum = scaled.amax(dim=1, keepdim=True)
    _check_logits(maximum, names)
    scaled.sub_(maximum)
    target_shifted = scaled.gather(1, targets.unsqueeze(1)).squeeze(1)
    _check_targets(target_shifted, targets, names)

    base = torch.full_like(temperature, torch.nan, dtype=torch.float64)
    if base_log_prob:
        base = target_shifted.double() - _softmax(scaled, probs)[0]
    divisor = temperature.clamp_min(SMALLEST_TEMPERATURE).unsqueeze(1)
    log_normaliser, total = _softmax(scaled.div_(divisor), probs)
    mean = torch.mul(probs, scaled, out=buffers[2]).sum(dim=1)
    if not bool(torch.isfinite(mean).all()):
        scaled.clamp_(min=_MASKED_LOGIT)
        mean = torch.mul(probs, scaled, out=buffers[2]).sum(dim=1)
    rows = ScaledRows(
        scaled=scaled,
        probs=probs,
        total=total,
        log_normaliser=log_normaliser,
        mean=mean.double() / total,
        target_scaled=target_shifted / divisor.squeeze(1),
    )
    return rows, base


def _softmax(scaled: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(scaled)` times a rounding error into `out`; logsumexp and that factor, float64 `[R]`.

    The fused kernel beats exp followed by a sum, and the largest probability gives its normaliser. But it adds up the
    vocabulary naively, which may be off by 2e-5; torch's own sum is accurate and corrects it.
    """
    torch.softmax(scaled, dim=1, out=out)
    total = out.sum(dim=1).double()
    return total.log() - out.amax(dim=1).double().log(), total


def _check_logits(maximum: torch.Tensor, names: torch.Tensor) -> None:
    bad = ~torch.isfinite(maximum).squeeze(1)
    if bool(bad.any()):
        raise ValueError(
            f"The logits at position {names[bad][0].item()} are NaN, +inf or all -inf: there is no distribution to "
            "take. Look for an overflow in the model's own forward pass, for example float16 activations."
        )


def _check_targets(target_shifted: torch.Tensor, targets: torch.Tensor, names: torch.Tensor) -> None:
    bad = torch.isneginf(target_shifted)
    if bool(bad.any()):
        raise ValueError(
            f"The target {targets[bad][0].item()} at position {names[bad][0].item()} has a logit of -inf, so its loss "
            "is infinite. Set the label to -100 where the model cannot produce the token."
        )


@dataclass(frozen=True)
class _RowSums:
    """What is left of rows when the vocabulary has been read; float64 `[R]` each, and the tokens to be ranked."""

    temperature: torch.Tensor
    log_normaliser: torch.Tensor
    mean: torch.Tensor
    target_scaled: torch.Tensor
    base_log_prob: torch.Tensor
    top_p: torch.Tensor | None
    found: FoundTokens | None

    @classmethod
    def of(
        cls,
        rows: ScaledRows,
        base_log_prob: torch.Tensor,
        temperature: torch.Tensor,
        top_p: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> _RowSums:
        cut = None if top_p is None else top_p.double()
        found = None if cut is None else find_tokens(rows, cut, targets)
        own = rows.target_scaled.double()
        return cls(temperature.double(), rows.log_normaliser, rows.mean, own, base_log_prob, cut, found)

    @property
    def n_tokens(self) -> int:
        return 0 if self.found is None else len(self.found.row)

    @staticmethod
    def join(parts: list[_RowSums]) -> _RowSums:
        """Several blocks as one."""
        if len(parts) == 1:
            return parts[0]

        def column(name: str) -> torch.Tensor:
            return torch.cat([vars(part)[name] for part in parts])

        found = [part.found for part in parts if part.found is not None]
        return _RowSums(
            temperature=column("temperature"),
            log_normaliser=column("log_normaliser"),
            mean=column("mean"),
            target_scaled=column("target_scaled"),
            base_log_prob=column("base_log_prob"),
            top_p=column("top_p") if found else None,
            found=FoundTokens.join(found) if found else None,
        )


@dataclass(frozen=True)
class _Wanted:
    """Where a block's derivative with respect to its logits goes, float32 `[R, V]`, u, float64 `[R]`, and the block."""

    out: torch.Tensor
    plain_share: torch.Tensor
    rows: ScaledRows
    targets: torch.Tensor


def _combine(sums: _RowSums, alpha: float, wanted: _Wanted | None = None) -> torch.Tensor:
    """The table in the module's docstring: six fields of [`RowDerivatives`] as float32 `[6, R]`; fills `wanted`."""
    inverse = 1.0 / sums.temperature.clamp_min(SMALLEST_TEMPERATURE)
    scaled_log_prob = sums.target_scaled - sums.log_normaliser
    pull = sums.target_scaled - sums.mean  # T d(-log p_y) / dT
    loss, d_temperature, d_top_p = -scaled_log_prob, pull, torch.zeros_like(pull)
    if sums.top_p is not None and sums.found is not None:
        cut = sums.top_p
        ranked = rank(sums.found, cut, alpha, keeps_tokens=wanted is not None)
        uncut_tail, cut_tail = tail_sums(ranked, cut, alpha)
        normaliser = ranked.masked_mass + uncut_tail + cut_tail + EPSILON
        # The tail's integral ends at c = 1 whatever T is, so only its lower end r moves it: -m(r) dr/dT.
        mask_at_tail = torch.exp(-alpha * (ranked.mass - cut).clamp(min=0.0))
        d_normaliser = -ranked.masked_drift + alpha * ranked.cut_drift + mask_at_tail * ranked.drift
        excess = ranked.target_mass.clamp(max=1.0) - cut
        active = (excess > 0).double()
        loss = loss + alpha * excess.clamp(min=0.0) + normaliser.log()
        d_temperature = d_temperature - alpha * active * ranked.target_drift + d_normaliser / normaliser
        d_top_p = alpha * ((ranked.cut_mass + cut_tail) / normaliser - active)
        if wanted is not None:
            cut_logit_gradient(
                wanted.out, wanted.rows, wanted.targets, inverse, wanted.plain_share, ranked, normaliser, cut_tail, cut,
                alpha,
            )  # fmt: skip
    elif wanted is not None:
        plain_logit_gradient(wanted.out, wanted.rows, wanted.targets, (1.0 + wanted.plain_share) * inverse)
    fields = (loss, d_temperature * inverse, d_top_p, scaled_log_prob, pull * inverse, sums.base_log_prob)
    return torch.stack(fields).float()
