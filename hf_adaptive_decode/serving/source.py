"""Which adapter an engine is to have, and where its base lies; knows vLLM's configs by their fields, no runner."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..configuration import AutoDecoConfig
from ..errors import AdapterLoadError, UnsupportedGenerationError
from ..hub.bases import locate_base
from ..hub.store import AdapterFiles, check_shape, locate
from .served import ServedAdapter, read_served

# The name of our settings in a base's config, and of those that a user passes in `--hf-overrides`.
FIELD, ADAPTER, BASE = "autodeco_adapter", "decoding_adapter", "base_model"
_HINT = 'name the base yourself: `--hf-overrides \'{"base_model": "FOLDER_OR_ID"}\'`.'


@dataclass(frozen=True)
class AdapterSource:
    """
    An adapter, found.

    Args:
        path (`str`): Folder or Hub id.
        revision (`str`, *optional*): On the Hub.
        base (`str`, *optional*): Folder or Hub id of its base; `None` where the engine was started with the base.
        base_revision (`str`, *optional*): The base's, on the Hub.
    """

    path: str
    revision: str | None = None
    base: str | None = None
    base_revision: str | None = None

    def files(self) -> AdapterFiles:
        """Its files; raises [`AdapterLoadError`]."""
        return locate(self.path, revision=self.revision)


def find_source(path: str, revision: str | None, base: str | None, token: Any = None) -> AdapterSource:
    """
    The adapter of a folder or Hub id, and its base.

    Args:
        path (`str`): Folder or Hub id.
        revision (`str`, *optional*): On the Hub.
        base (`str`, *optional*): Folder or Hub id of the base instead of the one that the adapter names.
        token (*optional*): For the Hub.

    Raises:
        [`AdapterLoadError`]: If the adapter cannot be read or its base is not named.
    """
    files = locate(path, revision=revision, token=token)
    config = files.read_config()
    named = None if base else config.base_model_revision
    where = base or locate_base(config.base_model_name_or_path, path, files.is_remote, _HINT)
    return AdapterSource(path, files.commit or revision, where, None if os.path.isdir(where) else named)


def source_in(hf_config: Any) -> AdapterSource:
    """
    The adapter that an engine's config names.

    Raises:
        [`AdapterLoadError`]: If it names none.
    """
    found = vars(hf_config).get(FIELD)
    if isinstance(found, dict):
        return AdapterSource(**found)
    asked = vars(hf_config).get(ADAPTER)
    if isinstance(asked, dict) and isinstance(asked.get("path"), str):
        return AdapterSource(asked["path"], asked.get("revision"))
    if isinstance(asked, str):
        return AdapterSource(asked)
    raise AdapterLoadError(
        f"an adaptive architecture needs an adapter, and `{ADAPTER}` is {asked!r}: pass "
        f'`--hf-overrides \'{{"{ADAPTER}": "FOLDER_OR_ID"}}\'`.'
    )


def read_settings_of(source: AdapterSource, hidden_size: int, vocab_size: int) -> tuple[AdapterFiles, AutoDecoConfig]:
    """
    An adapter's files and settings, if vLLM can serve it on a base of this shape.

    Raises:
        [`AdapterLoadError`]: If it was made for another base, or has a LoRA of it.
        [`UnsupportedGenerationError`]: If its policy reads the mean over the prompt.
    """
    files = source.files()
    config = files.read_config()
    check_shape(config, hidden_size, vocab_size, source.path, "the base to be served")
    if files.peft is not None:
        raise AdapterLoadError(
            f"the adapter {source.path!r} goes with a LoRA of its base, which vLLM would leave out; merge the LoRA "
            "into the base with PEFT's `merge_and_unload`, and name the result as `base_model`."
        )
    if config.pooling == "mean":
        raise UnsupportedGenerationError(
            f'the policy of {source.path!r} reads the mean over the prompt (`pooling="mean"`), which vLLM computes in '
            'parts and takes from its prefix cache; train it with `pooling="last"`, or use `generate`.'
        )
    return files, config


def open_adapter(vllm_config: Any) -> ServedAdapter:
    """The adapter of the engine whose model is being made, read in this process."""
    model_config = vllm_config.model_config
    source = source_in(model_config.hf_config)
    files, config = read_settings_of(source, *shape_of(model_config))
    device = vllm_config.device_config.device
    policy = read_served(source.path, config, files, device)
    return ServedAdapter(policy, source.path, vllm_config.instance_id, model_config.seed or 0, device)


def shape_of(model_config: Any) -> tuple[int, int]:
    """`(hidden_size, vocab_size)` of a base's output embedding, as vLLM knows them."""
    text = model_config.hf_text_config
    # OPT's projected output embedding is narrower than its layers.
    return vars(text).get("word_embed_proj_dim") or model_config.get_hidden_size(), model_config.get_vocab_size()
