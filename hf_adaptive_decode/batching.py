"""Continuous batching with an adapter: `generate_batch` and managers of requests; knows no policy's inside."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList

from .budget import ResolvedBudget, resolve_budget
from .capture import is_drafting, listening
from .errors import BudgetError, LogitsError, UnsupportedGenerationError
from .settings import (
    behind_constraints,
    explicit_parameters,
    neutralise,
    refuse_empty_prompts,
    requested_settings,
    wants_adapter,
)

if TYPE_CHECKING:  # what it is once it stands in front of a base's class
    from transformers import PreTrainedModel

    from .request_sampler import RequestSampler

    _Base: Any = PreTrainedModel
else:
    _Base = object

# Of what `generate_batch` takes, that which is no setting.
_HOW = ("continuous_batching_config", "record_timestamps", "progress_bar", "persistent_manager", "warmup")


@dataclass(frozen=True)
class _Asked:
    """What the `generate_batch` call that is going on was asked for: settings, and a token budget for each prompt."""

    requested: dict[str, Any]
    budgets: Sequence[int] | None


_ASKED: ContextVar[_Asked | None] = ContextVar("hf_adaptive_decode_batch", default=None)


class ContinuousBatching(_Base):
    """The part of [`AutoDecoForCausalLM`] that serves transformers' continuous batching."""

    def generate_batch(
        self, inputs: list[list[int]], generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        As `generate_batch` of the base model, but every token is sampled as the adapter decides.

        Args:
            inputs (list of list of `int`): Prompts, as tokens.
            generation_config ([`~transformers.GenerationConfig`], *optional*): What it sets beats the adapter;
                `do_sample=False` makes the call the base model's own.
            args, kwargs: As the base model takes them, and `budget`, as `generate` takes it.

        Returns:
            `dict` of request ids to `GenerationOutput`.

        Raises:
            [`BudgetError`]: If the budget is no positive whole number or does not fit the prompts.
            [`UnsupportedGenerationError`]: If the adapter could not act as trained.
        """
        own = vars(generation_config or self.generation_config)
        given = kwargs.pop("budget", None)
        budget = resolve_budget(given if given is not None else own.get("budget"), len(inputs))
        return self._generate_requests(inputs, generation_config, budget, {}, *args, **kwargs)

    def _generate_requests(
        self,
        inputs: list[list[int]],
        config: GenerationConfig | None,
        budget: ResolvedBudget,
        requested: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        refuse_empty_prompts([len(one) for one in inputs])
        requested = requested or requested_settings(config, {})
        if budget.samples is not None:
            config = copy.deepcopy(config or self.generation_config)
            config.num_return_sequences = budget.samples
        most = kwargs.get("max_new_tokens")
        if budget.longest is not None:
            kwargs["max_new_tokens"] = min(budget.longest, most or budget.longest)
        budgets = None if budget.tokens is None else [min(tokens, most or tokens) for tokens in budget.tokens]
        token = _ASKED.set(_Asked(requested, budgets))
        try:
            return super().generate_batch(inputs, config, *args, **kwargs)
        finally:
            _ASKED.reset(token)
            if not kwargs.get("persistent_manager"):
                for sampler in self.__dict__.pop("_request_samplers", []):
                    sampler.close()

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the base model's; requests are sampled as the adapter decides, with b_t from their `max_new_tokens`."""
        asked = _ASKED.get()
        requested = requested_settings(generation_config, {}) if asked is None else asked.requested
        if not self._adapter_enabled or is_drafting() or not wants_adapter(requested):
            return super().init_continuous_batching(generation_config, *args, **kwargs)
        call = _BatchingCall(self, requested)
        config = copy.deepcopy(generation_config or self.generation_config)
        call.prepare_config(config)
        with listening(call):
            manager = super().init_continuous_batching(config, *args, **kwargs)
        if call.sampler is not None:  # a manager that was kept has its own
            # transformers counts the tensors of its own processors alone.
            manager.logit_processor.tensors_required += call.sampler.tensors_required
            self.__dict__.setdefault("_request_samplers", []).append(call.sampler)
            weakref.finalize(manager, call.sampler.close)
        manager.add_requests = functools.partial(_add_requests, type(manager), weakref.ref(manager))
        return manager

    def generate_paged(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        budget: ResolvedBudget,
        requested: dict[str, Any],
        **kwargs: Any,
    ) -> torch.Tensor:
        """What `generate(..., cache_implementation="paged")` does: `[1, rows, length]`, rows padded on the right."""
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if ids is None:
            raise UnsupportedGenerationError("continuous batching takes `input_ids`; none were given.")
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        how = {name: kwargs.pop(name) for name in _HOW if name in kwargs}
        settings = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
        config, unknown = super()._prepare_generation_config(generation_config, **settings)
        refuse_in_batches(**unknown)
        config.cache_implementation = None
        rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        with torch.no_grad():
            found = self._generate_requests(rows, config, budget, requested, **how)
        failed = [one.error for one in found.values() if one.error is not None]
        if failed or len(found) < len(rows):
            raise LogitsError(failed[0] if failed else "requests were lost; transformers' log says why.")
        texts = [[*one.prompt_ids, *one.generated_tokens] for one in found.values()]
        pad = config.pad_token_id if config.pad_token_id is not None else _first(config.eos_token_id)
        width = max(map(len, texts))
        if pad is None and any(len(text) < width for text in texts):
            raise BudgetError("rows end at different lengths and the model has no pad token: pass `pad_token_id=`.")
        padded = [text + [cast(int, pad)] * (width - len(text)) for text in texts]
        return torch.tensor(padded, device=self.device)[None]


class _BatchingCall:
    """Stands where a `generate` call's session does while transformers makes the processors of a manager."""

    is_adaptive = True

    def __init__(self, model: Any, requested: dict[str, Any]) -> None:
        self._model = model
        self._requested = requested
        self.sampler: RequestSampler | None = None

    def hear(self, hidden: torch.Tensor) -> None:
        """Nothing: requests are decoded in a thread of their own."""

    def prepare_config(self, config: GenerationConfig) -> None:
        """As of a `generate` call."""
        neutralise(config, self._requested)

    def add_processors(self, processors: LogitsProcessorList, config: GenerationConfig, *_: Any) -> LogitsProcessorList:
        """Ours goes behind every constraint and in front of watermark and normalisation."""
        from .request_sampler import RequestSampler

        explicit = explicit_parameters(self._requested)
        self.sampler = RequestSampler(self._model, explicit, config.num_return_sequences or 1)
        place = behind_constraints(processors, config)
        return LogitsProcessorList([*processors[:place], *self.sampler.processors, *processors[place:]])


def refuse_in_batches(**given: Any) -> None:
    """Raises [`UnsupportedGenerationError`] if something was given that continuous batching has no place for."""
    for name, value in given.items():
        if value is not None:
            raise UnsupportedGenerationError(
                f"continuous batching has no `{name}`; leave it out, or generate without continuous batching."
            )


def _add_requests(kind: Any, manager: Any, inputs: list[list[int]], *args: Any, **kwargs: Any) -> list[str]:
    """The manager's own `add_requests`, but with the budget of each where the call gave one a prompt."""
    asked = _ASKED.get()
    if asked is None or asked.budgets is None or len(set(asked.budgets)) == 1:
        return cast(list[str], kind.add_requests(manager(), inputs, *args, **kwargs))
    ids: list[str] = []
    for one, budget in zip(inputs, asked.budgets, strict=True):
        ids += kind.add_requests(manager(), [one], *args, **{**kwargs, "max_new_tokens": budget})
    return ids


def _first(ids: Any) -> int | None:
    first: int | None = ids[0] if isinstance(ids, list) else ids
    return first
