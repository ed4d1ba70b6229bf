"""What of a rollout is logged and written down; knows rollouts and policies, nothing of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ..engines.rollout import Decisions
from ..policies.action_policy import ActionPolicy
from .rollouts import Rollout

Mean = tuple[float, float]  # and how many things it is the mean of; NaN of none


def rollout_metrics(rollout: Rollout, names: list[str], policy: ActionPolicy) -> dict[str, Mean]:
    """
    Means by name, where TRL logs the same under TRL's name.

    Each comes with its weight among those of other batches, which so may be of any size.

    `objective` is what B samples are worth, with `objective/B=4` for prompts with that B; `action/2` the part of the
    decisions that took action 2, and `action/2/coin` that on prompts whose column `type` is `coin` (`/cot` and
    `/direct` where some prompts ask for a chain of thought); `kept_fraction` the part of the prompts that are learned
    from.
    """
    total = rollout.table[np.isfinite(rollout.table)]
    found = {
        "reward": _mean(total),
        "reward_std": _mean(rollout.table.std(axis=1)),
        "objective": _mean(rollout.value),
        "kept_fraction": _mean(rollout.kept),
        "frac_reward_zero_std": _mean((rollout.table == rollout.table[:, :1]).all(axis=1)),
        "rewards/skipped": (float(rollout.rewards.skipped), 1.0),
        "completions/mean_length": _mean([len(one.token_ids) for one in rollout.completions]),
        "completions/clipped_ratio": _mean([not one.ended for one in rollout.completions]),
        "decisions_per_completion": (0.0, float(len(rollout.completions))),
    }
    for name, values in zip(names, rollout.rewards.values, strict=True):
        found[f"rewards/{name}/mean"] = _mean(values)
    budgets = np.unique(rollout.parallel).tolist()
    found |= {f"objective/B={b}": _mean(rollout.value[rollout.parallel == b]) for b in budgets}
    if rollout.decisions is not None:
        taken = rollout.decisions.action
        found["decisions_per_completion"] = (len(taken) / len(rollout.completions), float(len(rollout.completions)))
        counts = torch.bincount(taken, minlength=len(policy.config.actions or [])).tolist()
        found |= {f"action/{action}": (count / len(taken), len(taken)) for action, count in enumerate(counts)}
        found |= _by_prompt_type(rollout, rollout.decisions, len(counts))
    return found | {name: (value, len(rollout.completions)) for name, value in rollout.rewards.metrics.items()}


def _by_prompt_type(rollout: Rollout, decisions: Decisions, actions: int) -> dict[str, Mean]:
    """Each action's part of the decisions on each type of prompt, where there are several types."""
    samples = rollout.table.shape[1]
    row = decisions.row.cpu().numpy() // samples
    taken = decisions.action.cpu().numpy()
    found: dict[str, Mean] = {}
    columns = [[str(item["columns"].get("type", "")) for item in rollout.items]]
    columns.append(["cot" if draw.with_cot else "direct" for draw in rollout.draws])
    for column in map(np.array, columns):
        kinds = np.unique(column).tolist()
        for kind in kinds if len(kinds) > 1 else ():
            own = taken[column[row] == kind]
            if len(own):
                shares = np.bincount(own, minlength=actions) / len(own)
                found |= {f"action/{action}/{kind}": (float(share), len(own)) for action, share in enumerate(shares)}
    return found


def write_completions(rollout: Rollout, names: list[str], path: Path) -> None:
    """Writes every completion with its rewards, one JSON object a line."""
    lines = []
    samples = rollout.table.shape[1]
    for number, one in enumerate(rollout.completions):
        draw = rollout.draws[number // samples]
        values = zip(names, rollout.rewards.values[:, number].tolist(), strict=True)
        row = {
            "prompt": draw.prompt,
            "completion": one.text,
            "budget": draw.tokens,
            "parallel_budget": draw.samples,
            "ended": one.ended,
            "rewards": {name: None if np.isnan(value) else value for name, value in values},
            **{name: column[number] for name, column in rollout.rewards.extra.items()},
        }
        lines.append(json.dumps(row, ensure_ascii=False, default=str))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _mean(values: object) -> Mean:
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    return (float(numbers.mean()) if numbers.size else float("nan")), float(numbers.size)
