"""Policies that choose one of finitely many actions (Adaptive Decoding, section 2); knows no host or reward."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from ..configuration import AutoDecoConfig
from ..features import context, context_width, reads_logits
from ..types import DecodeState, SamplingParameters
from .base import DecodingPolicy
from .budget_encoder import WIDTH, BudgetEncoder
from .static import action_columns, take_action


class ActionPolicy(DecodingPolicy):
    """
    π(a | x) = softmax(MLP([features; budgets]) / action temperature), a 3-layer SiLU MLP with dropout (Table 15).

    The output layer starts at zero, so a fresh policy draws its actions uniformly. Dropout acts in training mode alone.
    Where the base model is surer than `max_prob_mask`, the policy does not decide: the token is greedy and the recorded
    action is -1 (section 2.3, training stability).

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
            width += WIDTH
        hidden = config.policy_hidden_size
        sizes = [(width, hidden), (hidden, hidden), (hidden, len(actions))]
        self.layers = nn.ModuleList([nn.Linear(*size, dtype=torch.float32) for size in sizes])
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.deterministic = bool(config.deterministic)

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

    def action_logits(self, state: DecodeState) -> torch.Tensor:
        """Unnormalised log-probabilities `[N, actions]`, `torch.float32`, the action temperature applied."""
        with torch.autocast(state.hidden.device.type, enabled=False):
            x = context(state, self.config.features)
            if self.budget_encoder is not None:
                x = torch.cat([x, self.budget_encoder(state)], dim=-1)
            for number, layer in enumerate(cast(list[nn.Linear], list(self.layers))):
                x = F.linear(x, layer.weight.float(), layer.bias.float())
                if number < len(self.layers) - 1:
                    x = F.dropout(F.silu(x), self.config.policy_dropout, self.training)
            return x / self.config.action_temperature

    def forward(self, state: DecodeState) -> SamplingParameters:
        """Parameters of a drawn action (the likeliest if `deterministic`), with `action` `[N]`."""
        logits = self.action_logits(state)
        drawn = logits.argmax(-1) if self.deterministic else torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
        parameters = take_action(self, drawn)
        limit = self.config.max_prob_mask
        return parameters if limit is None else _greedy_where_sure(state, parameters, limit)


def _greedy_where_sure(state: DecodeState, parameters: SamplingParameters, limit: float) -> SamplingParameters:
    logits = cast(torch.Tensor, state.logits).float()
    sure = (logits.amax(-1) - logits.logsumexp(-1)).exp() > limit
    temperature = parameters.temperature
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.ones_like(sure, dtype=torch.float32)
    return SamplingParameters(
        temperature.masked_fill(sure, 0.0),
        parameters.top_k,
        parameters.top_p,
        parameters.min_p,
        cast(torch.Tensor, parameters.action).masked_fill(sure, -1),
    )
