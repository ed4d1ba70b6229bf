"""What one `generate` call of an adaptive model keeps: budget, hook, processor, trace; knows no policy's inside."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import LogitNormalization
from transformers.utils import ModelOutput

from .budget import ResolvedBudget
from .errors import BudgetError, UnsupportedGenerationError
from .policies import DecodingPolicy
from .sampler import AdaptiveSamplerLogitsProcessor
from .tap import HiddenStateTap, mean_over_prompt
from .types import DecodingTrace, SamplingParameters
from .warping import check_scalars

_WARPED_HERE = ("temperature", "top_k", "top_p", "min_p")
# transformers' other warpers, switched off unless the caller asked for them.
_OTHER_WARPERS = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Modes in which a row's scores and the tapped hidden state would not belong together.
_REFUSED = {
    "assistant_model": "assisted generation",
    "prompt_lookup_num_tokens": "prompt lookup",
    "assistant_early_exit": "assisted generation",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "force_words_ids": "constrained beam search",
    "constraints": "constrained beam search",
}


def requested_settings(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the caller of `generate` set, by keyword or `generation_config`; the model's own config is not asked."""
    own = {} if generation_config is None else generation_config.to_dict()
    asked = {name: value for name, value in {**own, **kwargs}.items() if value is not None}
    if asked.get("do_sample") is True and asked.get("temperature") == 0:
        # transformers refuses the pair. Evaluation harnesses pass it where a task samples and names no temperature.
        del asked["temperature"]
    return asked


def wants_adapter(requested: dict[str, Any]) -> bool:
    """Whether a call samples token by token: `do_sample=False` and beams are the base model's own."""
    return requested.get("do_sample", True) is not False and requested.get("num_beams", 1) == 1


