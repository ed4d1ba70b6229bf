"""Many completions of many prompts by a transformers model, whose own cache is decoded from; knows no other host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..policies import DecodingPolicy
from .base import Completion
from .engine import Engine, is_greedy
from .prompts import Prompt, as_completions, encode_prompt, special_tokens
from .records import Decisions, Rows
from .rollout import decode, decode_finished

__all__ = [
    "Prompt",
    "TransformersEngine",
    "as_completions",
    "complete",
    "encode_prompt",
    "is_greedy",
    "special_tokens",
]


class TransformersEngine(Engine):
    """
    Every model and every policy, in this process.

    A completion's random draws depend on the seed, the prompt's place in `prompts` and the sample's number alone: it is
    the same whatever else is wanted, and however many rows are decoded at once. As rows end, others take their places.
    """

    name = "transformers"

    def _finished(self, policy: DecodingPolicy, rows: Rows) -> Iterator[tuple[list[int], list[Completion]]]:
        how: dict[str, Any] = {**special_tokens(self.model, self.tokenizer), "batch_rows": self.batch_rows}
        for at, decoded in decode_finished(self.model, policy, rows, records="parameters", **how):
            yield at.tolist(), as_completions(decoded, self.tokenizer)

    def _recorded(self, policy: DecodingPolicy, rows: Rows) -> tuple[list[Completion], Decisions | None]:
        how: dict[str, Any] = {**special_tokens(self.model, self.tokenizer), "batch_rows": self.batch_rows}
        decoded = decode(self.model, policy, rows, records="decisions", **how)
        return as_completions(decoded, self.tokenizer), decoded.decisions


def complete(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], *, batch_rows: int = 256, **how: Any
) -> list[list[Completion]]:
    """
    `samples` completions of each prompt, by [`TransformersEngine`].

    Args:
        model, tokenizer, batch_rows: As an [`Engine`] takes them.
        prompts, how: As [`~Engine.complete`] takes them.
    """
    return TransformersEngine(model, tokenizer, batch_rows=batch_rows).complete(prompts, **how)
