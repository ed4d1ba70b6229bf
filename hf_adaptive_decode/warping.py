"""Applies per-row sampling parameters to logits; knows tensors and nothing of models, policies or hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from .blocks import rows_at_once
from .errors import SamplingParameterError
from .nucleus import HOST, Edge, at_least, kth_largest, nucleus_edge, row_maxima
from .types import Field, SamplingParameters

# Below this a temperature is as good as greedy (a gap of 1e-4 becomes e^-100) and dividing by it could overflow.
MIN_TEMPERATURE = 1e-6
# Above this every finite row is flat, and beyond fp32 a row would become NaN.
MAX_TEMPERATURE = 1e6
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0}
_NEVER = -float("inf")
_MAX_TOP_K = 1 << 31
# Fresh memory for more numbers than these is worth waking a processor's other threads, which share its page faults.
_MUCH = 1 << 18


@torch.no_grad()
def warp_logits(
    logits: torch.Tensor, parameters: SamplingParameters, *, inplace: bool = False, maxima: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Temperature, then top-k, then top-p, then min-p, each with the semantics of transformers' own warper.

    No row is sorted, and on an accelerator nothing waits for it. No gradient flows.

    Args:
        logits (`torch.Tensor` of shape `[N, V]`): Any float dtype. -inf entries stay -inf.
        parameters ([`SamplingParameters`]): Fields of shape `[N]`, or scalars, or `None` for off.
        inplace (`bool`, defaults to `False`): Whether fp32 or fp64 logits may be overwritten.
        maxima (`torch.Tensor` of shape `[N]`, *optional*): The largest logit of each row, where it is known already.

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
    if scores.numel() == 0 or not any(_acts(parameters, name) for name in _OFF):
        return scores
    may_overwrite = (inplace or scores is not logits) and scores.is_contiguous()
    warped = scores if may_overwrite else torch.empty_like(scores, memory_format=torch.contiguous_format)
    rows = rows_at_once(scores)
    if rows >= scores.shape[0]:  # as in most steps of decoding, where to pick parts of everything would take a share
        _warp_into(warped, scores, parameters, maxima)
        return warped
    for start in range(0, scores.shape[0], rows):
        part = slice(start, start + rows)
        _warp_into(warped[part], scores[part], parameters.select(part), None if maxima is None else maxima[part])
    return warped


def _warp_into(
    warped: torch.Tensor, logits: torch.Tensor, parameters: SamplingParameters, maxima: torch.Tensor | None
) -> None:
    """[`warp_logits`] of rows that fit together, into `warped`, which may be the logits themselves."""
    cuts_ratio = _acts(parameters, "min_p")
    peak = None
    if cuts_ratio or _acts(parameters, "top_p"):
        peak = (row_maxima(logits) if maxima is None else maxima.to(logits.dtype))[:, None]
    greedy, scores = None, logits
    if _acts(parameters, "temperature"):
        t = _column(parameters.temperature, logits).nan_to_num(nan=1.0)
        greedy = _Greedy.among(logits, t)
        t = t.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
        scores = _divide(logits, t, warped)
        peak = None if peak is None else peak / t  # rounding keeps the order, so this is the largest quotient

    floor = kth_largest(scores, cast(Any, parameters.top_k)) if _acts(parameters, "top_k") else None
    edge = None
    if peak is not None and _acts(parameters, "top_p"):
        mass = _column(parameters.top_p, scores).expand(len(scores), 1)
        mass = mass if greedy is None else mass.masked_fill(greedy.where, 0.0)
        edge = nucleus_edge(scores, peak, mass.squeeze(-1), floor)
        floor = edge.score if floor is None else torch.maximum(floor, edge.score)
    if peak is not None and cuts_ratio:
        # p < min_p · max p, in log space; log(0) = -inf switches a row off.
        ratio = peak + _column(parameters.min_p, scores).log()
        floor = ratio if floor is None else torch.maximum(floor, ratio)
    if floor is None:
        warped.copy_(scores)
    else:
        _keep_above(warped, scores, floor, None if edge is None else edge.among)
    if edge is not None:
        _drop_ties(warped, edge)
    if greedy is not None:
        greedy.keep_alone(warped)


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


def _acts(parameters: SamplingParameters, name: str) -> bool:
    value = vars(parameters)[name]
    return value is not None and (isinstance(value, torch.Tensor) or value != _OFF[name])


def _column(value: Field, like: torch.Tensor) -> torch.Tensor:
    """`value` as `[N, 1]` or `[1, 1]`, ready to broadcast over `like` `[N, V]`."""
    if not isinstance(value, torch.Tensor):
        # Filled where it is: to copy a number to an accelerator is to wait for it.
        return torch.full((1, 1), min(float(cast(float, value)), MAX_TEMPERATURE), dtype=like.dtype, device=like.device)
    return value.to(like.device, like.dtype).reshape(-1, 1)


def _divide(logits: torch.Tensor, divisor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if logits.device.type != HOST or _is_fresh(out, logits):
        return torch.div(logits, divisor, out=out)
    np.divide(logits.numpy(), divisor.numpy(), out=out.numpy())
    return out


def _is_fresh(out: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether `out` is large and not the memory of `source`, so that it may be the first time that it is written."""
    return out.numel() > _MUCH and out.data_ptr() != source.data_ptr()


