"""What a caller asked of `generate`, read and turned into transformers' settings; knows no session and no policy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import LogitNormalization
from transformers.utils import ModelOutput

from .budget import ResolvedBudget
from .errors import BudgetError, UnsupportedGenerationError
from .types import SamplingParameters
from .warping import check_scalars

_WARPED_HERE = ("temperature", "top_k", "top_p", "min_p")
# transformers' other warpers, switched off unless the caller asked for them.
_NO_WARP = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
_OTHER_WARPERS = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


class OwnGenerationConfig(GenerationConfig):
    """
    A wrapped model's own config, which notes what is set on it; made by [`own_config`].

    Servers copy the model's config, set what their caller asked for, and pass the copy to `generate`. What was set
    beats the adapter; what was merely copied is the base's.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("_set", set()).add(name)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """As of any config."""
        return {name: value for name, value in super().to_dict().items() if name != "_set"}

    def chosen(self) -> dict[str, Any]:
        """What was set since the model was wrapped."""
        return {name: value for name, value in self.to_dict().items() if name in self.__dict__["_set"]}


def own_config(base: GenerationConfig) -> OwnGenerationConfig:
    """A copy of a base model's config, for the wrapped model; what it says so far nobody chose."""
    config = copy.deepcopy(base)
    if config.temperature is None:
        # A pipeline puts a temperature of its own where the model names none, and it would look like the user's.
        config.temperature = 1.0
    config.__class__ = OwnGenerationConfig
    config.__dict__["_set"] = set()
    return cast(OwnGenerationConfig, config)


