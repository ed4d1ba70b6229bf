"""A base model's class of vLLM with an adapter beside it, made when its name is asked for; knows no runner."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models import ModelRegistry

from .plugin import base_architecture
from .source import open_adapter


def __getattr__(name: str) -> type:
    """The adaptive class of an architecture, under the name that the plugin registered."""
    architecture = base_architecture(name)
    if architecture is None or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _adaptive(name, ModelRegistry.models[architecture].load_model_cls())
    return made


def _adaptive(name: str, base: Any) -> type:
    """`base`, whose logits are its own, and which leaves their hidden states to the adapter."""

    class Adaptive(base):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            # Not a submodule: vLLM loads, quantises, compiles and counts those.
            self.__dict__["decoding"] = open_adapter(vllm_config)
            self.__dict__["engine_config"] = vllm_config

        def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
            self.__dict__["decoding"].hear(hidden_states)
            logits: torch.Tensor | None = super().compute_logits(hidden_states, *args, **kwargs)
            return logits

        def get_model_state_cls(self) -> type:
            # Asked by the V2 runner alone.
            from .runner_v2 import state_class

            own = getattr(super(), "get_model_state_cls", None)
            return state_class(self.__dict__["engine_config"], self, None if own is None else own())

    Adaptive.__name__ = Adaptive.__qualname__ = name
    Adaptive.__module__ = __name__
    Adaptive.__doc__ = f"`{base.__name__}` with a decoding adapter."
    return Adaptive
