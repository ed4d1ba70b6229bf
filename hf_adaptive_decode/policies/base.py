"""What every decoding policy is; knows nothing of hosts, and of models only the width of their hidden state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn

from ..configuration import AutoDecoConfig
from ..types import DecodeState, SamplingParameters


class DecodingPolicy(nn.Module, ABC):
    """
    Looks at a [`DecodeState`] and says how to sample each of its rows.

    A policy is row-wise: what it says of a row depends on that row alone. It computes in fp32 whatever the dtype of
    the hidden state or of its own weights.

    Args:
        config ([`AutoDecoConfig`]): Settings with `hidden_size` filled in.
    """

    def __init__(self, config: AutoDecoConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def has_actions(self) -> bool:
        """Whether the policy chooses among `config.actions` and records which."""
        return False

    @property
    def needs_logits(self) -> bool:
        """Whether the policy reads `DecodeState.logits`."""
        return False

    @property
    def decides_once(self) -> bool:
        """Whether a sequence keeps the parameters of its first step."""
        return False

    @property
    def pools_prompt(self) -> bool:
        """Whether the policy reads `DecodeState.prompt_mean`."""
        return self.config.pooling == "mean"

    def warn_beyond(self, tokens: int | None, samples: int | None) -> None:
        """Warns once if a budget is beyond what the policy was made for; most policies know no budget."""

    def __call__(self, state: DecodeState) -> Any:
        """As [`~forward`], wherever the parts of the state lie; the parameters lie where the policy does."""
        return super().__call__(self.brought_here(state))

    def brought_here(self, state: DecodeState) -> DecodeState:
        """The state on the policy's own device; without weights or buffers, or with offloaded ones, where it is."""
        own = next(chain(self.parameters(), self.buffers()), None)
        if own is None or own.is_meta:
            return state
        return (state if self.needs_logits else replace(state, logits=None)).to(own.device)

    @abstractmethod
    def forward(self, state: DecodeState) -> SamplingParameters:
        """Sampling parameters with fields of shape `[N]`, `torch.float32`, for the `N` rows of `state`."""
