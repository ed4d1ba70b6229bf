"""Accuracy of mathematical answers, for `evaluate`; knows texts and leaves reading them to the library's reward."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_adaptive_decode.evaluation.modules import RefusesEmpty
from hf_adaptive_decode.rewards import math_reward

_DESCRIPTION = """
The share of completions whose final answer is mathematically equal to the reference: 1/2 is 0.5. math-verify reads and
compares them, in a process that is killed where a comparison takes too long. Where the reference is no mathematics,
texts are compared.
"""

_CITATION = r"""
@software{mathverify,
  title = {Math-Verify},
  author = {Kydl{\'i}{\v{c}}ek, Hynek},
  url = {https://github.com/huggingface/Math-Verify}
}
"""

_KWARGS_DESCRIPTION = r"""
Args:
    predictions (list of `str`): Completions; the last `\boxed{...}`, else what follows the last `####`, else what
        math-verify finds, is the answer.
    references (list of `str`): Solutions, bare or marked in the same way.
    timeout (`float`, defaults to 5.0): Seconds for one comparison; beyond it a completion is wrong.

Returns:
    `accuracy` (`float`): Share of completions that are right.
    `scores` (list of `float`): 1.0 for a right completion and 0.0 for a wrong one, in the order they were added.

Raises:
    `ValueError`: If there are no completions, or one has no reference.

Examples:
    >>> import evaluate
    >>> from hf_adaptive_decode.evaluation.modules import module_path
    >>> metric = evaluate.load(module_path("math_equivalence"))
    >>> metric.compute(predictions=["so \\boxed{0.5}", "so \\boxed{3}"], references=["\\frac{1}{2}", "2"])
    {'accuracy': 0.5, 'scores': [1.0, 0.0]}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MathEquivalence(RefusesEmpty, evaluate.Metric):
    """Accuracy of mathematical answers, and the score of each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://github.com/huggingface/Math-Verify"],
        )

    def _compute(self, predictions: list[str], references: list[str], timeout: float = 5.0) -> dict[str, Any]:
        for name, texts in (("predictions", predictions), ("references", references)):
            missing = [index for index, text in enumerate(texts) if text is None]
            if missing:
                raise ValueError(f"`{name}` has no text at index {missing[0]}; every answer needs its solution.")
        scores = math_reward(completions=predictions, solution=references, timeout=timeout)
        return {"accuracy": float(np.asarray(scores, dtype=np.float64).mean()), "scores": scores}
