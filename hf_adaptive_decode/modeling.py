"""`AutoDecoForCausalLM`: any causal language model with a decoding adapter; knows transformers, no policy's inside."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .budget import resolve_budget
from .configuration import AutoDecoConfig, read_config
from .detour import Detour
from .errors import AdapterConfigError, AdapterLoadError, UnsupportedGenerationError
from .generation import (
    GenerationSession,
    budget_settings,
    count_new_tokens,
    count_prompts,
    current_session,
    forget_defaults,
    requested_settings,
    wants_adapter,
)
from .hub.bases import base_name, fingerprint, load_base
from .hub.card import publish_card, update_card
from .hub.static_setting import SPECIAL_TOKENS
from .hub.store import load_adapter, locate, push_folder, save_adapter
from .policies import DecodingPolicy, build_policy
from .tap import output_device, output_embedding_shape

_HUB_KWARGS = ("token", "cache_dir", "local_files_only", "force_download")


if TYPE_CHECKING:  # what it is once `_attach` has put it in front of a base's class
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class AutoDecoForCausalLM(Detour, _Base):
    """
    A causal language model that decides for itself how each token is sampled.

    Not made by its constructor but by [`~AutoDecoForCausalLM.from_base`] (a fresh adapter) and
    [`~AutoDecoForCausalLM.from_pretrained`] (a trained one). The base model object itself becomes an instance of both
    its own class and this one, so everything that works with the base class works with it. `forward` is the base's;
    only [`~AutoDecoForCausalLM.generate`] differs.

    Attributes:
        decoding_adapter ([`DecodingPolicy`]): The policy, a submodule of the model.
        decoding_config ([`AutoDecoConfig`]): Its settings; `config` stays the base model's.
    """

    config_class = AutoDecoConfig
    decoding_adapter: DecodingPolicy
    decoding_config: AutoDecoConfig
    _adapter_enabled: bool = True

    @classmethod
    def from_base(
        cls,
        base_model: PreTrainedModel | str | os.PathLike[str],
        config: AutoDecoConfig | None = None,
        **kwargs: Any,
    ) -> AutoDecoForCausalLM:
        """
        Puts a fresh adapter on a base model, whose parameters stop requiring gradients and never change.

        Args:
            base_model ([`~transformers.PreTrainedModel`] or `str`): The model (which is changed in place into an
                adaptive one) or its folder or Hub id.
            config ([`AutoDecoConfig`], *optional*): The adapter's settings; temperature and top-p heads by default.
            kwargs: For `AutoModelForCausalLM.from_pretrained` where an id is given.

        Raises:
            [`AdapterConfigError`]: If the config is for another width or vocabulary, or the model has an adapter.
        """
        if not isinstance(base_model, torch.nn.Module):
            base_model = AutoModelForCausalLM.from_pretrained(base_model, **kwargs)
        vocab_size, hidden_size = output_embedding_shape(base_model)
        config = copy.deepcopy(config) if config is not None else AutoDecoConfig()
        for name, value in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            if vars(config)[name] not in (None, value):
                raise AdapterConfigError(
                    f"`{name}` is {vars(config)[name]} and {type(base_model).__name__} has {value}; leave it out."
                )
            setattr(config, name, value)
        config.base_model_name_or_path = config.base_model_name_or_path or base_name(base_model)
        config.base_model_revision = config.base_model_revision or getattr(base_model.config, "_commit_hash", None)
        config.base_fingerprint = fingerprint(base_model)
        policy = build_policy(config).to(output_device(base_model))
        return _attach(base_model, policy, config)

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
        **kwargs: Any,
    ) -> AutoDecoForCausalLM:
        """
        Loads an adapter, and the base model it was trained on.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id of the adapter.
            base_model ([`~transformers.PreTrainedModel`] or `str`, *optional*): Base to use instead of the one that
                the adapter names; a model object is changed in place.
            subfolder, revision (`str`, *optional*): Where on the Hub the adapter lies.
            config ([`AutoDecoConfig`], *optional*): Accepted for the Auto classes; the adapter's own file is read.
            is_trainable (`bool`, defaults to `False`): Whether the adapter's parameters require gradients.
            kwargs: As `AutoModelForCausalLM.from_pretrained` takes them, for the base (`dtype`, `device_map`, ...);
                `token`, `cache_dir`, `local_files_only` and `force_download` serve both.

        Raises:
            [`AdapterLoadError`], [`AdapterConfigError`]: If the adapter is damaged or does not fit the base.
        """
        del config  # read again from the file, with this library's checks
        limit = {"max_weight_bytes": kwargs.pop("max_weight_bytes")} if "max_weight_bytes" in kwargs else {}
        kwargs.pop("adapter_kwargs", None)  # the Auto classes add it, for PEFT
        shared = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
        files = locate(pretrained_model_name_or_path, subfolder=subfolder, revision=revision, **limit, **shared)
        settings = read_config(files.config)
        if base_model is None:
            kwargs.setdefault("revision", settings.base_model_revision or "main")
            base_model = load_base(settings.base_model_name_or_path, files.source, files.is_remote, **kwargs)
        elif not isinstance(base_model, torch.nn.Module):
            base_model = AutoModelForCausalLM.from_pretrained(base_model, **kwargs)
        policy = load_adapter(files, cast(PreTrainedModel, base_model), settings, **limit)
        model = _attach(base_model, policy.requires_grad_(is_trainable), settings)
        model.eval()
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Writes the adapter alone: `config.json`, `model.safetensors`, `generation_config.json` and a model card.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it is not there; other files in it are left alone.
            is_main_process (`bool`, defaults to `True`): Other processes write nothing.
            push_to_hub (`bool`, defaults to `False`): Also uploads, to `repo_id` or the folder's name.
            kwargs: `repo_id` and the other arguments of [`~AutoDecoForCausalLM.push_to_hub`].
        """
        if not is_main_process:
            return
        save_adapter(self.decoding_adapter, self.decoding_config, save_directory)
        tokens = {name: vars(self.generation_config).get(name) for name in SPECIAL_TOKENS}
        GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **tokens).save_pretrained(save_directory)
        update_card(save_directory, self.decoding_config)
        if push_to_hub:
            names = ("token", "private", "revision", "create_pr", "commit_message")
            repo_id = kwargs.get("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, card_folder=save_directory, **{n: kwargs[n] for n in names if n in kwargs})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload decoding adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        card_folder: str | os.PathLike[str] | None = None,
    ) -> str:
        """
        Uploads what [`~AutoDecoForCausalLM.save_pretrained`] writes, and makes the repository if there is none.

        The repository's model card is brought up to date, or that of `card_folder` goes along with its results.

        Returns:
            `str`: Address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            publish_card(folder, self.decoding_config, repo_id, card_folder, token, revision)
            how = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
            return push_folder(folder, repo_id, token, private, **how)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        budget: Any = None,
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
            output_decoding_trace (`bool`, defaults to `False`): With `return_dict_in_generate=True`, adds
                `decoding_trace` ([`DecodingTrace`]) to the output.

        Returns:
            What the base model's `generate` returns: `torch.LongTensor` of sequences, or a `ModelOutput`.

        Raises:
            [`BudgetError`]: If the budget is no positive whole number or does not fit the batch.
            [`UnsupportedGenerationError`]: If the adapter could not act as trained in the mode asked for.
            [`LogitsError`]: If the model's logits are NaN or +inf; names step and row.
        """
        requested = requested_settings(generation_config, kwargs)
        prompts = count_prompts(inputs, kwargs)
        own = vars(self.generation_config)
        given = budget if budget is not None else requested.get("budget", own.get("budget"))
        resolved = resolve_budget(given, prompts)
        active = self._adapter_enabled and wants_adapter(requested)
        settings: dict[str, Any] = budget_settings(resolved, requested)
        if active:
            settings["do_sample"] = True  # transformers validates several samples against it
        requested |= settings
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**settings)
            settings = {name: value for name, value in settings.items() if name in kwargs}
        kwargs |= settings
        returns_dict = requested.get("return_dict_in_generate", own.get("return_dict_in_generate"))
        if output_decoding_trace and not returns_dict:
            raise UnsupportedGenerationError("`output_decoding_trace=True` needs `return_dict_in_generate=True` too.")
        policy = self.decoding_adapter if active else None
        session = GenerationSession(self, policy, requested, resolved, prompts, output_decoding_trace)
        with session.running():
            output = super().generate(inputs, generation_config, *args, **kwargs, **session.forward_settings(self))
        if output_decoding_trace:
            output["decoding_trace"] = session.trace(count_new_tokens(output, inputs, kwargs))
        return output

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        session = current_session()
        if session is not None:
            session.prepare_config(config)
        elif self._adapter_enabled:
            forget_defaults(config, kwargs)
        return config, model_kwargs

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, with the adapter disabled; it offers no hidden states for an adapter to read."""
        self._refuse_continuous_batching()
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As [`~AutoDecoForCausalLM.generate_batch`]."""
        self._refuse_continuous_batching()
        return super().init_continuous_batching(*args, **kwargs)

    def _refuse_continuous_batching(self) -> None:
        if self._adapter_enabled:
            raise UnsupportedGenerationError(
                "continuous batching does not go with an active decoding adapter; use `generate`, or the base model's "
                "own sampling: `with model.disable_adapter(): ...`."
            )

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        session = current_session()
        if session is None:
            return processors
        length = kwargs.get("input_ids_seq_length")
        return session.add_processors(processors, generation_config, length, kwargs.get("model_kwargs"))

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        session = current_session()
        return criteria if session is None else session.add_criteria(criteria, generation_config)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is the base model, exactly."""
        before = self._adapter_enabled
        self._adapter_enabled = False
        try:
            yield
        finally:
            self._adapter_enabled = before

    def train(self, mode: bool = True) -> AutoDecoForCausalLM:
        """Puts the adapter in training mode; a frozen base stays in evaluation mode, so that its dropout is off."""
        super().train(mode)
        if mode:
            for child in self.children():
                if child is not self.decoding_adapter and not any(p.requires_grad for p in child.parameters()):
                    child.eval()
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Prints [`~AutoDecoForCausalLM.get_nb_trainable_parameters`] the way PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )


_ADAPTIVE_CLASSES: dict[type, type] = {}


def _attach(base: PreTrainedModel, policy: DecodingPolicy, config: AutoDecoConfig) -> AutoDecoForCausalLM:
    if isinstance(base, AutoDecoForCausalLM):
        raise AdapterConfigError(f"this {type(base).__bases__[1].__name__} has a decoding adapter already.")
    if base.config.is_encoder_decoder:
        raise AdapterLoadError(f"{type(base).__name__} is an encoder-decoder; a decoding adapter needs a causal model.")
    kind = type(base)
    if kind not in _ADAPTIVE_CLASSES:
        # Named like the registered class, since pipelines look the name up.
        body = {"config_class": kind.config_class, "__module__": __name__, "__doc__": AutoDecoForCausalLM.__doc__}
        _ADAPTIVE_CLASSES[kind] = type("AutoDecoForCausalLM", (AutoDecoForCausalLM, kind), body)
    base.requires_grad_(False)
    base.__class__ = _ADAPTIVE_CLASSES[kind]
    model: AutoDecoForCausalLM = base
    # A pipeline puts a temperature of its own where the model's config names none, and generate could not tell it from
    # the user's. The base's own object stays as it is.
    model.generation_config = copy.deepcopy(base.generation_config)
    if model.generation_config.temperature is None:
        model.generation_config.temperature = 1.0
    model.decoding_adapter = policy
    model.decoding_config = config
    return model


AutoModelForCausalLM.register(AutoDecoConfig, AutoDecoForCausalLM, exist_ok=True)
