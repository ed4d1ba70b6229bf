"""What engines have in common that take one configuration a request: who decides it, and what comes back; knows vLLM's
parameters by name, no client of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import BudgetError
from ..policies import DecodingPolicy
from ..types import SamplingParameters
from .base import Completion
from .deciding import decide_first
from .engine import Engine
from .prompts import special_tokens
from .records import OFF, Decisions, Rows
from .vllm_settings import constrained_as, route

_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class PerRequestEngine(Engine):
    """An engine whose own sampler draws by one configuration a request, decided here where a policy decides it."""

    def _why_not(self, policy: DecodingPolicy) -> str | None:
        return constrained_as(self.model)[1] or route(policy, self._has_plugin)[1]

    @property
    def _has_plugin(self) -> bool:
        """Whether policies may decide where the requests are run."""
        return False

    def _finished(self, policy: DecodingPolicy, rows: Rows) -> Iterator[tuple[list[int], list[Completion]]]:
        parameters, _ = self._decide(policy, rows)
        traces = _by_row(parameters)
        for tokens in self._run(rows, [self._settings_of(trace) for trace in traces]):
            yield list(tokens), self._completions(tokens, {row: traces[row] for row in tokens})

    def _recorded(self, policy: DecodingPolicy, rows: Rows) -> tuple[list[Completion], Decisions | None]:
        found: dict[int, Completion] = {}
        parameters, decisions = self._decide(policy, rows)
        for tokens in self._run(rows, [self._settings_of(trace) for trace in _by_row(parameters)]):
            found |= zip(tokens, self._completions(tokens), strict=True)
        return [found[row] for row in range(len(rows.keys))], decisions

    @abstractmethod
    def _run(self, rows: Rows, settings: Sequence[dict[str, Any]]) -> Iterator[dict[int, list[int]]]:
        """Tokens of rows that have ended, by number; `settings` are each row's own, besides [`~_limits`]."""

    def _decide(self, policy: DecodingPolicy, rows: Rows) -> tuple[SamplingParameters, Decisions | None]:
        policy.warn_beyond(int(rows.token_budget.max()), int(rows.parallel_samples.max()))
        pad = special_tokens(self.model, self.tokenizer)["pad"]
        return decide_first(self.model, policy, rows, pad, self.batch_rows)

    def _settings_of(self, parameters: SamplingParameters) -> dict[str, Any]:
        """One row's settings, for vLLM's own sampler."""
        given = {name: vars(parameters)[name] for name in _OFF}
        return {name: off if given[name] is None else given[name].item() for name, off in _OFF.items()}

    def _limits(self, budget: int, key: int) -> dict[str, Any]:
        """When a row ends, what constrains it, and its random numbers."""
        constraints = constrained_as(self.model)[0]
        if "min_tokens" in constraints:
            constraints["min_tokens"] = min(constraints["min_tokens"], budget)
        ends = sorted(special_tokens(self.model, self.tokenizer)["ends"])
        return {"max_tokens": budget, "seed": key, "stop_token_ids": ends, "ignore_eos": True, **constraints}

    def _completions(
        self, tokens: dict[int, list[int]], parameters: dict[int, SamplingParameters] | None = None
    ) -> list[Completion]:
        """Of the rows of `tokens`, with what they were sampled with, if that is to be kept."""
        ends = special_tokens(self.model, self.tokenizer)["ends"]
        texts = self.tokenizer.batch_decode(list(tokens.values()), skip_special_tokens=True)
        return [
            Completion(
                text, tuple(ids), ids[-1] in ends, **({} if parameters is None else _columns(parameters[row], len(ids)))
            )
            for text, (row, ids) in zip(texts, tokens.items(), strict=True)
        ]


def check_lengths(rows: Rows, longest: int) -> None:
    """Raises [`BudgetError`] if vLLM would cut a row off before its budget."""
    lengths = torch.tensor([len(prompt) for prompt in rows.prompts], device=rows.prompt.device)
    needed = int((lengths[rows.prompt] + rows.token_budget).max())
    if needed > longest:
        raise BudgetError(
            f"a prompt and its token budget are {needed} tokens long, and vLLM's `max_model_len` is {longest}; lower "
            "the budget, or pass a larger `max_model_len` to the engine."
        )


def _by_row(parameters: SamplingParameters) -> list[SamplingParameters]:
    """One for each row, fields of shape `[1]`."""
    columns = {name: value for name, value in vars(parameters).items() if value is not None}
    rows = len(next(iter(columns.values())))
    return [SamplingParameters(**{n: v[row : row + 1] for n, v in columns.items()}) for row in range(rows)]


def _columns(parameters: SamplingParameters, length: int) -> dict[str, np.ndarray]:
    """What [`Completion`] keeps of each token; fields of shape `[1]` hold for all of them."""
    found = {}
    for name in ("temperature", "top_p", "action"):
        value = vars(parameters)[name]
        if value is None and name == "action":
            continue
        column = torch.full((1,), OFF[name]) if value is None else value.cpu()
        found[name] = (column.expand(length) if len(column) == 1 else column[:length]).numpy().copy()
    return found
