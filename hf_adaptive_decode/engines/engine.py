"""What every engine takes and gives: prompts, what decides, and completions; knows models and tokenizers, no host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

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
from .prompts import Prompt, encode_prompt
from .records import Decisions, Rows


class Engine(ABC):
    """
    Draws many completions of many prompts. What it cannot do it refuses before it begins, and says why.

    Args:
        model ([`~transformers.PreTrainedModel`]): A base or adaptive model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        batch_rows (`int`, *optional*): Most sequences decoded at once; `None` for all.

    Attributes:
        name (`str`): What it goes by.
    """

    name: ClassVar[str]

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, batch_rows: int | None = 256) -> None:
        self.model, self.tokenizer, self.batch_rows = model, tokenizer, batch_rows

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int = 1,
        token_budget: int | Sequence[int] = 256,
        parallel_budget: int | None = None,
        settings: Mapping[str, float] | None = None,
        policy: DecodingPolicy | None = None,
        seed: int = 0,
        only: Sequence[int] | None = None,
        description: str | None = None,
    ) -> list[list[Completion]]:
        """
        `samples` completions of each prompt.

        Args:
            prompts (sequence of `str` or of message lists): Plain or conversational prompts.
            samples (`int`): Completions of each prompt.
            token_budget (`int` or sequence of `int`): Token budget b of every completion, or one for each prompt.
            parallel_budget (`int`, *optional*): Parallel budget B that the policy is told; `samples` by default.
            settings (mapping, *optional*): Static `temperature`, `top_k`, `top_p`, `min_p` (temperature 0 is greedy),
                with what is left out off, instead of a policy.
            policy ([`DecodingPolicy`], *optional*): Decides instead of the model's adapter. With neither `settings`
                nor `policy` the adapter decides, and on a base model plain sampling.
            seed (`int`): Seeds the draws.
            only (sequence of `int`, *optional*): Places of the prompts to complete, where others complete the rest.
            description (`str`, *optional*): Shows a progress bar under this name.

        Raises:
            [`BudgetError`]: If a budget is not a positive whole number, or there is not one token budget a prompt.
            [`UnsupportedGenerationError`]: If the engine refuses what it is asked for.

        Returns: A list of `samples` [`Completion`] for each prompt, in the order of `prompts`, or of `only`.
        """
        _budgets(token_budget, samples, len(prompts))  # before as many rows are listed
        places = range(len(prompts)) if only is None else only
        greedy = is_greedy(settings) and policy is None
        wanted = [(index, sample) for index in places for sample in range(1 if greedy else samples)]
        found: dict[tuple[int, int], Completion] = {}
        how: dict[str, Any] = {"token_budget": token_budget, "settings": settings, "policy": policy, "seed": seed}
        how["parallel_budget"] = samples if parallel_budget is None else parallel_budget
        bar = tqdm(total=len(wanted), desc=description, unit="row", disable=description is None, leave=False)
        with bar:
            for batch in self.complete_batches(prompts, wanted, **how):
                found |= {(index, sample): completion for index, sample, completion in batch}
                bar.update(len(batch))
        return [[found[index, 0 if greedy else sample] for sample in range(samples)] for index in places]

    def complete_batches(
        self,
        prompts: Sequence[Prompt],
        wanted: Sequence[tuple[int, int]],
        *,
        token_budget: int | Sequence[int],
        parallel_budget: int,
        settings: Mapping[str, float] | None = None,
        policy: DecodingPolicy | None = None,
        seed: int = 0,
    ) -> Iterator[list[tuple[int, int, Completion]]]:
        """
        Some completions of some prompts, for callers that keep what is finished.

        Args:
            prompts, token_budget, settings, policy, seed: As [`~Engine.complete`] takes them.
            wanted (sequence of `(prompt, sample)`): Which.
            parallel_budget (`int`): Parallel budget B that the policy is told.

        Yields:
            `(prompt, sample, completion)` of each of the rows that have ended since the last; each row comes once.
        """
        budgets, told = _budgets(token_budget, parallel_budget, len(prompts))
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        policy = self._decider(settings, policy)
        self._refuse(policy)
        if not wanted:
            return
        # Prompts of like length go together, so that little is padded.
        flat = sorted(wanted, key=lambda name: (len(encoded[name[0]]), name))
        rows = _rows(flat, encoded, budgets, told, seed)
        with evaluating(policy):
            for at, completions in self._finished(policy, rows):
                yield [(*flat[row], completion) for row, completion in zip(at, completions, strict=True)]

    def roll_out(self, policy: DecodingPolicy, rows: Rows) -> tuple[list[Completion], Decisions | None]:
        """
        One completion of each row, and the decisions of an action policy, which are what an update of it needs.

        Args:
            policy ([`DecodingPolicy`]): As it is now; it decides, in evaluation mode.
            rows ([`Rows`]): What to decode.

        Raises:
            [`UnsupportedGenerationError`]: If the engine cannot decode by this policy, or not record its decisions.

        Returns: The completions by row, and the decisions by step, then by row; `None` if the policy made none.
        """
        self._refuse(policy)
        with evaluating(policy):
            return self._recorded(policy, rows)

    def refusal(
        self, *, settings: Mapping[str, float] | None = None, policy: DecodingPolicy | None = None
    ) -> str | None:
        """Why this engine does not decode so, as a sentence; `None` if it does."""
        return self._why_not(self._decider(settings, policy))

    def close(self) -> None:  # noqa: B027  # most engines hold nothing
        """Lets go of what the engine holds; it is not to be used any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _finished(self, policy: DecodingPolicy, rows: Rows) -> Iterator[tuple[list[int], list[Completion]]]:
        """Rows that have ended, by number, with what each token was sampled with; each row once."""

    @abstractmethod
    def _recorded(self, policy: DecodingPolicy, rows: Rows) -> tuple[list[Completion], Decisions | None]:
        """As [`~Engine.roll_out`] gives it."""

    def _why_not(self, policy: DecodingPolicy) -> str | None:
        return None

    def _refuse(self, policy: DecodingPolicy) -> None:
        why = self._why_not(policy)
        if why is not None:
            raise UnsupportedGenerationError(why)

    def _decider(self, settings: Mapping[str, float] | None, policy: DecodingPolicy | None) -> DecodingPolicy:
        if policy is not None:
            return policy.to(self.model.device)
        if settings is None and isinstance(self.model, AutoDecoForCausalLM):
            return self.model.decoding_adapter
        action = {name: value for name, value in (settings or {}).items() if value is not None}
        if self.model.config.is_encoder_decoder:
            raise UnsupportedGenerationError(
                f"{type(self.model).__name__} is an encoder-decoder; only causal models decode here."
            )
        return build_policy(AutoDecoConfig(policy="static", actions=[action])).to(self.model.device)


def is_greedy(settings: Mapping[str, float] | None) -> bool:
    """Whether all samples of a prompt are the same under these static settings."""
    return settings is not None and settings.get("temperature") == 0


@contextmanager
def evaluating(policy: DecodingPolicy) -> Iterator[None]:
    """Within it the policy is in evaluation mode."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


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
