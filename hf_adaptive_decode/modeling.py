"""`AutoDecoForCausalLM`: any causal language model with a decoding adapter; knows transformers, no policy's inside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .adapters import BASE, DEFAULT, DecodingAdapters, check_adapter_name, config_for
from .batching import ContinuousBatching, refuse_in_batches
from .budget import resolve_budget
from .capture import Capture, current_call, is_drafting
from .configuration import AutoDecoConfig, absorbed_settings
from .detour import Detour
from .errors import AdapterConfigError, AdapterLoadError, UnsupportedGenerationError
from .generation import GenerationSession
from .hub.bases import load_at_one_commit
from .hub.peft_layers import freeze_dropout, unwrap_peft
from .policies import DecodingPolicy, RowPolicies, build_policy
from .settings import (
    base_sampling,
    budget_settings,
    count_new_tokens,
    count_prompts,
    forget_defaults,
    own_config,
    put_settings,
    refuse_padding_alone,
    refuse_untraceable,
    requested_settings,
    wants_adapter,
)
from .storage import StoredAdapters, open_adapter
from .tap import output_device, output_embedding

if TYPE_CHECKING:  # what it is once `_attach` has put it in front of a base's class
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class AutoDecoForCausalLM(StoredAdapters, DecodingAdapters, ContinuousBatching, Detour, _Base):
    """
    A causal language model that decides for itself how each token is sampled.

    Not made by its constructor but by [`~AutoDecoForCausalLM.from_base`] (a fresh adapter) and
    [`~AutoDecoForCausalLM.from_pretrained`] (a trained one). The base model object itself becomes an instance of both
    its own class and this one, so everything that works with the base class works with it. `forward` is the base's;
    only [`~AutoDecoForCausalLM.generate`] differs.

    Attributes:
        decoding_adapter ([`DecodingPolicy`]): The active adapter's policy, a submodule of the model.
        decoding_config ([`AutoDecoConfig`]): Its settings; `config` stays the base model's.
    """

    config_class = AutoDecoConfig

    @classmethod
    def from_base(
        cls,
        base_model: PreTrainedModel | str | os.PathLike[str],
        config: AutoDecoConfig | None = None,
        *,
        adapter_name: str = DEFAULT,
        **kwargs: Any,
    ) -> AutoDecoForCausalLM:
        """
        Puts a fresh adapter on a base model, whose parameters stop requiring gradients and never change.

        Args:
            base_model ([`~transformers.PreTrainedModel`], `peft.PeftModel` or `str`): The model (which is changed in
                place into an adaptive one) or its folder or Hub id. A LoRA stays in it and is saved with the adapter.
            config ([`AutoDecoConfig`], *optional*): The adapter's settings; temperature and top-p heads by default.
            adapter_name (`str`, defaults to `"default"`): What the adapter is called among others.
            kwargs: For `AutoModelForCausalLM.from_pretrained` where an id is given.

        Raises:
            [`AdapterConfigError`]: If the config is for another width or vocabulary, or the model has an adapter.
        """
        if not isinstance(base_model, nn.Module):
            base_model = load_at_one_commit(base_model, **kwargs)
        base_model = unwrap_peft(base_model)
        config = config_for(base_model, config or AutoDecoConfig())
        policy = build_policy(config).to(output_device(base_model))
        return _attach(base_model, policy, config, adapter_name, is_trainable=True)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        base_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        *,
        subfolder: str = "",
        revision: str | None = None,
        config: AutoDecoConfig | None = None,
        is_trainable: bool = False,
        adapter_name: str = DEFAULT,
        **kwargs: Any,
    ) -> AutoDecoForCausalLM:
        """
        Loads an adapter, and the base model it was trained on.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id of the adapter, or of a released
                AutoDeco checkpoint, which may hold its base model too.
            base_model ([`~transformers.PreTrainedModel`] or `str`, *optional*): Base to use instead of the one that
                the adapter names; a model object is changed in place.
            subfolder, revision (`str`, *optional*): Where on the Hub the adapter lies.
            config ([`AutoDecoConfig`], *optional*): Accepted for the Auto classes; the adapter's own file is read.
            is_trainable (`bool`, defaults to `False`): Whether the adapter's parameters require gradients.
            adapter_name (`str`, defaults to `"default"`): What the adapter is called among others.
            kwargs: As `AutoModelForCausalLM.from_pretrained` takes them, for the base (`dtype`, `device_map`, ...);
                `token`, `cache_dir`, `local_files_only` and `force_download` serve both; `max_weight_bytes` and
                `max_peft_bytes` bound what is loaded of an adapter and of a LoRA beside it.

        Raises:
            [`AdapterLoadError`], [`AdapterConfigError`]: If the adapter is damaged or does not fit the base.
        """
        kwargs = absorbed_settings(config) | kwargs  # of the config nothing else: it is read again, with our checks
        kwargs.pop("adapter_kwargs", None)  # the Auto classes add it, for PEFT
        check_adapter_name(adapter_name)
        if isinstance(base_model, nn.Module):  # before anything is put into it
            _refuse_unfit(unwrap_peft(base_model))
        where = {"subfolder": subfolder, "revision": revision}
        base, policy, settings = open_adapter(pretrained_model_name_or_path, base_model, is_trainable, where, kwargs)
        model = _attach(base, policy, settings, adapter_name, is_trainable)
        model.eval()
        return model

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        budget: Any = None,
        adapter_names: Sequence[str] | None = None,
        output_decoding_trace: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As `generate` of the base model, but every token is sampled as the adapter decides.

        What is passed here beats the adapter, and the adapter beats the base model's `generation_config`: with
        `temperature=0.7` the adapter chooses top-p alone, and `do_sample=False` or `num_beams` make the call the base
        model's own.

        Args:
            inputs, generation_config, args, kwargs: As the base model's `generate` takes them.
            budget (`int`, sequence of `int`, or [`Budget`], *optional*): New tokens per sequence, for all prompts or
                one number a prompt, at which each row stops; with `Budget(samples=B)` also B sequences a prompt.
            adapter_names (sequence of `str`, *optional*): The adapter of each prompt; `"__base__"` for the base model's
                own sampling. By default the active adapter decides for all.
            output_decoding_trace (`bool`, defaults to `False`): With `return_dict_in_generate=True`, adds
                `decoding_trace` ([`DecodingTrace`]) to the output.

        Returns:
            What the base model's `generate` returns: `torch.LongTensor` of sequences, or a `ModelOutput`.

        Raises:
            [`BudgetError`]: If the budget is no positive whole number or does not fit the batch.
            [`UnknownAdapterError`]: If an adapter's name is not known.
            [`UnsupportedGenerationError`]: If the adapter could not act as trained in the mode asked for.
            [`LogitsError`]: If the model's logits are NaN or +inf; names step and row.
        """
        requested = requested_settings(generation_config, kwargs)
        prompts = count_prompts(inputs, kwargs)
        given = budget if budget is not None else requested.get("budget", vars(self.generation_config).get("budget"))
        resolved = resolve_budget(given, prompts)
        active = self._adapter_enabled and not is_drafting() and wants_adapter(requested)
        if active:
            refuse_padding_alone(kwargs.get("attention_mask"))
        if active and requested.get("cache_implementation") == "paged":
            refuse_in_batches(adapter_names=adapter_names, output_decoding_trace=output_decoding_trace or None)
            return self.generate_paged(inputs, generation_config, resolved, requested, *args, **kwargs)
        settings: dict[str, Any] = budget_settings(resolved, requested)
        policy = self._policy_for(adapter_names, prompts, requested | settings) if active else None
        settings |= {"do_sample": True} if active else {}  # transformers validates several samples against it
        requested |= settings
        generation_config = put_settings(settings, generation_config, kwargs)
        refuse_untraceable(output_decoding_trace, requested, self.generation_config)
        self._capture.attach(self)  # the output embedding may have been resized
        session = GenerationSession(self._capture, policy, requested, resolved, prompts, output_decoding_trace)
        with session.running():
            output = super().generate(inputs, generation_config, *args, **kwargs, **session.forward_settings(self))
            session.check_asked(kwargs.get("custom_generate"))
        if output_decoding_trace:
            output["decoding_trace"] = session.trace(count_new_tokens(output, inputs, kwargs))
        return output

    def _get_name(self) -> str:
        return "AutoDecoForCausalLM"  # what it prints as

    def _policy_for(
        self, names: Sequence[str] | None, prompts: int, requested: dict[str, Any]
    ) -> DecodingPolicy | RowPolicies:
        """The active policy, or one a row."""
        if names is None:
            return self.decoding_adapter
        if isinstance(names, str) or len(names) != prompts:
            raise UnsupportedGenerationError(
                f"`adapter_names` is {names!r} for a batch of {prompts} prompts; pass exactly {prompts} names."
            )
        own = self.generation_config if BASE in names else None
        policies = self.policies_by_row(names, base_sampling(own, requested))
        samples = requested.get("num_return_sequences", vars(self.generation_config).get("num_return_sequences")) or 1
        return RowPolicies([policy for policy in policies for _ in range(samples)])

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        session = current_call()
        if session is not None:
            session.prepare_config(config)
        elif self._adapter_enabled and not is_drafting():
            forget_defaults(config, kwargs)
        return config, model_kwargs

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        session = current_call()
        if session is None:
            return processors
        length = kwargs.get("input_ids_seq_length")
        return session.add_processors(processors, generation_config, length, kwargs.get("model_kwargs"))

    def get_compiled_call(self, compile_config: Any) -> Any:
        """As the base's; what a compiled pass leaves of its hidden states goes to the call that ran it."""
        return self._capture.handing_over(super().get_compiled_call(compile_config))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        session = current_call()
        if session is None or not session.is_adaptive:
            return super()._get_candidate_generator(*args, **kwargs)
        kwargs["logits_processor"] = session.without_adapter(kwargs["logits_processor"])
        return session.keep_apart(super()._get_candidate_generator(*args, **kwargs))

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        session = current_call()
        return criteria if session is None else session.add_criteria(criteria, generation_config)

    def train(self, mode: bool = True) -> AutoDecoForCausalLM:
        """Puts the adapter in training mode; a frozen base stays in evaluation mode, so that its dropout is off."""
        super().train(mode)
        if mode:
            for child in self.children():
                if child is not self.decoding_adapters:
                    freeze_dropout(child)
        return self


