"""The adapter as processors of transformers' continuous batching; knows requests and rows, nothing of scheduling."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from .budget import MAX_BUDGET
from .checks import check_parameters, check_scores
from .errors import UnsupportedGenerationError
from .policies import DecodingPolicy
from .request_slots import HeldDecisions, Slot, Slots
from .sampler import warn_if_overruled
from .tap import output_embedding
from .types import DecodeState
from .warping import warp_logits

_SLOT = "_decoding_slot"


class BatchTap:
    """
    The hidden states that predict the tokens of a batch of requests.

    Args:
        model ([`~transformers.PreTrainedModel`]): Its calls by continuous batching are heard, and no others.
    """

    def __init__(self, model: Any) -> None:
        self._heard = threading.local()  # a manager decodes in a thread of its own
        self._hooks = [
            cast(nn.Module, model).register_forward_pre_hook(self._hear_call, with_kwargs=True),
            output_embedding(model).register_forward_pre_hook(self._hear_hidden),
        ]

    def take(self) -> torch.Tensor:
        """`[rows, H]`, of the call that this thread is in."""
        hidden: torch.Tensor
        hidden, self._heard.hidden = self._heard.hidden, None
        return hidden

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _hear_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._heard.is_batch = "logits_indices" in kwargs
        # A model that keeps all its logits has all hidden states enter its output embedding, too.
        self._heard.rows = None if "logits_to_keep" in kwargs else kwargs.get("logits_indices")

    def _hear_hidden(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(self._heard, "is_batch", False):
            hidden = args[0].flatten(0, -2)
            self._heard.hidden = hidden if self._heard.rows is None else hidden[self._heard.rows]


class Column(ContinuousBatchingLogitsProcessor):
    """One number a request, which transformers carries to the device along with its own; changes no scores."""

    ignored_kwargs: tuple[str, ...] = ()

    def __init__(
        self, read: Callable[[RequestState], Any], default: Any, dtype: torch.dtype, **supported: type
    ) -> None:
        self.supported_kwargs: dict[str, type] = supported
        self._read = read
        self._default = torch.tensor([default], dtype=dtype)
        self._longest = 0

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """What stands where there is no request."""
        int32_tensor.copy_(self._default.view(torch.int32).to(int32_tensor.device).expand_as(int32_tensor))

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """The numbers of the requests that are to have a token."""
        values = [self._read(request.state) for request in requests_with_new_token]
        # The storage keeps what an earlier and larger batch left in it, and rows behind the last request are run too.
        self._longest = max(self._longest, len(values))
        padded = self._default.repeat(self._longest)
        padded[: len(values)] = torch.tensor(values, dtype=self._default.dtype)
        return padded.view(torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Remembers the numbers as `values` `[rows]`."""
        self.values = tensor_arg[: scores.shape[0]].view(self._default.dtype)
        return scores


class RequestSampler:
    """
    Samples every request as the active adapter of a model decides.

    Its processors hold what the policy has to know of each request; only the last of them changes scores. Everything
    that differs from step to step reaches it as a tensor, so that a captured graph can be replayed.

    Args:
        model ([`AutoDecoForCausalLM`]): Its adapter decides, and its output embedding is read.
        explicit (`dict`): Parameters that the caller fixed for all requests; a request may fix its own `temperature`
            and `top_p`.
        samples (`int`): Sequences a prompt, B; a request may name another number as `samples`.

    Raises:
        [`UnsupportedGenerationError`]: If the policy reads the mean over a prompt, which is never whole here.
    """

    def __init__(self, model: Any, explicit: dict[str, float | int], samples: int) -> None:
        self._policy: DecodingPolicy = model.decoding_adapter
        if self._policy.pools_prompt:
            raise UnsupportedGenerationError(
                "continuous batching does not go with a policy that reads the mean over the prompt, which it reads in "
                "parts and shares between requests; use `generate`."
            )
        self._explicit = explicit
        slots = Slots()
        nan = float("nan")
        self._remaining = Column(remaining_tokens, 1, torch.int32)
        self._samples = Column(asked("samples", samples), samples, torch.int32, samples=int)
        self._temperature = Column(asked("temperature", nan), nan, torch.float32, temperature=float)
        self._top_p = Column(asked("top_p", nan), nan, torch.float32, top_p=float)
        # In this order: asking for a slot makes it, and being asked whether it is fresh it ceases to be.
        self._slot = Column(lambda state: _slot(slots, state).index, 0, torch.int32)
        self._fresh = Column(lambda state: _use(_slot(slots, state)), 0, torch.int32)
        columns = [self._remaining, self._samples, self._temperature, self._top_p, self._slot, self._fresh]
        self.processors = [*columns, Last(self.sample)]
        self.tensors_required = len(self.processors)
        self._held = HeldDecisions()
        self._tap = BatchTap(model)

    def close(self) -> None:
        """Removes the hooks."""
        self._tap.close()

    @torch.no_grad()
    def sample(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[rows, V]` → warped scores `[rows, V]`."""
        checked = not (scores.is_cuda and torch.cuda.is_current_stream_capturing())
        maxima = check_scores(scores, 0) if checked else scores.amax(-1)
        hidden, remaining, samples = self._tap.take(), self._remaining.values.long(), self._samples.values.long()
        state = DecodeState(hidden, scores, remaining, samples, maxima=maxima)
        parameters = self._policy(state)
        warn_if_overruled(parameters, self._explicit)
        if checked:
            check_parameters(parameters, 0)
        if self._policy.decides_once:
            parameters = self._held.keep(parameters, self._slot.values.long(), self._fresh.values > 0)
        parameters = parameters.override(self._explicit)
        own = {"temperature": self._temperature.values, "top_p": self._top_p.values}
        parameters = replace(parameters, **{n: _where_given(v, vars(parameters)[n]) for n, v in own.items()})
        return warp_logits(scores, parameters, maxima=maxima)


class Last(Column):
    """Changes scores `[rows, V]` by what the columns before it hold."""

    def __init__(self, sample: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(lambda state: 0, 0, torch.int32)
        self._sample = sample

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Sampled scores."""
        return self._sample(scores)


def remaining_tokens(state: RequestState) -> int:
    """b_t: tokens that a request may still generate, the one that is sampled now included."""
    prompt: int = state._true_initial_tokens or len(state.initial_tokens)
    if state.max_new_tokens is None:
        return MAX_BUDGET
    # A request that was put off counts what it had generated as prompt, and has that much less left to generate. Its
    # generated tokens may not all be known yet, but how many have been read is.
    budget: int = state.max_new_tokens + len(state.initial_tokens) - prompt
    read: int = state.position_offset - prompt
    return max(budget - read, 1)


def asked(name: str, default: Any) -> Callable[[RequestState], Any]:
    """Reads what a request named, or the default."""
    return lambda state: state.logit_processor_kwargs.get(name, default)


def _slot(slots: Slots, state: RequestState) -> Slot:
    """The place of a request. It stays the same when the request is put off and read again."""
    slot: Slot | None = state.logit_processor_kwargs.get(_SLOT)
    if slot is None or slot.owner != state.request_id:  # forked requests take the dict of their parent along
        slot = slots.take(state.request_id)
        state.logit_processor_kwargs[_SLOT] = slot
    return slot


def _use(slot: Slot) -> int:
    fresh, slot.is_fresh = slot.is_fresh, False
    return int(fresh)


def _where_given(given: torch.Tensor, otherwise: Any) -> torch.Tensor:
    other = 1.0 if otherwise is None else otherwise
    return torch.where(given.isnan(), torch.as_tensor(other, dtype=given.dtype, device=given.device), given)
