"""A causal model called token by token for a batch whose rows come and go; knows caches and masks, nothing of policies
or sampling.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..tap import HiddenStateTap, mean_over_prompt
from .caches import can_merge, copy_rows, new_cache, take_places, trim
from .constraints import Constraints, Group


@dataclass
class Read:
    """
    What a model has read of `N` rows, and what it goes on from. All rows end at the last of `W` columns.

    Args:
        ids, mask (`torch.Tensor` of shape `[N, W]`, `torch.long`): The texts, and 0 where they are padded.
        lengths, prompt_tokens (`torch.Tensor` of shape `[N]`, `torch.long`): Tokens of the text, and of its prompt.
        cache (*optional*): Keys and values.
        groups (*optional*): The rows as their constraints group them, while nothing changed.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    prompt_tokens: torch.Tensor
    cache: Any = None
    groups: list[Group] | None = None

    def select(self, rows: torch.Tensor) -> Read:
        """`rows` (indices, repeats allowed) of it, the cache a copy."""
        cache = None if self.cache is None else copy_rows(self.cache, rows)
        return Read(self.ids[rows], self.mask[rows], self.lengths[rows], self.prompt_tokens[rows], cache)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with `rows` (indices, repeats allowed): Appendix D.1's shrinking, and its opposite."""
        cache, self.cache = self.cache, None
        if cache is not None:
            cache.reorder_cache(rows)
        vars(self).update(vars(self.select(rows)), cache=cache)

    def take(self, places: torch.Tensor, other: Read, rows: torch.Tensor) -> None:
        """`rows` of `other` (indices) take `places`; both may be the narrower one."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        take_places(self.cache, places, other.cache, rows, width)
        for name in ("ids", "mask"):
            mine, theirs = (
                F.pad(column, (width - column.shape[1], 0)) for column in (vars(self)[name], vars(other)[name])
            )
            mine[places] = theirs[rows]
            setattr(self, name, mine)
        self.lengths[places] = other.lengths[rows]
        self.prompt_tokens[places] = other.prompt_tokens[rows]
        self.groups = None

    def vacate(self, places: torch.Tensor) -> None:
        """Lets the texts of `places` go, and with them the columns at the left that no other row needs."""
        self.mask[places] = 0
        self.trim()

    def trim(self) -> None:
        """Cuts off the columns at the left that are padding for every row."""
        used = self.mask.any(0).nonzero()
        start = int(used[0]) if len(used) else self.mask.shape[1]
        if start:
            self.ids, self.mask = self.ids[:, start:], self.mask[:, start:]
            trim(self.cache, self.ids.shape[1])
            self.groups = None

    def append(self, tokens: torch.Tensor, going: torch.Tensor) -> None:
        """One token a row `[N]`; rows not `going` `[N]` are padded."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        # A row that has ended takes no further position: the model's table may end with it.
        self.mask = torch.cat([self.mask, going[:, None].to(self.mask)], dim=1)
        self.lengths = self.lengths + going


class SteppedModel:
    """
    A context manager around one call: prompts are read, and the batch of rows made of them takes steps.

    Models without a key-value cache of transformers' kind (Mamba's, say) read their whole text anew at every step.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode.
        pad (`int`): Fills the left of shorter prompts.
        pools_prompt (`bool`): Whether the mean of the prompt's hidden states is wanted.
    """

    def __init__(self, model: PreTrainedModel, pad: int, pools_prompt: bool = False) -> None:
        self._model, self._pad, self._pools_prompt = model, pad, pools_prompt
        self._tap = HiddenStateTap(model, keeps_all=pools_prompt)
        self._takes = inspect.signature(model.forward).parameters
        self._config = model.config.get_text_config(decoder=True)
        self._constraints = Constraints(model)
        self._caches = "past_key_values" in self._takes
        self.device = model.device
        # Whether rows of one batch can enter another; else they enter together.
        self.merges = self._caches and can_merge(new_cache(self._config))

    def __enter__(self) -> SteppedModel:
        self._tap.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tap.close()

    def read(self, prompts: list[list[int]]) -> tuple[Read, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Reads prompts.

        Returns:
            What was read, hidden states `[N, H]` and logits `[N, V]` that predict each row's first new token, and, if
            they are wanted, the means `[N, H]` of the prompts' hidden states.
        """
        lengths = list(map(len, prompts))
        width = max(lengths)
        ids = torch.tensor([[self._pad] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=self.device)
        counts = torch.tensor(lengths, device=self.device)
        read = Read(ids, mask, counts, counts.clone(), new_cache(self._config) if self._caches else None)
        hidden, logits = self._forward(read, ids, (mask.cumsum(-1) - 1).clamp(min=0))
        mean = mean_over_prompt(self._tap.every_position(), mask) if self._pools_prompt else None
        return read, hidden, logits, mean

    def step(self, read: Read, tokens: torch.Tensor, going: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `tokens` `[N]`; hidden states and logits as [`~read`] gives them. Rows not `going` stand still."""
        read.append(tokens, going)
        if read.cache is not None:
            return self._forward(read, tokens[:, None], (read.lengths - 1)[:, None])
        return self._forward(read, read.ids, (read.mask.cumsum(-1) - 1).clamp(min=0))

    def _forward(self, read: Read, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": read.mask, "use_cache": self._caches}
        if self._caches:
            inputs["past_key_values"] = read.cache
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._takes and not self._pools_prompt:
            inputs["logits_to_keep"] = 1
        logits = cast(torch.Tensor, self._model(**inputs).logits[:, -1])
        if self._constraints.any:
            if read.groups is None:
                read.groups = self._constraints.group(read.mask, read.prompt_tokens)
            logits = Constraints.apply(read.groups, read.ids, logits)
        return self._tap.last_position(), logits
