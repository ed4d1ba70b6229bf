"""Models with decoding adapters read from folders and the Hub, and written there; knows no `generate`."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .adapters import DEFAULT
from .configuration import AutoDecoConfig, read_settings
from .errors import AdapterLoadError, UnknownAdapterError
from .hub.autodeco_import import (
    ReleasedCheckpoint,
    is_released_format,
    load_released,
    load_released_base,
    locate_released,
)
from .hub.bases import load_at_one_commit, load_base
from .hub.card import update_card
from .hub.peft_layers import active_lora, unwrap_peft
from .hub.peft_weights import load_peft, save_peft
from .hub.push import push_adapter, push_local
from .hub.static_setting import SPECIAL_TOKENS
from .hub.store import AdapterFiles, check_fit, load_adapter, locate, refuse_another_model, save_adapter
from .hub.writing import replacing
from .policies import DecodingPolicy, build_policy
from .tap import output_device

_HUB_KWARGS = ("token", "cache_dir", "local_files_only", "force_download")
_LIMITS = ("max_weight_bytes", "max_peft_bytes")
_PUSH = ("token", "private", "revision", "create_pr", "commit_message")

if TYPE_CHECKING:  # what it is once it stands in front of a base's class
    from .adapters import DecodingAdapters as _Base
else:
    _Base = object


def open_adapter(
    source: str | os.PathLike[str],
    base_model: PreTrainedModel | str | os.PathLike[str] | None,
    is_trainable: bool,
    where: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, DecodingPolicy, AutoDecoConfig]:
    """
    An adapter's base model, with its LoRA if one lies beside the adapter, its policy and its settings.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id of an adapter or of a released AutoDeco checkpoint.
        base_model ([`~transformers.PreTrainedModel`] or `str`, *optional*): Instead of the one that it names.
        is_trainable (`bool`): Whether the LoRA requires gradients.
        where (`dict`): `subfolder` and `revision`.
        kwargs (`dict`): For the base, for the Hub, and limits of size.

    Raises:
        [`AdapterLoadError`], [`AdapterConfigError`]: If the adapter is damaged or does not fit the base.
    """
    limits = {name: kwargs.pop(name) for name in _LIMITS if name in kwargs}
    hub = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
    weights = {name: limit for name, limit in limits.items() if name == "max_weight_bytes"}
    files = _locate_either(source, {**where, **hub}, limits, weights)
    if isinstance(files, ReleasedCheckpoint):
        config, tensors = load_released(files)
        base = load_released_base(files, **kwargs) if base_model is None else _given(base_model, kwargs)
        check_fit(config, base, files.source)
        policy = build_policy(config)
        policy.load_state_dict(tensors)
        return base, policy.to(output_device(base)).eval(), config
    config = files.read_config()
    if base_model is None:
        kwargs.setdefault("revision", config.base_model_revision or "main")
        base = load_base(config.base_model_name_or_path, files.source, files.is_remote, **kwargs)
        config.base_model_revision = config.base_model_revision or getattr(base.config, "_commit_hash", None)
    else:
        base = _given(base_model, kwargs)
    policy = load_adapter(files, base, config, **weights)
    if files.peft is not None:  # the last that can fail, and undoes itself
        load_peft(base, files.peft, is_trainable)
    return base, policy, config


def _locate_either(
    source: str | os.PathLike[str], where: dict[str, Any], limits: dict[str, Any], weights: dict[str, Any]
) -> AdapterFiles | ReleasedCheckpoint:
    """An adapter's files; or a released checkpoint, which is looked for only where there is no adapter."""
    try:
        files = locate(source, **limits, **where)
        if not is_released_format(read_settings(files.config)):
            return files
        problem = None
    except AdapterLoadError as error:
        problem = error
    released = locate_released(source, **weights, **where)
    if released is None:
        raise problem or AdapterLoadError(f"{os.fspath(source)!r} was changed while it was read; load it again.")
    return released


