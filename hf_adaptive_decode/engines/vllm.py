"""vLLM as an engine in this process: its own sampler where that is enough, the library's plugin elsewhere; knows
requests and policies, nothing of how a policy decides.
"""

from __future__ import annotations

import gc
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import BudgetError, UnsupportedGenerationError
from ..policies import DecodingPolicy
from ..serving.client import RequestTrace, replace_adapter, take_traces
from ..serving.plugin import PREFIX
from ..types import Observation, SamplingParameters
from .base import Completion
from .deciding import decide_first
from .engine import Engine
from .prompts import special_tokens
from .records import OFF, Decisions, Rows
from .vllm_settings import constrained_as, route
from .vllm_start import save_served, start

_SETTINGS = ("temperature", "top_k", "top_p", "min_p")
_STATIC = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class VLLMEngine(Engine):
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
        self._llm, self._is_ours, self._options = llm, llm is None, options
        self._folder = tempfile.TemporaryDirectory(prefix="decoding-adapter-")
        self._tag = ""

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`, which is started if there is none yet."""
        if self._llm is None:
            self._llm = start(self.model, self._folder.name, self.batch_rows, self._options)
        return self._llm

    def close(self) -> None:
        """Shuts the engine down, unless it was given, and deletes its files."""
        if self._llm is not None and self._is_ours:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._folder.cleanup()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _has_plugin(self) -> bool:
        if self._llm is None:
            return True
        return bool(self._llm.llm_engine.model_config.hf_config.architectures[0].startswith(PREFIX))

    def _why_not(self, policy: DecodingPolicy) -> str | None:
        return constrained_as(self.model)[1] or route(policy, self._has_plugin)[1]

    def _finished(self, policy: DecodingPolicy, rows: Rows) -> Iterator[tuple[list[int], list[Completion]]]:
        if route(policy, self._has_plugin)[0]:
            parameters, _ = self._decide(policy, rows)
            traces = _by_row(parameters)
            for tokens in self._run(rows, [self._own(trace) for trace in traces]):
                yield list(tokens), self._completions(tokens, {row: traces[row] for row in tokens})
            return
        self._serve(policy)
        for tokens in self._run(rows, self._served(rows, observed=False)):
            taken = self._take(list(tokens))
            yield list(tokens), self._completions(tokens, {row: taken[row].parameters for row in tokens})

    def _recorded(self, policy: DecodingPolicy, rows: Rows) -> tuple[list[Completion], Decisions | None]:
        found: dict[int, Completion] = {}
        if route(policy, self._has_plugin)[0]:
            parameters, decisions = self._decide(policy, rows)
            for tokens in self._run(rows, [self._own(trace) for trace in _by_row(parameters)]):
                found |= zip(tokens, self._completions(tokens), strict=True)
            return [found[row] for row in range(len(rows.keys))], decisions
        self._serve(policy)
        taken: list[Decisions] = []
        for tokens in self._run(rows, self._served(rows, observed=True)):
            for row, trace in self._take(list(tokens)).items():
                taken += _decisions(row, len(tokens[row]), trace, rows.keys.device)
            found |= zip(tokens, self._completions(tokens), strict=True)
        return [found[row] for row in range(len(rows.keys))], Decisions.in_order(taken)

    def _decide(self, policy: DecodingPolicy, rows: Rows) -> tuple[SamplingParameters, Decisions | None]:
        policy.warn_beyond(int(rows.token_budget.max()), int(rows.parallel_samples.max()))
        pad = special_tokens(self.model, self.tokenizer)["pad"]
        return decide_first(self.model, policy, rows, pad, self.batch_rows)

    def _serve(self, policy: DecodingPolicy) -> None:
        """Gives the workers the policy as it is now."""
        replace_adapter(self.llm, save_served(self.model, policy, self._folder.name))
        self._tag = uuid.uuid4().hex

    def _own(self, parameters: SamplingParameters) -> dict[str, Any]:
        """One row's settings, for vLLM's own sampler."""
        given = {name: vars(parameters)[name] for name in _SETTINGS}
        settings = {name: off if given[name] is None else given[name].item() for name, off in _STATIC.items()}
        return {**settings, **({"extra_args": {"adaptive_decoding": False}} if self._has_plugin else {})}

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
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        _check_lengths(rows, engine.model_config.max_model_len)
        ends = sorted(special_tokens(self.model, self.tokenizer)["ends"])
        constraints = constrained_as(self.model)[0]
        asked = zip(rows.prompt.tolist(), rows.token_budget.tolist(), rows.keys.tolist(), settings, strict=True)
        call, waiting = uuid.uuid4().hex, dict[str, int]()
        try:
            for row, (place, budget, key, how) in enumerate(asked):
                fixed: dict[str, Any] = {"max_tokens": budget, "seed": key, "stop_token_ids": ends, **constraints}
                fixed["min_tokens"] = min(fixed.get("min_tokens", 0), budget)
                params = SamplingParams(**fixed, **how, ignore_eos=True, detokenize=False)
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

    def _completions(
        self, tokens: dict[int, list[int]], parameters: dict[int, SamplingParameters] | None = None
    ) -> list[Completion]:
        ends = special_tokens(self.model, self.tokenizer)["ends"]
        texts = self.tokenizer.batch_decode(list(tokens.values()), skip_special_tokens=True)
        return [
            Completion(
                text, tuple(ids), ids[-1] in ends, **({} if parameters is None else _columns(parameters[row], len(ids)))
            )
            for text, (row, ids) in zip(texts, tokens.items(), strict=True)
        ]


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


def _decisions(row: int, length: int, trace: RequestTrace, device: torch.device) -> list[Decisions]:
    """What a policy itself decided of a row's tokens."""
    action, seen = trace.parameters.action, trace.observation
    if action is None or seen is None:
        return []
    step = (action[:length] >= 0).nonzero().squeeze(-1)
    columns: dict[str, Any] = {n: None if v is None else v.to(device) for n, v in vars(seen.select(step)).items()}
    own, step = Observation(**columns), step.to(device)
    return [Decisions(own, action.to(device)[step], torch.full_like(step, row), step)] if len(step) else []


def _check_lengths(rows: Rows, longest: int) -> None:
    lengths = torch.tensor([len(prompt) for prompt in rows.prompts], device=rows.prompt.device)
    needed = int((lengths[rows.prompt] + rows.token_budget).max())
    if needed > longest:
        raise BudgetError(
            f"a prompt and its token budget are {needed} tokens long, and vLLM's `max_model_len` is {longest}; lower "
            "the budget, or pass a larger `max_model_len` to the engine."
        )


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
    if torch.distributed.is_available() and torch.distributed.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UnsupportedGenerationError(
            'the engine "vllm" shares its process with one training process, and here are '
            f'{os.environ["WORLD_SIZE"]}; take the engine "transformers", which each of them has.'
        )
