"""Decoding policies, one file each; the dict below maps the name in an adapter's config to its class."""

from __future__ import annotations

from ..configuration import AutoDecoConfig
from .base import DecodingPolicy
from .entropy import EntropyPolicy
from .heads import HeadsPolicy
from .row_policies import RowPolicies
from .sequence_actions import SequenceActionsPolicy
from .static import StaticPolicy
from .token_actions import TokenActionsPolicy

POLICIES: dict[str, type[DecodingPolicy]] = {
    "heads": HeadsPolicy,
    "token_actions": TokenActionsPolicy,
    "sequence_actions": SequenceActionsPolicy,
    "static": StaticPolicy,
    "entropy": EntropyPolicy,
}


def build_policy(config: AutoDecoConfig) -> DecodingPolicy:
    """A fresh, untrained policy of the kind that `config` names."""
    return POLICIES[config.policy](config)


__all__ = [
    "POLICIES",
    "DecodingPolicy",
    "EntropyPolicy",
    "HeadsPolicy",
    "RowPolicies",
    "SequenceActionsPolicy",
    "StaticPolicy",
    "TokenActionsPolicy",
    "build_policy",
]