def count_prompts(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int:
    """Rows of the batch before `generate` repeats them; an empty batch or prompt is refused here."""
    found = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
    tensors = [t for t in (inputs, *found) if isinstance(t, torch.Tensor)]
    if not tensors:
        return 1
    if any(t.shape[0] == 0 for t in tensors):
        raise BudgetError("the batch is empty (0 rows); `generate` needs at least one prompt.")
    if all(t.dim() > 1 and t.shape[1] == 0 for t in tensors):
        raise BudgetError("the prompts are empty (0 tokens); start them with the tokenizer's bos token.")
    return tensors[0].shape[0]


def budget_settings(budget: ResolvedBudget, requested: dict[str, Any]) -> dict[str, int]:
    """The budget as transformers' own settings, `max_new_tokens` and `num_return_sequences`."""
    limits = {}
    if budget.longest is not None:
        limits["max_new_tokens"] = min(budget.longest, requested.get("max_new_tokens", budget.longest))
    if budget.samples is not None:
        asked = requested.get("num_return_sequences", budget.samples)
        if asked != budget.samples:
            raise BudgetError(
                f"`budget` asks for {budget.samples} samples and `num_return_sequences` for {asked}; pass one of them."
            )
        limits["num_return_sequences"] = budget.samples
    return limits


def count_new_tokens(output: ModelOutput, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int:
    """Tokens that a `generate` call added; with `inputs_embeds` alone its sequences hold nothing else."""
    prompt = inputs if inputs is not None else kwargs.get("input_ids")
    return int(output.sequences.shape[1]) - (0 if prompt is None else prompt.shape[1])


def forget_defaults(config: GenerationConfig, chosen: dict[str, Any]) -> None:
    """
    Takes out of a config what its maker did not choose.

    Pipelines of transformers up to 5.17 prepare a config once and pass it to every call, where their defaults, and the
    base's, would look like the caller's choice.
    """
    for name in (*_WARPED_HERE, *_OTHER_WARPERS, "do_sample"):
        if name not in chosen:
            setattr(config, name, None)


class GenerationSession:
    """
    The state of one call, never shared between calls or threads.

    Args:
        model ([`~transformers.PreTrainedModel`]): The wrapped model.
        policy ([`DecodingPolicy`], *optional*): `None` leaves the sampling to the base model.
        requested (`dict`): What the caller set.
        budget ([`ResolvedBudget`]): The checked budget.
        prompts (`int`): Prompts in the batch.
        record (`bool`): Whether to keep a trace.

    Raises:
        [`UnsupportedGenerationError`]: If the caller asked for a mode in which the adapter could not act as trained.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: DecodingPolicy | None,
        requested: dict[str, Any],
        budget: ResolvedBudget,
        prompts: int,
        record: bool,
    ) -> None:
        self._policy = policy
        self._requested = requested
        self._budget = budget
        self._prompts = prompts
        self._record = record
        self._processor: AdaptiveSamplerLogitsProcessor | None = None
        self._hidden: torch.Tensor | None = None
        self._done: list[torch.Tensor] = []
        self._pools = policy is not None and policy.config.pooling == "mean"
        self._prompt_mask: torch.Tensor | None = None
        self._prompt_mean: torch.Tensor | None = None
        self._tap = None
        if policy is not None:
            self._tap = HiddenStateTap(model, is_listening=lambda: _CURRENT.get() is self, keeps_all=self._pools)
        self._explicit = {name: requested[name] for name in _WARPED_HERE if name in requested}
        if policy is not None:
            check_scalars(SamplingParameters(**self._explicit))
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        if self._tap is None:
            if self._record:
                raise UnsupportedGenerationError(
                    "`output_decoding_trace=True` traces the adapter, which does not act in this call (it is disabled, "
                    "or `do_sample=False` or beams were asked for); drop one of the two."
                )
            return
        paged = self._requested.get("cache_implementation") == "paged"
        modes = [mode for name, mode in _REFUSED.items() if name in self._requested]
        modes += ["continuous batching"] if paged else []
        modes += ["chunked prefill"] if self._pools and "prefill_chunk_size" in self._requested else []
        if modes:
            raise UnsupportedGenerationError(
                f"{modes[0]} does not go with an active decoding adapter; generate without it, or with the base "
                "model's own sampling: `with model.disable_adapter(): ...`."
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes this the current session; on leaving, whatever happened, no hook and no tensor stays behind."""
        token = _CURRENT.set(self)
        if self._tap is not None:
            self._tap.open()
        try:
            yield
        finally:
            _CURRENT.reset(token)
            self._hidden = self._prompt_mean = None
            if self._tap is not None:
                self._tap.close()

    def prepare_config(self, config: GenerationConfig) -> None:
        """Turns sampling on and transformers' warpers off: the policy decides, and all warping happens in one place."""
        if self._tap is None:
            return
        config.do_sample, config.num_beams = True, 1
        config.temperature, config.top_k, config.top_p, config.min_p = 1.0, 0, 1.0, None
        for name in _OTHER_WARPERS:
            if name not in self._requested:
                setattr(config, name, None)

    def forward_settings(self, model: nn.Module) -> dict[str, int]:
        """What the base's forward is asked for besides: to mean over a prompt, its positions must reach the tap."""
        takes = inspect.signature(cast(Any, model.forward)).parameters
        return {"logits_to_keep": 0} if self._pools and "logits_to_keep" in takes else {}

    def add_processors(
        self,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        prompt_length: int | None,
        model_kwargs: dict[str, Any] | None,
    ) -> LogitsProcessorList:
        """Ours goes behind every constraint and in front of watermark and normalisation."""
        if self._tap is None or self._policy is None:
            return processors
        self._prompt_mask = (model_kwargs or {}).get("attention_mask")
        rows = self._rows(config)
        token_budget = self._budget.per_row(rows)
        if config.max_length is not None and prompt_length is not None:
            limit = torch.full((rows,), config.max_length - prompt_length, dtype=torch.long)
            token_budget = limit if token_budget is None else token_budget.minimum(limit)
        longest = None if token_budget is None else int(token_budget.max())
        self._policy.warn_beyond(longest, config.num_return_sequences)
        self._processor = AdaptiveSamplerLogitsProcessor(
            self._policy,
            self._taken,
            explicit=self._explicit,
            token_budget=token_budget,
            parallel_samples=config.num_return_sequences or 1,
            record=self._record,
            read_prompt_mean=lambda: self._prompt_mean,
        )
        last = len(processors)
        if last and isinstance(processors[last - 1], LogitNormalization):
            last -= 1
        if config.watermarking_config is not None:
            last -= 1
        # A processor may run the model itself (classifier-free guidance does), so the hidden state is taken first.
        return LogitsProcessorList([_TakeHidden(self), *processors[:last], self._processor, *processors[last:]])

    def take_hidden(self) -> None:
        """Keeps the hidden state of the forward pass that made the scores now being processed."""
        if self._tap is None:
            return
        self._hidden = self._tap.last_position()
        if self._pools and self._prompt_mean is None:
            self._prompt_mean = mean_over_prompt(self._tap.every_position(), self._prompt_mask)

    def _taken(self) -> torch.Tensor:
        return cast(torch.Tensor, self._hidden)

    def _rows(self, config: GenerationConfig) -> int:
        return self._prompts * max(config.num_beams or 1, config.num_return_sequences or 1)

    def add_criteria(self, criteria: StoppingCriteriaList, config: GenerationConfig) -> StoppingCriteriaList:
        """Stops each row at its own budget, and remembers when rows ended if a trace is wanted."""
        if len(set(self._budget.tokens or ())) > 1:
            if (config.num_beams or 1) > 1:
                raise BudgetError("beam search ends all rows together; give it one budget for all of them.")
            if config._pad_token_tensor is None:
                raise BudgetError(
                    "rows with different budgets end at different times, and the rest of a row is filled with the pad "
                    "token; this model has none: pass `pad_token_id=` to `generate`."
                )
            budgets = cast(torch.Tensor, self._budget.per_row(self._rows(config)))
            criteria = StoppingCriteriaList([*criteria, _RowBudget(budgets, config._eos_token_tensor)])
        return _Remembering(criteria, self._done) if self._record else criteria

    def trace(self, new_tokens: int) -> DecodingTrace:
        """The trace of the finished call, with one column a new token."""
        done = torch.stack([row_done.clone() for row_done in self._done[:new_tokens]], dim=1)
        ended = done.cummax(dim=1).values.roll(1, dims=1)
        ended[:, 0] = False
        return cast(AdaptiveSamplerLogitsProcessor, self._processor).trace(ended)


_CURRENT: ContextVar[GenerationSession | None] = ContextVar("hf_adaptive_decode_session", default=None)


def current_session() -> GenerationSession | None:
    """The session of the `generate` call that this thread is in."""
    return _CURRENT.get()


class _TakeHidden(LogitsProcessor):
    def __init__(self, session: GenerationSession) -> None:
        self._session = session

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self._session.take_hidden()
        return scores


class _RowBudget(StoppingCriteria):
    def __init__(self, budgets: torch.Tensor, eos_token_id: torch.Tensor | None) -> None:
        self._budgets = budgets
        self._prompt_length: int | None = None
        # transformers pads finished rows only if some criterion has this attribute.
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1] - 1
        return self._budgets.to(input_ids.device) <= input_ids.shape[1] - self._prompt_length


class _Remembering(StoppingCriteriaList):
    def __init__(self, criteria: StoppingCriteriaList, done: list[torch.Tensor]) -> None:
        super().__init__(criteria)
        self._done = done

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        self._done.append(done)
        return done
