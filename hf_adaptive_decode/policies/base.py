"""What every decoding policy is; knows nothing of hosts, and of models only the width of their hidden state."""

from __future__ import annotations

from abc import ABC, abstractmethod

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

    def warn_beyond(self, tokens: int | None, samples: int | None) -> None:
        """Warns once if a budget is beyond what the policy was made for; most policies know no budget."""

    @abstractmethod
    def forward(self, state: DecodeState) -> SamplingParameters:
        """Sampling parameters with fields of shape `[N]`, `torch.float32`, for the `N` rows of `state`."""
