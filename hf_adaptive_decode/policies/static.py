"""Fixed sampling parameters, or a mixture of them: the baselines; knows nothing of the hidden state it is given."""

from __future__ import annotations

import torch

from ..configuration import ACTION_FIELDS, AutoDecoConfig
from ..types import DecodeState, SamplingParameters
from .base import DecodingPolicy

# What a parameter that an action leaves out means.
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class StaticPolicy(DecodingPolicy):
    """
    One action for every token, or for each token one drawn from `config.actions` with `config.action_weights`.

    The draw comes from torch's default generator of the hidden state's device, as sampling itself does.
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

    def forward(self, state: DecodeState) -> SamplingParameters:
        """Parameters and `action` of shape `[N]`."""
        rows = state.hidden.shape[0]
        if self.weights.numel() == 1:
            action = torch.zeros(rows, dtype=torch.long, device=self.weights.device)
        else:
            action = torch.multinomial(self.weights, rows, replacement=True)
        return take_action(self, action)


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
