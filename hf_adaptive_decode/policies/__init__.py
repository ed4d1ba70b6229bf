"""Decoding policies, one file each; the dict below maps the name in an adapter's config to its class."""

from __future__ import annotations

from ..configuration import AutoDecoConfig
from .base import DecodingPolicy
from .heads import HeadsPolicy
from .static import StaticPolicy

POLICIES: dict[str, type[DecodingPolicy]] = {
    "heads": HeadsPolicy,
    "static": StaticPolicy,
}


def build_policy(config: AutoDecoConfig) -> DecodingPolicy:
    """A fresh, untrained policy of the kind that `config` names."""
    return POLICIES[config.policy](config)


__all__ = ["POLICIES", "DecodingPolicy", "HeadsPolicy", "StaticPolicy", "build_policy"]
