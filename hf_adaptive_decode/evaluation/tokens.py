"""What a model thought of every token that it wrote, one row a token; knows models and completions, no rewards, tasks
or pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..engines.base import Completion
from ..engines.transformers import Prompt, encode_prompt, special_tokens
from ..projection import FrozenProjection
from ..tap import output_embedding_shape

# Positions whose logits exist at once: at a vocabulary of 150,000, 150 MB in fp32.
_CHUNK = 256


@dataclass(frozen=True)
class TokenTable:
    """
    One row a generated token, over all completions of all prompts: by problem, then sample, then position.

    Probabilities and entropy are those of the base model's own distribution (temperature 1, nothing cut off), not of
    the one that the token was sampled from.

    Args:
        problem (`np.ndarray` of shape `[M]`, `int64`): Index of the prompt.
        sample (`np.ndarray` of shape `[M]`, `int64`): Which completion of the prompt.
        position (`np.ndarray` of shape `[M]`, `int64`): Place within the completion, from 0.
        token_id (`np.ndarray` of shape `[M]`, `int64`): The token.
        temperature, top_p (`np.ndarray` of shape `[M]`, `float32`): What it was sampled with; NaN where not recorded.
        action (`np.ndarray` of shape `[M]`, `int64`): The policy's action; -1 where it took none.
        entropy (`np.ndarray` of shape `[M]`, `float32`): In nats.
        probability (`np.ndarray` of shape `[M]`, `float32`): Of the token.
        top_ids (`np.ndarray` of shape `[M, K]`, `int64`): The K likeliest tokens, the likeliest first.
        top_probabilities (`np.ndarray` of shape `[M, K]`, `float32`): Their probabilities.
    """

    problem: np.ndarray
    sample: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    action: np.ndarray
    entropy: np.ndarray
    probability: np.ndarray
    top_ids: np.ndarray
    top_probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.token_id)

    def select(self, rows: np.ndarray) -> TokenTable:
        """Some of the rows, by index or by mask."""
        return TokenTable(**{name: column[rows] for name, column in vars(self).items()})


@torch.no_grad()
def token_table(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    *,
    top: int = 5,
    batch_rows: int = 64,
) -> TokenTable:
    """
    The table of all tokens of `completions`, by teacher-forced passes over prompt and completion.

    What a generation config does to logits besides sampling (a repetition penalty, say) is not part of it.

    Args:
        model ([`~transformers.PreTrainedModel`]): A base or adaptive model, in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (sequence of `str` or of message lists): As they were completed.
        completions (sequence of sequences of [`Completion`]): Those of each prompt.
        top (`int`): K, how many of the likeliest tokens to keep; at most the vocabulary.
        batch_rows (`int`): Completions in one pass.

    Raises:
        `ValueError`: If there is not one group of completions a prompt, or `top` or `batch_rows` is not positive.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts and {len(completions)} groups of completions; they have to pair.")
    for name, number in (("top", top), ("batch_rows", batch_rows)):
        if number < 1:
            raise ValueError(f"`{name}` is {number}; it has to be a whole number from 1.")
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    named = [(index, number, one) for index, group in enumerate(completions) for number, one in enumerate(group)]
    texts = [(encoded[index], list(one.token_ids)) for index, _, one in named]
    lengths = np.array([len(one.token_ids) for _, _, one in named], dtype=np.int64)
    recorded = {
        "problem": np.repeat(np.array([index for index, _, _ in named], dtype=np.int64), lengths),
        "sample": np.repeat(np.array([number for _, number, _ in named], dtype=np.int64), lengths),
        "position": _joined([np.arange(length) for length in lengths], np.int64),
        "token_id": _joined([np.array(ids) for _, ids in texts], np.int64),
        "temperature": _joined([_column(one.temperature, one, np.nan) for _, _, one in named], np.float32),
        "top_p": _joined([_column(one.top_p, one, np.nan) for _, _, one in named], np.float32),
        "action": _joined([_column(one.action, one, -1) for _, _, one in named], np.int64),
    }
    return TokenTable(**recorded, **_measured(model, tokenizer, texts, lengths, top, batch_rows))


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([*parts, np.empty(0)]).astype(dtype)


def _column(recorded: np.ndarray | None, completion: Completion, missing: float) -> np.ndarray:
    return np.full(len(completion.token_ids), missing) if recorded is None else recorded


def _measured(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: list[tuple[list[int], list[int]]],
    lengths: np.ndarray,
    top: int,
    batch_rows: int,
) -> dict[str, np.ndarray]:
    """The columns that need the model, `[M]` and `[M, K]`; `texts` are prompts with their completions, as ids."""
    total, kept = int(lengths.sum()), min(top, output_embedding_shape(model)[0])
    starts = lengths.cumsum() - lengths
    columns: dict[str, np.ndarray] = {
        "entropy": np.empty(total, dtype=np.float32),
        "probability": np.empty(total, dtype=np.float32),
        "top_ids": np.empty((total, kept), dtype=np.int64),
        "top_probabilities": np.empty((total, kept), dtype=np.float32),
    }
    pad = special_tokens(model, tokenizer)["pad"]
    projection = FrozenProjection(model)
    # Texts of like length go together, so that little is padded.
    order = [row for row in sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row]))) if lengths[row]]
    for batch in (order[start : start + batch_rows] for start in range(0, len(order), batch_rows)):
        hidden, targets = _predictors(projection, [texts[row] for row in batch], pad, model.device)
        where = _joined([starts[row] + np.arange(lengths[row]) for row in batch], np.int64)
        for part, target, at in zip(hidden.split(_CHUNK), targets.split(_CHUNK), _split(where), strict=True):
            for name, value in _statistics(projection.logits(part), target, kept).items():
                columns[name][at] = value.cpu().numpy()
    return columns


def _split(where: np.ndarray) -> list[np.ndarray]:
    return [where[start : start + _CHUNK] for start in range(0, len(where), _CHUNK)]


def _predictors(
    projection: FrozenProjection, texts: list[tuple[list[int], list[int]]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states `[C, H]` that predict the completions' tokens, and those tokens `[C]`; C is all of `texts`."""
    width = max(len(prompt) + len(ids) for prompt, ids in texts) - 1  # the last token predicts none of these
    inputs = torch.full((len(texts), width), pad, device=device)
    mask = torch.zeros_like(inputs)
    predicts = torch.zeros_like(inputs, dtype=torch.bool)
    # Padded on the right, whatever the tokenizer does: causal models then see and number every text as if alone, those
    # that take no positions (GPT-2's relatives count columns, Mamba's read them in turn) included.
    for row, (prompt, ids) in enumerate(texts):
        text = [*prompt, *ids][:-1]
        inputs[row, : len(text)] = torch.tensor(text, device=device)
        mask[row, : len(text)] = 1
        predicts[row, len(prompt) - 1 : len(text)] = True
    hidden = projection.hidden_states(input_ids=inputs, attention_mask=mask)
    targets = torch.tensor([token for _, ids in texts for token in ids], device=hidden.device)
    return hidden[predicts.to(hidden.device)], targets


def _statistics(logits: torch.Tensor, target: torch.Tensor, top: int) -> dict[str, torch.Tensor]:
    probabilities = logits.float().softmax(-1)
    likeliest = probabilities.topk(top, dim=-1)
    return {
        "entropy": torch.special.entr(probabilities).sum(-1),  # 0 log 0 = 0, as where a model rules a token out
        "probability": probabilities.gather(-1, target.to(logits.device)[:, None]).squeeze(-1),
        "top_ids": likeliest.indices,
        "top_probabilities": likeliest.values,
    }
