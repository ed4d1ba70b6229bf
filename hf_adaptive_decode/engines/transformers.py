"""Many completions of many prompts by transformers' `generate`; knows models and tokenizers, no rewards or tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..budget import resolve_budget
from ..modeling import AutoDecoForCausalLM
from ..types import Budget
from .base import Completion

Prompt = str | list[dict[str, str]]


def complete(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    token_budget: int = 256,
    settings: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_rows: int = 256,
    description: str | None = None,
) -> list[list[Completion]]:
    """
    `samples` completions of each prompt.

    Args:
        model ([`~transformers.PreTrainedModel`]): A base or adaptive model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer; it pads on the left while this runs.
        prompts (sequence of `str` or of message lists): Plain or conversational prompts.
        samples (`int`): Parallel budget B.
        token_budget (`int`): Token budget b of every completion.
        settings (mapping, *optional*): Static `temperature`, `top_k`, `top_p`, `min_p` (temperature 0 is greedy), with
            what is left out off, instead of the adapter. `None` lets the adapter decide.
        seed (`int`): Seeds each batch; the same arguments give the same completions on CPU.
        batch_rows (`int`): Sequences decoded at once.
        description (`str`, *optional*): Shows a progress bar under this name.

    Raises:
        [`BudgetError`]: If `samples` or `token_budget` is not a positive whole number.

    Returns:
        A list of `samples` [`Completion`] for each prompt, in the order of `prompts`.
    """
    resolve_budget(Budget(tokens=token_budget, samples=samples), prompts=1)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # Prompts of like length go together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    greedy = settings is not None and settings.get("temperature") == 0
    drawn = 1 if greedy else samples
    step = max(1, batch_rows // drawn)
    found: list[list[Completion]] = [[] for _ in prompts]
    bar = tqdm(total=len(prompts), desc=description, unit="prompt", disable=description is None, leave=False)
    with bar:
        for batch in _chunks(order, step):
            torch.manual_seed(seed * 1_000_003 + batch[0])
            rows = _generate(model, tokenizer, [encoded[i] for i in batch], drawn, token_budget, settings)
            for position, index in enumerate(batch):
                own = rows[position * drawn : (position + 1) * drawn]
                found[index] = own * samples if greedy else own
            bar.update(len(batch))
    return found


def _chunks(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a plain prompt, or of a conversation up to where the assistant begins."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))


def _generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[list[int]],
    samples: int,
    token_budget: int,
    settings: Mapping[str, float] | None,
) -> list[Completion]:
    pad = model.generation_config.pad_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "pad_token_id": pad}
    adaptive = isinstance(model, AutoDecoForCausalLM)
    trace = None
    if settings is None and adaptive:
        budget = Budget(tokens=token_budget, samples=samples)
        output = model.generate(**how, budget=budget, return_dict_in_generate=True, output_decoding_trace=True)
        sequences, trace = output.sequences, output.decoding_trace
    else:
        how |= {"max_new_tokens": token_budget, "num_return_sequences": samples, **_static(settings or {})}
        with model.disable_adapter() if adaptive else nullcontext():
            sequences = model.generate(**how)
    new = sequences[:, width:].tolist()
    ends = _end_ids(model)
    columns = [] if trace is None else [trace.temperature.cpu().numpy(), trace.top_p.cpu().numpy()]
    return [_completion(tokenizer, row, ends, [column[i] for column in columns]) for i, row in enumerate(new)]


def _static(settings: Mapping[str, float]) -> dict[str, Any]:
    """Keywords for the base model's own `generate`, with everything off that `settings` leaves out."""
    if settings.get("temperature") == 0:
        return {"do_sample": False}
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None}
    return {"do_sample": True, **off, **settings}


def _end_ids(model: PreTrainedModel) -> set[int]:
    end = model.generation_config.eos_token_id
    return set() if end is None else set(cast(list[int], end if isinstance(end, list) else [end]))


def _completion(tokenizer: Any, row: list[int], ends: set[int], columns: list[Any]) -> Completion:
    stop = next((position + 1 for position, token in enumerate(row) if token in ends), None)
    ids = row if stop is None else row[:stop]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(text, tuple(ids), stop is not None, *(column[: len(ids)] for column in columns))
