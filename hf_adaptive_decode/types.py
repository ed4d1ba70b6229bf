"""The records that pass between the parts, every field with its shape; knows nothing of models, hosts or policies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

# A row is one next-token decision: a sequence of a generate batch, a position of a training batch, a request of a
# server. N rows, H wide hidden states, V words.
Field = torch.Tensor | float | int | None


@dataclass(frozen=True)
class SamplingParameters:
    """
    How to sample each row. `None` leaves a parameter off; a scalar holds for every row.

    Args:
        temperature (`torch.Tensor` of shape `[N]` or `float`, *optional*):
            Divides the logits. 0 is greedy: only the most likely token stays.
        top_k (`torch.Tensor` of shape `[N]`, integer, or `int`, *optional*):
            Number of most likely tokens to keep; 0 is off.
        top_p (`torch.Tensor` of shape `[N]` or `float`, *optional*):
            Probability mass of the nucleus in (0, 1]; 1 is off.
        min_p (`torch.Tensor` of shape `[N]` or `float`, *optional*):
            Drops tokens less likely than this fraction of the most likely one; 0 is off.
        action (`torch.Tensor` of shape `[N]`, `torch.long`, *optional*):
            Index of the action that a finite-action policy chose; a record, without effect on the warp.
    """

    temperature: Field = None
    top_k: Field = None
    top_p: Field = None
    min_p: Field = None
    action: torch.Tensor | None = None

    def override(self, explicit: dict[str, Any]) -> SamplingParameters:
        """The same parameters with those in `explicit` (name to scalar) put in place of the policy's."""
        return replace(self, **explicit) if explicit else self

    def select(self, rows: torch.Tensor | slice) -> SamplingParameters:
        """The parameters of `rows` (slice, or index or mask of shape `[M]`); scalars stay as they are."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingParameters(**{k: v[rows] if is_per_row(v) else v for k, v in values.items()})

    def to(self, device: torch.device) -> SamplingParameters:
        """The parameters on another device; the hidden state may live on another than the scores do."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingParameters(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def is_per_row(value: Any) -> bool:
    """Whether a field of [`SamplingParameters`] holds one value a row rather than one for all."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


@dataclass(frozen=True)
class DecodeState:
    """
    What a policy may look at when it decides how to sample.

    Args:
        hidden (`torch.Tensor` of shape `[N, H]`):
            Input of the model's output embedding at the position that predicts the next token, in the base's dtype.
        logits (`torch.Tensor` of shape `[N, V]`, *optional*):
            Logits about to be warped; policies that use logit statistics read them.
        remaining_tokens (`torch.Tensor` of shape `[N]`, `torch.long`, *optional*):
            Tokens a row may still generate, the next one included (b_t = b - t).
        parallel_samples (`torch.Tensor` of shape `[N]`, `torch.long`, *optional*):
            Samples drawn for the row's prompt (B).
        prompt_mean (`torch.Tensor` of shape `[N, H]`, *optional*):
            Mean over the prompt's tokens of what `hidden` holds of the last; policies that pool by mean read it.
        uniform (`torch.Tensor` of shape `[N]`, `torch.float64`, *optional*):
            Numbers of [0, 1) that decide what a policy draws; without them it draws from torch's generator.
        maxima (`torch.Tensor` of shape `[N]`, *optional*):
            The largest of each row's logits, where it is known already: it saves who reads them a pass.
    """

    hidden: torch.Tensor
    logits: torch.Tensor | None = None
    remaining_tokens: torch.Tensor | None = None
    parallel_samples: torch.Tensor | None = None
    prompt_mean: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    maxima: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> DecodeState:
        """The state of `rows` (index or mask of shape `[M]`)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {k: None if v is None else v[rows.to(v.device)] for k, v in values.items()}
        return DecodeState(**chosen)

    def to(self, device: torch.device) -> DecodeState:
        """The state on one device; a model that lies on several leaves parts of it on different ones."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in values.items()}
        return DecodeState(**moved)


@dataclass(frozen=True)
class Observation:
    """
    What an action policy makes of a [`DecodeState`] before its first layer, small enough to be kept for training.

    Args:
        context (`torch.Tensor` of shape `[N, W]`, `torch.float32`): The features that the policy reads.
        remaining_tokens, parallel_samples (`torch.Tensor` of shape `[N]`, `torch.long`, *optional*): The budgets.
    """

    context: torch.Tensor
    remaining_tokens: torch.Tensor | None = None
    parallel_samples: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> Observation:
        """The observations of `rows` (index or mask of shape `[M]`)."""
        remaining, samples = (None if v is None else v[rows] for v in (self.remaining_tokens, self.parallel_samples))
        return Observation(self.context[rows], remaining, samples)


@dataclass(frozen=True)
class DecodingTrace:
    """
    What was sampled with at every step of a `generate` call. After a row has ended: NaN, and -1 for the action.

    Args:
        temperature (`torch.Tensor` of shape `[rows, new_tokens]`, `torch.float32`): Temperature; 0 is greedy.
        top_p (`torch.Tensor` of shape `[rows, new_tokens]`, `torch.float32`): Nucleus mass; 1 is off.
        action (`torch.Tensor` of shape `[rows, new_tokens]`, `torch.long`, *optional*):
            Index into the policy's actions, `None` for policies without actions.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    action: torch.Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """
    How much a caller is ready to spend on each prompt.

    Args:
        tokens (`int` or sequence of `int`, *optional*):
            Token budget b: new tokens per sequence, for all prompts or one number a prompt.
        samples (`int`, *optional*):
            Parallel budget B: sequences per prompt.

    Example:

    ```python
    >>> Budget(tokens=256, samples=8)
    Budget(tokens=256, samples=8)
    ```
    """

    tokens: int | Iterable[int] | torch.Tensor | None = None
    samples: int | None = None
