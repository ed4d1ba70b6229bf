"""Key-value caches whose rows come and go: they grow in place, and rows of one take places in another; knows no model.

Rows lie left-padded, so all end at the same column, and a column that every row pads can be cut off at the left.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Columns that a layer makes room for whenever it has none left.
_SPARE = 32
# Layers that hold keys and values by column, or nothing (those that read another's). By name: not every version of
# transformers has all of them.
_MERGING = {"GrowingLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of full attention that writes behind its end, where transformers' copies all of itself at each step."""

    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None
    _end = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[N, heads, length, D]`, and gives all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        length, new = self.keys.shape[-2], key_states.shape[-2]
        if self._rooms is None or self._end + new > self._rooms[0].shape[-2]:
            self._rooms = (_with_room(self.keys, new), _with_room(self.values, new))
            self._end = length
        end = self._end + new
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, self._end : end] = states
        self.keys, self.values = (room[:, :, self._end - length : end] for room in self._rooms)
        self._end = end
        return self.keys, self.values

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Goes on with other tensors."""
        self.keys, self.values, self._rooms = keys, values, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Goes on with some of the rows."""
        super().reorder_cache(beam_idx)
        self._rooms = None


def _with_room(states: torch.Tensor, new: int) -> torch.Tensor:
    rows, heads, length, width = states.shape
    room = states.new_empty(rows, heads, length + new + _SPARE, width)
    room[:, :, :length] = states
    return room


def new_cache(config: Any) -> Any:
    """An empty cache for a model with `config`."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_merge(cache: Any) -> bool:
    """Whether every layer keeps keys and values by column alone: no recurrent state, no index of its own."""
    return all(type(layer).__name__ in _MERGING for layer in cache.layers)


def copy_rows(cache: Any, rows: torch.Tensor) -> Any:
    """Another cache, of `rows` (indices)."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    other.reorder_cache(rows)
    return other


def take_places(cache: Any, places: torch.Tensor, other: Any, rows: torch.Tensor, width: int) -> None:
    """
    `rows` of `other` take the `places` of rows of `cache`.

    Args:
        cache, other: Caches of one model, `cache` at most `width` columns wide and `other` at most that.
        places, rows (`torch.Tensor` of shape `[M]`, `torch.long`): Which, and of which rows.
        width (`int`): Columns that `cache` then has.
    """
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if theirs.keys is None:
            continue
        kept = _kept(mine, width)
        parts = []
        for old, new in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            whole = _padded(old, kept)
            # Zeros, too, go over what was there: a row that broke down would else be 0 · NaN to its successor.
            whole[places.to(whole.device)] = _padded(new[rows.to(new.device)], kept)
            parts.append(whole)
        keys, values = parts
        _hold(mine, keys, values, width)


def trim(cache: Any, width: int) -> None:
    """Keeps the last `width` columns."""
    for layer in cache.layers:
        if layer.keys is None:
            continue
        kept = _kept(layer, width)
        keys, values = (states[:, :, states.shape[-2] - kept :] for states in (layer.keys, layer.values))
        if not kept:  # let the memory go
            _hold(layer, keys.clone(), values.clone(), width)
        elif isinstance(layer, GrowingLayer):  # the room behind the end stays
            layer.keys, layer.values = keys, values
        else:
            _hold(layer, keys, values, width)


def _kept(layer: Any, width: int) -> int:
    """Columns that a layer keeps of `width`: a sliding window needs no more than the next token will see."""
    return width if isinstance(layer, GrowingLayer) else min(width, layer.sliding_window - 1)


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - states.shape[-2]
    return F.pad(states, (0, 0, missing, 0)) if missing > 0 else states


def _hold(layer: Any, keys: torch.Tensor, values: torch.Tensor, width: int) -> None:
    if isinstance(layer, GrowingLayer):
        if keys is not layer.keys:
            layer.hold(keys, values)
    else:
        layer.keys, layer.values, layer.cumulative_length = keys, values, width
