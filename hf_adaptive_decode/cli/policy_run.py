"""Trains one action policy, and finds the prior that it may begin with; knows no flags and no particular task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .run_folder import RunFolder, train_in

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RunFolder", "prior_entries", "static_rates", "train_policy_in"]


def train_policy_in(
    run: RunFolder,
    model: Any,
    tokenizer: Any,
    config: Callable[[], Any],
    arguments: Any,
    reward: Callable[..., Any],
    problems: Sequence[dict[str, Any]],
    deterministic: bool = False,
    source: str | None = None,
) -> Any:
    """
    The trained policy, which is also saved with the tokenizer; of a finished run it is only loaded.

    Args:
        run ([`RunFolder`]): Where.
        model ([`~transformers.PreTrainedModel`]), tokenizer: The base model, which may become an adaptive one.
        config (`Callable`): Makes the fresh adapter's [`AutoDecoConfig`], if there is anything to train.
        arguments ([`REINFORCEDecodingTrainingArguments`]): Those of the trainer.
        reward (`Callable`), problems (sequence of `dict`): What to train on.
        deterministic (`bool`): Whether the policy takes its likeliest actions once it is trained.
        source (`str`, *optional*): What the problems are called, for the card.
    """
    import torch

    from ..modeling import AutoDecoForCausalLM
    from ..training import REINFORCEDecodingTrainer

    def make_trainer() -> Any:
        fresh = config()
        torch.manual_seed(arguments.seed)
        adaptive = AutoDecoForCausalLM.from_base(model, fresh)
        return REINFORCEDecodingTrainer(adaptive, reward, arguments, problems, processing_class=tokenizer)

    def settle(adaptive: Any) -> None:
        # Not before: a policy that always takes its likeliest action has nothing to learn from.
        policy = adaptive.decoding_adapter
        policy.deterministic = policy.config.deterministic = adaptive.decoding_config.deterministic = deterministic

    def data() -> str:
        return f"{len(problems):,} problems{'' if source is None else f' of {source}'}"

    return train_in(run, model, make_trainer, shown=("reward", "objective"), data=data, settle=settle)


def static_rates(
    model: Any,
    tokenizer: Any,
    problems: Sequence[dict[str, Any]],
    reward: Callable[..., Any],
    actions: Sequence[dict[str, float]],
    token_budgets: Sequence[int],
    parallel_budgets: Sequence[int],
    **how: Any,
) -> np.ndarray:
    """pass@B of each action alone, as the mean over problems and token budgets, `[parallel budgets, actions]`."""
    import numpy as np

    from ..actions import describe
    from ..evaluation import Decoder, run_decoder

    rates = []
    for action in actions:
        decoder = Decoder(f"prior: {describe(action)}", action)
        found = [run_decoder(model, tokenizer, problems, reward, decoder, token_budget=b, **how) for b in token_budgets]
        rates.append([np.mean([one.pass_at(parallel) for one in found]) for parallel in parallel_budgets])
    return np.array(rates).T


def prior_entries(
    rates: np.ndarray, parallel_budgets: Sequence[int], probability: float, told_samples: bool
) -> list[dict[str, Any]]:
    """
    An `action_prior` with `probability` on the best action for each B and the rest spread evenly over the others.

    A policy that is not told B gets one entry for all of them, since its start would tell it otherwise.
    """
    if not told_samples:
        rates, parallel_budgets = rates.mean(axis=0, keepdims=True), parallel_budgets[:1]
    others = (1 - probability) / max(1, rates.shape[1] - 1)
    entries = []
    for parallel, of_actions in zip(parallel_budgets, rates, strict=True):
        best = int(of_actions.argmax())
        chances = [probability if action == best else others for action in range(len(of_actions))]
        entries.append({"samples": parallel, "probabilities": chances})
    return entries
