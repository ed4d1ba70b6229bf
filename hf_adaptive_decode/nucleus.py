"""
Finds the score at which a row's top-k or nucleus ends, without sorting the row; knows scores, not what they are for.

On a processor: the last token of `P` of the mass has a probability of at least `(1 - P) / V`, so only those above that
are looked at, and first those far above it; their masses are put into buckets by score, and the one bucket in which the
mass is reached is sorted. On an
accelerator, where asking how many there are would make the host wait: a radix search, eight bits of the score a time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch

# Below this many words a sort costs less than being clever.
_SMALL_VOCABULARY = 512
# Groups in which tokens are looked at for the k largest; each of these lies in one of the k groups of largest maxima.
_GROUP = 16
# So many times the mass below which no token can be the edge: above it lie a fraction of the tokens, and nearly always
# the nucleus.
_LIKELY = 16
# So many candidates are sorted as they are.
_FEW = 2048
# A bucket for so many words, but no more buckets than these.
_WORDS_A_BUCKET, _MOST_BUCKETS = 4, 2048
# Where more than this part of the tokens, and more than so many, could be the edge, every 64th says where to look.
_MANY_PART, _MANY, _STRIDE, _MARGIN = 1 / 16, 1 << 14, 64, 0.02
_NEVER = -float("inf")
# The device whose values can be read without waiting for it.
HOST = "cpu"


@dataclass(frozen=True)
class Edge:
    """
    The last token of each row's nucleus.

    Args:
        score (`torch.Tensor` of shape `[N, 1]`): -inf where there is no edge.
        count (`torch.Tensor` of shape `[N]`): How many tokens of that score belong to the nucleus.
        more (`torch.Tensor` of shape `[N]`, bool): Whether there are more than those.
        among (`np.ndarray` of shape `[n]`, *optional*): Places, in the flattened scores and in rising order, that hold
            every token of every nucleus, if that is known and each row has an edge.
    """

    score: torch.Tensor
    count: torch.Tensor
    more: torch.Tensor
    among: np.ndarray | None = None


def kth_largest(scores: torch.Tensor, k: torch.Tensor | int) -> torch.Tensor:
    """
    The k-th largest score of each row, `[N, 1]`; -inf where k is 0, which stands for off.

    Args:
        scores (`torch.Tensor` of shape `[N, V]`): float32 or float64.
        k (`torch.Tensor` of shape `[N]` or `[1]`, integer, or `int`): Beyond V it is V.
    """
    vocabulary = scores.shape[-1]
    if not isinstance(k, torch.Tensor):
        return largest(scores, min(int(k), vocabulary))[:, -1:]
    k = k.to(scores.device).long().clamp(max=vocabulary).expand(scores.shape[0])
    if scores.device.type == HOST:
        values = largest(scores, max(int(k.max()), 1))
        kth = values.gather(-1, (k - 1).clamp(min=0)[:, None])
    else:
        kth = _radix_search(scores, None, k.double())[0]
    return kth.masked_fill((k == 0)[:, None], _NEVER)


def row_maxima(scores: torch.Tensor) -> torch.Tensor:
    """The largest of each row of `[N, V]`, `[N]`; NaN where there is one."""
    if scores.device.type != HOST or scores.dtype not in (torch.float32, torch.float64) or not scores.shape[0]:
        return scores.amax(-1)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(scores.detach().numpy().max(-1))


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The `k` largest of each row of `scores` `[N, V]` in order, `[N, k]`, ties included as often as they occur."""
    rows, vocabulary = scores.shape
    grouped = vocabulary // _GROUP * _GROUP
    if k * _GROUP * 2 > grouped:
        return scores.topk(k, dim=-1).values
    # Strided groups, so that their maxima are taken by whole vectors.
    groups = scores[:, :grouped].view(rows, _GROUP, -1)
    best = groups.amax(1).topk(k, dim=-1, sorted=False).indices
    members = groups.gather(-1, best[:, None, :].expand(rows, _GROUP, k)).view(rows, -1)
    return torch.cat([members, scores[:, grouped:]], dim=-1).topk(k, dim=-1).values


