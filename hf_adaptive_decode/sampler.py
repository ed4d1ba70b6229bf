"""Turns transformers' `(input_ids, scores)` into rows for a policy and warps the scores; knows no model classes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import LogitsProcessor

from .budget import resolve_budget
from .checks import StepChecks
from .errors import AdaptiveDecodeError, UnsupportedGenerationError
from .hub.peft_weights import check_lora
from .hub.store import load_adapter, locate
from .policies import DecodingPolicy, RowPolicies
from .tap import HiddenStateTap
from .types import DecodeState, DecodingTrace, SamplingParameters
from .warping import warp_logits


class AdaptiveSamplerLogitsProcessor(LogitsProcessor):
    """
    Samples every token as a policy says; the last of a `generate` call's processors.

    [`AutoDecoForCausalLM`] makes a fresh one for each call. On an unwrapped model, use
    [`~AdaptiveSamplerLogitsProcessor.from_pretrained`] and pass it to `generate` with `do_sample=True, top_k=0`: the
    processor does all the warping, and transformers' own warpers, which run after it, have to be off.

    Args:
        policy ([`DecodingPolicy`] or [`RowPolicies`]): Decides the parameters of each row.
        read_hidden (`Callable[[], torch.Tensor]`): Gives the hidden state `[rows, H]` of the step.
        explicit (`dict`, *optional*): Parameters that the caller fixed; they replace the policy's.
        token_budget (`torch.Tensor` of shape `[rows]`, `torch.long`, *optional*): Token budget b of each row.
        parallel_samples (`int`, *optional*): Parallel budget B.
        record (`bool`, defaults to `False`): Whether to keep what was sampled with, for [`~trace`].
        read_prompt_mean (`Callable[[], torch.Tensor | None]`, *optional*):
            Gives the mean of the prompt's hidden states `[rows, H]`, for policies that pool by mean.
        may_overwrite (`bool`, defaults to `False`): Whether the scores it is called with are nobody else's.

    Raises:
        [`LogitsError`]: If a row's scores are NaN, +inf or all -inf; names the step and the row. On CUDA it comes with
            the next step, or from [`~finish`], so that the host waits for nothing.
    """

    def __init__(
        self,
        policy: DecodingPolicy | RowPolicies,
        read_hidden: Callable[[], torch.Tensor],
        explicit: dict[str, float | int] | None = None,
        token_budget: torch.Tensor | None = None,
        parallel_samples: int | None = None,
        record: bool = False,
        read_prompt_mean: Callable[[], torch.Tensor | None] | None = None,
        may_overwrite: bool = False,
    ) -> None:
        self.policy = policy
        self.step = 0
        self._read_hidden = read_hidden
        self._explicit = explicit or {}
        self._token_budget = token_budget
        self._parallel_samples = parallel_samples
        self._record = record
        self._read_prompt_mean = read_prompt_mean
        self._may_overwrite = may_overwrite
        self._checks = StepChecks()
        self._first_length: int | None = None
        # By step: a draft that is refused has its steps sampled again.
        self._steps: dict[int, SamplingParameters] = {}
        self._held: SamplingParameters | None = None
        self._tap: HiddenStateTap | None = None
        self._last_text: torch.Tensor | None = None

    @classmethod
    def from_pretrained(
        cls, adapter: str | os.PathLike[str], model: nn.Module, budget: Any = None, **hub_kwargs: Any
    ) -> AdaptiveSamplerLogitsProcessor:
        """
        Loads an adapter for use on `model`, which stays as it is but for one hook on its output embedding.

        The hook lives as long as the processor; [`~close`] removes it at once.

        Args:
            adapter (`str` or `os.PathLike`): Folder or Hub id.
            model ([`~transformers.PreTrainedModel`]): The model that will generate.
            budget (`int` or [`Budget`], *optional*): One for every row of every call, for policies that know a budget;
                `generate` has to be given the same as `max_new_tokens` and `num_return_sequences`.
            hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`.

        Raises:
            [`AdapterLoadError`]: If the adapter cannot be read or was made for a base of another shape.
        """
        known = resolve_budget(budget, prompts=1)
        files = locate(adapter, **hub_kwargs)
        limit = {name: hub_kwargs[name] for name in ("max_weight_bytes",) if name in hub_kwargs}
        policy = load_adapter(files, model, **limit)
        check_lora(model, files.peft, files.source)
        tap = HiddenStateTap(model).open()
        tokens = None if known.tokens is None else torch.tensor(known.tokens)
        processor = cls(policy, tap.last_position, token_budget=tokens, parallel_samples=known.samples)
        processor._tap = tap
        processor._checks = StepChecks(defers=False)  # nobody says when the last step was
        return processor

    def close(self) -> None:
        """Removes the hook that [`~from_pretrained`] set."""
        if self._tap is not None:
            self._tap.close()

    def __del__(self) -> None:
        self.close()

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[rows, V]` → warped scores `[rows, V]`, `torch.float32`."""
        self._check_passes(input_ids)
        if self._first_length is None:
            self._first_length = input_ids.shape[1]
        # By the text's length, not by counting: of a draft the same step may come twice.
        self.step = input_ids.shape[1] - self._first_length
        maxima = self._checks.scores(scores, self.step)
        hidden = self._read_hidden()
        if hidden.shape[0] != scores.shape[0]:
            raise AdaptiveDecodeError(
                f"step {self.step} has scores for {scores.shape[0]} rows and hidden states for {hidden.shape[0]}; this "
                "way of generating does not keep one hidden state a row."
            )
        prompt_mean = None if self._read_prompt_mean is None else self._read_prompt_mean()
        state = DecodeState(hidden, scores, *self._budgets(scores), prompt_mean, maxima=maxima)
        parameters = self._held
        if parameters is None:
            decided = self.policy(state)
            self._checks.parameters(decided, self.step)
            if self.step == 0:
                warn_if_overruled(decided, self._explicit)
            parameters = decided.override(self._explicit)
            self._held = parameters if self.policy.decides_once else None
        if self._record:
            self._steps[self.step] = parameters
        parameters = parameters.to(scores.device)
        warped = warp_logits(scores, parameters, inplace=self._may_overwrite, maxima=maxima)
        return self._checks.make_harmless(warped, maxima)

    def finish(self) -> None:
        """To be called behind the last step: raises what is found to be wrong with it."""
        self._checks.finish()

    def _budgets(self, scores: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        remaining = samples = None
        if self._token_budget is not None:
            self._token_budget = self._token_budget.to(scores.device)
            remaining = (self._token_budget.expand(scores.shape[0]) - self.step).clamp(min=0)
        if self._parallel_samples is not None:
            samples = torch.full(scores.shape[:1], self._parallel_samples, device=scores.device)
        return remaining, samples

    def _check_passes(self, input_ids: torch.Tensor) -> None:
        """On an unwrapped model, where the hook is all there is: whose forward pass was heard last?"""
        if self._tap is None:
            return
        passes, begins = self._tap.count_passes(), not _goes_on(input_ids, self._last_text)
        if begins:
            self._first_length = self._held = None  # another `generate` call has begun
        if passes == 0 or (passes > 1 and not begins):
            raise UnsupportedGenerationError(
                f"the model ran {passes} times for one token, so whose hidden state the tap heard is not known; "
                "guidance and drafts do that, and a closed processor or another model is not heard at all. Wrap the "
                "model with `AutoDecoForCausalLM.from_pretrained` instead."
            )
        self._last_text = input_ids

    def trace(self, ended: torch.Tensor) -> DecodingTrace:
        """
        What was sampled with at each recorded step.

        Args:
            ended (`torch.Tensor` of shape `[rows, new_tokens]`, `torch.bool`): Steps after a row's end.
        """
        rows, steps = ended.shape
        recorded = [self._steps[step] for step in range(steps)]

        def column(name: str, off: float) -> torch.Tensor:
            values = [torch.as_tensor(off if (v := vars(p)[name]) is None else v) for p in recorded]
            stacked = torch.stack([v.to(ended.device).float().expand(rows) for v in values], dim=1)
            return stacked.masked_fill(ended, float("nan"))

        action = None
        if self.policy.has_actions:
            action = (
                torch.stack([cast(torch.Tensor, p.action) for p in recorded], dim=1)
                .to(ended.device)
                .masked_fill(ended, -1)
            )
        return DecodingTrace(column("temperature", 1.0), column("top_p", 1.0), action)


def _goes_on(text: torch.Tensor, before: torch.Tensor | None) -> bool:
    """Whether each row of `text` `[rows, L]` is one of `before` and one token more; beams change places."""
    if before is None or text.shape != (before.shape[0], before.shape[1] + 1):
        return False
    begin = text[:, :-1]
    return torch.equal(begin, before) or bool((begin[:, None] == before).all(-1).any(-1).all())


def warn_if_overruled(decided: SamplingParameters, explicit: dict[str, float | int]) -> None:
    """Warns, once, if the caller fixed all that the policy decides, as trainers do that sample for their own losses."""
    names = [name for name, value in vars(decided).items() if name != "action" and value is not None]
    if names and set(names) <= explicit.keys():
        listed = ", ".join(f"`{name}={explicit[name]}`" for name in names)
        warnings.warn(
            f"{listed} was passed to `generate`, and the adapter decides nothing else, so it takes no part. Leave it "
            'out, or pass None (to TRL\'s trainers `generation_kwargs={"temperature": None, "top_p": None, "top_k": '
            "None}`), and the adapter decides; `model.disable_adapter()` says that it is not to.",
            stacklevel=2,
        )
