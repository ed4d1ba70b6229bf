"""pass@k with its interval, for `evaluate`; knows rewards or counts and nothing of what was solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_adaptive_decode.evaluation.metrics import bootstrap_interval, pass_at_k
from hf_adaptive_decode.evaluation.modules import RefusesEmpty

_DESCRIPTION = """
pass@k: the chance that at least one of k samples solves a problem, estimated without bias from the n samples that were
drawn of each, 1 - C(n - c, k) / C(n, k) for c right ones; the mean over problems, with its 95 % bootstrap interval.
"""

_CITATION = """
@article{chen2021evaluating,
  title = {Evaluating Large Language Models Trained on Code},
  author = {Chen, Mark and others},
  journal = {arXiv:2107.03374},
  year = {2021}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list): For each problem, a list with the reward of each of its samples, of which at least 1 counts as
        right (`True` does), or the number of right samples. Of lists each problem may have its own length.
    k (`int` or list of `int`, defaults to 1): How many samples one may use.
    samples (`int`, *optional*): How many samples were drawn of each problem; needed with numbers of right samples.
    seed (`int`, defaults to 0): Seeds the bootstrap.

Returns:
    `pass@k` (`float`) for each k, and the ends of its interval, `pass@k_low` and `pass@k_high` (`float`); `problems`
    (`int`).

Raises:
    `ValueError`: If there are no problems, a k is below 1 or above the samples drawn, or a reward is missing.

Examples:
    >>> import evaluate
    >>> from hf_adaptive_decode.evaluation.modules import module_path
    >>> metric = evaluate.load(module_path("pass_at_k"))
    >>> metric.compute(predictions=[[True, False, False, False], [False, False, False, False]], k=[1, 2])["pass@2"]
    0.25
    >>> metric.compute(predictions=[1, 0], samples=4, k=2)["pass@2"]
    0.25
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PassAtK(RefusesEmpty, evaluate.Metric):
    """pass@k, its interval over problems, and how many there were."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
                datasets.Features({"predictions": datasets.Value("int64")}),
            ],
            reference_urls=["https://huggingface.co/papers/2107.03374"],
        )

    def _compute(
        self, predictions: list[Any], k: int | Sequence[int] = 1, samples: int | None = None, seed: int = 0
    ) -> dict[str, Any]:
        drawn, right = _counts(predictions, samples)
        ks = np.atleast_1d(np.asarray(k)).tolist()
        if not ks:
            raise ValueError("`k` is empty; it has to be a number of samples, or several.")
        results: dict[str, Any] = {}
        for one in ks:
            interval = bootstrap_interval(pass_at_k(drawn, right, one), seed)
            name = f"pass@{one}"
            results |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return {**results, "problems": len(predictions)}


def _counts(predictions: list[Any], samples: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Samples drawn and right ones of each problem, `[problems]` both."""
    if not isinstance(predictions[0], list):
        if samples is None:
            raise ValueError("`predictions` are numbers of right samples; pass `samples`, how many were drawn.")
        right = np.asarray(predictions)
        return np.full_like(right, samples), right
    if samples is not None:
        raise ValueError(f"`samples` is {samples} and `predictions` are lists, whose lengths say it; leave it out.")
    for problem, rewards in enumerate(predictions):
        if not np.isfinite(np.asarray(rewards, dtype=np.float64)).all():
            raise ValueError(f"the rewards of problem {problem} are {rewards!r}; each sample needs a finite one.")
    return (
        np.array([len(rewards) for rewards in predictions]),
        np.array([sum(reward >= 1 for reward in rewards) for rewards in predictions]),
    )
