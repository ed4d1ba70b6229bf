"""Applies per-row sampling parameters to logits; knows tensors and nothing of models, policies or hosts."""

from __future__ import annotations

import torch

from .errors import SamplingParameterError
from .types import Field, SamplingParameters, is_per_row

# Below this a temperature is as good as greedy (a gap of 1e-4 becomes e^-100) and dividing by it could overflow.
MIN_TEMPERATURE = 1e-6
# Above this every finite row is flat, and beyond fp32 a row would become NaN.
MAX_TEMPERATURE = 1e6
# A nucleus is looked for among this many most likely tokens, then among more, then by a full sort.
_NUCLEUS_STAGES = (128, 2048)
_NEVER = -float("inf")
_MAX_TOP_K = 1 << 31


def warp_logits(logits: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """
    Temperature, then top-k, then top-p, then min-p, each with the semantics of transformers' own warper.

    Args:
        logits (`torch.Tensor` of shape `[N, V]`): Any float dtype. -inf entries stay -inf.
        parameters ([`SamplingParameters`]): Fields of shape `[N]`, or scalars, or `None` for off.

    Returns:
        `torch.Tensor` of shape `[N, V]`, `torch.float32` (`torch.float64` for such input): dropped tokens are -inf, at
        least one token of each row survives. A row at temperature 0 keeps its argmax alone, the first one of a tie.

    Raises:
        [`SamplingParameterError`]: If a parameter that is a Python number is outside its range. Tensors are not
            checked: reading them would make an accelerator wait.

    Example:

    ```python
    >>> warp_logits(torch.tensor([[1.0, 3.0, 2.0]]), SamplingParameters(temperature=0.5, top_k=2))
    tensor([[-inf, 6., 4.]])
    ```
    """
    check_scalars(parameters)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if scores.numel() == 0:
        return scores
    greedy = None
    temperature = parameters.temperature
    if temperature is not None and not _is_scalar(temperature, 1.0):
        t = _column(temperature, scores).nan_to_num(nan=1.0)
        greedy = t <= 0
        scores = scores / t.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
    threshold = _top_k_threshold(scores, parameters.top_k)
    threshold, ties = _top_p_threshold(scores, parameters.top_p, threshold, greedy)
    if parameters.min_p is not None and not _is_scalar(parameters.min_p, 0):
        # p < min_p · max p, in log space; log(0) = -inf switches a row off.
        threshold = _highest(threshold, scores.amax(-1, keepdim=True) + _column(parameters.min_p, scores).log())
    if threshold is not None:
        scores = scores.masked_fill(scores < threshold, _NEVER)
    if ties is not None:
        scores = _drop_ties(scores, *ties)
    if greedy is not None and (is_per_row(temperature) or temperature == 0):
        scores = _keep_argmax(scores, logits, greedy)
    return scores


def check_scalars(parameters: SamplingParameters) -> None:
    """Raises [`SamplingParameterError`] if a parameter given as a Python number is outside its range."""
    allowed = {
        "temperature": (lambda v: 0 <= v < float("inf"), "a finite number of at least 0 (0 is greedy)"),
        "top_k": (lambda v: 0 <= v < _MAX_TOP_K and v == int(v), "a whole number from 0 (off) to 2^31 - 1"),
        "top_p": (lambda v: 0 <= v <= 1, "between 0 and 1 (1 is off)"),
        "min_p": (lambda v: 0 <= v <= 1, "between 0 and 1 (0 is off)"),
    }
    for name, (is_allowed, wanted) in allowed.items():
        value = vars(parameters)[name]
        if value is None or isinstance(value, torch.Tensor):
            continue
        if isinstance(value, bool | str) or not is_allowed(value):
            raise SamplingParameterError(f"`{name}` is {value!r}; it has to be {wanted}.")


def _is_scalar(value: Field, off: float) -> bool:
    return not isinstance(value, torch.Tensor) and value == off


def _column(value: Field, like: torch.Tensor) -> torch.Tensor:
    """`value` as `[N, 1]` or `[1, 1]`, ready to broadcast over `like` `[N, V]`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1)


def _highest(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else torch.maximum(a, b)


def _top_k_threshold(scores: torch.Tensor, top_k: Field) -> torch.Tensor | None:
    """`[N, 1]` or `[1, 1]`: the k-th largest score of each row; ties with it are kept, as transformers does."""
    if top_k is None or _is_scalar(top_k, 0):
        return None
    vocabulary = scores.shape[-1]
    k = torch.as_tensor(top_k, device=scores.device).reshape(-1, 1).long().clamp(max=vocabulary)
    largest = int(k.max())
    if largest == 0:
        return None
    values = scores.topk(largest, dim=-1).values
    kth = values.gather(-1, (k - 1).clamp(min=0).expand(scores.shape[0], 1))
    return kth.masked_fill(k == 0, _NEVER)


def _top_p_threshold(
    scores: torch.Tensor, top_p: Field, threshold: torch.Tensor | None, greedy: torch.Tensor | None
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """
    The score `[N, 1]` of the last token in each row's nucleus, joined with `threshold`, and the rows where tokens
    tied with it must go: (rows `[M]`, their cut-off `[M]`, how many of the tied to keep `[M]`).
    """
    if top_p is None or _is_scalar(top_p, 1.0):
        return threshold, None
    mass = _column(top_p, scores).expand(scores.shape[0], 1)
    # A row with mass 1 is never masked: an fp32 cumulative sum above 1 must not drop its rarest tokens.
    open_rows = (mass < 1).squeeze(-1)
    if greedy is not None:
        open_rows = open_rows & ~greedy.squeeze(-1)
    rows = open_rows.nonzero().squeeze(-1)
    if rows.numel() == 0:
        return threshold, None
    kept = scores if threshold is None else scores.masked_fill(scores < threshold, _NEVER)
    log_z = kept.logsumexp(-1, keepdim=True)
    cutoff = torch.full_like(log_z, _NEVER)
    tied: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for stage in (*_NUCLEUS_STAGES, kept.shape[-1]):
        width = min(stage, kept.shape[-1])
        part = kept if rows.numel() == kept.shape[0] else kept[rows]
        last, values, count, covered = _nucleus_edge(part, log_z[rows], mass[rows], width)
        done = rows[covered]
        cutoff[done] = last[covered]
        straddles = covered & (values == last).sum(-1).gt(count)
        # The last candidate tied with the edge may have equals beyond the candidates, so it counts as straddling too.
        straddles |= covered & (values[:, -1:] == last).squeeze(-1) & (width < kept.shape[-1])
        if straddles.any():
            tied.append((rows[straddles], last[straddles].squeeze(-1), count[straddles]))
        rows = rows[~covered]
        if rows.numel() == 0:
            break
    if not tied:
        return _highest(threshold, cutoff), None
    at, value, keep = (torch.cat(parts) for parts in zip(*tied, strict=True))
    return _highest(threshold, cutoff), (at, value, keep)


def _nucleus_edge(
    scores: torch.Tensor, log_z: torch.Tensor, mass: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Looks for each row's nucleus among its `width` largest scores.

    Returns the edge's score `[M, 1]`, the candidates `[M, width]`, how many tokens equal to the edge belong to the
    nucleus `[M]`, and whether the nucleus ended within the candidates `[M]`.
    """
    values = scores.topk(width, dim=-1).values if width < scores.shape[-1] else scores.sort(-1, descending=True).values
    p = torch.exp(values - log_z)
    total = p.cumsum(-1)
    # transformers keeps a token while the mass ahead of it is below top_p; the most likely token always stays.
    inside = (total - p < mass) & (values > _NEVER)
    size = inside.sum(-1, keepdim=True).clamp(min=1)
    edge = values.gather(-1, size - 1)
    in_nucleus = torch.arange(width, device=values.device) < size
    count = ((values == edge) & in_nucleus).sum(-1)
    covered = (total[:, -1:] >= mass).squeeze(-1) | (size.squeeze(-1) < width)
    if width == scores.shape[-1]:
        covered = torch.ones_like(covered)
    return edge, values, count, covered


def _drop_ties(scores: torch.Tensor, rows: torch.Tensor, cutoff: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Of the tokens equal to `cutoff`, keeps the `keep` with the highest index: the order of transformers' sort."""
    part = scores[rows]
    tie = part == cutoff[:, None]
    rank_from_end = tie.flip(-1).cumsum(-1).flip(-1)
    scores = scores.clone() if scores.is_inference() else scores
    scores[rows] = part.masked_fill(tie & (rank_from_end > keep[:, None]), _NEVER)
    return scores


def _keep_argmax(scores: torch.Tensor, logits: torch.Tensor, greedy: torch.Tensor) -> torch.Tensor:
    """On rows where `greedy` `[N, 1]` (or `[1, 1]`) holds, drops all but the first most likely token."""
    best = logits.argmax(-1, keepdim=True)
    others = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, False)
    warped = scores.masked_fill(others & greedy, _NEVER)
    # A greedy row's temperature is no divisor: its argmax keeps the model's own logit.
    own = logits.gather(-1, best).to(scores.dtype)
    return warped.scatter(-1, best, torch.where(greedy, own, warped.gather(-1, best)))
