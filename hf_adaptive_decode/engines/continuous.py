"""Transformers' continuous batching as an engine: pages instead of padded rows; knows managers and requests, nothing of
how a policy decides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, LogitsProcessorList, PreTrainedModel

from ..errors import LogitsError
from ..modeling import AutoDecoForCausalLM
from ..policies import DecodingPolicy
from ..settings import neutralise
from .base import Completion
from .constraints import Constraints
from .engine import Engine
from .prompts import as_completions, special_tokens
from .records import Decisions, Decoded, Rows

_PAGE = 16
_SECONDS = 1.0  # between two looks whether the manager is still alive


class ContinuousBatchingEngine(Engine):
    """
    transformers' continuous batching: prompts are read in parts beside rows that write, and share what they have in
    common, so that rows of very different lengths waste nothing.

    Tokens are drawn as [`TransformersEngine`] draws them, by the same random numbers: where two kernels of attention
    agree on the logits, the completions are the same.

    Args:
        model, tokenizer, batch_rows: As an [`Engine`] takes them.
        batching (`dict`, *optional*): For [`~transformers.ContinuousBatchingConfig`], such as `{"page_size": 256}`. By
            default as many pages as the rows at hand need on a CPU, and as the memory has room for elsewhere.
    """

    name = "continuous_batching"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_rows: int | None = 256,
        batching: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, tokenizer, batch_rows=batch_rows)
        self._batching = batching or {}

    def _why_not(self, policy: DecodingPolicy) -> str | None:
        if policy.pools_prompt:
            return (
                'the engine "continuous_batching" reads a prompt in parts and shares it between rows, so it never has '
                'the mean over a prompt that this policy reads (`pooling="mean"`); take the engine "transformers".'
            )
        if type(self.model)._is_stateful:
            return (
                'the engine "continuous_batching" keeps keys and values in pages, and '
                f'{type(self.model).__name__} has a state besides; take the engine "transformers".'
            )
        found = [type(one).__name__ for one in Constraints(self.model).found]
        if found:
            return (
                f"the model's generation config asks for {', '.join(found)}, which continuous batching does not apply; "
                'take the engine "transformers", or unset it in `model.generation_config`.'
            )
        return None

    def _finished(self, policy: DecodingPolicy, rows: Rows) -> Iterator[tuple[list[int], list[Completion]]]:
        with self._sampling(policy, rows, "parameters") as sampler:
            for at, tokens in self._run(sampler, rows):
                yield at, self._completions(at, tokens, sampler.written)

    def _recorded(self, policy: DecodingPolicy, rows: Rows) -> tuple[list[Completion], Decisions | None]:
        found: dict[int, Completion] = {}
        with self._sampling(policy, rows, "decisions") as sampler:
            for at, tokens in self._run(sampler, rows):
                found |= zip(at, self._completions(at, tokens, {}), strict=True)
            decisions = Decisions.in_order(sampler.decisions)
        return [found[row] for row in range(len(rows.keys))], decisions

    @contextmanager
    def _sampling(self, policy: DecodingPolicy, rows: Rows, records: str) -> Iterator[Any]:
        from .row_sampler import RowSampler

        sampler = RowSampler(self.model, policy, rows, records)
        policy.warn_beyond(int(rows.token_budget.max()), int(rows.parallel_samples.max()))
        try:
            yield sampler
        finally:
            sampler.close()

    def _run(self, sampler: Any, rows: Rows) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Numbers of rows that have ended, with their tokens."""
        ends = sorted(special_tokens(self.model, self.tokenizer)["ends"]) or -1
        prompt, budgets = rows.prompt.tolist(), rows.token_budget.tolist()
        left = len(prompt)
        with self._manager(sampler, rows) as manager:
            for row, (place, budget) in enumerate(zip(prompt, budgets, strict=True)):
                ids = rows.prompts[place]
                manager.add_request(ids, request_id=str(row), max_new_tokens=budget, eos_token_id=ends, row=row)
            while left:
                results = self._results(manager, sampler)
                left -= len(results)
                yield [int(one.request_id) for one in results], [one.generated_tokens for one in results]

    @contextmanager
    def _manager(self, sampler: Any, rows: Rows) -> Iterator[Any]:
        """A manager whose every token `sampler` draws; an adapter that the model has takes no part."""
        config = copy.deepcopy(self.model.generation_config)
        neutralise(config, {})
        config.max_new_tokens, config.num_return_sequences = int(rows.token_budget.max()), 1
        model, how = self.model, ContinuousBatchingConfig(**self._settings(rows))
        alone = model.disable_adapter() if isinstance(model, AutoDecoForCausalLM) else nullcontext()
        with alone:
            with _processors(model, sampler.processors):
                manager = model.init_continuous_batching(config, how)
            # transformers counts the tensors of its own processors alone.
            manager.logit_processor.tensors_required += len(sampler.processors)
            manager.start()
            try:
                yield manager
            finally:
                manager.stop(block=True, hard_stop=True)
                manager.destroy()

    def _settings(self, rows: Rows) -> dict[str, Any]:
        """Graphs would be replayed without what the sampler writes down."""
        settings: dict[str, Any] = {"use_cuda_graph": False, "use_async_batching": False, "page_size": _PAGE}
        if self.batch_rows is not None:
            settings["max_requests_per_batch"] = self.batch_rows
        if self.model.device.type == "cpu":
            longest = max(map(len, rows.prompts)) + int(rows.token_budget.max())
            at_once = min(len(rows.keys), self.batch_rows or len(rows.keys))
            settings |= {"num_blocks": at_once * (longest // _PAGE + 2), "max_batch_tokens": max(256, at_once)}
        return settings | self._batching

    @staticmethod
    def _results(manager: Any, sampler: Any) -> list[Any]:
        """Requests that have ended, at least one."""
        found: list[Any] = []
        while not found or not manager.output_router.output_queue.empty():
            one = manager.get_result(timeout=_SECONDS)
            if sampler.error is not None:
                raise sampler.error
            if one is None and not manager.is_running():
                raise LogitsError("continuous batching ended before all rows had; transformers' log says why.")
            if one is not None and one.is_finished():
                if one.error is not None:
                    raise LogitsError(f"row {one.request_id} failed in continuous batching: {one.error}")
                found.append(one)
        return found

    def _completions(
        self, at: list[int], tokens: list[list[int]], written: dict[str, torch.Tensor]
    ) -> list[Completion]:
        ends = special_tokens(self.model, self.tokenizer)["ends"]
        longest = max(map(len, tokens))
        parameters: dict[str, Any] = {name: column[at, :longest].cpu() for name, column in written.items()}
        decoded = Decoded(
            torch.tensor([row + [-1] * (longest - len(row)) for row in tokens]),
            torch.tensor([len(row) for row in tokens]),
            torch.tensor([row[-1] in ends for row in tokens]),
            **parameters,
        )
        return as_completions(decoded, self.tokenizer)


@contextmanager
def _processors(model: Any, added: list[Any]) -> Iterator[None]:
    """Within it, what a manager asks the model for ends with `added`."""
    own = model._get_logits_processor
    model._get_logits_processor = lambda *args, **kwargs: LogitsProcessorList([*own(*args, **kwargs), *added])
    try:
        yield
    finally:
        del model._get_logits_processor
