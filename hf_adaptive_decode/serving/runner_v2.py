"""The adapter as a logits processor of vLLM's second model runner; knows its slots and rows, nothing of policies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from .requests import check_request, read_settings
from .served import Rows, Steps, served_by

_ADAPTIVE, _RESUMED = 4, 5
_COLUMNS = 6


class AdapterProcessor(LogitsProcessor):
    """
    Warps the rows of adaptive requests, after penalties and grammar and before their T = 1; a row may be a draft's.

    Args:
        vllm_config (`vllm.config.VllmConfig`): Of the engine.
        req_states (`LogitsProcRequestState`): What the runner knows of requests, by slot.
    """

    reads_samples = False

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises a `ValueError`, which becomes HTTP 400, for what would fight the adapter."""
        check_request(sampling_params, cls.reads_samples)

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        self._engine, self._states = vllm_config.instance_id, req_states
        self._host = torch.zeros((_COLUMNS, req_states.max_num_reqs), dtype=torch.long)
        self._device = self._host.to(req_states.device)
        self._adaptive = np.zeros(req_states.max_num_reqs, dtype=bool)
        self._is_stale = False

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request enters; whether the adapter decides for it."""
        settings = read_settings(sampling_params.extra_args)
        is_adaptive = settings.adaptive and sampling_params.temperature != 0
        self._adaptive[req_idx] = is_adaptive
        columns = (0,) * _COLUMNS
        if is_adaptive:
            adapter = served_by(self._engine)
            request = adapter.enter(req_idx, sampling_params)
            has_output = self._states.prefill_len.np[req_idx] > self._states.prompt_len.np[req_idx]
            columns = (*request.columns, 1, int(has_output))
        self._host[:, req_idx] = torch.tensor(columns, dtype=torch.long)
        self._is_stale = True
        return bool(is_adaptive)

    def apply_staged_writes(self) -> None:
        """Copies what is known of requests to the device, without waiting for it."""
        if self._is_stale:
            on_host = self._host.clone()
            on_host = on_host.pin_memory() if self._states.device.type == "cuda" else on_host
            self._device = on_host.to(self._states.device, non_blocking=True)
            self._is_stale = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Logits `[rows, V]`, as the adapter decides in its rows and as they are in the others."""
        adapter = served_by(self._engine)
        hidden = adapter.next_hidden(logits.shape[0])
        adaptive = self._adaptive[ctx.idx_mapping_np]
        if not adaptive.any():
            return logits
        places = ctx.expanded_idx_mapping.long()
        columns = self._device[:, places]
        position = ctx.pos.long() + 1
        tokens = position - self._states.prompt_len.gpu[places]
        steps = Steps(
            tokens.clamp(min=0),
            # Of a request that comes back, parts of the prompt are run again; what was decided stays.
            (tokens <= 0) & (columns[_RESUMED] == 0),
            position >= self._states.prefill_len.gpu[places],
        )
        is_everything = bool(adaptive.all())
        warped = adapter.warp(logits, hidden, steps, Rows(*columns[:_ADAPTIVE].unbind()), inplace=is_everything)
        return warped if is_everything else torch.where(columns[_ADAPTIVE][:, None] > 0, warped, logits)


class SamplesAdapterProcessor(AdapterProcessor):
    """For policies that decide by the parallel budget."""

    reads_samples = True


def state_class(vllm_config: Any, model: Any, own: type | None) -> type:
    """
    The runner's own class of model state for this model, which also tells the adapter the ids of requests.

    Args:
        vllm_config (`vllm.config.VllmConfig`): Of the engine.
        model (`nn.Module`): The model.
        own (`type`, *optional*): What the base's class names itself.
    """
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    # Without our method, which would be asked again.
    base: Any = own or resolve_model_state_cls(vllm_config, SimpleNamespace(modules=model.modules))
    adapter = served_by(vllm_config.instance_id)

    class AdapterModelState(base):  # type: ignore[misc]
        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            adapter.ids[req_index] = new_req_data.req_id

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            adapter.leave(req_id)

    return AdapterModelState
