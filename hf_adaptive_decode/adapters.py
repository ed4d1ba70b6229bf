"""Several decoding adapters on one model, managed as PEFT's are; knows files and policies, nothing of `generate`."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .capture import Capture
from .configuration import AutoDecoConfig, read_config
from .errors import AdapterConfigError, UnknownAdapterError
from .hub.bases import base_name, fingerprint
from .hub.peft_weights import check_lora
from .hub.store import load_adapter, locate
from .policies import DecodingPolicy, StaticPolicy, build_policy
from .tap import output_device, output_embedding_shape

# The base model's own sampling, where a batch names an adapter for each row.
BASE = "__base__"
DEFAULT = "default"

if TYPE_CHECKING:  # what it is once it stands in front of a base's class
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class DecodingAdapters(_Base):
    """
    The part of [`AutoDecoForCausalLM`] that adds, loads, chooses and removes adapters.

    Names and meanings are PEFT's: a new adapter is there but not active, [`~set_adapter`] makes one active and only
    that one trainable. Names that belong to a LoRA of the base are passed on to transformers' own methods.

    Attributes:
        decoding_adapters (`torch.nn.ModuleDict`): The policies, by name.
        decoding_configs (`dict`): Their settings, by name.
        active_adapter (`str`): Name of the one that decides.
    """

    decoding_adapters: nn.ModuleDict
    decoding_configs: dict[str, AutoDecoConfig]
    _active: str
    # Blocks of `disable_adapter` that are open. On the model and in no context variable, since a streamer's `generate`
    # runs in a thread of its own.
    _disabled: int = 0
    _is_trainable: dict[str, bool]
    _capture: Capture
    # What `unload` gives back.
    _of_base: tuple[type, GenerationConfig, frozenset[str]]

    @property
    def _adapter_enabled(self) -> bool:
        return self._disabled == 0

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that decides."""
        return self._active

    @property
    def decoding_adapter(self) -> DecodingPolicy:
        """The active adapter's policy, a submodule of the model."""
        return self.decoding_adapters[self._active]  # type: ignore[return-value]

    @property
    def decoding_config(self) -> AutoDecoConfig:
        """The active adapter's settings; `config` stays the base model's."""
        return self.decoding_configs[self._active]

    def add_adapter(self, adapter_name: str, config: AutoDecoConfig | None = None, **kwargs: Any) -> None:
        """
        Adds a fresh adapter; it is trainable once [`~set_adapter`] makes it active.

        Args:
            adapter_name (`str`): A new name.
            config ([`AutoDecoConfig`], *optional*): Its settings; temperature and top-p heads by default. A
                `peft.PeftConfig` adds a LoRA to the base, by transformers' own `add_adapter`.
            kwargs: For transformers' own.

        Raises:
            [`UnknownAdapterError`]: If the name is taken or cannot be one.
            [`AdapterConfigError`]: If the config is for another width or vocabulary.
        """
        if not isinstance(adapter_name, str) or not isinstance(config, AutoDecoConfig | None):
            first, name = (adapter_name, config) if isinstance(config, str | None) else (config, adapter_name)
            super().add_adapter(first, name, **kwargs)
            return
        config = config_for(self, config or AutoDecoConfig())
        self._put(adapter_name, build_policy(config).to(output_device(self)), config, is_trainable=True)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str = "",
        revision: str | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        Loads another adapter beside those that are there; it does not become active.

        Args:
            model_id (`str` or `os.PathLike`): Folder or Hub id of the adapter.
            adapter_name (`str`): A new name.
            is_trainable (`bool`, defaults to `False`): Whether it requires gradients while it is active.
            subfolder, revision (`str`, *optional*): Where on the Hub it lies.
            autocast_adapter_dtype (`bool`, defaults to `True`): Weights in fp32, or else in the base's dtype; what is
                computed is fp32 either way.
            kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `max_weight_bytes`.

        Returns:
            What `load_state_dict` returns: missing and unexpected keys, of which there are none.

        Raises:
            [`AdapterLoadError`]: If the adapter is damaged or does not fit the base.
        """
        files = locate(model_id, subfolder=subfolder, revision=revision, **kwargs)
        check_lora(self, files.peft, files.source)
        config = read_config(files.config)
        limit = {name: kwargs[name] for name in ("max_weight_bytes",) if name in kwargs}
        self._check_name(adapter_name)
        policy = load_adapter(files, self, config, **limit)
        self._put(adapter_name, policy if autocast_adapter_dtype else policy.to(self.dtype), config, is_trainable)
        return nn.modules.module._IncompatibleKeys([], [])

    def set_adapter(self, adapter_name: str, **kwargs: Any) -> None:
        """Makes an adapter active, and it alone trainable if it was added or loaded to be trained."""
        if self._is_tuners(adapter_name):
            super().set_adapter(adapter_name, **kwargs)
            return
        self._check_known([adapter_name])
        self._active = adapter_name
        for name, policy in self.decoding_adapters.items():
            policy.requires_grad_(name == adapter_name and self._is_trainable[name])

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Removes an adapter; if it was the active one, the first of the others becomes it.

        Raises:
            [`UnknownAdapterError`]: If there is none of that name.
            [`AdapterConfigError`]: If it is the only one.
        """
        if self._is_tuners(adapter_name):
            super().delete_adapter(adapter_name)
            return
        self._check_known([adapter_name])
        if len(self.decoding_adapters) == 1:
            raise AdapterConfigError(
                f"{adapter_name!r} is the model's only decoding adapter; `model.unload()` gives the base model back."
            )
        del self.decoding_adapters[adapter_name], self.decoding_configs[adapter_name], self._is_trainable[adapter_name]
        if self._active == adapter_name:
            self.set_adapter(next(iter(self.decoding_adapters)))

    def unload(self) -> PreTrainedModel:
        """Takes every decoding adapter away: the very object, which is the base model again, as it was given."""
        self._capture.detach()
        kind, self.generation_config, trained = self._of_base
        for name in ("decoding_adapters", "decoding_configs", "_active", "_is_trainable", "_capture", "_of_base"):
            delattr(self, name)
        self.__dict__.pop("_disabled", None)
        self.__class__ = kind  # type: ignore[assignment]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As the base's own; from then on the adapters are those of the resized base."""
        before = fingerprint(self)
        embeddings: nn.Module = super().resize_token_embeddings(*args, **kwargs)
        vocab_size, after = output_embedding_shape(self)[0], fingerprint(self)
        for config in self.decoding_configs.values():
            config.vocab_size = vocab_size
            if config.base_fingerprint == before:  # an adapter of another base stays one
                config.base_fingerprint = after
        return embeddings

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """
        Within it the model is the base model, exactly; a LoRA that the base came with stays on.

        Blocks may overlap, in one thread or several.
        """
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; of a 4-bit base, as many as are packed in its weights."""
        trainable = total = 0
        for parameter in self.parameters():
            count = _count(parameter)
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Prints [`~AutoDecoForCausalLM.get_nb_trainable_parameters`] the way PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def policies_by_row(self, adapter_names: Sequence[str], settings: dict[str, Any]) -> list[DecodingPolicy]:
        """
        The policy of each name of a batch.

        Args:
            adapter_names (sequence of `str`): Names of adapters, or `"__base__"`.
            settings (`dict`): How the base samples, as one action.
        """
        self._check_known([name for name in adapter_names if name != BASE])
        policies = dict(self.decoding_adapters.items())
        if BASE in adapter_names:
            policies[BASE] = StaticPolicy(AutoDecoConfig(policy="static", actions=[settings], hidden_size=1))
        return [policies[name] for name in adapter_names]  # type: ignore[misc]

    def _put(self, name: str, policy: DecodingPolicy, config: AutoDecoConfig, is_trainable: bool) -> None:
        self._check_name(name)
        self.decoding_adapters[name] = policy.requires_grad_(False).train(self.training)
        self.decoding_configs[name] = config
        self._is_trainable[name] = is_trainable

    def _check_name(self, name: str) -> None:
        if name in self.decoding_adapters or self._is_tuners(name):
            raise UnknownAdapterError(
                f"there is an adapter {name!r} already (adapters: {self._names()}); take another name, or "
                "`delete_adapter` it first."
            )
        check_adapter_name(name)

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.decoding_adapters:
                raise UnknownAdapterError(f"there is no adapter {name!r}; this model has: {self._names()}.")

    def _names(self) -> str:
        return ", ".join(map(repr, self.decoding_adapters))

    def _is_tuners(self, name: Any) -> bool:
        """Whether the name is that of a LoRA in the base."""
        loaded = getattr(self, "_hf_peft_config_loaded", False)
        return loaded and name not in self.decoding_adapters and name in self.peft_config


def check_adapter_name(name: Any) -> None:
    """Raises [`UnknownAdapterError`] if a submodule, or a folder, could not be called so."""
    ok = isinstance(name, str) and name != BASE and 0 < len(name) <= 128 and not set(name) & set("./\\\0")
    if not ok or hasattr(nn.ModuleDict, name):
        raise UnknownAdapterError(
            f"{name!r} cannot be an adapter's name; it has to be a string of 1 to 128 characters without dots and "
            f"slashes, not {BASE!r}, and no word that modules use themselves."
        )


def config_for(model: PreTrainedModel, config: AutoDecoConfig) -> AutoDecoConfig:
    """
    A copy of a config, filled in with what it says of the base model.

    Raises:
        [`AdapterConfigError`]: If it is for another width or vocabulary.
    """
    vocab_size, hidden_size = output_embedding_shape(model)
    config = copy.deepcopy(config)
    for name, value in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        if vars(config)[name] not in (None, value):
            raise AdapterConfigError(
                f"`{name}` is {vars(config)[name]} and {type(model).__name__} has {value}; leave it out."
            )
        setattr(config, name, value)
    config.base_model_name_or_path = config.base_model_name_or_path or base_name(model)
    config.base_model_revision = config.base_model_revision or getattr(model.config, "_commit_hash", None)
    config.base_fingerprint = fingerprint(model)
    return config


def _count(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter; bitsandbytes packs two 4-bit ones in a byte."""
    packed = type(parameter).__name__ == "Params4bit"
    storage = getattr(parameter, "quant_storage", None)
    size = storage.itemsize if isinstance(storage, torch.dtype) else 1
    return parameter.numel() * 2 * size if packed else parameter.numel()