def _given(base_model: PreTrainedModel | str | os.PathLike[str], kwargs: dict[str, Any]) -> PreTrainedModel:
    return unwrap_peft(base_model if isinstance(base_model, nn.Module) else load_at_one_commit(base_model, **kwargs))


class StoredAdapters(_Base):
    """The part of [`AutoDecoForCausalLM`] that writes folders and pushes them."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        *,
        selected_adapters: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Writes the adapter alone: `config.json`, `model.safetensors`, `generation_config.json` and a model card.

        Of several adapters the one called "default" lies in the folder, and each of the others in a subfolder of its
        name; a single one lies in the folder whatever its name. A LoRA of the base lies beside it in `peft`.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it is not there; other files in it are left alone.
            is_main_process (`bool`, defaults to `True`): Other processes write nothing.
            push_to_hub (`bool`, defaults to `False`): Also uploads, to `repo_id` or the folder's name.
            selected_adapters (sequence of `str`, *optional*): Names of those to write; all by default.
            kwargs: `repo_id` and the other arguments of [`~AutoDecoForCausalLM.push_to_hub`].

        Raises:
            [`UnknownAdapterError`]: If an adapter is selected that is not there.
        """
        if not is_main_process:
            return
        names = list(self.decoding_adapters if selected_adapters is None else selected_adapters)
        self._check_known(names)
        if not names:
            raise UnknownAdapterError("`selected_adapters` is empty; name at least one adapter.")
        if push_to_hub and len(names) > 1:
            raise UnknownAdapterError(
                f"a repository holds one adapter, and these are {len(names)}: {', '.join(names)}; push each by itself, "
                "with `selected_adapters=[NAME]`."
            )
        self._warn_of_a_trained_base()
        for name in names:
            alone = len(names) == 1 or name == DEFAULT
            self._save_one(name, Path(save_directory) if alone else Path(save_directory, name))
        if push_to_hub:
            repo_id = kwargs.get("repo_id", os.path.basename(os.path.normpath(save_directory)))
            push_local(save_directory, repo_id, **{name: kwargs[name] for name in _PUSH if name in kwargs})

    def _warn_of_a_trained_base(self) -> None:
        parts = [part for part in (self.decoding_adapters, active_lora(self)) if part is not None]
        saved = {id(parameter) for part in parts for parameter in part.parameters()}
        if any(parameter.requires_grad and id(parameter) not in saved for parameter in self.parameters()):
            warnings.warn(
                "the base model's weights require gradients, and an adapter's folder does not hold them; save a base "
                "that was trained by itself: `model.unload().save_pretrained(FOLDER)`.",
                stacklevel=3,
            )

    def _save_one(self, name: str, folder: Path) -> None:
        refuse_another_model(folder)
        save_peft(self, folder)  # before the card, which speaks of it
        config = self.decoding_configs[name]
        save_adapter(self.decoding_adapters[name], config, folder)  # type: ignore[arg-type]
        tokens = {token: vars(self.generation_config).get(token) for token in SPECIAL_TOKENS}
        with replacing(folder / "generation_config.json") as staged:
            GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **tokens).save_pretrained(
                staged.parent
            )
        update_card(folder, config)

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
        Uploads the active adapter as [`~AutoDecoForCausalLM.save_pretrained`] writes it, and makes the repository if
        there is none.

        The repository's model card is brought up to date, or that of `card_folder` goes along with its results.

        Returns:
            `str`: Address of the commit.

        Raises:
            [`PushError`]: If it did not get there; says in which folder the adapter is kept and how to send it again.
        """
        how: dict[str, Any] = {"commit_message": commit_message, "private": private, "token": token}
        how |= {"revision": revision, "create_pr": create_pr}
        write = functools.partial(self.save_pretrained, selected_adapters=[self.active_adapter])
        return push_adapter(write, repo_id, card_folder=card_folder, **how)
