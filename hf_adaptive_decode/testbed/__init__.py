"""A tiny base model that ships with the library and verifiable tasks for it; knows nothing of decoding policies.

Importing this package loads neither torch nor transformers nor datasets: each loads where a function first needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tasks import build_problems, is_correct, testbed_reward, to_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BASE_MODEL_PATH: Path = Path(__file__).resolve().parent / "base"


def load_base_model(**kwargs: Any) -> PreTrainedModel:
    """
    The shipped base model, in evaluation mode.

    Args:
        **kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH, **kwargs).eval()


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer, which pads on the left."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_MODEL_PATH)


__all__ = [
    "BASE_MODEL_PATH",
    "build_problems",
    "is_correct",
    "load_base_model",
    "load_tokenizer",
    "testbed_reward",
    "to_dataset",
]
