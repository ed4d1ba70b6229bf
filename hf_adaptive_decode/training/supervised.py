"""`AutoDecoTrainer`: soft top-p training of decoding heads; knows the Trainer and the loss, no policy's inside."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..configuration import AutoDecoConfig
from ..errors import AdaptiveDecodeError
from ..losses import IGNORE_INDEX, DecodingLossOutput, chunked_decoding_loss, stable_mask_uniform
from ..modeling import AutoDecoForCausalLM
from ..projection import FrozenProjection
from ..types import DecodeState
from .arguments import AutoDecoTrainingArguments
from .checkpoints import AdapterTrainer
from .data import DecodingDataCollator, tokenized

_SUMS = ("temperature", "temperature_square", "top_p", "top_p_square", "temperature_loss", "top_p_loss")


class AutoDecoTrainer(AdapterTrainer):
    """
    Trains a model's decoding heads end to end on the soft top-p distribution (AutoDeco, section 2.1).

    The base runs once a batch, without gradients; logits are made and used up chunk by chunk. Checkpoints hold the
    adapter and the optimiser's state, never the base.

    Args:
        model ([`AutoDecoForCausalLM`], [`~transformers.PreTrainedModel`] or `str`):
            An adaptive model, or a base (or its id) to be given a fresh adapter.
        args ([`AutoDecoTrainingArguments`], *optional*): Arguments.
        train_dataset, eval_dataset: In TRL's formats: prompt/completion, messages, text, or tokenised.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; loaded with the base's id when `None`.
        decoding_config ([`AutoDecoConfig`], *optional*): Settings of a fresh adapter.
        kwargs: As [`~transformers.Trainer`] takes them.

    Logged beside the loss: mean and spread of T and P, both cross entropies, and the fraction of positions kept.
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
        if args.world_size > 1:
            raise AdaptiveDecodeError(
                f"`AutoDecoTrainer` runs in one process and was launched in {args.world_size}; start it with `python`."
            )
        if not isinstance(model, AutoDecoForCausalLM):
            model = AutoDecoForCausalLM.from_base(model, decoding_config)
        base: PreTrainedModel = model
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(base.config.name_or_path)
        prepare = {
            "tokenizer": processing_class,
            "max_length": args.max_length,
            "chat_template_kwargs": args.chat_template_kwargs,
            "num_proc": args.dataset_num_proc,
        }
        if train_dataset is not None:
            train_dataset = tokenized(train_dataset, **prepare)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: tokenized(part, **prepare) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = tokenized(eval_dataset, **prepare)
        kwargs.setdefault("data_collator", DecodingDataCollator(processing_class.pad_token_id or 0))
        super().__init__(
            model=base,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # The loss divides by the step's number of targets, which makes accumulation exact.
        self.model_accepts_loss_kwargs = True
        self._projection = FrozenProjection(base)
        self._sums: dict[str, dict[str, Any]] = {mode: defaultdict(float) for mode in ("train", "eval")}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """The decoding loss of a padded batch; the model's own outputs are never made."""
        # The output layer then runs in the precision of the rest of the model; the heads keep to fp32 by themselves.
        with self.accelerator.autocast():
            output = self._decoding_loss(model, inputs, num_items_in_batch)
        self._remember(output, "train" if model.training else "eval")
        return (output.loss, {}) if return_outputs else output.loss

    def _decoding_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items: torch.Tensor | int | None
    ) -> DecodingLossOutput:
        policy = cast(AutoDecoForCausalLM, model).decoding_adapter
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        passed = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = self._projection.hidden_states(**passed)[:, :-1]
        targets = labels[:, 1:]
        uniform = None
        args = cast(AutoDecoTrainingArguments, self.args)
        config = args.loss_config(training=model.training)
        if config.easy_token_mask_ratio > 0:
            # The step is part of the seed, so that another epoch drops other tokens.
            uniform = stable_mask_uniform(input_ids, (args.seed << 32) + self.state.global_step)[:, :-1].flatten()

        def predict(part: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            parameters = policy(DecodeState(part, logits if policy.needs_logits else None))
            return parameters.temperature, parameters.top_p

        return chunked_decoding_loss(
            hidden.flatten(0, 1),
            targets.flatten(),
            predict,
            self._projection.logits,
            config,
            mask_uniform=uniform,
            num_items=num_items,
        )

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | int | None:
        """Targets of the whole optimiser step; a row's first token is predicted from nothing and does not count."""
        count = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batch_samples)
        return max(count, 1)

    def _remember(self, output: DecodingLossOutput, mode: str) -> None:
        sums = self._sums[mode]
        sums["kept"] += output.n_kept
        sums["valid"] += output.n_valid
        for name in _SUMS:
            sums[name] = sums[name] + vars(output)[f"{name}_sum"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the policy predicted since the last log."""
        # One of several evaluation sets has its loss called `eval_NAME_loss`; what is added takes the same prefix.
        losses = [name for name in logs if name.startswith("eval_") and name.endswith("_loss")]
        mode, prefix = ("eval", losses[0].removesuffix("loss")) if losses else ("train", "")
        sums, self._sums[mode] = self._sums[mode], defaultdict(float)
        kept = sums["kept"]
        if kept:
            policy = cast(AutoDecoForCausalLM, self.model).decoding_adapter
            for name in policy.config.heads:
                mean = float(sums[name]) / kept
                spread = max(float(sums[f"{name}_square"]) / kept - mean**2, 0.0) ** 0.5
                logs |= {f"{prefix}{name}_mean": mean, f"{prefix}{name}_std": spread}
            for name in ("temperature_loss", "top_p_loss"):
                logs[f"{prefix}{name}"] = float(sums[name]) / kept
            logs[f"{prefix}kept_fraction"] = kept / sums["valid"]
        super().log(logs, *args, **kwargs)
