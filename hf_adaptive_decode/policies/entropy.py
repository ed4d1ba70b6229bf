"""Temperature by a fixed rule from the logits' entropy: baselines; knows nothing of the hidden state it is given."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..configuration import AutoDecoConfig
from ..configuration_checks import complete_rule
from ..features import logit_statistics
from ..types import DecodeState, SamplingParameters
from .base import DecodingPolicy

# Below this an entropy is 0 in fp32; it keeps both rules from dividing by 0.
_LEAST_ENTROPY = 1e-12


class EntropyPolicy(DecodingPolicy):
    """
    T = T₀·N^(θ/H) ("edt") or T = low + (high − low)·(H/H_max)^exponent ("dynatemp"), H the entropy in nats at T = 1.

    "edt" is entropy-based dynamic temperature (Zhang et al., 2024, arXiv 2403.14541) with N = `base`: near T₀ where the
    model is torn, and greedy where it is sure, since T → 0 as H → 0. "dynatemp" is llama.cpp's dynamic temperature:
    H_max is the log of the number of tokens that no constraint has ruled out, and H/H_max counts as 0 if only one is
    left. Either has no weights.

    Args:
        config ([`AutoDecoConfig`]): Settings with `entropy_rule`.
    """

    def __init__(self, config: AutoDecoConfig) -> None:
        super().__init__(config)
        self.rule = complete_rule(cast(dict[str, Any], config.entropy_rule))

    @property
    def needs_logits(self) -> bool:
        """Their entropy is all that the rule reads."""
        return True

    @torch.no_grad()
    def forward(self, state: DecodeState) -> SamplingParameters:
        """`temperature` of shape `[N]`, `torch.float32`, and the rule's `top_p`, a number for all rows."""
        logits = cast(torch.Tensor, state.logits)
        entropy = logit_statistics(logits, state.maxima)[..., 1]
        if self.rule["name"] == "edt":
            power = self.rule["theta"] / entropy.clamp(min=_LEAST_ENTROPY)
            temperature = self.rule["temperature"] * self.rule["base"] ** power
        else:
            highest = (logits > -torch.inf).sum(-1).float().log()
            share = (entropy / highest.clamp(min=_LEAST_ENTROPY)).clamp(max=1.0) ** self.rule["exponent"]
            temperature = self.rule["low"] + (self.rule["high"] - self.rule["low"]) * share
        return SamplingParameters(temperature=temperature, top_p=self.rule["top_p"])
