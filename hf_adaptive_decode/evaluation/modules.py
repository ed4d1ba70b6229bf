"""Where this library's modules for `evaluate` lie, and what they share; knows nothing of what each computes."""

from __future__ import annotations

import importlib.resources
from typing import Any, Final

MODULES: Final = ("pass_at_k", "math_equivalence", "decoding_control")


def module_path(name: str) -> str:
    """
    The folder of one of this library's modules for `evaluate`: `evaluate.load(module_path("pass_at_k"))`.

    Args:
        name (`str`): `"pass_at_k"`, `"math_equivalence"` or `"decoding_control"`.

    Raises:
        `ValueError`: If there is no such module.
    """
    if name not in MODULES:
        raise ValueError(f"There is no module {name!r}; choose from {', '.join(MODULES)}.")
    return str(importlib.resources.files("hf_adaptive_decode") / "evaluate_modules" / name)


class RefusesEmpty:
    """A mix-in for an `evaluate.EvaluationModule`: an empty batch is an error, as `compute` without any is."""

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """
        Adds a batch of examples.

        Raises:
            `ValueError`: If the batch is empty.
        """
        if predictions is not None and len(predictions) == 0:
            raise ValueError("`predictions` is empty; there is nothing to compute of no examples.")
        super().add_batch(predictions=predictions, references=references, **kwargs)  # type: ignore[misc]
