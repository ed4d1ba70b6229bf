r"""
A row of logits as a few hundred numbers, from which its soft top-p loss can be had at any T and P; it knows logits and
targets, no loss and no file.

With `x = l - max l`, a row is kept as

| what | numbers | right to |
|---|---|---|
| its `KEPT` largest x, in order | 128 | float32 |
| the rest, the tail: 16 segments of `d = x_K - x`, where x_K is the last kept | 96 | 1e-5 of the tail's mass |
| the part of the target's segment that ranks no lower than the target, where that is in the tail | 6 | the same |
| the target's x, its place, `log softmax(l)_y` and whether it is the argmax | 4 | float32 |

A segment's tokens are replaced by weights on 6 fixed nodes, by Lagrange interpolation: `sum_k n_k f(d_k)` over the
nodes is `sum f(d)` over the tokens for every polynomial f of degree 5, and almost so for `exp(-d / T)`. Segments are as
wide as `sqrt(d)`, since the deeper a token lies, the higher is the temperature at which it still counts. Deeper than
`DEPTH` a token holds less than 1e-13 of the mass at any T up to `LARGEST_TEMPERATURE`, and is left out.

The weights need no sort: tokens are counted in 32,768 bins first, and a matrix turns counts into weights. Where in its
bin a token lies averages out over hundreds of values. Only a tail of a handful of values, as no model has, may be off
by a few 1e-4 of its mass, and a loss by some 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch

from ..blocks import LARGE_BLOCK, rows_at_once
from ..nucleus import largest

# Part of a stored sketch's identity: raise it whenever a field or a constant here changes its meaning.
SKETCH_VERSION = 1

KEPT = 128
SEGMENTS, NODES = 16, 6
LARGEST_TEMPERATURE = 2.0
DEPTH = 30.0 * LARGEST_TEMPERATURE

_FINE = 2048  # bins a segment
_BINS = SEGMENTS * _FINE
_DEEPEST = -1e4  # stands for -inf: its probability underflows to 0 at any allowed T
_UNIT_NODES = (np.polynomial.legendre.leggauss(NODES)[0] + 1.0) / 2.0


@dataclass(frozen=True)
class Sketch:
    """What is kept of N rows of logits and their targets."""

    # the largest x, descending from 0, float32 [N, KEPT]; -1e4 stands for -inf and for what a small vocabulary lacks
    top: torch.Tensor
    # weights of the tail's nodes, float32 [N, SEGMENTS, NODES]; single ones may be negative
    tail: torch.Tensor
    # weights of the tokens in the target's segment that rank no lower than it, on the nodes of a segment that ends at
    # the target, float32 [N, NODES]; 0 where it is kept
    part: torch.Tensor
    # x_y, float32 [N]
    target: torch.Tensor
    # log softmax(l)_y, float32 [N]
    base_log_prob: torch.Tensor
    # the target's rank if it is kept, else KEPT + its segment, int16 [N]
    place: torch.Tensor
    # whether the target is the argmax, of tied maxima the one of the lowest id, uint8 [N]
    easy: torch.Tensor

    def __getitem__(self, rows: torch.Tensor | slice) -> Sketch:
        return Sketch(**{field.name: vars(self)[field.name][rows] for field in fields(self)})

    def to(self, device: torch.device) -> Sketch:
        """The same on another device."""
        return Sketch(**{field.name: vars(self)[field.name].to(device) for field in fields(self)})


# What a row's fields are: dtype and shape behind the row.
SKETCH_FIELDS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "top": (torch.float32, (KEPT,)),
    "tail": (torch.float32, (SEGMENTS, NODES)),
    "part": (torch.float32, (NODES,)),
    "target": (torch.float32, ()),
    "base_log_prob": (torch.float32, ()),
    "place": (torch.int16, ()),
    "easy": (torch.uint8, ()),
}


@torch.no_grad()
def sketch_rows(logits: torch.Tensor, targets: torch.Tensor) -> Sketch:
    r"""
    The sketches of rows of logits.

    Args:
        logits (`torch.Tensor` of shape `[N, V]`, any floating dtype): Without NaN, +inf or a row that is all -inf.
        targets (`torch.Tensor` of shape `[N]`, long): Token ids y, of finite logits.

    Returns:
        [`Sketch`] of N rows, on the logits' device.
    """
    rows, vocab = logits.shape
    size = rows_at_once(logits, LARGE_BLOCK, _BINS)
    work = torch.empty(3, min(size, rows), vocab, device=logits.device)
    # Counts times weights are no work for the precision that a model may run in.
    with torch.autocast(logits.device.type, enabled=False):
        parts = [_block(logits[i : i + size], targets[i : i + size], work) for i in range(0, max(rows, 1), size)]
    return concatenated(parts)


def concatenated(parts: list[Sketch]) -> Sketch:
    """Sketches behind each other."""
    return Sketch(**{name: torch.cat([vars(part)[name] for part in parts]) for name in SKETCH_FIELDS})


def node_depths(device: torch.device) -> torch.Tensor:
    """The d of the tail's nodes, float64 `[SEGMENTS, NODES]`."""
    return _tables(device)[0]


