"""Reads an adapter's `config.json` as its base's, with the adapter noted in it; knows no weights and no runner."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..configuration import AutoDecoConfig
from ..configuration_checks import is_released_format
from ..errors import AdapterLoadError
from .plugin import PREFIX
from .source import ADAPTER, BASE, FIELD, AdapterSource, find_source


def register_config_reader() -> None:
    """Puts ours in front of vLLM's reader of `config.json`, to which it leaves every other model."""
    from vllm.transformers_utils import config as vllm_configs

    theirs: Any = type(vllm_configs.get_config_parser("hf"))
    if theirs.__name__ == "AdapterConfigParser":
        return

    class AdapterConfigParser(theirs):  # type: ignore[misc]
        def parse(
            self,
            model: str | Path,
            trust_remote_code: bool,
            revision: str | None = None,
            code_revision: str | None = None,
            **kwargs: Any,
        ) -> tuple[dict[str, Any], PreTrainedConfig]:
            overrides = kwargs.get("hf_overrides")
            asked = overrides if isinstance(overrides, dict) else {}
            source = _source_of(str(model), revision, asked, kwargs.get("token"))
            if source is None:
                found: tuple[dict[str, Any], PreTrainedConfig] = super().parse(
                    model, trust_remote_code, revision=revision, code_revision=code_revision, **kwargs
                )
                return found
            if source.base is not None:
                model, revision, code_revision = source.base, source.base_revision, None
            settings, config = super().parse(
                model, trust_remote_code, revision=revision, code_revision=code_revision, **kwargs
            )
            if config.model_type == AutoDecoConfig.model_type:
                raise AdapterLoadError(f"the adapter {source.path!r} names {model!r} as its base, an adapter itself.")
            config.architectures = [_adaptive(name) for name in config.architectures or []]
            setattr(config, FIELD, asdict(source))
            return settings, config

    # Said once by a warning that something was replaced; it is only extended.
    logger = logging.getLogger(vllm_configs.__name__)
    logger.addFilter(_is_no_replacement)
    try:
        vllm_configs.register_config_parser("hf")(AdapterConfigParser)
    finally:
        logger.removeFilter(_is_no_replacement)


def _source_of(model: str, revision: str | None, asked: dict[str, Any], token: Any) -> AdapterSource | None:
    """The adapter that `model` is, or that goes on it; `None` for a model that has to do with none."""
    named = asked.get(ADAPTER)
    if isinstance(named, str):
        return AdapterSource(named)
    settings, _ = PreTrainedConfig.get_config_dict(model, revision=revision, token=token)
    if settings.get("model_type") != AutoDecoConfig.model_type:
        return None
    if is_released_format(settings):
        raise AdapterLoadError(
            f"{model!r} is a checkpoint as AutoDeco's authors released them; make an adapter of it first: "
            f"`hf-adaptive-decode convert {model} FOLDER --to adapter`."
        )
    return find_source(model, revision, asked.get(BASE), token)


def _adaptive(architecture: str) -> str:
    return architecture if architecture.startswith(PREFIX) else PREFIX + architecture


def _is_no_replacement(record: logging.LogRecord) -> bool:
    return "onfig" not in str(record.msg) or "parser" not in str(record.msg)
