"""The adapter as a logits processor of vLLM's first model runner; knows its batch's rows, nothing of policies."""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from .requests import check_request, read_settings
from .served import Request, Rows, ServedAdapter, Steps, served_by

# Where a request's places are kept: what comes back after preemption is the same parameters object.
_PLACES = "hf_adaptive_decode"


class AdapterProcessor(LogitsProcessor):
    """
    Warps the rows of adaptive requests, after penalties, grammar and (their T = 1) temperature.

    Args:
        vllm_config (`vllm.config.VllmConfig`): Of the engine.
        device (`torch.device`): Of the logits.
        is_pin_memory (`bool`): Whether copies to the device can go on by themselves.
    """

    reads_samples = False

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises a `ValueError`, which becomes HTTP 400, for what would fight the adapter."""
        check_request(sampling_params, cls.reads_samples)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._engine = vllm_config.instance_id
        self._device, self._pins = device, is_pin_memory
        self._requests: dict[int, Request] = {}
        self._order: list[Request] = []
        self._at: torch.Tensor | None = None
        self._rows: Rows | None = None

    def is_argmax_invariant(self) -> bool:
        """Greedy requests, which alone are decided before this runs, are the base model's."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Requests that entered, left and moved."""
        if batch_update is None:
            return
        adapter = self._adapter()
        before = {request.slot.index for request in self._requests.values() if request.settings.is_traced}
        if not process_dict_updates(self._requests, batch_update, self._enter):
            return
        for slot in before - {request.slot.index for request in self._requests.values()}:
            adapter.recorder.leave(slot)
        places = sorted(self._requests)
        self._order = [self._requests[place] for place in places]
        columns = torch.tensor([request.columns for request in self._order], dtype=torch.long)
        self._rows = Rows(*self._on_device(columns.T.contiguous()).unbind()) if places else None
        # Rows that are all of a batch need not be picked.
        self._at = self._on_device(torch.tensor(places))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[requests, V]`, as the adapter decides in its rows and as they are in the others."""
        if self._rows is None or self._at is None:
            return logits
        adapter = self._adapter()
        hidden = adapter.next_hidden(logits.shape[0])
        tokens = self._on_device(torch.tensor([len(request.slot.owner) for request in self._order]))
        steps = Steps(tokens, tokens == 0)
        if len(self._order) == logits.shape[0]:
            return adapter.warp(logits, hidden, steps, self._rows, inplace=True)
        logits[self._at] = adapter.warp(logits[self._at], hidden[self._at], steps, self._rows, inplace=True)
        return logits

    def _enter(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Request | None:
        settings = read_settings(params.extra_args)
        if not settings.adaptive or params.temperature == 0:
            return None
        if params.extra_args is None:
            params.extra_args = {}
        # Sequences of one prompt may share their parameters; the list of its tokens is each one's own.
        places: list[Request] = params.extra_args.setdefault(_PLACES, [])
        for request in self._put_off(places, output):
            request.slot.owner = output
            self._adapter().recorder.come_back(request.slot.index)
            return request
        places.append(self._adapter().request(settings, params.max_tokens, params.seed, owner=output))
        return places[-1]

    def _put_off(self, places: list[Request], output: list[int]) -> list[Request]:
        """The request among those of the same parameters that comes back with these tokens, if one does."""
        own = [request for request in places if request.slot.owner is output]
        if own or not output:
            return own
        # With asynchronous scheduling it comes back with a new list, whose newest tokens the old one may not know.
        running = {id(request) for request in self._requests.values()}
        known = [tuple(token for token in request.slot.owner if token >= 0) for request in places]
        return [
            request
            for request, tokens in zip(places, known, strict=True)
            if id(request) not in running and tuple(output[: len(tokens)]) == tokens
        ][:1]

    def _adapter(self) -> ServedAdapter:
        return served_by(self._engine)

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return values
        return (values.pin_memory() if self._pins else values).to(self._device, non_blocking=True)


class SamplesAdapterProcessor(AdapterProcessor):
    """For policies that decide by the parallel budget."""

    reads_samples = True
