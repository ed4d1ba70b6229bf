"""`REINFORCEDecodingTrainer`: action policies from verifiable rewards; knows the Trainer, rollouts and their loss.

It differs from a policy-gradient trainer of language models in this: the base is frozen and runs once, in the rollout.
There is one action a decision and a handful of them, so an update is one pass of a small MLP over what the rollout
kept, on-policy and with no ratio, no clipping and no token's log-probability.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..configuration import AutoDecoConfig
from ..errors import AdapterConfigError
from ..hub.writing import save_tensors
from ..modeling import AutoDecoForCausalLM
from ..policies.action_policy import ActionPolicy
from ..rewards.calls import Reward, RewardFunctions
from .checkpoints import AdapterTrainer
from .credit import credit, with_baseline
from .policy_loss import policy_loss
from .prefilter import prefiltered
from .processes import summed, total
from .prompts import PromptDataset
from .reinforce_arguments import REINFORCEDecodingTrainingArguments
from .rollout_metrics import Mean, rollout_metrics, write_completions
from .rollouts import Rollout, RolloutMaker, evaluation_sets

_STATE_FILE = "reinforce_state.safetensors"
# No training step has this number, so evaluation draws what training never does, and the same every time.
_EVALUATION = -1


class REINFORCEDecodingTrainer(AdapterTrainer):
    """
    Trains a token or sequence policy by REINFORCE (Adaptive Decoding, sections 2.2 and 2.3).

    Args:
        model ([`AutoDecoForCausalLM`], [`~transformers.PreTrainedModel`] or `str`):
            An adaptive model with an action policy, or a base (or its id) for a fresh one after `decoding_config`.
        reward_funcs (`Callable` or list of them):
            Rewards in TRL's signature, sync or async: `reward(prompts, completions, completion_ids, **columns)` gives a
            `float` for each completion, or `None` where it does not apply.
        args ([`REINFORCEDecodingTrainingArguments`], *optional*): Arguments.
        train_dataset: With a `prompt` column, plain or conversational; the other columns go to the rewards. A mapping
            of several data sets mixes them in equal parts.
        eval_dataset: The same, where a mapping means several evaluations.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer.
        decoding_config ([`AutoDecoConfig`], *optional*): Settings of a fresh adapter.
        scorer (`Callable`, *optional*): For `reward_aggregation="best_of"`: what chooses among B samples, in the
            rewards' signature.
        answer_of (`Callable`, *optional*): For `"majority"`: a completion's text → its answer, or `None`.
        kwargs: As [`~transformers.Trainer`] takes them.

    Raises:
        [`AdapterConfigError`]: If the model's policy has no actions to learn, or its mask contradicts `args`.
        [`DataFormatError`]: If a data set has no `prompt` column.

    Example:

    ```python
    >>> config = AutoDecoConfig(policy="token_actions", actions=[{"temperature": 0.0}, {"temperature": 1.0}])
    >>> trainer = REINFORCEDecodingTrainer("Qwen/Qwen3-0.6B", math_reward, args, dataset, decoding_config=config)
    >>> trainer.train()
    ```
    """

    train_dataset: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: AutoDecoForCausalLM | PreTrainedModel | str,
        reward_funcs: Reward | Sequence[Reward],
        args: REINFORCEDecodingTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        decoding_config: AutoDecoConfig | None = None,
        scorer: Reward | None = None,
        answer_of: Callable[[str], Hashable] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or REINFORCEDecodingTrainingArguments(output_dir="reinforce_output")
        _check_helpers(args, scorer, answer_of)
        if not isinstance(model, AutoDecoForCausalLM):
            model = AutoDecoForCausalLM.from_base(model, decoding_config)
        base: PreTrainedModel = model
        self._policy = _prepared_policy(model, args)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(base.config.name_or_path)
        rewards = RewardFunctions(reward_funcs, args.reward_weights, args.reward_errors, args.reward_timeout)
        template_kwargs = cast(dict[str, Any] | None, args.chat_template_kwargs)
        self._maker = RolloutMaker(
            args.engine(base, processing_class),
            rewards,
            args.drawer(),
            samples=args.num_generations,
            aggregation=args.reward_aggregation,
            scorer=None if scorer is None else RewardFunctions(scorer, None, args.reward_errors, args.reward_timeout),
            answer_of=answer_of,
            drop_equal=args.drop_equal_groups,
            chat_template_kwargs=template_kwargs,
            seed=args.seed,
        )
        kwargs.setdefault("data_collator", list)
        super().__init__(
            model=base,
            args=args,
            train_dataset=None if train_dataset is None else PromptDataset(train_dataset),
            eval_dataset=evaluation_sets(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        self._maker.lockstep = self.lockstep
        # The loss is a mean over this batch's trajectories; the Trainer averages over accumulated ones.
        self.model_accepts_loss_kwargs = False
        self._reference = copy.deepcopy(self._policy).requires_grad_(False).eval() if args.kl_coef else None
        self._average, self._average_weight = 0.0, 0.0
        self._credited = 0.0
        self._sums: dict[str, dict[str, list[float]]] = {m: defaultdict(lambda: [0.0, 0.0]) for m in ("train", "eval")}
        self._latest: Rollout | None = None
        self.add_callback(_NoStepWithoutCredit(self))
        if train_dataset is not None and args.prefilter_samples:
            self.train_dataset, kept = prefiltered(self._maker, self.train_dataset, args, self.accelerator)
            self._note("train", {"prefilter/kept_fraction": (kept, 1.0)})

    def objective(self) -> str:
        """What is learned on, in words for the card."""
        return f"REINFORCE on the reward's {self._settings.reward_aggregation}"

    @property
    def _settings(self) -> REINFORCEDecodingTrainingArguments:
        return cast(REINFORCEDecodingTrainingArguments, self.args)

    def own_rows(self, batch: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The batch's first prompts."""
        return batch[:count]

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # prompts are no tensors, and there may be none

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """Decodes the batch of prompts, has it rewarded, and gives the loss of its decisions."""
        started = time.perf_counter()
        rollout = self._maker.roll_out(self._policy, inputs, self.state.global_step, self.state, explores=True)
        advantage = self._advantages(rollout)
        rolled = time.perf_counter()
        # As the forward of the wrapped model, so that gradients are averaged over processes.
        adaptive = cast(AutoDecoForCausalLM, self.accelerator.unwrap_model(self.model))
        with adaptive.running_instead(lambda: self._loss(rollout, advantage)):
            loss = cast(torch.Tensor, model())
        seconds = {"seconds/rollout": rolled - started, "seconds/loss": time.perf_counter() - rolled}
        self._note("train", rollout_metrics(rollout, self._maker.rewards.names, self._policy))
        self._note("train", {name: (value, 1.0) for name, value in seconds.items()})
        self._latest = rollout
        return (loss, {}) if return_outputs else loss

    def _advantages(self, rollout: Rollout) -> np.ndarray:
        """Credit of each completion, `[G, n]`; 0 where a prompt is not kept."""
        settings, kept = self._settings, rollout.kept
        found = np.zeros_like(rollout.table)
        if settings.baseline == "leave_one_out":
            if kept.any():
                of_kept = self._maker.of_groups(kept, rollout.parallel, rollout.scores, rollout.answers)
                found[kept] = credit(rollout.table[kept], *of_kept)
            return found
        known = rollout.table[np.isfinite(rollout.table)]
        earned, count = total(self.accelerator, float(known.sum()), float(len(known)))
        mean = earned / max(count, 1.0)
        baseline = {"batch": mean, "none": 0.0}.get(settings.baseline, self._average / max(self._average_weight, 1e-12))
        decay = settings.ema_decay if count else 1.0  # a batch without a reward says nothing
        self._average = decay * self._average + (1 - decay) * mean
        self._average_weight = decay * self._average_weight + (1 - decay)
        if kept.any():
            found[kept] = with_baseline(rollout.table[kept], baseline)
        return found

    def _loss(self, rollout: Rollout, advantage: np.ndarray) -> torch.Tensor:
        """The loss of the kept prompts' decisions; zero, but with a graph, where there are none."""
        decisions = rollout.decisions
        device = self.args.device
        mine = torch.zeros(0, dtype=torch.long, device=device)
        if decisions is not None:
            kept = torch.from_numpy(rollout.kept).to(device).repeat_interleave(self._maker.samples)
            mine = kept[decisions.row].nonzero().squeeze(-1)
        # Means over all processes' decisions and trajectories, as sums of their shares.
        processes = self.accelerator.num_processes
        count, trajectories = (number / processes for number in total(self.accelerator, len(mine), advantage.size))
        self._credited += count
        if decisions is None or len(mine) == 0:
            nothing: torch.Tensor = torch.stack([p.sum() * 0.0 for p in self._policy.parameters()]).sum()
            return nothing
        seen = decisions.seen.select(mine)
        flat = torch.from_numpy(advantage).to(device, torch.float32).flatten()
        with torch.no_grad():
            reference = None if self._reference is None else self._reference.to(device).action_logits(seen)
        found = policy_loss(
            self._policy.action_logits(seen),
            decisions.action[mine],
            flat[decisions.row[mine]],
            trajectories=trajectories,
            decisions=count,
            entropy_coef=self._settings.entropy_coef,
            kl_coef=self._settings.kl_coef,
            reference=reference,
        )
        own = {"entropy": found.entropy, "kl": found.kl}  # parts of the means over all processes
        self._note("train", {name: (value * count / len(mine), len(mine)) for name, value in own.items()})
        return found.loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, on data sets of the same formats as at the beginning."""
        known = eval_dataset if isinstance(eval_dataset, str) else evaluation_sets(eval_dataset)
        return cast(dict[str, float], super().evaluate(known, *args, **kwargs))

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Decodes and rewards evaluation prompts, with the same draws at every evaluation."""
        rollout = self._maker.roll_out(self._policy, self._own(inputs), _EVALUATION, self.state)
        self._note("eval", rollout_metrics(rollout, self._maker.rewards.names, self._policy))
        return torch.zeros((), device=self.args.device), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's, with the rollouts' metrics in place of a loss."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.pop(f"{metric_key_prefix}_loss", None)
        found = self._drain("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _note(self, mode: str, metrics: dict[str, Mean]) -> None:
        for name, (value, weight) in metrics.items():
            if np.isfinite(value):
                entry = self._sums[mode][name]
                entry[0] += value * weight
                entry[1] += weight

    def _drain(self, mode: str) -> dict[str, float]:
        """Means since the last time, over all processes."""
        own = {name: tuple(entry) for name, entry in self._sums[mode].items()}
        self._sums[mode].clear()
        return {
            name: float(value / weight) for name, (value, weight) in summed(self.accelerator, own).items() if weight
        }

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the rollouts since the last log brought."""
        if "loss" in logs:
            logs |= self._drain("train")
            if self._settings.log_completions and self._latest is not None and self.is_world_process_zero():
                path = Path(str(self.args.output_dir), "completions", f"step_{self.state.global_step}.jsonl")
                write_completions(self._latest, self._maker.rewards.names, path)
        super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Exponential decay (Table 15) unless `final_learning_rate_ratio` is `None`."""
        ratio = self._settings.final_learning_rate_ratio
        if ratio is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            share = max(0, step - warmup) / max(1, num_training_steps - warmup)
            return float(min(1.0, (step + 1) / (warmup + 1)) * max(ratio, 1e-12) ** share)

        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_extra_state(self, folder: Path) -> None:
        """The moving average, and the policy that training began with."""
        averages = torch.tensor([self._average, self._average_weight], dtype=torch.float64)
        reference = {} if self._reference is None else self._reference.state_dict()
        tensors = {f"reference.{name}": t.cpu().contiguous() for name, t in reference.items()}
        save_tensors({"averages": averages, **tensors}, folder / _STATE_FILE)

    def load_extra_state(self, folder: Path) -> None:
        """As saved; a folder that holds an adapter alone leaves everything as it is."""
        if not (folder / _STATE_FILE).exists():
            return
        tensors = load_file(folder / _STATE_FILE)
        self._average, self._average_weight = tensors.pop("averages").tolist()
        if self._reference is not None and tensors:
            self._reference.load_state_dict({name.removeprefix("reference."): t for name, t in tensors.items()})


class _NoStepWithoutCredit(TrainerCallback):
    """An optimiser with momentum would move on even where nothing was learned; without gradients it stays."""

    def __init__(self, trainer: REINFORCEDecodingTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._credited == 0:
            for parameter in self._trainer._policy.parameters():
                parameter.grad = None
        self._trainer._credited = 0.0


def _prepared_policy(model: AutoDecoForCausalLM, args: REINFORCEDecodingTrainingArguments) -> ActionPolicy:
    policy, config = model.decoding_adapter, model.decoding_config
    if not isinstance(policy, ActionPolicy):
        raise AdapterConfigError(
            f'policy "{config.policy}" has no actions to choose among; REINFORCE trains "token_actions" and '
            '"sequence_actions": pass `decoding_config=AutoDecoConfig(policy="token_actions", actions=[...])`.'
        )
    changes: dict[str, Any] = {}
    if not policy.decides_once:
        changes["max_prob_mask"] = args.max_prob_mask
        if config.max_prob_mask not in (None, args.max_prob_mask):
            raise AdapterConfigError(
                f"the adapter's `max_prob_mask` is {config.max_prob_mask} and that of `args` is {args.max_prob_mask}; "
                "a policy is used as it is trained, so give both the same."
            )
    if args.action_temperature is not None:
        changes["action_temperature"] = args.action_temperature
    for settings in (policy.config, config):
        for name, value in changes.items():
            setattr(settings, name, value)
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    return policy


def _check_helpers(args: REINFORCEDecodingTrainingArguments, scorer: object, answer_of: object) -> None:
    for aggregation, name, given in (("best_of", "scorer", scorer), ("majority", "answer_of", answer_of)):
        if args.reward_aggregation == aggregation and given is None:
            raise ValueError(f'`reward_aggregation="{aggregation}"` needs the trainer\'s `{name}`.')
