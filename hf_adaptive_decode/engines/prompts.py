"""Prompts as tokens, and completions as texts; knows tokenizers, no engine and no policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedModel

from ..errors import BudgetError
from .base import Completion
from .records import Decoded

Prompt = str | list[dict[str, str]]


def encode_prompt(tokenizer: Any, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a plain prompt, or of a conversation up to where the assistant begins."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        how: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        ids = list(tokenizer.apply_chat_template(prompt, **how, **(chat_template_kwargs or {})))
    if not ids:
        raise BudgetError(f"the prompt {prompt!r} is empty (0 tokens); start it with the tokenizer's bos token.")
    return ids


def special_tokens(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """`ends` and `pad` as [`~engines.rollout.decode`] takes them."""
    end = model.generation_config.eos_token_id
    ends = set() if end is None else set(cast(list[int], end if isinstance(end, list) else [end]))
    pad = model.generation_config.pad_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    return {"ends": ends, "pad": 0 if pad is None else pad}  # masked out, so any id serves


def as_completions(decoded: Decoded, tokenizer: Any) -> list[Completion]:
    """The rows of a decoded batch as texts and arrays."""
    lengths, ended = decoded.lengths.tolist(), decoded.ended.tolist()
    ids = [row[:length] for row, length in zip(decoded.tokens.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    names = ("temperature", "top_p", "action")
    traces = {name: None if (t := vars(decoded)[name]) is None else t.cpu().numpy() for name in names}
    return [
        Completion(
            text,
            tuple(ids[row]),
            ended[row],
            **{name: None if t is None else t[row, : lengths[row]] for name, t in traces.items()},
        )
        for row, text in enumerate(texts)
    ]
