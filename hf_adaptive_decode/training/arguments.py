"""The arguments of the trainers; knows what may be set, nothing of how training runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..losses import DecodingLossConfig
from ..losses.control import RankingLossConfig
from .control import CommandSet
from .epoch_cache_options import check_epoch_cache

# AutoDeco, section 6: AdamW at 5e-6, batches of 32 sequences of up to 16,384 tokens, 400 steps.
_PAPER = {
    "learning_rate": 5e-6,
    "max_steps": 400,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32,
    "max_length": 16384,
    "loss_type": "end_to_end",
    "alpha": 30.0,
    "easy_token_mask_ratio": 0.6,
    "easy_token_mask_target": "both",
    "dft_weight": "base",
}


@dataclass
class AutoDecoTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and the options of the soft top-p loss.

    Args:
        max_length (`int`, *optional*, defaults to 2048):
            Longer examples are cut at the end; `None` for no limit.
        loss_type (`str`, defaults to `"end_to_end"`):
            `"end_to_end"`: cross entropy on the soft top-p distribution (AutoDeco, equations 1 to 3). `"two_loss"`:
            that plus the cross entropy of the temperature alone, the form of the released training code.
        alpha (`float`, defaults to 30.0):
            Steepness of the soft top-p mask (equation 2).
        easy_token_mask_ratio (`float`, defaults to 0.6):
            Fraction of the positions dropped whose target is already the base model's first choice.
        easy_token_mask_target (`str`, defaults to `"both"`):
            `"both"` drops their whole loss, `"temperature"` only what teaches the temperature.
        dft_weight (`str`, defaults to `"base"`):
            Dynamic Fine-Tuning weight: the target's probability under the base (`"base"`), under the predicted
            temperature (`"scaled"`), or none (`"off"`).
        train_peft (`bool`, *optional*, defaults to `False`):
            Whether the LoRA in the base learns together with the heads, from the same loss (both papers name joint
            training as future work). The base's own weights stand still.
        peft_learning_rate (`float`, *optional*):
            The LoRA's learning rate; `learning_rate` when `None`.
        control_loss_weight (`float`, *optional*, defaults to 0.0):
            What the ranking loss of prompts with commands weighs beside the decoding loss (AutoDeco, section 3.3); at 0
            commands are ignored. Above 0, data needs `prompt` and `completion` with `low_prompt` and `high_prompt`, or
            `control_commands`.
        control_temperature_margin (`float`, *optional*, defaults to 0.1):
            How much lower (higher) the mean temperature has to be under a low-diversity (high-diversity) command. The
            paper names no margin.
        control_top_p_margin (`float`, *optional*, defaults to 0.02):
            The same of top-p.
        control_commands ([`CommandSet`], `dict` or `str`, *optional*):
            Commands to make `low_prompt` and `high_prompt` with, where the data has none of its own:
            `{"low": [...], "high": [...]}`, or `"diversity"` for the library's. Drawn by `seed`.
        epoch_cache (`str`, *optional*):
            What the first epoch keeps on disk for the later ones and for repeated evaluations, so that the base need
            not run again: `"distribution"` the hidden state of each position with a target and a sketch of its logits,
            from which the loss follows to 1e-5 on average; `"hidden"` the hidden states alone, for the exact loss at
            the price of the output layer. `None`: nothing. The size is logged and reserved before training.
        epoch_cache_dir (`str`, *optional*):
            Where to keep it; defaults to `epoch_cache` in `output_dir`. What another run on the same data and base left
            there is used.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template of conversational data.
        dataset_num_proc (`int`, *optional*):
            Processes that tokenise.
    """

    # On a command line these are JSON.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "control_commands", "chat_template_kwargs"]

    max_length: int | None = field(default=2048, metadata={"help": "Cut longer examples at the end."})
    loss_type: str = field(default="end_to_end", metadata={"help": "end_to_end or two_loss."})
    alpha: float = field(default=30.0, metadata={"help": "Steepness of the soft top-p mask (equation 2)."})
    easy_token_mask_ratio: float = field(default=0.6, metadata={"help": "Fraction of easy positions to drop."})
    easy_token_mask_target: str = field(default="both", metadata={"help": "both or temperature."})
    dft_weight: str = field(default="base", metadata={"help": "base, scaled or off."})
    train_peft: bool = field(default=False, metadata={"help": "Train the base's LoRA together with the heads."})
    peft_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the LoRA."})
    control_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the ranking loss of commands."})
    control_temperature_margin: float = field(default=0.1, metadata={"help": "Least difference of the mean T."})
    control_top_p_margin: float = field(default=0.02, metadata={"help": "Least difference of the mean top-p."})
    control_commands: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Commands as JSON with the keys low and high, or diversity."}
    )
    epoch_cache: str | None = field(default=None, metadata={"help": "distribution or hidden, kept between epochs."})
    epoch_cache_dir: str | None = field(default=None, metadata={"help": "Where; output_dir/epoch_cache by default."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to the chat template."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    # The data is tokenised to exactly what is needed, and the base's forward takes no loss options.
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Kept off: see the trainer."})
    ddp_find_unused_parameters: bool | None = field(default=None, metadata={"help": "Needed with a LoRA in experts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            # A loss reads all of the heads, but a batch need not reach all of a LoRA (one in experts, say).
            self.ddp_find_unused_parameters = self.train_peft
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}; it has to be at least 2, or None for no limit.")
        rate = self.peft_learning_rate
        if rate is not None and not (self.train_peft and math.isfinite(rate) and rate >= 0):
            raise ValueError(
                f"`peft_learning_rate` is {rate} and `train_peft` is {self.train_peft}; the rate has to be a number of "
                "at least 0, and is used where `train_peft=True`."
            )
        self.loss_config()  # raises for a bad loss option now, not at the first step
        self.ranking_config()
        check_epoch_cache(self)
        if self.control_commands is not None:
            if self.control_loss_weight == 0:
                raise ValueError(
                    "`control_commands` is set and `control_loss_weight` is 0; set it above 0 to use them."
                )
            # As plain lists, so that the arguments can be written as JSON.
            self.control_commands = {
                name: list(commands) for name, commands in vars(CommandSet.read(self.control_commands)).items()
            }

    def loss_config(self, training: bool = True) -> DecodingLossConfig:
        """The loss's options; in evaluation no easy token is dropped, so that the number is the same every time."""
        return DecodingLossConfig(
            loss_type=self.loss_type,
            alpha=self.alpha,
            dft_weight=self.dft_weight,
            easy_token_mask_ratio=self.easy_token_mask_ratio if training else 0.0,
            easy_token_mask_target=self.easy_token_mask_target,
        )

    def ranking_config(self) -> RankingLossConfig:
        """The margins and the weight of the ranking loss."""
        return RankingLossConfig(
            temperature_margin=self.control_temperature_margin,
            top_p_margin=self.control_top_p_margin,
            weight=self.control_loss_weight,
        )

    @classmethod
    def autodeco_paper(cls, output_dir: str, **overrides: Any) -> AutoDecoTrainingArguments:
        """
        The settings of the AutoDeco paper (sections 2.1 and 6) for one device: 32 accumulated sequences a step.

        Example:

        ```python
        >>> args = AutoDecoTrainingArguments.autodeco_paper("output", bf16=True)
        ```
        """
        return cls(output_dir=output_dir, **{**_PAPER, **overrides})
