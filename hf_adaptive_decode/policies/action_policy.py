"""Policies that choose one of finitely many actions (Adaptive Decoding, section 2); knows no host or reward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..configuration import AutoDecoConfig
from ..errors import AdaptiveDecodeError
from ..features import context, context_width, reads_logits
from ..types import DecodeState, Observation, SamplingParameters
from .base import DecodingPolicy
from .budget_encoder import BudgetEncoder
from .static import action_columns, draw, greedy_where, is_sure, take_action

# A prior's probability of 0 would be -inf as a logit, which no training could move.
_LEAST_PRIOR = 1e-4


class ActionPolicy(DecodingPolicy):
    """
    π(a | x) = softmax(MLP([features; budgets]) / action temperature), a 3-layer SiLU MLP with dropout (Table 15).

    The output layer starts at zero, so a fresh policy draws its actions uniformly, or as `action_prior` says for the
    parallel budget at hand: the prior's log-probabilities are added to the MLP's output. Dropout acts in training mode
    alone. Where the base model is surer than `max_prob_mask`, the policy does not decide: the token is greedy, or
    sampled by the prior's favourite, and the recorded action is -1 (section 2.3, training stability).

    Args:
        config ([`AutoDecoConfig`]): Settings with `actions` and `hidden_size`.
    """

    def __init__(self, config: AutoDecoConfig) -> None:
        super().__init__(config)
        actions = config.actions or []
        for name, values in action_columns(actions).items():
            self.register_buffer(name, values, persistent=False)
        width = context_width(config.features, int(config.hidden_size or 0))
        self.budget_encoder = None
        if config.budget_features:
            self.budget_encoder = BudgetEncoder(
                config.budget_features, config.max_token_budget, config.max_parallel_budget
            )
            width += self.budget_encoder.width
        hidden = config.policy_hidden_size
        sizes = [(width, hidden), (hidden, hidden), (hidden, len(actions))]
        self.layers = nn.ModuleList([nn.Linear(*size, dtype=torch.float32) for size in sizes])
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.deterministic = bool(config.deterministic)
        samples, log_prior = _prior(config)
        self.register_buffer("prior_samples", samples, persistent=False)
        self.register_buffer("log_prior", log_prior, persistent=False)

    @property
    def has_actions(self) -> bool:
        """An action policy records what it chose."""
        return True

    @property
    def needs_logits(self) -> bool:
        """Logits are read for their statistics, and to see where the model is sure."""
        return reads_logits(self.config.features) or self.config.max_prob_mask is not None

    def warn_beyond(self, tokens: int | None, samples: int | None) -> None:
        """Warns once if a budget is beyond what the policy tells apart."""
        if self.budget_encoder is not None:
            self.budget_encoder.warn_beyond(tokens, samples)

    def observe(self, state: DecodeState) -> Observation:
        """The part of a state that decides, `context` of shape `[N, W]`."""
        if self.config.pooling == "mean":
            if state.prompt_mean is None:
                raise AdaptiveDecodeError(
                    'this policy pools the prompt by mean (`pooling="mean"`), and the host keeps its last hidden state '
                    "alone; wrap the model with `AutoDecoForCausalLM.from_pretrained` instead."
                )
            state = replace(state, hidden=state.prompt_mean)
        return Observation(context(state, self.config.features), state.remaining_tokens, state.parallel_samples)

    def action_logits(self, seen: Observation) -> torch.Tensor:
        """Unnormalised log-probabilities `[N, actions]`, `torch.float32`, the action temperature applied."""
        with torch.autocast(seen.context.device.type, enabled=False):
            x = seen.context
            if self.budget_encoder is not None:
                x = torch.cat([x, self.budget_encoder(seen)], dim=-1)
            for number, layer in enumerate(cast(list[nn.Linear], list(self.layers))):
                x = F.linear(x, layer.weight.float(), layer.bias.float())
                if number < len(self.layers) - 1:
                    x = F.dropout(F.silu(x), self.config.policy_dropout, self.training)
            if self.config.action_prior:
                x = x + self.prior(seen.parallel_samples, x.shape[0])
            return x / self.config.action_temperature

    def prior(self, samples: torch.Tensor | None, rows: int) -> torch.Tensor:
        """Log-probabilities `[N, actions]` of the prior at each row's B, between listed budgets linear in log B."""
        listed, table = self.get_buffer("prior_samples"), self.get_buffer("log_prior")
        if len(listed) == 1 or samples is None:
            return table[:1].expand(rows, -1)
        at = samples.to(listed.dtype).clamp(listed[0], listed[-1])
        above = torch.searchsorted(listed, at).clamp(1, len(listed) - 1)
        low, high = listed[above - 1].log(), listed[above].log()
        share = ((at.log() - low) / (high - low)).unsqueeze(-1)
        return (1 - share) * table[above - 1] + share * table[above]

    def decide(self, state: DecodeState) -> tuple[SamplingParameters, Observation]:
        """Parameters of a drawn action (the likeliest if `deterministic`), with `action` `[N]`, and what was seen."""
        state = self.brought_here(state)
        seen = self.observe(state)
        logits = self.action_logits(seen)
        broken = ~logits.isfinite().all(-1)
        logits = logits.masked_fill(broken[:, None], 0.0)
        chosen = logits.argmax(-1) if self.deterministic else draw(logits.softmax(-1), state.uniform)
        parameters = _undecided(broken, take_action(self, chosen))
        limit = self.config.max_prob_mask
        if limit is None:
            return parameters, seen
        sure = is_sure(state, limit)
        if self.config.masked_steps == "greedy":
            return greedy_where(sure, parameters), seen
        usual = self.prior(seen.parallel_samples, len(chosen)).argmax(-1)
        parameters = _undecided(broken & ~sure, take_action(self, torch.where(sure, usual, chosen)))
        return replace(parameters, action=chosen.masked_fill(sure, -1)), seen

    def forward(self, state: DecodeState) -> SamplingParameters:
        """As [`~decide`], without what was seen."""
        return self.decide(state)[0]


def _undecided(broken: torch.Tensor, parameters: SamplingParameters) -> SamplingParameters:
    """NaN as the temperature in the rows of `broken` `[N]`, where hosts look for it and name the row."""
    temperature = parameters.temperature
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.ones_like(broken, dtype=torch.float32)
    return replace(parameters, temperature=temperature.masked_fill(broken, float("nan")))


def _prior(config: AutoDecoConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The budgets B that the prior lists, ascending, `[P]`, and its log-probabilities there, `[P, actions]`."""
    entries: list[dict[str, Any]] = sorted(config.action_prior or [], key=lambda entry: entry["samples"])
    samples = torch.tensor([entry["samples"] for entry in entries], dtype=torch.float32)
    weights = [[weight / sum(entry["probabilities"]) for weight in entry["probabilities"]] for entry in entries]
    return samples, torch.tensor(weights, dtype=torch.float32).clamp(min=_LEAST_PRIOR).log()
