"""`AutoDecoTrainer`: soft top-p training of decoding heads; knows the Trainer and the loss, no policy's inside."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..configuration import AutoDecoConfig
from ..errors import AdaptiveDecodeError
from ..hub.peft_layers import active_lora, unwrap_peft
from ..losses import (
    IGNORE_INDEX,
    DecodingLossOutput,
    chunked_decoding_loss,
    joint_decoding_loss,
    stable_mask_uniform,
)
from ..modeling import AutoDecoForCausalLM
from ..projection import FrozenProjection, Projection
from ..types import DecodeState
from .arguments import AutoDecoTrainingArguments
from .checkpoints import AdapterTrainer
from .control import DIRECTIONS, CommandSet, control_loss, count_pairs, of_baseline
from .data import DecodingDataCollator, column_names, commanded, has_commands, tokenized
from .epoch_cache import CommitCallback, EpochCache, numbered
from .epoch_cache_options import ROW_COLUMN, epoch_cache_folder
from .heads_metrics import HeadsMetrics
from .processes import total


class AutoDecoTrainer(AdapterTrainer):
    """
    Trains a model's decoding heads end to end on the soft top-p distribution (AutoDeco, section 2.1).

    The base runs once a batch, without gradients; logits are made and used up chunk by chunk. Checkpoints hold the
    adapter and the optimiser's state, never the base.

    With `train_peft` a LoRA in the base learns together with the heads: the same loss, whose gradient then goes through
    the logits and through the hidden states that the heads read, in one backward pass through the base. Everything else
    of the base stands still, without dropout. Checkpoints and saved adapters hold both.

    Args:
        model ([`AutoDecoForCausalLM`], [`~transformers.PreTrainedModel`], `peft.PeftModel` or `str`):
            An adaptive model, or a base (or its id) to be given a fresh adapter.
        args ([`AutoDecoTrainingArguments`], *optional*): Arguments.
        train_dataset, eval_dataset: In TRL's formats: prompt/completion, messages, text, or tokenised.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; loaded with the base's id when `None`.
        decoding_config ([`AutoDecoConfig`], *optional*): Settings of a fresh adapter.
        kwargs: As [`~transformers.Trainer`] takes them.

    With `epoch_cache` the first epoch keeps on disk what it computed of the base, and the base does not run again for
    rows that are kept; neither do evaluations that are repeated run it.

    Logged beside the loss: mean and spread of T and P, both cross entropies, and the fraction of positions kept.

    With `control_loss_weight` above 0 it also learns from prompts with commands (section 3.3): each example's
    completion is read behind its prompt, behind one that asks for less diversity and behind one that asks for more, and
    a ranking loss keeps the mean T and P over it in that order. The decoding loss stays that of the prompts without
    commands. Logged with it: `control_loss`, and the mean T and P under `low`, `base` and `high`.
    """

    def __init__(
        self,
        model: AutoDecoForCausalLM | PreTrainedModel | str,
        args: AutoDecoTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        decoding_config: AutoDecoConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or AutoDecoTrainingArguments(output_dir="autodeco_output")
        if args.world_size > 1 and args.epoch_cache is not None:
            raise AdaptiveDecodeError(
                f'`epoch_cache` is "{args.epoch_cache}" and there are {args.world_size} processes, of which each would '
                "look for rows that another has kept; start one with `python`, or set `epoch_cache=None`."
            )
        model = unwrap_peft(model) if isinstance(model, nn.Module) else model
        if not isinstance(model, AutoDecoForCausalLM):
            model = AutoDecoForCausalLM.from_base(model, decoding_config)
        model.decoding_adapter.requires_grad_(True)  # PEFT freezes what it is put on
        base: PreTrainedModel = model
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(base.config.name_or_path)
        # One process tokenises; the others then find what `datasets` keeps of it.
        with args.main_process_first(desc="tokenising"):
            if train_dataset is not None:
                train_dataset = _prepared(train_dataset, processing_class, args)
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    name: _prepared(part, processing_class, args, True) for name, part in eval_dataset.items()
                }
            elif eval_dataset is not None:
                eval_dataset = _prepared(eval_dataset, processing_class, args, True)
        if args.epoch_cache is not None:
            train_dataset, eval_dataset = _numbered(train_dataset, eval_dataset)
        kwargs.setdefault("data_collator", DecodingDataCollator(processing_class.pad_token_id or 0))
        super().__init__(
            model=base,
            train_peft=args.train_peft,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # The loss divides by the step's number of targets, which makes accumulation exact.
        self.model_accepts_loss_kwargs = True
        self._projection = Projection(base) if args.train_peft else FrozenProjection(base)
        self._pairs_of_step = 1
        self._metrics = HeadsMetrics(self.accelerator)
        self._cache = self._epoch_cache()

    def _epoch_cache(self) -> EpochCache | None:
        args = cast(AutoDecoTrainingArguments, self.args)
        datasets = _named(self.train_dataset, self.eval_dataset)
        if args.epoch_cache is None or not datasets:
            return None
        precision = str(self.accelerator.mixed_precision)
        folder = epoch_cache_folder(args)
        with self.accelerator.autocast():
            cache = EpochCache(args.epoch_cache, folder, self.model, self._projection, datasets, precision)
        self.add_callback(CommitCallback(cache))
        return cache

    def objective(self) -> str:
        """What is learned on, in words for the card."""
        args = cast(AutoDecoTrainingArguments, self.args)
        together = "; the base's LoRA learned together with the heads" if args.train_peft else ""
        return f"soft top-p cross entropy ({args.loss_type}, DFT weight {args.dft_weight}){together}"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's, with groups of their own for the LoRA's parameters where they have another rate."""
        fresh, rate = self.optimizer is None, cast(AutoDecoTrainingArguments, self.args).peft_learning_rate
        optimizer = cast(torch.optim.Optimizer, super().create_optimizer(*args, **kwargs))
        lora = active_lora(cast(nn.Module, self.model))
        if not fresh or rate is None or lora is None:
            return optimizer
        ids = {id(parameter) for parameter in lora.parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in ids]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """
        The decoding loss of a padded batch, and the ranking loss where it has commands; the model's own outputs are
        never made.
        """
        adaptive = cast(AutoDecoForCausalLM, self.accelerator.unwrap_model(model))
        # As the forward of the wrapped model, so that gradients are averaged over processes.
        job = partial(self._loss, adaptive, dict(inputs), num_items_in_batch)
        with self.lockstep.phase(), adaptive.running_instead(job):
            loss = cast(torch.Tensor, model())
        if num_items_in_batch is not None:
            # Divided by the tokens of all processes, it is this one's share, and gradients become the mean of shares.
            loss = loss * self.accelerator.num_processes
            if not model.training:
                loss = cast(torch.Tensor, self.accelerator.reduce(loss.detach(), "mean"))
        return (loss, {}) if return_outputs else loss

    def _loss(
        self, model: AutoDecoForCausalLM, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        args, mode = cast(AutoDecoTrainingArguments, self.args), "train" if model.training else "eval"
        ranking = args.ranking_config()
        rows = self._numbers(inputs, model)
        # The output layer then runs in the precision of the rest of the model; the heads keep to fp32 by themselves.
        with self.accelerator.autocast():
            if self._cache is not None and rows is not None and self._cache.has(rows):
                output = self._kept_loss(model, inputs, rows, num_items)
                loss = output.loss
            else:
                hidden = self._projection.hidden_states(**of_baseline(inputs))
                inputs = send_to_device(inputs, hidden.device)  # several devices: it ends on another than it begins
                output = self._decoding_loss(model, inputs, hidden, rows, num_items)
                loss = output.loss
                if ranking.weight > 0 and "low_labels" in inputs:
                    policy, pairs = model.decoding_adapter, None if num_items is None else self._pairs_of_step
                    control = control_loss(policy, self._projection, inputs, hidden, ranking, pairs)
                    self._metrics.add_control(control, mode)
                    loss = loss + ranking.weight * control.ranking.loss
        self._metrics.add(output, mode)
        return loss.to(self.args.device)

    def _numbers(self, inputs: dict[str, torch.Tensor], model: nn.Module) -> torch.Tensor | None:
        """The batch's row numbers, taken out of it; `None` for data that was not there from the start."""
        rows = inputs.pop(ROW_COLUMN, None)
        if rows is None and self._cache is not None and model.training:
            raise AdaptiveDecodeError(
                f"`epoch_cache` is set and a batch has no `{ROW_COLUMN}`: pass that column of the examples on in your "
                "`data_collator`, as an integer tensor [B], or set `epoch_cache=None`."
            )
        return rows

    def _asked(
        self, model: AutoDecoForCausalLM, inputs: dict[str, torch.Tensor]
    ) -> tuple[Any, Any, torch.Tensor | None]:
        """What the loss takes beside positions: the policy as a function, the options, and the numbers of the draw."""
        policy = model.decoding_adapter
        args, uniform = cast(AutoDecoTrainingArguments, self.args), None
        config = args.loss_config(training=model.training)
        if config.easy_token_mask_ratio > 0:
            # The step is part of the seed, so that another epoch drops other tokens.
            seed = (args.seed << 32) + self.state.global_step
            uniform = stable_mask_uniform(inputs["input_ids"], seed)[:, :-1].flatten()

        def predict(part: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            parameters = policy(DecodeState(part, logits if policy.needs_logits else None))
            return parameters.temperature, parameters.top_p

        return predict, config, uniform

    def _decoding_loss(
        self,
        model: AutoDecoForCausalLM,
        inputs: dict[str, torch.Tensor],
        hidden: torch.Tensor,
        rows: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> DecodingLossOutput:
        predict, config, uniform = self._asked(model, inputs)
        hidden, targets = hidden[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        given = (hidden, targets, predict, self._projection.logits)
        if cast(AutoDecoTrainingArguments, self.args).train_peft and torch.is_grad_enabled():
            policy = model.decoding_adapter
            learning = [p for p in (*policy.parameters(), *self._projection.parameters()) if p.requires_grad]
            return joint_decoding_loss(*given, learning, config, mask_uniform=uniform, num_items=num_items)
        if self._cache is None or rows is None:
            return chunked_decoding_loss(*given, config, mask_uniform=uniform, num_items=num_items)
        seen = self._cache.recorder()
        output = chunked_decoding_loss(*given, config, mask_uniform=uniform, num_items=num_items, observe=seen)
        self._cache.keep(rows, hidden[targets != IGNORE_INDEX], seen)
        return output

    def _kept_loss(
        self,
        model: AutoDecoForCausalLM,
        inputs: dict[str, torch.Tensor],
        rows: torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> DecodingLossOutput:
        """[`~_decoding_loss`] of a batch that the cache has, without its base."""
        cache = cast(EpochCache, self._cache)
        inputs = send_to_device(inputs, cache.device)
        predict, config, uniform = self._asked(model, inputs)
        targets = inputs["labels"][:, 1:].flatten()
        valid = targets != IGNORE_INDEX
        uniform = None if uniform is None else uniform[valid]
        return cache.loss(rows, targets[valid], predict, config, mask_uniform=uniform, num_items=num_items)

    def own_rows(self, batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The batch, with targets in its first rows alone: every process runs the base on batches of one shape."""
        targets = {"labels", *(f"{name}_labels" for name in DIRECTIONS)} & set(batch)
        blank = {name: batch[name].clone() for name in targets}
        for labels in blank.values():
            labels[count:] = IGNORE_INDEX
        return {**batch, **blank}

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | int | None:
        """
        Targets of the whole optimiser step, in all processes; a row's first token is predicted from nothing and does
        not count.
        """
        pairs = sum(map(count_pairs, batch_samples))
        count = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batch_samples)
        count, pairs = (int(number) for number in total(self.accelerator, count, pairs))
        self._pairs_of_step = max(pairs, 1)
        return max(count, 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the policy predicted since the last log."""
        # One of several evaluation sets has its loss called `eval_NAME_loss`; what is added takes the same prefix.
        losses = [name for name in logs if name.startswith("eval_") and name.endswith("_loss")]
        mode, prefix = ("eval", losses[0].removesuffix("loss")) if losses else ("train", "")
        policy = cast(AutoDecoForCausalLM, self.model).decoding_adapter
        logs |= self._metrics.drain(mode, policy.config.heads, prefix)
        super().log(logs, *args, **kwargs)


def _named(train: Any, evaluation: Any) -> dict[str, Any]:
    """The data sets there are, by the names of their caches."""
    if not isinstance(evaluation, dict):
        evaluation = {None: evaluation}
    parts = {"train": train}
    parts |= {"eval" if name is None else f"eval_{name}": part for name, part in evaluation.items()}
    return {name: part for name, part in parts.items() if part is not None}


def _numbered(train: Any, evaluation: Any) -> tuple[Any, Any]:
    """Both, with numbered rows."""
    found = numbered(_named(train, evaluation))
    if isinstance(evaluation, dict):
        return found.get("train"), {name: found[f"eval_{name}"] for name in evaluation}
    return found.get("train"), found.get("eval")


def _prepared(dataset: Any, tokenizer: Any, args: AutoDecoTrainingArguments, is_eval: bool = False) -> Any:
    """The data set tokenised; with commands if they count, though evaluation data may do without any."""
    versions = args.control_loss_weight > 0
    if versions and args.control_commands is not None:
        dataset = commanded(dataset, CommandSet.read(args.control_commands), args.seed)
    elif versions and is_eval:
        versions = has_commands(column_names(dataset))
    template = cast(dict[str, Any] | None, args.chat_template_kwargs)
    return tokenized(dataset, tokenizer, args.max_length, template, args.dataset_num_proc, versions=versions)