def requested_settings(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the caller of `generate` set, by keyword or `generation_config`; the model's own config is not asked."""
    config = generation_config
    given = config.chosen() if isinstance(config, OwnGenerationConfig) else config.to_dict() if config else {}
    asked = {name: value for name, value in {**given, **kwargs}.items() if value is not None}
    if asked.get("do_sample") is True and asked.get("temperature") == 0:
        # transformers refuses the pair. Evaluation harnesses pass it where a task samples and names no temperature.
        del asked["temperature"]
    return asked


def wants_adapter(requested: dict[str, Any]) -> bool:
    """Whether a call samples token by token: `do_sample=False` and beams are the base model's own."""
    return requested.get("do_sample", True) is not False and requested.get("num_beams", 1) == 1


def base_sampling(own: GenerationConfig | None, requested: dict[str, Any]) -> dict[str, Any]:
    """
    How the base model samples by itself, as an action: what the caller asked for, then its own config, then defaults.

    Args:
        own ([`~transformers.GenerationConfig`], *optional*): The base's config; without it an empty action.
        requested (`dict`): What the caller set.
    """
    if own is None:
        return {}
    settings = {name: value for name, value in own.to_dict().items() if value is not None} | requested
    used = [name for name in _OTHER_WARPERS if settings.get(name) not in (None, _NO_WARP.get(name))]
    if used:
        raise UnsupportedGenerationError(
            f"the base model's own sampling uses {', '.join(used)}, which rows with adapters do not; generate its rows "
            "in a call of their own, within `model.disable_adapter()`."
        )
    if settings.get("do_sample") is not True:
        return {"temperature": 0.0}
    usual = {"top_k": 50}  # transformers' own default
    return usual | {name: settings[name] for name in _WARPED_HERE if name in settings}


def count_prompts(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int:
    """Rows of the batch before `generate` repeats them; an empty batch or prompt is refused here."""
    found = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
    tensors = [t for t in (inputs, *found) if isinstance(t, torch.Tensor)]
    if not tensors:
        return 1
    if any(t.shape[0] == 0 for t in tensors):
        raise BudgetError("the batch is empty (0 rows); `generate` needs at least one prompt.")
    if all(t.dim() > 1 and t.shape[1] == 0 for t in tensors):
        raise BudgetError("the prompts are empty (0 tokens); start them with the tokenizer's bos token.")
    return tensors[0].shape[0]


def refuse_empty_prompts(lengths: Sequence[int]) -> None:
    """Raises [`BudgetError`] if there is no prompt, or one of so many tokens is empty."""
    if not lengths:
        raise BudgetError("the batch is empty (0 prompts); `generate` needs at least one.")
    if not min(lengths):
        raise BudgetError(
            f"row {list(lengths).index(0)} of the prompts is empty (0 tokens, or padding alone); start it with the "
            "tokenizer's bos token."
        )


def refuse_padding_alone(mask: Any) -> None:
    """Raises [`BudgetError`] if an attention mask `[rows, length]` hides every token of a row."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        refuse_empty_prompts(mask.any(-1).long().tolist())


def budget_settings(budget: ResolvedBudget, requested: dict[str, Any]) -> dict[str, int]:
    """The budget as transformers' own settings, `max_new_tokens` and `num_return_sequences`."""
    limits = {}
    if budget.longest is not None:
        limits["max_new_tokens"] = min(budget.longest, requested.get("max_new_tokens", budget.longest))
    if budget.samples is not None:
        asked = requested.get("num_return_sequences", budget.samples)
        if asked != budget.samples:
            raise BudgetError(
                f"`budget` asks for {budget.samples} samples and `num_return_sequences` for {asked}; pass one of them."
            )
        limits["num_return_sequences"] = budget.samples
    return limits


def put_settings(
    settings: dict[str, Any], generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    """Puts settings into the keywords, or into a copy of the caller's config, which is returned."""
    if generation_config is not None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**settings)
        settings = {name: value for name, value in settings.items() if name in kwargs}
    kwargs |= settings
    return generation_config


def count_new_tokens(output: ModelOutput, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int:
    """Tokens that a `generate` call added; with `inputs_embeds` alone its sequences hold nothing else."""
    prompt = inputs if inputs is not None else kwargs.get("input_ids")
    return int(output.sequences.shape[1]) - (0 if prompt is None else prompt.shape[1])


def forget_defaults(config: GenerationConfig, chosen: dict[str, Any]) -> None:
    """
    Takes out of a config what its maker did not choose.

    Pipelines of transformers up to 5.17 prepare a config once and pass it to every call, where their defaults, and the
    base's, would look like the caller's choice.
    """
    for name in (*_WARPED_HERE, *_OTHER_WARPERS, "do_sample"):
        if name not in chosen:
            setattr(config, name, None)


def refuse_untraceable(wants_trace: bool, requested: dict[str, Any], own: GenerationConfig) -> None:
    """Raises [`UnsupportedGenerationError`] if a trace is wanted and there is no dict to put it in."""
    if wants_trace and not requested.get("return_dict_in_generate", own.return_dict_in_generate):
        raise UnsupportedGenerationError("`output_decoding_trace=True` needs `return_dict_in_generate=True` too.")


def explicit_parameters(requested: dict[str, Any]) -> dict[str, float | int]:
    """What the caller fixed of that which the adapter decides; checked."""
    explicit = {name: requested[name] for name in _WARPED_HERE if name in requested}
    check_scalars(SamplingParameters(**explicit))
    return explicit


def neutralise(config: GenerationConfig, requested: dict[str, Any]) -> None:
    """Turns sampling on and transformers' warpers off: the policy decides, and all warping happens in one place."""
    config.do_sample, config.num_beams = True, 1
    config.temperature, config.top_k, config.top_p, config.min_p = 1.0, 0, 1.0, None
    for name in _OTHER_WARPERS:
        if name not in requested:
            setattr(config, name, None)


def behind_constraints(processors: LogitsProcessorList, config: GenerationConfig) -> int:
    """The adapter's place: behind every constraint and in front of watermark and normalisation."""
    last = len(processors)
    if last and isinstance(processors[last - 1], LogitNormalization):
        last -= 1
    return last - 1 if config.watermarking_config is not None else last
