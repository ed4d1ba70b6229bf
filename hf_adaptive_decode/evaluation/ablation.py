"""A joint adapter with one of its outputs switched off; knows the heads policy, nothing of how it is then measured."""

from __future__ import annotations

from typing import cast

from ..configuration import HEADS
from ..policies import DecodingPolicy, HeadsPolicy
from ..types import DecodeState, SamplingParameters


class _OnlyOutput(DecodingPolicy):
    def __init__(self, policy: HeadsPolicy, output: str) -> None:
        super().__init__(policy.config)
        self.policy, self.output = policy, output
        self.train(policy.training)

    @property
    def needs_logits(self) -> bool:
        return self.policy.needs_logits

    def forward(self, state: DecodeState) -> SamplingParameters:
        found = cast(SamplingParameters, self.policy(state))
        return SamplingParameters(**{self.output: vars(found)[self.output]})


def only(policy: HeadsPolicy, output: str) -> DecodingPolicy:
    """
    The same heads, of which one alone acts.

    The top-p head still sees the temperature that the other head predicts, as it was trained to. So this asks what an
    output is worth within the joint adapter, and not what a head trained alone would reach. A control: not saved.

    Args:
        policy ([`HeadsPolicy`]): An adapter with both heads; it is shared, not copied.
        output (`str`): `"temperature"` or `"top_p"`: the one that stays.

    Raises:
        `ValueError`: If the output is neither, or the policy does not have both.
    """
    if output not in HEADS:
        raise ValueError(f"`output` is {output!r}; it has to be one of {HEADS}.")
    if not isinstance(policy, HeadsPolicy) or policy.temperature_head is None or policy.top_p_head is None:
        raise ValueError(f'one of two heads is switched off, and this "{policy.config.policy}" policy lacks them.')
    return _OnlyOutput(policy, output)