_ADAPTIVE_CLASSES: dict[type, type] = {}


def _refuse_unfit(base: PreTrainedModel) -> None:
    """Raises [`AdapterConfigError`] if a model is adaptive already, and [`AdapterLoadError`] if it can never be."""
    output_embedding(base)
    if isinstance(base, AutoDecoForCausalLM):
        raise AdapterConfigError(
            f"this {type(base).__bases__[1].__name__} has a decoding adapter already; give it another one with "
            "`model.add_adapter` or `model.load_adapter`."
        )
    if base.config.is_encoder_decoder:
        raise AdapterLoadError(f"{type(base).__name__} is an encoder-decoder; a decoding adapter needs a causal model.")


def _attach(
    base: PreTrainedModel, policy: DecodingPolicy, config: AutoDecoConfig, name: str, is_trainable: bool
) -> AutoDecoForCausalLM:
    _refuse_unfit(base)
    check_adapter_name(name)
    kind = type(base)
    if kind not in _ADAPTIVE_CLASSES:
        # Named like the base's class, since transformers looks the name up: pipelines do, and the caches of Mamba.
        body = {"config_class": kind.config_class, "__module__": __name__, "__doc__": AutoDecoForCausalLM.__doc__}
        _ADAPTIVE_CLASSES[kind] = type(kind.__name__, (AutoDecoForCausalLM, kind), body)
    trained = frozenset(name for name, parameter in base.named_parameters() if parameter.requires_grad)
    base.requires_grad_(False)
    base.__class__ = _ADAPTIVE_CLASSES[kind]
    model: AutoDecoForCausalLM = base
    model._of_base = (kind, base.generation_config, trained)
    model.generation_config = own_config(base.generation_config)  # the base's own object stays as it is
    model._capture = Capture()
    model._capture.attach(model)
    model.decoding_adapters, model.decoding_configs, model._is_trainable = (
        nn.ModuleDict({name: policy.train(base.training)}),
        {name: config},
        {},
    )
    model._is_trainable[name] = is_trainable
    model.set_adapter(name)
    return model


AutoModelForCausalLM.register(AutoDecoConfig, AutoDecoForCausalLM, exist_ok=True)