def border_depths(device: torch.device) -> torch.Tensor:
    """The d of the segments' borders, float64 `[SEGMENTS + 1]`."""
    return DEPTH * (torch.arange(SEGMENTS + 1, device=device, dtype=torch.float64) / SEGMENTS) ** 2


def _block(logits: torch.Tensor, targets: torch.Tensor, work: torch.Tensor) -> Sketch:
    n, vocab = logits.shape
    rows = work[0, :n].copy_(logits)
    top = largest(rows, min(KEPT, vocab))
    maximum = top[:, :1]
    last = top[:, -1:].maximum(maximum + _DEEPEST)
    own = rows.gather(1, targets.unsqueeze(1))
    rank = _rank(rows, targets, own, top)
    counts = _counts(rows, last, work[1, :n], work[2, :n].view(torch.int32))
    in_top = (top >= last).sum(dim=1)
    counts[:, 0, 0] -= in_top  # as all of them stand in the first bin
    tail = torch.matmul(counts.transpose(0, 1), _tables(rows.device)[1]).transpose(0, 1)

    place, part = rank, rows.new_zeros(n, NODES)
    chosen = (rank >= top.shape[1]).nonzero().squeeze(1)
    if chosen.numel():
        depth = (last - own)[chosen].squeeze(1)
        up_to = (rank + 1 - in_top)[chosen]
        segment, part[chosen] = _part_weights(counts[chosen], depth, up_to)
        place = rank.index_copy(0, chosen, KEPT + segment)
    kept = rows.new_full((n, KEPT), _DEEPEST)
    kept[:, : top.shape[1]] = (top - maximum).clamp_(min=_DEEPEST)
    target = (own - maximum).squeeze(1)
    tail_mass = tail * (kept[:, -1:, None] - node_depths(rows.device)).exp_()
    base = target - (kept.double().exp_().sum(dim=1) + tail_mass.sum(dim=(1, 2))).log()
    return Sketch(kept, tail, part, target, base.float(), place.to(torch.int16), (rank == 0).to(torch.uint8))