def _keep_above(warped: torch.Tensor, scores: torch.Tensor, floor: torch.Tensor, among: np.ndarray | None) -> None:
    """
    `scores` `[N, V]` into `warped`, which they may be, with -inf in place of what is below `floor` `[N, 1]`; only the
    places `among` are looked at, if they are given.
    """
    if scores.device.type != HOST:
        warped.copy_(scores).masked_fill_(scores < floor, _NEVER)
        return
    # Few are kept, as a rule. numpy finds them, and leaves out others, several times faster than torch does here.
    values, found = scores.numpy(), warped.numpy()
    if among is None:
        is_kept = at_least(scores, floor.numpy())
        if np.count_nonzero(is_kept) > is_kept.size // 8:
            warped.copy_(scores)
            np.copyto(found, _NEVER, where=~is_kept)
            return
        kept = np.flatnonzero(is_kept)
    else:
        its_floor = floor.expand(len(scores), 1).numpy()[among // scores.shape[-1], 0]
        kept = among[values.reshape(-1)[among] >= its_floor]
    own = values.reshape(-1)[kept]
    if _is_fresh(warped, scores):
        warped.fill_(_NEVER)
    else:
        found.fill(_NEVER)
    found.reshape(-1)[kept] = own


def _drop_ties(scores: torch.Tensor, edge: Edge) -> None:
    """Where a row has more tokens equal to its edge than belong to the nucleus, keeps the last of them, as a sort."""
    if scores.device.type != HOST:
        tied = scores == edge.score
        up_to_here = tied.cumsum(-1)
        is_surplus = up_to_here[:, -1:] - up_to_here >= edge.count[:, None]
        scores.masked_fill_(tied & is_surplus & edge.more[:, None], _NEVER)
        return
    more = edge.more.numpy()
    if not more.any():
        return
    values, score, vocabulary = scores.numpy(), edge.score.numpy()[:, 0], scores.shape[-1]
    if edge.among is None:
        at = np.flatnonzero(more)
        row, word = np.nonzero(values[at] == score[at, None])
        place = at[row] * vocabulary + word
    else:
        place = edge.among
    row = place // vocabulary
    is_tied = more[row] & (values.reshape(-1)[place] == score[row])
    place, row = place[is_tied], row[is_tied]
    ends = np.searchsorted(row, np.arange(len(more)), side="right")
    is_surplus = ends[row] - np.arange(len(row)) > edge.count.numpy()[row]
    values.reshape(-1)[place[is_surplus]] = _NEVER


@dataclass(frozen=True)
class _Greedy:
    """Rows at temperature 0: `where` they are, bool `[N, 1]`; their argmax, `best`, and its logit, `own`, `[N, 1]`."""

    where: torch.Tensor
    best: torch.Tensor
    own: torch.Tensor

    @classmethod
    def among(cls, logits: torch.Tensor, temperature: torch.Tensor) -> _Greedy | None:
        """`None` if there are none; not asked of an accelerator."""
        where = (temperature <= 0).expand(len(logits), 1)
        if where.device.type == HOST and not where.numpy().any():
            return None
        best = logits.argmax(-1, keepdim=True)
        return cls(where, best, logits.gather(-1, best))

    def keep_alone(self, scores: torch.Tensor) -> None:
        """Drops all but the argmax, whose score is the model's own logit: 0 is no divisor."""
        kept = torch.where(self.where, self.own, scores.gather(-1, self.best))
        scores.masked_fill_(self.where, _NEVER).scatter_(-1, self.best, kept)
