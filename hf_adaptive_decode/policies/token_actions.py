"""One action a token (Adaptive Decoding, section 2.3); knows nothing beyond what every action policy knows."""

from __future__ import annotations

from .action_policy import ActionPolicy


class TokenActionsPolicy(ActionPolicy):
    """Decides anew at each step from [h_t; b_t], the hidden state and the remaining token budget (equation 2)."""
