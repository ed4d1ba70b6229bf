"""One action a sequence (Adaptive Decoding, section 2.2); knows nothing beyond what every action policy knows."""

from __future__ import annotations

from .action_policy import ActionPolicy


class SequenceActionsPolicy(ActionPolicy):
    """Decides from [e; B], the hidden state of the prompt's last token and the parallel budget (equation 1)."""

    @property
    def decides_once(self) -> bool:
        """The host asks at the first step and keeps the answer."""
        return True
