"""Many completions of many prompts by a transformers model; knows models and tokenizers, no rewards or tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..budget import resolve_budget
from ..configuration import AutoDecoConfig
from ..errors import BudgetError, UnsupportedGenerationError
from ..modeling import AutoDecoForCausalLM
from ..policies import DecodingPolicy, build_policy
from ..randomness import row_key
from ..types import Budget
from .base import Completion
from .rollout import Decoded, Rows, decode_finished

Prompt = str | list[dict[str, str]]


def complete(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    token_budget: int | Sequence[int] = 256,
    parallel_budget: int | None = None,
    settings: Mapping[str, float] | None = None,
    policy: DecodingPolicy | None = None,
    seed: int = 0,
    only: Sequence[int] | None = None,
    batch_rows: int = 256,
    description: str | None = None,
) -> list[list[Completion]]:
    """
    `samples` completions of each prompt.

    A completion's random draws depend on the seed, the prompt's place in `prompts` and the sample's number alone, so
    the batch size and other prompts do not matter to it.

    Args:
        model ([`~transformers.PreTrainedModel`]): A base or adaptive model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (sequence of `str` or of message lists): Plain or conversational prompts.
        samples (`int`): Completions of each prompt.
        token_budget (`int` or sequence of `int`): Token budget b of every completion, or one for each prompt.
        parallel_budget (`int`, *optional*): Parallel budget B that the policy is told; `samples` by default.
        settings (mapping, *optional*): Static `temperature`, `top_k`, `top_p`, `min_p` (temperature 0 is greedy), with
            what is left out off, instead of a policy.
        policy ([`DecodingPolicy`], *optional*): Decides instead of the model's adapter. With neither `settings` nor
            `policy` the adapter decides, and on a base model plain sampling.
        seed (`int`): Seeds the draws; the same arguments give the same completions on CPU.
        only (sequence of `int`, *optional*): Places of the prompts to complete, where others complete the rest.
        batch_rows (`int`): Most sequences decoded at once.
        description (`str`, *optional*): Shows a progress bar under this name.

    Raises:
        [`BudgetError`]: If a budget is not a positive whole number, or there is not one token budget a prompt.

    Returns: A list of `samples` [`Completion`] for each prompt, in the order of `prompts`, or of `only`.
    """
    _budgets(token_budget, samples, len(prompts))  # before as many rows are listed
    greedy = is_greedy(settings) and policy is None
    places = range(len(prompts)) if only is None else only
    wanted = [(index, sample) for index in places for sample in range(1 if greedy else samples)]
    found: dict[tuple[int, int], Completion] = {}
    how: dict[str, Any] = {"token_budget": token_budget, "settings": settings, "policy": policy, "seed": seed}
    how["parallel_budget"] = samples if parallel_budget is None else parallel_budget
    bar = tqdm(total=len(wanted), desc=description, unit="row", disable=description is None, leave=False)
    with bar:
        for batch in complete_batches(model, tokenizer, prompts, wanted, batch_rows=batch_rows, **how):
            found |= {(index, sample): completion for index, sample, completion in batch}
            bar.update(len(batch))
    return [[found[index, 0 if greedy else sample] for sample in range(samples)] for index in places]


def is_greedy(settings: Mapping[str, float] | None) -> bool:
    """Whether all samples of a prompt are the same under these static settings."""
    return settings is not None and settings.get("temperature") == 0


def complete_batches(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    wanted: Sequence[tuple[int, int]],
    *,
    token_budget: int | Sequence[int],
    parallel_budget: int,
    settings: Mapping[str, float] | None = None,
    policy: DecodingPolicy | None = None,
    seed: int = 0,
    batch_rows: int = 256,
) -> Iterator[list[tuple[int, int, Completion]]]:
    """
    Some completions of some prompts, for callers that keep what is finished. As rows end, others take their places.

    Args:
        model, tokenizer, prompts, token_budget, settings, policy, seed, batch_rows: As [`complete`] takes them.
        wanted (sequence of `(prompt, sample)`): Which; a completion is the same whatever else is wanted.
        parallel_budget (`int`): Parallel budget B that the policy is told.

    Yields:
        `(prompt, sample, completion)` of each of the rows that have ended since the last; each row comes once, and
        prompts of like length begin together.
    """
    budgets, told = _budgets(token_budget, parallel_budget, len(prompts))
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    policy = _policy(model, settings) if policy is None else policy.to(model.device)
    if not wanted:
        return
    # Prompts of like length go together, so that little is padded.
    flat = sorted(wanted, key=lambda name: (len(encoded[name[0]]), name))
    rows = _rows(flat, encoded, budgets, told, seed)
    how: dict[str, Any] = {**special_tokens(model, tokenizer), "records": "parameters", "batch_rows": batch_rows}
    with _evaluating(policy):
        for at, decoded in decode_finished(model, policy, rows, **how):
            completions = as_completions(decoded, tokenizer)
            yield [(*flat[row], completion) for row, completion in zip(at.tolist(), completions, strict=True)]


def _budgets(token_budget: Any, parallel: Any, prompts: int) -> tuple[tuple[int, ...], int]:
    known = resolve_budget(Budget(tokens=token_budget, samples=parallel), prompts)
    if known.tokens is None or known.samples is None:
        raise BudgetError("`token_budget` is None; it has to be a positive whole number, or one for every prompt.")
    return known.tokens, known.samples


def _rows(
    batch: list[tuple[int, int]], encoded: list[list[int]], budgets: Sequence[int], parallel: int, seed: int
) -> Rows:
    places = {index: place for place, index in enumerate(dict.fromkeys(index for index, _ in batch))}
    return Rows(
        [encoded[index] for index in places],
        torch.tensor([places[index] for index, _ in batch]),
        torch.tensor([budgets[index] for index, _ in batch]),
        torch.full((len(batch),), parallel),
        torch.tensor([row_key(seed, *name) for name in batch]),
    )


@contextmanager
def _evaluating(policy: DecodingPolicy) -> Iterator[None]:
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


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


def _policy(model: PreTrainedModel, settings: Mapping[str, float] | None) -> DecodingPolicy:
    if settings is None and isinstance(model, AutoDecoForCausalLM):
        return model.decoding_adapter
    action = {name: value for name, value in (settings or {}).items() if value is not None}
    if model.config.is_encoder_decoder:
        raise UnsupportedGenerationError(
            f"{type(model).__name__} is an encoder-decoder; only causal models decode here."
        )
    return build_policy(AutoDecoConfig(policy="static", actions=[action])).to(model.device)
