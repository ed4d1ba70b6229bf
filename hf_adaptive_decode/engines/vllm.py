"""vLLM as an engine in this process: its own sampler where that is enough, the library's plugin elsewhere; knows
requests and policies, nothing of how a policy decides.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedGenerationError
from ..policies import DecodingPolicy
from ..serving.client import RequestTrace, take_traces
from ..types import Observation, SamplingParameters
from .base import Completion
from .per_request import PerRequestEngine, check_lengths
from .records import Decisions, Rows
from .vllm_settings import route
from .vllm_start import Colocated


class VLLMEngine(PerRequestEngine):
    """
    Stock vLLM, colocated: one `vllm.LLM` in this process, started at the first call and kept.

    Static settings, mixtures of them a sequence, and policies that decide once are one configuration a request, drawn
    by vLLM's own sampler; what decides is read off the prompts by `model`, in transformers. Every other policy with a
    serialised name decides in vLLM's workers, by the library's plugin, which takes new weights and other policies
    without a restart.

    Every request has a seed of its own, a hash of the seed, the prompt's place and the sample's number. So a completion
    does not depend on what else is wanted, as far as vLLM computes the same logits in another batch, and the same call
    gives the same completions again where it schedules them alike. They are not those of transformers: vLLM draws by
    other random numbers. Decisions that are made here are.

    Args:
        model ([`~transformers.PreTrainedModel`]): Loaded from a folder or the Hub, as vLLM loads it again from there;
            what has been changed of its weights since vLLM does not see.
        tokenizer, batch_rows: As an [`Engine`] takes them; `batch_rows` is vLLM's `max_num_seqs`.
        llm (`vllm.LLM`, *optional*): An engine that runs already, with the same base. It serves policies that decide
            at every token if it was started with an adapter's folder.
        options: For `vllm.LLM`, such as `max_model_len`, `gpu_memory_utilization` (0.45 by default, since the model
            is on the GPU, too) or `tensor_parallel_size`.

    Raises:
        [`UnsupportedGenerationError`]: If the model came from no folder, carries a LoRA, or runs on several processes.
        [`MissingExtraError`]: At the first call, if vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, batch_rows: int | None = 256, llm: Any = None, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, batch_rows=batch_rows)
        _refuse_unfit(model, llm)
        self._host = Colocated(model, batch_rows, options, llm)
        self._tag = ""

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`, which is started if there is none yet."""
        return self._host.llm

    def close(self) -> None:
        """Shuts the engine down, unless it was given, and deletes its files."""
        self._host.close()

    @property
    def _has_plugin(self) -> bool:
        return self._host.has_plugin

    def _finished(self, policy: DecodingPolicy, rows: Rows) -> Iterator[tuple[list[int], list[Completion]]]:
        if route(policy, self._has_plugin)[0]:
            yield from super()._finished(policy, rows)
            return
        self._serve(policy)
        for tokens in self._run(rows, self._served(rows, observed=False)):
            taken = self._take(list(tokens))
            yield list(tokens), self._completions(tokens, {row: taken[row].parameters for row in tokens})

    def _recorded(self, policy: DecodingPolicy, rows: Rows) -> tuple[list[Completion], Decisions | None]:
        if route(policy, self._has_plugin)[0]:
            return super()._recorded(policy, rows)
        found: dict[int, Completion] = {}
        taken: list[Decisions] = []
        self._serve(policy)
        for tokens in self._run(rows, self._served(rows, observed=True)):
            for row, trace in self._take(list(tokens)).items():
                length = 1 if policy.decides_once else len(tokens[row])
                taken += _decisions(row, length, trace, rows.keys.device)
            found |= zip(tokens, self._completions(tokens), strict=True)
        return [found[row] for row in range(len(rows.keys))], Decisions.in_order(taken)

    def _serve(self, policy: DecodingPolicy) -> None:
        self._host.serve(policy)
        self._tag = uuid.uuid4().hex

    def _settings_of(self, parameters: SamplingParameters) -> dict[str, Any]:
        opt_out = {"extra_args": {"adaptive_decoding": False}} if self._has_plugin else {}
        return {**super()._settings_of(parameters), **opt_out}

    def _served(self, rows: Rows, observed: bool) -> list[dict[str, Any]]:
        """Every row's settings, for the plugin."""
        asked = zip(rows.token_budget.tolist(), rows.parallel_samples.tolist(), strict=True)
        return [
            {
                "temperature": 1.0,
                "extra_args": {
                    "token_budget": budget,
                    "parallel_budget": samples,
                    "decoding_trace": f"{self._tag}-{row}",
                    "decoding_observation": observed,
                },
            }
            for row, (budget, samples) in enumerate(asked)
        ]

    def _take(self, at: Sequence[int]) -> dict[int, RequestTrace]:
        found = take_traces(self.llm, [f"{self._tag}-{row}" for row in at])
        return {row: found[f"{self._tag}-{row}"][0] for row in at}

    def _run(self, rows: Rows, settings: Sequence[dict[str, Any]]) -> Iterator[dict[int, list[int]]]:
        """Tokens of rows that have ended, by number."""
        engine = self.llm.llm_engine  # before the import: it says what to install
        from vllm import SamplingParams

        check_lengths(rows, engine.model_config.max_model_len)
        asked = zip(rows.prompt.tolist(), rows.token_budget.tolist(), rows.keys.tolist(), settings, strict=True)
        call, waiting = uuid.uuid4().hex, dict[str, int]()
        try:
            for row, (place, budget, key, how) in enumerate(asked):
                params = SamplingParams(**self._limits(budget, key), **how, detokenize=False)
                name = f"{call}-{row}"
                engine.add_request(name, {"prompt_token_ids": rows.prompts[place]}, params)
                waiting[name] = row
            while waiting:
                done = [one for one in engine.step() if one.finished]
                if done:
                    yield {waiting.pop(one.request_id): list(one.outputs[0].token_ids) for one in done}
        finally:
            if waiting:
                engine.abort_request(list(waiting))


def _decisions(row: int, length: int, trace: RequestTrace, device: torch.device) -> list[Decisions]:
    """What a policy itself decided of a row's first `length` tokens."""
    action, seen = trace.parameters.action, trace.observation
    if action is None or seen is None:
        return []
    step = (action[:length] >= 0).nonzero().squeeze(-1)
    columns: dict[str, Any] = {n: None if v is None else v.to(device) for n, v in vars(seen.select(step)).items()}
    own, step = Observation(**columns), step.to(device)
    return [Decisions(own, action.to(device)[step], torch.full_like(step, row), step)] if len(step) else []


def _refuse_unfit(model: PreTrainedModel, llm: Any) -> None:
    if llm is None and not model.config.name_or_path:
        raise UnsupportedGenerationError(
            "vLLM loads a base from where it lies, and this model came from nowhere; save it with `save_pretrained`, "
            "and load it from there."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedGenerationError(
            "this model carries a LoRA, which vLLM would leave out; merge it into the base and load the result."
        )
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if llm is None and processes > 1:
        raise UnsupportedGenerationError(
            f'the engine "vllm" shares its process with one training process, and here are {processes}; take the '
            'engine "transformers", which each of them has.'
        )
