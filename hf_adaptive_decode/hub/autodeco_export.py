"""Adapters as AutoDeco's released settings and tensors, where these can say the same; knows no base model's tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..configuration import AutoDecoConfig
from ..errors import AdapterConfigError, AdapterLoadError
from .autodeco_base import base_config, base_settings
from .autodeco_import import load_released, locate_released, released_names
from .bases import PACKAGED_BASES
from .checkpoint import CARRIED_FILES, Checkpoint
from .store import check_fit, locate, read_policy

# What the released code builds its heads with, whatever a checkpoint holds.
_RELEASED_WIDTH = 256


@dataclass(frozen=True)
class Heads:
    """
    The heads of an adapter or of a released checkpoint.

    Attributes:
        config ([`AutoDecoConfig`]): Their settings.
        tensors (`dict` of `str` to `torch.Tensor`): By our names, `torch.float32`.
        source (`str`): Where they were read from.
        is_remote (`bool`): Whether that is the Hub.
    """

    config: AutoDecoConfig
    tensors: dict[str, torch.Tensor]
    source: str
    is_remote: bool

    def released_tensors(self) -> dict[str, torch.Tensor]:
        """By their released names."""
        return {theirs: self.tensors[ours] for theirs, ours in released_names(self.config).items()}


def read_heads(adapter: str | os.PathLike[str], revision: str | None = None, **download: Any) -> Heads:
    """
    The heads in a folder or a Hub repository of either format.

    Raises:
        [`AdapterLoadError`], [`AdapterConfigError`]: If it is an adapter of neither, or of another kind than heads.
    """
    released = locate_released(adapter, revision=revision, **download)
    if released is not None:
        if released.is_merged:
            raise AdapterLoadError(f"{released.source!r} is merged with a base model already; split it first.")
        return Heads(*load_released(released), released.source, released.is_remote)
    files = locate(adapter, revision=revision, **download)
    config = files.read_config()
    _refuse_inexact(config, files.source, files.peft)
    return Heads(config, read_policy(files, config).state_dict(), files.source, files.is_remote)


def open_base(
    heads: Heads, base: str | os.PathLike[str] | None, revision: str | None = None, **download: Any
) -> Checkpoint:
    """
    The checkpoint of the base model that heads are for, checked to fit them.

    Args:
        heads ([`Heads`]): The heads.
        base (`str` or `os.PathLike`, *optional*): Folder or Hub id; what the heads' own config names when `None`.
        revision (`str`, *optional*): Branch, tag or commit of it; what the config names when `None`, as for `base`.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        [`AdapterLoadError`]: If there is no such base, or it is of another shape or kind.
    """
    if base is None:
        named = trusted_base(heads.config, heads.is_remote)
        if named is None:
            raise AdapterLoadError(
                f"{heads.source!r} names {heads.config.base_model_name_or_path!r} as its base model, which cannot be "
                "used; name the folder or Hub id of its base model yourself (`base=`, `--base`)."
            )
        base, revision = PACKAGED_BASES.get(named, named), revision or heads.config.base_model_revision
    try:
        found = Checkpoint(base, revision=revision, carried=CARRIED_FILES, **download)
        settings = {**found.settings, "base_model_type": found.settings.get("model_type")}
        _refuse_misfit(heads, settings, found.source)
    except (AdapterLoadError, AdapterConfigError) as error:
        raise AdapterLoadError(f"the base model {os.fspath(base)!r} cannot be used: {error}") from error
    return found


def released_settings(heads: Heads, base: Checkpoint) -> dict[str, Any]:
    """
    The `config.json` of a released checkpoint: the base's own settings and what the heads add.

    Raises:
        [`AdapterLoadError`]: If transformers knows no model of the base's kind.
    """
    config = heads.config
    widths = {config.head_hidden_size, config.top_p_head_hidden_size or config.head_hidden_size}
    if widths != {_RELEASED_WIDTH}:
        warnings.warn(
            f"AutoDeco's own code builds heads of width {_RELEASED_WIDTH} and cannot load these, of "
            f"{' and '.join(map(str, sorted(widths)))}; this library can.",
            stacklevel=3,
        )
    kind = base.settings.get("model_type")
    ours = {name: vars(config)[name] for name in ("base_model_revision", "base_fingerprint", "detach_temperature")}
    return {
        **base_settings({**base.settings, "base_model_type": kind}, base.source),
        "model_type": AutoDecoConfig.model_type,
        "architectures": ["AutoDecoModelForCausalLM"],
        "base_model_type": kind,
        "base_model_name_or_path": trusted_base(config, heads.is_remote) or base.source,
        **{name: value for name, value in ours.items() if value is not None},
        "enable_temperature_head": "temperature" in config.heads,
        "enable_top_p_head": "top_p" in config.heads,
        "use_enhanced_features": config.top_p_statistics,
        "temperature_hidden_size": config.hidden_size,
        "top_p_hidden_size": config.hidden_size,
    }


def _refuse_inexact(config: AutoDecoConfig, source: str, peft: Path | None) -> None:
    """Raises [`AdapterConfigError`] unless the released format's formulas are the adapter's."""
    problems = [f"its policy is {config.policy!r} and not 'heads'"] if config.policy != "heads" else []
    if not problems:
        for name, wanted in (("temperature", [0.0, 2.0]), ("top_p", [0.0, 1.0])):
            found = vars(config)[f"{name}_range"]
            if name in config.heads and list(found) != wanted:
                problems.append(f"its `{name}_range` is {found} and not {wanted}")
        if list(config.features) != ["hidden"]:
            problems.append(f"its `features` are {list(config.features)} and not ['hidden']")
    if peft is not None:
        problems.append(f"a LoRA of the base model belongs to it ({peft})")
    if problems:
        raise AdapterConfigError(
            f"{source!r} cannot be written in AutoDeco's released format, which has no place for it: "
            f"{'; '.join(problems)}. Use it as it is."
        )


def _refuse_misfit(heads: Heads, settings: Mapping[str, Any], source: str) -> None:
    from transformers import AutoModelForCausalLM

    kind = settings.get("model_type")
    if kind == AutoDecoConfig.model_type:
        raise AdapterLoadError("it is an adapter or a merged checkpoint itself.")
    config = base_config(settings, source)
    try:
        with torch.device("meta"):  # shapes without weights
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's class raises whatever its settings make it raise
        raise AdapterLoadError(f"transformers builds no causal language model of type {kind!r}: {error}") from error
    check_fit(heads.config, model, heads.source)


def trusted_base(config: AutoDecoConfig, is_remote: bool) -> str | None:
    """The base model that a config names; `None` without one, or if the config is the Hub's and names a local path."""
    name = config.base_model_name_or_path
    if name is None or not is_remote or name in PACKAGED_BASES:
        return name
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if os.path.exists(name) else name
