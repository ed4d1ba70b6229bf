"""Teaches vLLM what an adapter is, in each of its processes; knows architectures by name, nothing of models."""

from __future__ import annotations

import re
from importlib.metadata import version

from .._version import __version__

PREFIX = "AutoDeco"
_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_NAMED = re.compile(rf"{PREFIX}(\w+?)_of_\w+")


def base_architecture(name: str) -> str | None:
    """The base's architecture in the name of an adaptive class, `AutoDecoQwen3ForCausalLM_of_0_32_0_with_0_1_0`."""
    found = _NAMED.fullmatch(name)
    return found.group(1) if found else None


def register() -> None:
    """
    What vLLM's entry point calls, once in each process.

    It registers an adaptive architecture beside each generative one, a hook that sets an engine up for it, and a reader
    of configs that follows an adapter's `config.json` to its base's.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .config import register_config_reader
    from .hooks import hook_of

    # vLLM remembers what it learned of a class by its name, and not by the versions of what it was made of.
    made_of = re.sub(r"\W", "_", f"of_{version('vllm')}_with_{__version__}")
    for architecture in list(ModelRegistry.get_supported_archs()):
        name = PREFIX + architecture
        if not architecture.endswith(_SUFFIXES) or architecture.startswith(PREFIX):
            continue
        ModelRegistry.register_model(name, f"{__package__}.models:{name}_{made_of}")
        MODELS_CONFIG_MAP[name] = hook_of(architecture)
    register_config_reader()
