"""Which base model an adapter belongs to: its name, its fingerprint, and loading it; knows nothing of policies."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import AdapterLoadError, AdaptiveDecodeError
from .causes import why_unread
from .files import resolve_commit

_PACKAGE = Path(__file__).resolve().parent.parent
# The base model inside the package goes by this name in adapters, so that they load on any machine.
PACKAGED_BASES = {"hf_adaptive_decode:testbed": _PACKAGE / "testbed" / "base"}
_HUB = ("token", "cache_dir", "local_files_only", "force_download", "subfolder")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# The adapter whose base is being loaded.
_WANTING: ContextVar[str | None] = ContextVar("hf_adaptive_decode_wanting", default=None)
# What may differ between two copies of one architecture: where it lies, who wrote it, how it runs.
_NOT_ARCHITECTURE = {
    "architectures",
    "name_or_path",
    "transformers_version",
    "dtype",
    "use_cache",
    "quantization_config",
}


def load_at_one_commit(name: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """As `AutoModelForCausalLM.from_pretrained`, with all files of one Hub commit, which the config remembers."""
    # Not at the top: loading the Auto classes imports the module that imports this one (see `_registration`).
    from transformers import AutoModelForCausalLM

    commit = resolve_commit(name, kwargs.get("revision"), **{key: kwargs[key] for key in _HUB if key in kwargs})
    model = AutoModelForCausalLM.from_pretrained(name, **(kwargs | {"revision": commit} if commit else kwargs))
    model.config._commit_hash = commit
    return model


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the settings of the base's architecture."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_ARCHITECTURE and k[0] != "_"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def base_name(model: PreTrainedModel) -> str | None:
    """What the adapter's config should call this base; `None` for a model built in code."""
    name = model.config.name_or_path
    for alias, folder in PACKAGED_BASES.items():
        if name and os.path.isdir(name) and Path(name).resolve() == folder:
            return alias
    return name or None


def locate_base(name: str | None, adapter: str, adapter_is_remote: bool, hint: str) -> str:
    """
    The folder or Hub id of the base that an adapter names.

    Args:
        name (`str`, *optional*): `base_model_name_or_path` of the adapter's config.
        adapter (`str`): The adapter's folder or Hub id, for messages.
        adapter_is_remote (`bool`): Whether the config came from the Hub; it may then name Hub ids only.
        hint (`str`): How to name another base, for messages.

    Raises:
        [`AdapterLoadError`]: If no base is named, or the name is not allowed.
    """
    if name is None:
        raise AdapterLoadError(f"the adapter {adapter!r} names no base model; {hint}")
    if name in PACKAGED_BASES:
        return os.fspath(PACKAGED_BASES[name])
    if adapter_is_remote and (not _HUB_ID.fullmatch(name) or os.path.exists(name)):
        raise AdapterLoadError(
            f"the downloaded adapter {adapter!r} names {name!r} as its base, which is or could be a local path; {hint}"
        )
    return name


def load_base(name: str | None, adapter: str, adapter_is_remote: bool, **kwargs: Any) -> PreTrainedModel:
    """
    Loads the base model that an adapter names.

    Args:
        name (`str`, *optional*): `base_model_name_or_path` of the adapter's config.
        adapter (`str`): The adapter's folder or Hub id, for messages.
        adapter_is_remote (`bool`): Whether the config came from the Hub; it may then name Hub ids only.
        kwargs: For `AutoModelForCausalLM.from_pretrained`.

    Raises:
        [`AdapterLoadError`]: If no base is named, the name is not allowed, or the base cannot be loaded.
    """
    # Not at the top: loading the Auto classes imports the module that imports this one (see `_registration`).
    from transformers import AutoModelForCausalLM

    hint = "pass the base yourself: `from_pretrained(adapter, base_model=MODEL_OR_ID_OR_FOLDER)`."
    where = locate_base(name, adapter, adapter_is_remote, hint)
    if _WANTING.get() is not None:
        raise AdapterLoadError(
            f"the adapter {_WANTING.get()!r} names {adapter!r} as its base, an adapter itself; {hint}"
        )
    if name in PACKAGED_BASES:
        return AutoModelForCausalLM.from_pretrained(where, **{**kwargs, "revision": "main"})
    token = _WANTING.set(adapter)
    try:
        return load_at_one_commit(where, **kwargs)
    except AdaptiveDecodeError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # not there, no causal model, or damaged
        why = why_unread(error, where, kwargs.get("revision")).rstrip(".")
        raise AdapterLoadError(
            f"the base model {name!r} of adapter {adapter!r} could not be loaded: {why}. Or {hint}"
        ) from error
    finally:
        _WANTING.reset(token)