def _equal(rows: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column of every element that equals its row's value; a row's come together."""
    if rows.device.type == "cpu":
        # numpy compares and finds ten times faster than torch does on a processor.
        found = torch.from_numpy(np.flatnonzero(rows.numpy() == values.numpy()))
    else:
        found = (rows == values).view(-1).nonzero().squeeze(1)
    row = torch.div(found, rows.shape[1], rounding_mode="floor")
    return row, found - row * rows.shape[1]


def _rank(rows: torch.Tensor, targets: torch.Tensor, own: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """How many tokens rank above the target, long `[R]`; tied ones do by a lower id."""
    rank = (top > own).sum(dim=1)
    for row in (own < top[:, -1:]).squeeze(1).nonzero().squeeze(1).tolist():
        rank[row] = (rows[row] > own[row]).sum()
    chosen = (((top == own).sum(dim=1) > 1) | (own <= top[:, -1:]).squeeze(1)).nonzero().squeeze(1)
    if chosen.numel():
        row, column = _equal(rows[chosen], own[chosen])
        rank[chosen] += torch.bincount(row[column < targets[chosen][row]], minlength=chosen.numel())
    return rank


def _counts(rows: torch.Tensor, last: torch.Tensor, depth: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """How many tokens each bin has, float32 `[R, SEGMENTS, _FINE]`; those above `last` count in the first."""
    bins.copy_(_binned(torch.sub(last, rows, out=depth)))
    if rows.device.type == "cpu":
        found = torch.stack([torch.bincount(row, minlength=_BINS + 1)[:_BINS].float() for row in bins.unbind(0)])
    else:
        start = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32).unsqueeze(1) * (_BINS + 1)
        found = torch.bincount(bins.add_(start).view(-1), minlength=rows.shape[0] * (_BINS + 1))
        found = found.view(rows.shape[0], _BINS + 1)[:, :_BINS].float()
    return found.view(rows.shape[0], SEGMENTS, _FINE)


def _binned(depth: torch.Tensor) -> torch.Tensor:
    """The bin of each d, in its place; from `_BINS` on one is too deep to count."""
    return depth.clamp_(min=0.0, max=DEPTH).sqrt_().mul_(_BINS / DEPTH**0.5)


def part_depths(segment: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """The d of the nodes of the part of a segment `[R]` that ends at `depth` `[R]`: float64 `[R, NODES]`."""
    low = border_depths(depth.device)[segment].unsqueeze(1)
    points = torch.from_numpy(_UNIT_NODES).to(depth.device)
    return low + (depth.unsqueeze(1) - low).clamp(min=0.0) * points


def _part_weights(counts: torch.Tensor, depth: torch.Tensor, up_to: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The segments of targets at `depth` `[R]`, and the weights of [`part_depths`], float32 `[R, NODES]`, for tokens
    counted in `[R, SEGMENTS, _FINE]`, of which `up_to` `[R]` rank no lower than the target.
    """
    own = _binned(depth.clone()).long().clamp_(max=_BINS - 1).unsqueeze(1)
    segment = own.squeeze(1) // _FINE
    above = counts.flatten(1) * (torch.arange(_BINS, device=own.device) < own)
    above.scatter_(1, own, (up_to - above.sum(dim=1)).clamp(min=0.0).unsqueeze(1))
    above = above.view_as(counts)[torch.arange(len(segment), device=own.device), segment]

    low = border_depths(depth.device)[segment].unsqueeze(1)
    at = _middles(depth.device).view(SEGMENTS, _FINE)[segment] - low
    at = (at / (depth.double().unsqueeze(1) - low).clamp(min=1e-12)).clamp_(0.0, 1.0)
    power, moments = above.double(), []
    for _ in range(NODES):
        moments.append(power.sum(dim=1))
        power = power * at
    inverse = torch.from_numpy(np.linalg.inv(np.vander(_UNIT_NODES, NODES, increasing=True).T)).to(depth.device)
    return segment, (torch.stack(moments, dim=1) @ inverse.t()).float()


@lru_cache(maxsize=8)
def _middles(device: torch.device) -> torch.Tensor:
    """The d in the middle of each bin, float64 `[_BINS]`."""
    edges = DEPTH * (torch.arange(_BINS + 1, device=device, dtype=torch.float64) / _BINS) ** 2
    return (edges[1:] + edges[:-1]) / 2


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The nodes' d, float64 `[SEGMENTS, NODES]`; the weights of a token in each bin, `[SEGMENTS, _FINE, NODES]`."""
    edges = border_depths(torch.device("cpu")).numpy()
    depths = edges[:-1, None] + np.diff(edges)[:, None] * _UNIT_NODES
    at = _middles(torch.device("cpu")).numpy().reshape(SEGMENTS, _FINE)
    matrix = np.empty((SEGMENTS, _FINE, NODES))
    for k in range(NODES):
        others = np.delete(depths, k, axis=1)[:, None, :]
        matrix[:, :, k] = np.prod((at[:, :, None] - others) / (depths[:, k, None, None] - others), axis=2)
    return torch.from_numpy(depths).to(device), torch.from_numpy(matrix).float().to(device)
