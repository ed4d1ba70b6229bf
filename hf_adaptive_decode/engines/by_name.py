"""Engines by the names that commands and arguments know them by; knows nothing of how they decode."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .continuous import ContinuousBatchingEngine
from .engine import Engine
from .transformers import TransformersEngine
from .vllm import VLLMEngine

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (TransformersEngine, ContinuousBatchingEngine, VLLMEngine)
}


def build_engine(
    engine: str | Engine, model: PreTrainedModel, tokenizer: Any, *, batch_rows: int | None = 256, **options: Any
) -> Engine:
    """
    An engine by its name; one that is built already is given back.

    Args:
        engine (`str` or [`Engine`]): A name among [`ENGINES`], or an engine.
        model, tokenizer, batch_rows: As an [`Engine`] takes them.
        options: What that engine takes besides.

    Raises:
        `ValueError`: If no engine has this name.
    """
    if isinstance(engine, Engine):
        return engine
    check_engine(engine)
    return ENGINES[engine](model, tokenizer, batch_rows=batch_rows, **options)


def check_engine(engine: str | Engine) -> None:
    """Raises `ValueError` if no engine has this name."""
    if not isinstance(engine, Engine) and engine not in ENGINES:
        raise ValueError(f"there is no engine {engine!r}; choose among {', '.join(map(repr, ENGINES))}.")
