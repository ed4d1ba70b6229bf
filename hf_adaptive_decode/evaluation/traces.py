"""One completion token by token, as plain values that a page or a file can hold; knows tokenizers and token tables,
and no pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..actions import describe
from ..engines.base import Completion
from ..engines.transformers import Prompt, complete, encode_prompt
from .runner import Decoder, Reward, score
from .tokens import TokenTable, token_table

# Of a character whose bytes are not all there yet.
_UNFINISHED = "\ufffd"
# How much of the prompt's end a first token is read behind, so that its leading space shows.
_CONTEXT = 4


@dataclass(frozen=True)
class Alternative:
    """
    One of the likeliest tokens at a position.

    Args:
        token_id (`int`): The token.
        text (`str`): What it would have added to the text.
        probability (`float`): Under the base model's own distribution.
    """

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class TokenTrace:
    """
    One generated token.

    Args:
        token_id (`int`): The token.
        text (`str`): What it adds to the text; empty where it only begins a character.
        temperature, top_p (`float`, *optional*): What it was sampled with, where that is known.
        action (`int`, *optional*): Index into [`Trace`]'s `actions`; `None` where the policy took none.
        entropy (`float`): In nats, of the base model's own distribution.
        probability (`float`): Of the token under it.
        remaining (`int`): b_t, the tokens that were left when it was sampled, this one included.
        alternatives (tuple of [`Alternative`]): The likeliest tokens under it, the likeliest first.
    """

    token_id: int
    text: str
    temperature: float | None
    top_p: float | None
    action: int | None
    entropy: float
    probability: float
    remaining: int
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Trace:
    """
    One completion of one prompt.

    Args:
        name (`str`): The decoder's.
        prompt (`str`): As the model read it, special tokens included.
        tokens (tuple of [`TokenTrace`]): The completion.
        actions (tuple of `str`): Each of the policy's configurations in words; none for a policy without actions.
        token_budget (`int`): b.
        ended (`bool`): Whether it ended by itself.
        reward (`float`, *optional*): What it earned, where there is a reward.
    """

    name: str
    prompt: str
    tokens: tuple[TokenTrace, ...]
    actions: tuple[str, ...]
    token_budget: int
    ended: bool
    reward: float | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat dict a token, with the same keys in all of them: a line of a file, or a row of a data set."""
        for position, token in enumerate(self.tokens):
            kept = {name: value for name, value in vars(token).items() if name != "alternatives"}
            yield {
                "decoder": self.name,
                "position": position,
                **kept,
                "configuration": None if token.action is None else self.actions[token.action],
                "max_probability": token.alternatives[0].probability,
                "top_ids": [one.token_id for one in token.alternatives],
                "top_texts": [one.text for one in token.alternatives],
                "top_probabilities": [one.probability for one in token.alternatives],
            }


def traces_of(
    table: TokenTable,
    tokenizer: Any,
    prompt: Prompt,
    completions: Sequence[Completion],
    *,
    name: str,
    token_budget: int,
    actions: Sequence[Mapping[str, float]] = (),
    rewards: Sequence[float] | None = None,
) -> list[Trace]:
    """
    A trace of each completion of one prompt.

    Args:
        table ([`TokenTable`]): From [`token_table`], of this prompt and these completions alone.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        prompt (`str` or message list): The prompt.
        completions (sequence of [`Completion`]): All by one decoder.
        name (`str`): The decoder's.
        token_budget (`int`): b of every completion.
        actions (sequence of mappings): The sampling configurations that `action` is an index into.
        rewards (sequence of `float`, *optional*): One a completion.
    """
    context = encode_prompt(tokenizer, prompt)
    configurations = tuple(describe(action) for action in actions)
    traces = []
    for sample, completion in enumerate(completions):
        own = table.select(table.sample == sample)
        texts, others = _texts(tokenizer, context, own)
        tokens = tuple(
            TokenTrace(
                token_id=int(own.token_id[row]),
                text=texts[row],
                temperature=_known(own.temperature[row]),
                top_p=_known(own.top_p[row]),
                action=int(own.action[row]) if configurations and own.action[row] >= 0 else None,
                entropy=float(own.entropy[row]),
                probability=float(own.probability[row]),
                remaining=token_budget - row,
                alternatives=tuple(
                    Alternative(int(token), text, float(probability))
                    for token, text, probability in zip(
                        own.top_ids[row], others[row], own.top_probabilities[row], strict=True
                    )
                ),
            )
            for row in range(len(own))
        )
        reward = None if rewards is None else float(rewards[sample])
        read = _decode(tokenizer, context)
        traces.append(Trace(name, read, tokens, configurations, token_budget, completion.ended, reward))
    return traces


def trace_problem(
    model: PreTrainedModel,
    tokenizer: Any,
    row: Mapping[str, Any],
    reward: Reward | None,
    decoder: Decoder,
    *,
    token_budget: int,
    samples: int = 1,
    parallel_budget: int | None = None,
    seed: int = 0,
    top: int = 5,
) -> list[Trace]:
    """
    A decoder's completions of one problem, token by token.

    Args:
        model, tokenizer: A base or adaptive model and its tokenizer.
        row (mapping): With a `prompt` and the columns that the reward reads.
        reward (`Callable`, *optional*): In TRL's signature.
        decoder ([`Decoder`]): How to decode; a policy or static settings.
        token_budget, samples, parallel_budget, seed: As [`~engines.transformers.complete`] takes them.
        top (`int`): How many of the likeliest tokens to keep.
    """
    prompt, policy = row["prompt"], decoder.policy
    completions = complete(
        model,
        tokenizer,
        [prompt],
        samples=samples,
        token_budget=token_budget,
        parallel_budget=parallel_budget,
        settings=decoder.settings,
        policy=policy,
        seed=seed,
    )
    table = token_table(model, tokenizer, [prompt], completions, top=top)
    rewards = None if reward is None else score(completions, [row], reward)[0]
    actions = [decoder.settings or {}] if policy is None else policy.config.actions or []
    how: dict[str, Any] = {"token_budget": token_budget, "actions": actions, "rewards": rewards}
    return traces_of(table, tokenizer, prompt, completions[0], name=decoder.name, **how)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _texts(tokenizer: Any, context: list[int], table: TokenTable) -> tuple[list[str], list[list[str]]]:
    """
    What each token, and each of its alternatives, adds to the text.

    A token's text depends on what stands before it (a leading space, a character in several tokens), so each is the
    difference between two decoded texts; these begin where the last full character did, so the work stays linear.
    """
    ids = [*context, *table.token_id.tolist()]
    first = len(context)
    start, done = max(0, first - _CONTEXT), first
    texts, others = [], []
    for at in range(first, len(ids)):
        shown = len(_decode(tokenizer, ids[start:done]))
        top = table.top_ids[at - first].tolist()
        others.append([_decode(tokenizer, [*ids[start:at], token])[shown:] for token in top])
        text = _decode(tokenizer, ids[start : at + 1])
        if text.endswith(_UNFINISHED) and at + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[shown:])
        start, done = done, at + 1
    return texts, others


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
