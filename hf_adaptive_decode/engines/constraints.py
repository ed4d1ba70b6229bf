"""What a base's own generation config does to logits besides sampling, for rows of different lengths in one batch;
knows logits processors, nothing of caches or policies.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

# Processors to which neither a prompt's length nor the padding to its left matters.
_LENGTHLESS = (InfNanRemoveLogitsProcessor, LogitNormalization, SuppressTokensLogitsProcessor)
# Rows (all of them if `None`), the column where their texts begin, and what constrains them.
Group = tuple[torch.Tensor | None, int, LogitsProcessorList]


class Constraints:
    """
    The base's constraints (a repetition penalty, a least length). Its processors take one length of prompt for all of
    a batch and its padding as text, so rows go to them in groups of equal prompts and texts, each without its padding.

    Args:
        model ([`~transformers.PreTrainedModel`]): Whose generation config says what they are.

    Attributes:
        found (`LogitsProcessorList`): The processors for a prompt of one token.
        any (`bool`): Whether there are any.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._config = copy.deepcopy(model.generation_config)
        self._config.do_sample, self._config.num_beams = False, 1
        self._config.forced_eos_token_id = None  # it is forced at the one length of all rows; here each has its own
        model._prepare_special_tokens(self._config, kwargs_has_attention_mask=True, device=model.device)
        self.found = self._processors(torch.ones(1, 1, dtype=torch.long, device=model.device), 1)
        self.any = bool(self.found)
        self._grouped = not all(map(_is_lengthless, self.found))

    def group(self, mask: torch.Tensor, prompt_tokens: torch.Tensor) -> list[Group]:
        """
        Rows that can be constrained together.

        Args:
            mask (`torch.Tensor` of shape `[N, W]`): 0 on the padding to the left of each text.
            prompt_tokens (`torch.Tensor` of shape `[N]`, `torch.long`): How many of the text are the prompt's.
        """
        if not self._grouped:
            return [(None, 0, self._processors(mask, mask.shape[1]))]
        kinds = torch.stack([(mask != 0).int().argmax(1), prompt_tokens])
        distinct, kind = kinds.unique(dim=1, return_inverse=True)
        groups: list[Group] = []
        for number, (start, tokens) in enumerate(distinct.T.tolist()):
            rows = (kind == number).nonzero().squeeze(-1)
            groups.append((rows, start, self._processors(mask.new_ones(len(rows), tokens), tokens)))
        return groups

    @staticmethod
    def apply(groups: list[Group], ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Constrained logits `[N, V]`, `torch.float32`, of rows whose texts are `ids` `[N, W]`."""
        logits = logits.float()
        if groups[0][0] is None:
            return cast(torch.Tensor, groups[0][2](ids, logits))
        found = torch.empty_like(logits)
        for rows, start, processors in groups:
            found[rows] = processors(ids[rows, start:], logits[rows])
        return found

    def _processors(self, mask: torch.Tensor, prompt_tokens: int) -> LogitsProcessorList:
        return self._model._get_logits_processor(
            self._config,
            input_ids_seq_length=prompt_tokens,
            device=str(self._model.device),
            model_kwargs={"attention_mask": mask},
        )


def _is_lengthless(processor: object) -> bool:
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        return processor.prompt_ignore_length is not None  # then it leaves the padding out by itself
    return isinstance(processor, _LENGTHLESS)
