"""The arguments of `REINFORCEDecodingTrainer`; knows what may be set, nothing of how training runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .credit import AGGREGATIONS
from .prompts import Drawer

BASELINES = ("leave_one_out", "batch", "ema", "none")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class REINFORCEDecodingTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and the options of REINFORCE on verifiable rewards.

    `per_device_train_batch_size` counts prompts; each is decoded `num_generations` times. Adam without weight decay at
    `learning_rate` 5e-3 (Table 15 names the optimizer and not its rate; this one suits policies that start at zero).

    Args:
        num_generations (`int`, defaults to 8): Completions of each prompt, n.
        budget (`int`, list of `int`, `range`, or mapping, defaults to 256):
            Token budget b of a prompt's completions, or what to draw it from for each prompt: a list, or
            `{"low": ..., "high": ...}`.
        parallel_budget (`int` or list of `int`, defaults to 1):
            Parallel budget B that the policy is told and rewarded for, or what to draw it from; at most
            `num_generations`.
        reward_aggregation (`str`, defaults to `"mean"`):
            What B samples are worth: `"mean"`, the reward of one; `"pass@B"`, the highest reward; `"best_of"`, the
            reward of the one that the trainer's `scorer` likes best; `"majority"`, that of the commonest answer, as the
            trainer's `answer_of` reads it.
        baseline (`str`, defaults to `"leave_one_out"`):
            What is subtracted from a reward: the mean of the prompt's other samples (`"leave_one_out"`, the only one
            for other aggregations than `"mean"`), the batch's mean (`"batch"`), a moving average over the batches
            before (`"ema"`), or nothing (`"none"`).
        ema_decay (`float`, defaults to 0.9): Of that average.
        entropy_coef (`float`, defaults to 0.01): β of equation 1, times the mean entropy of a decision in nats.
        kl_coef (`float`, defaults to 0.0):
            Times the mean KL divergence of a decision from the policy that training began with.
        max_prob_mask (`float`, *optional*, defaults to 0.95):
            Where the base's largest probability is above this, a token policy does not decide and is taught nothing
            (section 2.3). Written into the adapter's config, since it holds in use too. `None` for no mask.
        action_temperature (`float`, *optional*): Written into the adapter's config, if given.
        drop_equal_groups (`bool`, defaults to `True`): Drops prompts whose samples all earned the same.
        prefilter_samples (`int`, defaults to 0):
            If above 0, the base model samples each prompt so often (at temperature 1) before training begins, and
            prompts with a success rate outside `prefilter_range` are left out (section 2.3).
        prefilter_range (list of two `float`, defaults to `[0.05, 0.95]`): Its bounds, which belong to it.
        reward_weights (list of `float`, *optional*): One for each reward function, by default 1.
        reward_errors (`str`, defaults to `"raise"`):
            Whether a reward that raises stops training with the prompt's index, or its prompt is left out and counted
            (`"skip"`).
        reward_timeout (`float`, *optional*): Seconds after which a call of a reward is killed, in a process of its own.
        cot_ratio (`float`, defaults to 0.0): Part of the prompts that get the template's chain-of-thought text.
        cot_template (`str` or mapping, *optional*): `"math"`, `"code"` (Appendix D.2), `"step_by_step"`, a text, or
            `{"cot": ..., "direct": ..., "role": "user" or "system"}`.
        chat_template_kwargs (`dict`, *optional*): For the chat template, such as `{"enable_thinking": False}`.
        final_learning_rate_ratio (`float`, *optional*, defaults to 0.1):
            The learning rate decays exponentially (Table 15) to this part of itself; `None` leaves it to
            `lr_scheduler_type`.
        rollout_batch_rows (`int`, *optional*): Most completions decoded at once; all of a batch by default.
        log_completions (`bool`, defaults to `False`):
            Whether to write each logged step's completions to `completions/` in the output folder, as JSON Lines.
    """

    num_generations: int = _option(8, "Completions of each prompt.")
    budget: Any = _option(256, "Token budget, or what to draw it from.")
    parallel_budget: Any = _option(1, "Parallel budget B, or what to draw it from.")
    reward_aggregation: str = _option("mean", "mean, pass@B, best_of or majority.")
    baseline: str = _option("leave_one_out", "leave_one_out, batch, ema or none.")
    ema_decay: float = _option(0.9, "Decay of the ema baseline.")
    entropy_coef: float = _option(0.01, "Weight of the entropy bonus.")
    kl_coef: float = _option(0.0, "Weight of the KL divergence from the initial policy.")
    max_prob_mask: float | None = _option(0.95, "Tokens surer than this are not decided.")
    action_temperature: float | None = _option(None, "Divides the policy's logits.")
    drop_equal_groups: bool = _option(True, "Drop prompts whose samples all earned the same.")
    prefilter_samples: int = _option(0, "Samples a prompt to filter prompts by before training.")
    prefilter_range: list[float] = field(
        default_factory=lambda: [0.05, 0.95], metadata={"help": "Success rates to train on."}
    )
    reward_weights: list[float] | None = _option(None, "Weight of each reward function.")
    reward_errors: str = _option("raise", "raise or skip.")
    reward_timeout: float | None = _option(None, "Seconds after which a reward is killed.")
    cot_ratio: float = _option(0.0, "Part of the prompts with a chain-of-thought text.")
    cot_template: Any = _option(None, "math, code, step_by_step, a text, or a mapping.")
    chat_template_kwargs: dict[str, Any] | str | None = _option(None, "Passed to the chat template.")
    final_learning_rate_ratio: float | None = _option(0.1, "Where the exponential decay of the learning rate ends.")
    rollout_batch_rows: int | None = _option(None, "Most completions decoded at once.")
    log_completions: bool = _option(False, "Write completions to the output folder.")

    learning_rate: float = _option(5e-3, "Initial learning rate.")
    logging_steps: float = _option(5, "Log every so many steps.")
    remove_unused_columns: bool | None = _option(False, "Kept off: rewards read the other columns.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("reward_aggregation", AGGREGATIONS),
            ("baseline", BASELINES),
            ("reward_errors", ("raise", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it has to be one of {', '.join(allowed)}.")
        if self.reward_aggregation != "mean" and self.baseline != "leave_one_out":
            raise ValueError(
                f'`reward_aggregation="{self.reward_aggregation}"` has a baseline of its own; `baseline` has to be '
                f'"leave_one_out" and is "{self.baseline}".'
            )
        if self.num_generations < 2 and self.baseline == "leave_one_out":
            raise ValueError(
                f"`num_generations` is {self.num_generations}; leaving one out takes at least 2. For one completion a "
                'prompt choose `baseline="batch"`, "ema" or "none".'
            )
        self._check_numbers()
        drawer = self.drawer()  # raises for a bad budget now, not at the first step
        if drawer.largest_samples > self.num_generations and self.reward_aggregation != "mean":
            raise ValueError(
                f"`parallel_budget` goes up to {drawer.largest_samples} and `num_generations` is "
                f"{self.num_generations}; what B samples are worth is seen on at least B of them."
            )

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("num_generations", 1, None),
            ("entropy_coef", 0, None),
            ("kl_coef", 0, None),
            ("prefilter_samples", 0, None),
            ("ema_decay", 0, 1),
            ("max_prob_mask", 0, 1),
            ("final_learning_rate_ratio", 0, 1),
            ("rollout_batch_rows", 1, None),
        ):
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                wanted = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"`{name}` is {value!r}; it has to be {wanted}.")
        low_high = self.prefilter_range
        if len(low_high) != 2 or not 0 <= low_high[0] <= low_high[1] <= 1:
            raise ValueError(f"`prefilter_range` is {low_high!r}; it has to be two rates, 0 <= low <= high <= 1.")

    def drawer(self) -> Drawer:
        """What decides each prompt's budgets and text, reproducibly."""
        return Drawer(self.budget, self.parallel_budget, self.cot_ratio, self.cot_template, self.seed)