def nucleus_edge(scores: torch.Tensor, peak: torch.Tensor, mass: torch.Tensor, floor: torch.Tensor | None) -> Edge:
    """
    The last token of each row's nucleus: transformers keeps a token while the mass ahead of it is below top-p.

    Args:
        scores (`torch.Tensor` of shape `[N, V]`): float32 or float64, -inf where a token is ruled out.
        peak (`torch.Tensor` of shape `[N, 1]`): The largest score of each row, finite.
        mass (`torch.Tensor` of shape `[N]`): P; a row with 1 or more has no edge.
        floor (`torch.Tensor` of shape `[N, 1]`, *optional*): Tokens with scores below it are ruled out, too.
    """
    if scores.device.type != HOST:
        return _edge_by_radix(scores, peak, mass, floor)
    if scores.shape[-1] <= _SMALL_VOCABULARY:
        return _edge_by_sort(scores, peak, mass, floor)
    return _edge_by_buckets(scores, peak, mass, floor)


def _edge_by_sort(scores: torch.Tensor, peak: torch.Tensor, mass: torch.Tensor, floor: torch.Tensor | None) -> Edge:
    kept = scores if floor is None else scores.masked_fill(scores < floor, _NEVER)
    ranked = kept.sort(-1, descending=True).values
    weight = torch.exp(ranked - peak).double()
    total = weight.cumsum(-1)
    wanted = mass.double()[:, None] * total[:, -1:]
    size = ((total - weight < wanted) & (weight > 0)).sum(-1, keepdim=True).clamp(min=1)
    edge = ranked.gather(-1, size - 1)
    equal = ranked == edge
    count = (equal & (torch.arange(ranked.shape[-1]) < size)).sum(-1)
    is_open = mass < 1
    return Edge(edge.masked_fill(~is_open[:, None], _NEVER), count, (equal.sum(-1) > count) & is_open)


class _Scratch(threading.local):
    """Memory that a thread uses again: to get and give back as much for every step takes longer than to fill it."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, torch.Tensor] = {}

    def like(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As large as `tensor` and of its type or another, until the thread asks for one of that type again."""
        dtype = dtype or tensor.dtype
        held = self._held.get(dtype)
        if held is None or held.numel() < tensor.numel():
            with torch.inference_mode(False):  # what is made in that mode could not be used outside of it
                held = self._held[dtype] = torch.empty(tensor.numel(), dtype=dtype)
        return held[: tensor.numel()].view(tensor.shape)


_SCRATCH = _Scratch()


def at_least(scores: torch.Tensor, floor: np.ndarray) -> np.ndarray:
    """Where `scores` `[N, V]` on a processor reach `floor` `[N, 1]`, until the thread asks again."""
    is_kept: np.ndarray = _SCRATCH.like(scores, torch.bool).numpy()
    np.greater_equal(scores.numpy(), floor, out=is_kept)
    return is_kept


