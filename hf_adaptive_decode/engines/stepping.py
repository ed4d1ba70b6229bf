"""A causal model called token by token for a batch whose rows may be repeated or dropped; knows caches and masks,
nothing of policies or sampling.
"""

from __future__ import annotations

import copy
import inspect
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from ..tap import HiddenStateTap, mean_over_prompt


class SteppedModel:
    """
    A context manager around one batch: prefill, then steps.

    Models without a key-value cache of transformers' kind (Mamba's, say) read their whole text anew at every step.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode.
        pools_prompt (`bool`): Whether the mean of the prompt's hidden states is wanted.
    """

    def __init__(self, model: PreTrainedModel, pools_prompt: bool = False) -> None:
        self._model = model
        self._tap = HiddenStateTap(model, keeps_all=pools_prompt)
        self._takes = inspect.signature(model.forward).parameters
        self._pools_prompt = pools_prompt
        self._cache = None
        if "past_key_values" in self._takes:
            self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._constraints = LogitsProcessorList()
        self.prompt_mean: torch.Tensor | None = None

    def __enter__(self) -> SteppedModel:
        self._tap.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tap.close()

    def prefill(self, prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Reads prompts, padded on the left.

        Returns:
            Hidden states `[N, H]` and logits `[N, V]` that predict each row's first new token.
        """
        width = max(map(len, prompts))
        device = self._model.device
        self.ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        self._mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self._width = width
        self._constraints = _constraints(self._model, self._mask)
        hidden, logits = self._forward(self.ids)
        if self._pools_prompt:
            self.prompt_mean = mean_over_prompt(self._tap.every_position(), self._mask)
        return hidden, logits

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with `rows` (indices, repeats allowed) of the batch: Appendix D.1's shrinking, and its opposite."""
        if self._cache is not None:
            self._cache.reorder_cache(rows)
        self.ids, self._mask = self.ids[rows], self._mask[rows]
        if self._constraints:
            self._constraints = _constraints(self._model, self._mask[:, : self._width])
        if self.prompt_mean is not None:
            self.prompt_mean = self.prompt_mean[rows.to(self.prompt_mean.device)]

    def step(self, tokens: torch.Tensor, going: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `tokens` `[N]`, and returns as [`~prefill`] does; rows not `going` `[N]` stand still."""
        column = tokens[:, None].to(self.ids.device)
        self.ids = torch.cat([self.ids, column], dim=1)
        # A row that has ended takes no further position: the model's table may end with it.
        self._mask = torch.cat([self._mask, going[:, None].to(column)], dim=1)
        return self._forward(column if self._cache is not None else self.ids)

    def _forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask, "use_cache": self._cache is not None}
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        if "position_ids" in self._takes:
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes and not self._pools_prompt:
            inputs["logits_to_keep"] = 1
        logits = self._model(**inputs).logits[:, -1]
        if self._constraints:
            logits = self._constraints(self.ids, logits.float())
        return self._tap.last_position(), logits


def _constraints(model: PreTrainedModel, prompt_mask: torch.Tensor) -> LogitsProcessorList:
    """What the base's own generation config does to logits besides sampling (a repetition penalty, say)."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.num_beams = False, 1
    config.forced_eos_token_id = None  # it is forced at the one length of all rows, and here each has its own
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    return model._get_logits_processor(
        config,
        input_ids_seq_length=prompt_mask.shape[1],
        device=str(model.device),
        model_kwargs={"attention_mask": prompt_mask},
    )
