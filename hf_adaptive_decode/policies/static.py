"""Fixed sampling parameters, or a mixture of them: the baselines; knows nothing of the hidden state it is given."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from ..configuration import AutoDecoConfig
from ..configuration_checks import ACTION_FIELDS
from ..types import DecodeState, SamplingParameters
from .base import DecodingPolicy

# What a parameter that an action leaves out means.
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class StaticPolicy(DecodingPolicy):
    """
    One action for every token, or one drawn from `config.actions` with `config.action_weights` for each token, or for
    each sequence with `mixture_per="sequence"`.

    The draw is the state's, or else comes from torch's default generator of the hidden state's device. With
    `max_prob_mask` the masked static: greedy wherever the base model is surer than that.
    """

    weights: torch.Tensor

    def __init__(self, config: AutoDecoConfig) -> None:
        super().__init__(config)
        for name, values in action_columns(config.actions or []).items():
            self.register_buffer(name, values, persistent=False)
        weights = config.action_weights or [1.0] * len(config.actions or [])
        weights = [weight / sum(weights) for weight in weights]  # in double precision: fp32 may hold less
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    @property
    def has_actions(self) -> bool:
        """A static policy records which of its actions a token was sampled with."""
        return True

    @property
    def needs_logits(self) -> bool:
        """Logits are read to see where the model is sure."""
        return self.config.max_prob_mask is not None

    @property
    def decides_once(self) -> bool:
        """Whether the action is drawn at a sequence's first step and kept."""
        return self.config.mixture_per == "sequence"

    def forward(self, state: DecodeState) -> SamplingParameters:
        """Parameters and `action` of shape `[N]`."""
        rows = state.hidden.shape[0]
        if self.weights.numel() == 1:
            action = torch.zeros(rows, dtype=torch.long, device=self.weights.device)
        else:
            action = draw(self.weights.expand(rows, -1), state.uniform)
        parameters = take_action(self, action)
        limit = self.config.max_prob_mask
        return parameters if limit is None else greedy_where(is_sure(state, limit), parameters)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """
    One column of each row, `[N]`, `torch.long`, with the row's probabilities.

    Args:
        probabilities (`torch.Tensor` of shape `[N, K]`): Of any positive sum.
        uniform (`torch.Tensor` of shape `[N]`, `torch.float64`, *optional*):
            Numbers of [0, 1) that decide, by inverting the distribution function; else torch's generator does.
    """
    if uniform is None:
        return torch.multinomial(probabilities, 1).squeeze(-1)
    # In double precision, since a column that is rarer than the sum's last bit must not be lost or favoured.
    total = probabilities.double().cumsum(-1)
    target = uniform.to(total.device)[:, None] * total[:, -1:]
    return torch.searchsorted(total, target, right=True).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def is_sure(state: DecodeState, limit: float) -> torch.Tensor:
    """Rows `[N]` in which the base model's largest probability is above `limit`."""
    logits = cast(torch.Tensor, state.logits).float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp() > limit


def greedy_where(sure: torch.Tensor, parameters: SamplingParameters) -> SamplingParameters:
    """`parameters` with temperature 0, and action -1, in the rows of `sure` `[N]`."""
    temperature = parameters.temperature
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.ones_like(sure, dtype=torch.float32)
    action = cast(torch.Tensor, parameters.action).masked_fill(sure, -1)
    return replace(parameters, temperature=temperature.masked_fill(sure, 0.0), action=action)


def action_columns(actions: list[dict[str, float]]) -> dict[str, torch.Tensor]:
    """Each parameter of a list of actions as a tensor `[len(actions)]`, with "off" where an action leaves it out."""
    dtypes = {"top_k": torch.long}
    return {
        name: torch.tensor([action.get(name, _OFF[name]) for action in actions], dtype=dtypes.get(name, torch.float32))
        for name in ACTION_FIELDS
    }


def take_action(policy: DecodingPolicy, action: torch.Tensor) -> SamplingParameters:
    """The parameters of each row's `action` `[N]`; a parameter that is off in every action is left out."""
    columns = {name: policy.get_buffer(name) for name in ACTION_FIELDS}
    used = {name for name in ACTION_FIELDS if any(name in a for a in policy.config.actions or [])}
    return SamplingParameters(action=action, **{name: columns[name][action] for name in used})