def _edge_by_buckets(scores: torch.Tensor, peak: torch.Tensor, mass: torch.Tensor, floor: torch.Tensor | None) -> Edge:
    # The fused kernel takes exponentials on all threads at once, and numpy compares ten times as fast as torch does.
    weights = torch.softmax(scores, -1, out=_SCRATCH.like(scores))
    weight, score, part = weights.numpy(), scores.numpy(), mass.double().numpy()
    if floor is not None:
        weight *= score >= floor.numpy()
    total = weight.sum(-1).astype(np.float64)  # not 1: that kernel adds up naively, which may be off by 2e-5
    rows, vocabulary = weight.shape
    wanted, is_open = part * total, part < 1
    # A hair below (1 - P) / V of the mass, so that no rounding rules out the edge; above all where there is none.
    low = np.where(is_open, (1 - part) * total / vocabulary * 0.999, np.inf).astype(weight.dtype)
    ahead, is_few = np.zeros(rows), True
    found, holds = _likely(weights, _LIKELY * low, wanted)
    if not (holds | ~is_open).all():
        low, high = np.where(holds, _LIKELY * low, low), np.full_like(low, np.inf)
        is_candidate = at_least(weights, low[:, None])
        is_few = bool(np.count_nonzero(is_candidate) <= max(_MANY, _MANY_PART * is_candidate.size))
        if not is_few:
            low, high, ahead = _bracket(weight, part, total, low)
            is_candidate = at_least(weights, low[:, None]) & (weight < high[:, None])
        found = np.flatnonzero(is_candidate)
    counts = np.diff(np.searchsorted(found, np.arange(rows + 1) * vocabulary))
    row = np.repeat(np.arange(rows), counts)
    mine, its_score = weight.ravel()[found].astype(np.float64), score.ravel()[found]

    if len(found) > _FEW:
        # The bucket in which the mass is reached holds few.
        first = np.minimum(counts.cumsum() - counts, len(found) - 1)
        top, bottom = (of.reduceat(its_score, first) for of in (np.maximum, np.minimum))
        buckets = _Buckets(row, its_score, mine, top, bottom, min(vocabulary // _WORDS_A_BUCKET, _MOST_BUCKETS))
        member, ahead = buckets.in_which(wanted, ahead)
        row, its_score, mine = row[member], its_score[member], mine[member]
    edge, count, more = _edge_among(row, its_score, mine, ahead, wanted)
    among = found if is_few and is_open.all() else None
    return Edge(torch.from_numpy(edge)[:, None], torch.from_numpy(count), torch.from_numpy(more), among)


def _likely(weights: torch.Tensor, floor: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of weights from `floor` `[R]` on, and whether these hold a row's nucleus for certain, `[R]`."""
    weight = weights.numpy()
    found = np.flatnonzero(at_least(weights, floor[:, None]))
    row, mine = found // weight.shape[1], weight.ravel()[found]
    # Without those at the floor itself: tokens of equal score may lie on both sides of it, by the rounding of a weight.
    mine[mine < floor[row] * 1.0001] = 0.0
    reached = np.bincount(row, weights=mine, minlength=len(weight))
    return found, (reached >= wanted) & (reached > 0)


class _Buckets:
    """
    The mass of tokens by score, over which they lie more evenly than over probability; the first has the largest.

    Args:
        row, score, mass (`np.ndarray` of shape `[n]`): Of each token.
        top, bottom (`np.ndarray` of shape `[R]`): Between them lie a row's scores, but for rounding.
        count (`int`): How many buckets.
    """

    def __init__(
        self, row: np.ndarray, score: np.ndarray, mass: np.ndarray, top: np.ndarray, bottom: np.ndarray, count: int
    ) -> None:
        self._row, self._count, rows = row, count, len(top)
        scale = count / np.maximum(top - bottom, 1e-6)
        of_row = np.clip((top[row] - score) * scale[row], 0, count - 1).astype(np.int64)
        self._bucket = of_row + row * count
        self._masses = np.bincount(self._bucket, weights=mass, minlength=rows * count).reshape(rows, count)

    def in_which(self, wanted: np.ndarray, ahead: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The tokens of each row's bucket in which `wanted` `[R]` is reached, `ahead` `[R]` being there already; and the
        mass ahead of that bucket.
        """
        rows = np.arange(len(wanted))
        reached = ahead[:, None] + self._masses.cumsum(1)
        last = self._count - 1 - (self._masses[:, ::-1] > 0).argmax(1)
        which = np.minimum((reached < wanted[:, None]).sum(1), last)
        member = np.flatnonzero(self._bucket == (which + rows * self._count)[self._row])
        return member, (reached - self._masses)[rows, which]


def _bracket(
    weight: np.ndarray, part: np.ndarray, total: np.ndarray, low: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights `[R]` between which each row's edge lies for certain, and the mass from the upper one on."""
    sample = -np.sort(-weight[:, ::_STRIDE], axis=-1)
    share = sample.cumsum(-1, dtype=np.float64)
    share /= np.maximum(share[:, -1:], np.finfo(np.float64).tiny)
    ranked = np.concatenate([sample, np.zeros_like(low)[:, None]], axis=1)
    guesses: list[tuple[np.ndarray, np.ndarray]] = []
    for wanted in (part + _MARGIN, part - _MARGIN):
        guess = np.take_along_axis(ranked, (share < wanted[:, None]).sum(1, keepdims=True), 1)
        reached = np.einsum("ij,ij->i", weight, (weight >= guess).astype(weight.dtype)).astype(np.float64)
        guesses.append((guess[:, 0], reached))
    (below, with_below), (above, with_above) = guesses
    slack = 1e-5 * total
    wanted = part * total
    low = np.where(with_below >= wanted + slack, np.maximum(below, low), low)
    is_above = with_above < wanted - slack
    return low, np.where(is_above, above, np.inf).astype(low.dtype), np.where(is_above, with_above, 0.0)


def _edge_among(
    row: np.ndarray, score: np.ndarray, weight: np.ndarray, ahead: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edge, how many of its score to keep, and whether there are more: `[R]` each, from some tokens of each row."""
    order = np.lexsort((-score, row))
    row, score, weight = row[order], score[order], weight[order]
    members = np.bincount(row, minlength=len(wanted))
    starts = members.cumsum() - members
    before = weight.cumsum() - weight
    first = starts[row]
    is_inside = (ahead[row] + before - before[first] < wanted[row]) | (np.arange(len(row)) == first)
    size = np.bincount(row, weights=is_inside, minlength=len(wanted)).astype(np.int64)
    edge = np.full(len(wanted), _NEVER, score.dtype)
    edge[members > 0] = score[(starts + size - 1)[members > 0]]
    is_equal = score == edge[row]
    count = np.bincount(row, weights=is_equal & is_inside, minlength=len(wanted)).astype(np.int64)
    return edge, count, np.bincount(row, weights=is_equal, minlength=len(wanted)) > count


def _edge_by_radix(scores: torch.Tensor, peak: torch.Tensor, mass: torch.Tensor, floor: torch.Tensor | None) -> Edge:
    weights = torch.sub(scores, peak).exp_()
    if floor is not None:
        weights.masked_fill_(scores < floor, 0.0)
    weights = weights.double()
    # Above 0, so that the most likely token is wanted even by P = 0.
    wanted = (mass.double() * weights.sum(-1)).clamp(min=torch.finfo(torch.float64).tiny)
    edge, ahead = _radix_search(scores, weights, wanted)
    equal = scores == edge
    each = (edge - peak).exp().double()[:, 0].clamp(min=torch.finfo(torch.float64).tiny)
    count = ((wanted - ahead) / each).ceil().clamp(min=1, max=scores.shape[-1]).long()
    is_open = mass < 1
    return Edge(edge.masked_fill(~is_open[:, None], _NEVER), count, (equal.sum(-1) > count) & is_open)


def _radix_search(
    scores: torch.Tensor, weights: torch.Tensor | None, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest score `[N, 1]` from which on a row's weights (1 each for `None`) reach `wanted` `[N]`, or the smallest
    that there is, and the weight above it `[N]`, float64. The host waits for nothing.
    """
    bits, integer = (64, torch.int64) if scores.dtype == torch.float64 else (32, torch.int32)
    # IEEE bits are in the order of their numbers, but for the negative ones, which go backwards.
    key = (scores + 0.0).view(integer)
    key = key ^ ((key >> (bits - 1)) & torch.iinfo(integer).max)
    ahead = torch.zeros_like(wanted)
    prefix = torch.zeros_like(key[:, :1])
    of_prefix = torch.ones_like(key, dtype=torch.float64) if weights is None else weights
    for shift in range(bits - 8, -1, -8):
        # The first digit carries the sign.
        digit = ((key >> shift) + 128 if shift == bits - 8 else key >> shift) & 255
        held = wanted.new_zeros(len(wanted), 256).scatter_add_(1, digit.long(), of_prefix)
        from_here = ahead[:, None] + held.flip(-1).cumsum(-1).flip(-1)
        smallest = (held > 0).byte().argmax(-1, keepdim=True)
        chosen = ((from_here >= wanted[:, None]).sum(-1, keepdim=True) - 1).maximum(smallest)
        ahead = (from_here - held).gather(-1, chosen)[:, 0]
        of_prefix = of_prefix * (digit == chosen)
        digit_value = (chosen - 128 if shift == bits - 8 else chosen).to(integer)
        prefix = prefix | (digit_value << shift)
    prefix = prefix ^ ((prefix >> (bits - 1)) & torch.iinfo(integer).max)
    return prefix.view(scores.dtype), ahead
