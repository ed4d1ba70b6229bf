"""What one `generate` call of an adaptive model keeps: budget, states, processor, trace; knows no policy's inside."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.candidate_generator import CandidateGenerator

from .budget import ResolvedBudget
from .capture import Capture, current_call, drafting, listening
from .errors import AdaptiveDecodeError, BudgetError, UnsupportedGenerationError
from .policies import DecodingPolicy, RowPolicies
from .sampler import AdaptiveSamplerLogitsProcessor
from .settings import behind_constraints, explicit_parameters, neutralise
from .tap import mean_over_prompt
from .types import DecodingTrace

# Modes whose distribution is not one a step that an adapter could take the place of.
_REFUSED = {
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "force_words_ids": "constrained beam search",
    "constraints": "constrained beam search",
}


class GenerationSession:
    """
    The state of one call, never shared between calls or threads.

    Args:
        capture ([`Capture`]): The model's hook.
        policy ([`DecodingPolicy`] or [`RowPolicies`], *optional*): `None` leaves the sampling to the base model.
        requested (`dict`): What the caller set.
        budget ([`ResolvedBudget`]): The checked budget.
        prompts (`int`): Prompts in the batch.
        record (`bool`): Whether to keep a trace.

    Raises:
        [`UnsupportedGenerationError`]: If the caller asked for a mode in which the adapter could not act as trained.
    """

    def __init__(
        self,
        capture: Capture,
        policy: DecodingPolicy | RowPolicies | None,
        requested: dict[str, Any],
        budget: ResolvedBudget,
        prompts: int,
        record: bool,
    ) -> None:
        self._capture = capture
        self._policy = policy
        self._requested = requested
        self._budget = budget
        self._prompts = prompts
        self._record = record
        self._processor: AdaptiveSamplerLogitsProcessor | None = None
        self._heard: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        # With a draft, the length of prompt, text and draft; the hidden states end there.
        self._drafted: int | None = None
        # Whether a `generate` call within this one was decided by an adapter.
        self._passed_on = False
        self._done: list[torch.Tensor] = []
        self._pools = policy is not None and policy.pools_prompt
        self._prompt_mask: torch.Tensor | None = None
        self._prompt_mean: torch.Tensor | None = None
        self._explicit = explicit_parameters(requested) if policy is not None else {}
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        if self._policy is None:
            if self._record:
                raise UnsupportedGenerationError(
                    "`output_decoding_trace=True` traces the adapter, which does not act in this call (it is disabled, "
                    "or `do_sample=False` or beams were asked for); drop one of the two."
                )
            return
        modes = [mode for name, mode in _REFUSED.items() if name in self._requested]
        modes += ["chunked prefill"] if self._pools and "prefill_chunk_size" in self._requested else []
        if modes:
            raise UnsupportedGenerationError(
                f"{modes[0]} does not go with an active decoding adapter; generate without it, or with the base "
                "model's own sampling: `with model.disable_adapter(): ...`."
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether an adapter takes part."""
        return self._policy is not None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes this the thread's current call; on leaving, whatever happened, no tensor stays behind."""
        outer = current_call()
        self._capture.take_compiled()  # of a pass that was nobody's
        try:
            with listening(self):
                yield
            if self._processor is not None:
                self._processor.finish()
        finally:
            if isinstance(outer, GenerationSession) and self._was_asked():
                outer._passed_on = True
            self._heard = self._hidden = self._prompt_mean = None
            self._capture.take_compiled()

    def check_asked(self, custom: Any) -> None:
        """Raises [`UnsupportedGenerationError`] if a decoding loop of the caller's asked no logits processor."""
        if custom is not None and self._policy is not None and not self._was_asked():
            raise UnsupportedGenerationError(
                f"`custom_generate={custom!r}` called no logits processor, so the adapter took no part in it; let the "
                "loop call `logits_processor(input_ids, logits)`, or use it within `model.disable_adapter()`."
            )

    def _was_asked(self) -> bool:
        return self._passed_on or self._hidden is not None

    def hear(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Keeps the hidden states of a forward pass; of a prompt to be pooled, only the last reaches the logits."""
        if self._policy is None:
            return None
        self._heard = hidden
        return hidden[:, -1:] if self._pools and self._prompt_mean is None else None

    def prepare_config(self, config: GenerationConfig) -> None:
        """Leaves the sampling to the policy, if there is one."""
        if self._policy is None:
            return
        neutralise(config, self._requested)

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
        if self._policy is None:
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
            # transformers copies the logits for its processors, and keeps that copy only for whoever asks for logits.
            may_overwrite=not config.output_logits and "custom_generate" not in self._requested,
        )
        last = behind_constraints(processors, config)
        # A processor may run the model itself (classifier-free guidance does), so the hidden state is taken first.
        return LogitsProcessorList([_TakeHidden(self), *processors[:last], self._processor, *processors[last:]])

    def take_hidden(self, length: int) -> None:
        """
        Keeps the hidden state of the forward pass that made the scores now being processed.

        Args:
            length (`int`): Tokens in front of the one to be sampled, as the processors are told.
        """
        hidden = self._capture.take_compiled()
        hidden = hidden if hidden is not None else self._heard
        if hidden is None:
            raise AdaptiveDecodeError(
                "no hidden state has reached the model's output embedding: code that was compiled before the model was "
                "wrapped does not hear of it; compile it afterwards."
            )
        self._heard = hidden
        behind = 0 if self._drafted is None else self._drafted - length
        self._hidden = hidden[:, hidden.shape[1] - 1 - behind] if hidden.dim() == 3 else hidden
        if self._pools and self._prompt_mean is None:
            self._prompt_mean = mean_over_prompt(hidden, self._prompt_mask)

    def keep_apart(self, drafts: CandidateGenerator) -> CandidateGenerator:
        """Lets a candidate generator make its drafts unheard and without the adapter, and notes how long they are."""
        if self._pools:
            raise UnsupportedGenerationError(
                "assisted generation does not go with a policy that reads the mean over the prompt; generate without a "
                "draft, or without the adapter: `with model.disable_adapter(): ...`."
            )
        make = drafts.get_candidates

        def get_candidates(*args: Any, **kwargs: Any) -> tuple[torch.LongTensor, torch.Tensor | None]:
            with drafting():
                ids, logits = make(*args, **kwargs)
            self._drafted = ids.shape[1]
            return ids, logits

        # On the object, whose class transformers looks at when it is done.
        drafts.get_candidates = get_candidates  # type: ignore[method-assign]
        return drafts

    def without_adapter(self, processors: LogitsProcessorList) -> LogitsProcessorList:
        """The processors that a draft may see."""
        ours = (_TakeHidden, AdaptiveSamplerLogitsProcessor)
        return LogitsProcessorList([p for p in processors if not isinstance(p, ours)])

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
        if self._drafted is not None:  # one row, and several tokens between two looks at the stopping criteria
            ended = torch.zeros(1, new_tokens, dtype=torch.bool, device=self._done[0].device)
        else:
            done = torch.stack([row_done.clone() for row_done in self._done[:new_tokens]], dim=1)
            ended = done.cummax(dim=1).values.roll(1, dims=1)
            ended[:, 0] = False
        return cast(AdaptiveSamplerLogitsProcessor, self._processor).trace(ended)


class _TakeHidden(LogitsProcessor):
    def __init__(self, session: GenerationSession) -> None:
        self._session = session

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self._session.take_hidden(input_ids.shape[1])
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
            self._budgets = self._budgets.to(input_ids.device)  # once, as a copy is waited for
        return self._budgets <= input_ids.shape[1] - self._prompt_length


class _Remembering(StoppingCriteriaList):
    def __init__(self, criteria: StoppingCriteriaList, done: list[torch.Tensor]) -> None:
        super().__init__(criteria)
        self._done = done

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        self._done.append(done)
        return done
