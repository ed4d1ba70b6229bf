"""The REINFORCE loss on recorded decisions; knows action logits and advantages, no model, reward or trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PolicyLoss:
    """
    Args:
        loss (`torch.Tensor`, scalar): What is to be minimised; carries the gradient.
        entropy, kl (`float`): Means over decisions, in nats; 0 where there were none, and without a reference.
    """

    loss: torch.Tensor
    entropy: float
    kl: float


def policy_loss(
    logits: torch.Tensor,
    action: torch.Tensor,
    advantage: torch.Tensor,
    *,
    trajectories: float,
    decisions: float,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    reference: torch.Tensor | None = None,
) -> PolicyLoss:
    r"""
    −1/R Σ_m A_m log π(a_m | x_m) − β H̄ + κ KL̄(π ‖ π₀)

    The log-probabilities are those of actions, never of tokens. The sum runs over the decisions of all trajectories, so
    its gradient is the estimate of equation 2's (or 1's); entropy and KL divergence are means over decisions.

    Args:
        logits (`torch.Tensor` of shape `[M, actions]`): Action logits at M decisions, with gradient.
        action (`torch.Tensor` of shape `[M]`, `torch.long`): What was chosen.
        advantage (`torch.Tensor` of shape `[M]`): Credit of the trajectory that each decision belongs to.
        trajectories (`float`): R, the trajectories drawn, those that are taught nothing included.
        decisions (`float`): What the means over decisions divide by; M, but for several processes.
        entropy_coef, kl_coef (`float`): β and κ.
        reference (`torch.Tensor` of shape `[M, actions]`, *optional*): Logits of π₀, for the KL divergence.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    chosen = log_p.gather(-1, action[:, None]).squeeze(-1)
    loss = -(chosen * advantage).sum() / trajectories
    entropy = -(p * log_p).sum() / decisions
    kl = torch.zeros_like(entropy)
    if reference is not None:
        kl = (p * (log_p - reference.log_softmax(-1))).sum() / decisions
    loss = loss - entropy_coef * entropy + kl_coef * kl
    return PolicyLoss(loss, float(entropy.detach()), float(kl.detach()))
