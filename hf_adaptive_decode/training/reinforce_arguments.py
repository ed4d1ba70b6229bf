"""The arguments of `REINFORCEDecodingTrainer`; knows what may be set, nothing of how training runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, cast

from transformers import TrainingArguments

from ..engines.by_name import build_engine, check_engine
from ..engines.engine import Engine
from ..errors import BudgetError
from .credit import AGGREGATIONS
from .prompts import Drawer

BASELINES = ("leave_one_out", "batch", "ema", "none")
_MAY_BE_NONE = ("max_prob_mask", "action_temperature", "final_learning_rate_ratio", "rollout_batch_rows")


@dataclass
class REINFORCEDecodingTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and the options of REINFORCE on verifiable rewards.

    `per_device_train_batch_size` counts prompts; each is decoded `num_generations` times. Adam without weight decay at
    `learning_rate` 3e-3 (Table 15 names the optimizer and not its rate). Larger rates and a smaller entropy bonus learn
    faster, and with few prompts a step may settle on one action before prompts are told apart.

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
        entropy_coef (`float`, defaults to 0.03): β of equation 1, times the mean entropy of a decision in nats.
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
        rollout_engine (`str`, defaults to `"transformers"`):
            What decodes: `"transformers"`, `"continuous_batching"` or `"vllm"`, which sees the policy as it is after
            every update.
        rollout_engine_options (`dict`, *optional*):
            For that engine, such as `{"gpu_memory_utilization": 0.4}` for vLLM, which shares its GPU with training.
        rollout_batch_rows (`int`, *optional*): Most completions decoded at once; all of a batch by default.
        log_completions (`bool`, defaults to `False`):
            Whether to write each logged step's completions to `completions/` in the output folder, as JSON Lines.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "rollout_engine_options"]

    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt."})
    budget: Any = field(default=256, metadata={"help": "Token budget, or what to draw it from."})
    parallel_budget: Any = field(default=1, metadata={"help": "Parallel budget B, or what to draw it from."})
    reward_aggregation: str = field(default="mean", metadata={"help": "mean, pass@B, best_of or majority."})
    baseline: str = field(default="leave_one_out", metadata={"help": "leave_one_out, batch, ema or none."})
    ema_decay: float = field(default=0.9, metadata={"help": "Decay of the ema baseline."})
    entropy_coef: float = field(default=0.03, metadata={"help": "Weight of the entropy bonus."})
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the initial policy."})
    max_prob_mask: float | None = field(default=0.95, metadata={"help": "Tokens surer than this are not decided."})
    action_temperature: float | None = field(default=None, metadata={"help": "Divides the policy's logits."})
    drop_equal_groups: bool = field(default=True, metadata={"help": "Drop prompts whose samples all earned the same."})
    prefilter_samples: int = field(default=0, metadata={"help": "Samples a prompt, to filter by before training."})
    prefilter_range: list[float] = field(
        default_factory=lambda: [0.05, 0.95], metadata={"help": "Success rates to train on."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward function."})
    reward_errors: str = field(default="raise", metadata={"help": "raise or skip."})
    reward_timeout: float | None = field(default=None, metadata={"help": "Seconds after which a reward is killed."})
    cot_ratio: float = field(default=0.0, metadata={"help": "Part of the prompts with a chain-of-thought text."})
    cot_template: Any = field(default=None, metadata={"help": "math, code, step_by_step, a text, or a mapping."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to the chat template."}
    )
    final_learning_rate_ratio: float | None = field(default=0.1, metadata={"help": "Where the learning rate ends."})
    rollout_engine: str = field(default="transformers", metadata={"help": "transformers, continuous_batching or vllm."})
    rollout_engine_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to the engine."}
    )
    rollout_batch_rows: int | None = field(default=None, metadata={"help": "Most completions decoded at once."})
    log_completions: bool = field(default=False, metadata={"help": "Write completions to the output folder."})

    learning_rate: float = field(default=3e-3, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=5, metadata={"help": "Log every so many steps."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "A loss reads all parameters."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Kept off: rewards read them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_engine(self.rollout_engine)
        self._check_numbers()
        self._check_budgets()
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
        drawer = self.drawer()
        if drawer.largest_samples > self.num_generations and self.reward_aggregation != "mean":
            raise ValueError(
                f"`parallel_budget` goes up to {drawer.largest_samples} and `num_generations` is "
                f"{self.num_generations}; what B samples are worth is seen on at least B of them."
            )

    def _check_numbers(self) -> None:
        for name, kind, low, high in (
            ("num_generations", Integral, 1, math.inf),
            ("entropy_coef", Real, 0, math.inf),
            ("kl_coef", Real, 0, math.inf),
            ("prefilter_samples", Integral, 0, math.inf),
            ("ema_decay", Real, 0, 1),
            ("max_prob_mask", Real, 0, 1),
            ("action_temperature", Real, 1e-3, 1e3),
            ("final_learning_rate_ratio", Real, 0, 1),
            ("rollout_batch_rows", Integral, 1, math.inf),
        ):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not _is_within(value, kind, low, high):
                what = "a whole number" if kind is Integral else "a number"
                span = f"of at least {low}" if high == math.inf else f"from {low:g} to {high:g}"
                raise ValueError(f"`{name}` is {value!r}; it has to be {what} {span}.")
        ends = self.prefilter_range
        if len(ends) != 2 or not all(_is_within(end, Real, 0, 1) for end in ends) or ends[0] > ends[1]:
            raise ValueError(f"`prefilter_range` is {ends!r}; it has to be two rates, 0 <= low <= high <= 1.")

    def _check_budgets(self) -> None:
        """A bad budget is refused now, not at the first step; a range is kept as what JSON knows, too."""
        for name, budgets in (("budget", (self.budget, 1)), ("parallel_budget", (1, self.parallel_budget))):
            try:
                Drawer(*budgets)
            except BudgetError as error:
                raise BudgetError(f"`{name}`: {error}") from error
            value = getattr(self, name)
            if isinstance(value, range):
                setattr(self, name, {"low": value[0], "high": value[-1]} if value.step == 1 else list(value))

    def drawer(self) -> Drawer:
        """What decides each prompt's budgets and text, reproducibly."""
        return Drawer(self.budget, self.parallel_budget, self.cot_ratio, self.cot_template, self.seed)

    def engine(self, model: Any, tokenizer: Any) -> Engine:
        """What decodes rollouts."""
        options = cast(dict[str, Any], self.rollout_engine_options or {})
        return build_engine(self.rollout_engine, model, tokenizer, batch_rows=self.rollout_batch_rows, **options)


def _is_within(value: Any, kind: Any, low: float, high: float) -> bool:
    """Whether `value` is a finite number of a kind, from low to high."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high and value != math.inf
